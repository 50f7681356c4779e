"""What the objects of things.py take from another module of the user's; it is copied beside them,
or into their package."""

import enum
import functools
import threading

CONSTANT = 17
REGISTRY = {}
LOCK = threading.Lock()


class Kind(enum.Enum):
    """Kinds of shapes."""
    ROUND = 'round'
    SQUARE = 'square'


class Base:
    """A base class with state of its own."""
    made = 'common'

    def __init__(self, value=0):
        self.value = value

    def describe(self):
        return type(self).__name__, self.value, self.made


def counted(function):
    """A decorator that marks what it returns."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 'counted', function(*args, **kwargs)
    wrapper.mark = CONSTANT
    return wrapper


def register(name):
    """A decorator that notes a function under a name."""
    def note(function):
        REGISTRY[name] = function
        return function
    return note


@functools.lru_cache(maxsize=None)
def twice(n):
    return 2 * n
