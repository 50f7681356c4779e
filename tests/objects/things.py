"""Objects of every sort, as users define and hold them. tests/system/test_objects.py writes copies
of this file as a script, as a module beside a script, as a module of a package and as an editable
install.

`make_X` gives an object and `probe_X` describes what a user would see of it, in plain values.
`call_X` holds the arguments of a call where the object itself can be called. The copies also have

    held_X = make_X()
    def use_X():
        return probe_X(held_X)

Blocks from `#: since 3.N` (or `#: needs MODULE`) to `#: end` are left out where the version is
older (the module is not installed). Probes change nothing that another probe sees.
"""

import abc
import argparse
import array
import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import copyreg
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import inspect
import io
import ipaddress
import itertools
import logging
import math
import multiprocessing
import operator
import os
import pathlib
import queue
import random
import re
import socket
import string
import struct
import sys
import threading
import types
import typing
import uuid
import warnings
import weakref

from COMMON import CONSTANT as TAKEN
from COMMON import REGISTRY, Base, Kind, counted, register, twice
import COMMON as common_module

FACTOR = 3
TABLE = {'a': [1, 2], 'b': (None, b'x')}
NAMES = ['first', 'second']


# -- functions -------------------------------------------------------------------------------------

def plain_function(n):
    return n * FACTOR


def make_plain_function():
    return plain_function


def probe_plain_function(thing):
    return thing(4), thing.__name__, thing.__qualname__, type(thing).__name__


call_plain_function = (4,)


def function_with_defaults(n, into=[], *, times=2, base=FACTOR):
    return into + [n] * times + [base]


def make_function_with_defaults():
    return function_with_defaults


def probe_function_with_defaults(thing):
    return thing(1), thing(1, [0], times=1), list(thing.__defaults__), dict(thing.__kwdefaults__)


call_function_with_defaults = (5,)


def function_with_mutable_default(n, seen=[]):
    seen.append(n)
    found = list(seen)
    seen.pop()
    return found


def make_function_with_mutable_default():
    return function_with_mutable_default


def probe_function_with_mutable_default(thing):
    return thing(1), thing(2), thing.__defaults__[0] == []


call_function_with_mutable_default = (3,)


def positional_only(first, second, /, third=3):
    return first, second, third


def make_positional_only():
    return positional_only


def probe_positional_only(thing):
    return thing(1, 2), str(inspect.signature(thing))


call_positional_only = (1, 2)


def annotated(n: int, text: 'str' = '', *rest: float) -> typing.List[int]:
    """Its text."""
    return [n] * len(rest)


def make_annotated():
    return annotated


def probe_annotated(thing):
    hints = typing.get_type_hints(thing)
    return (sorted(hints), hints['n'] is int, hints['text'] is str, thing.__doc__,
            thing(1, '', 1.0, 2.0))


call_annotated = (1, '', 2.0)


def with_attributes(n):
    return n + with_attributes.offset


with_attributes.offset = 10
with_attributes.notes = {'a': [1]}


def make_with_attributes():
    return with_attributes


def probe_with_attributes(thing):
    return thing(1), thing.offset, thing.notes


call_with_attributes = (1,)


def tracing(function):
    @functools.wraps(function)
    def wrapper(*args):
        return ['traced', function(*args)]
    return wrapper


@tracing
def decorated(n):
    """A decorated function."""
    return n + 1


def make_decorated():
    return decorated


def probe_decorated(thing):
    return (thing(1), thing.__name__, thing.__doc__, thing.__wrapped__(1),
            thing.__module__ == __name__)


call_decorated = (1,)


def repeating(times):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args):
            return [function(*args) for _ in range(times)]
        return wrapper
    return decorate


@repeating(3)
@tracing
def decorated_twice(n):
    return n


def make_decorated_twice():
    return decorated_twice


def probe_decorated_twice(thing):
    return thing(7), thing.__wrapped__.__wrapped__(7)


call_decorated_twice = (7,)


@counted
def decorated_elsewhere(n):
    return n, TAKEN


def make_decorated_elsewhere():
    return decorated_elsewhere


def probe_decorated_elsewhere(thing):
    return thing(1), thing.mark


call_decorated_elsewhere = (1,)


@register('registered')
def registered(n):
    return 'registered', n


def make_registered():
    return registered


def probe_registered(thing):
    return thing(1), REGISTRY['registered'](2), sorted(REGISTRY)


call_registered = (1,)


class Memo:
    """A decorator that is a class."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function
        self.known = {}

    def __call__(self, n):
        return self.known.get(n) or self.function(n)

    def __reduce__(self):
        return self.__name__


@Memo
def decorated_by_class(n):
    return n * 5


def make_decorated_by_class():
    return decorated_by_class


def probe_decorated_by_class(thing):
    return thing(2), isinstance(thing, Memo), thing.__name__


call_decorated_by_class = (2,)


def recursive(n):
    return 1 if n < 2 else n * recursive(n - 1)


def make_recursive():
    return recursive


def probe_recursive(thing):
    return thing(10)


call_recursive = (10,)


def is_even(n):
    return n == 0 or is_odd(n - 1)


def is_odd(n):
    return n != 0 and is_even(n - 1)


def make_mutually_recursive():
    return is_even


def probe_mutually_recursive(thing):
    return thing(10), thing(7)


call_mutually_recursive = (10,)


def function_of_helpers(n):
    return plain_function(n) + recursive(3) + twice(n)


def make_function_of_helpers():
    return function_of_helpers


def probe_function_of_helpers(thing):
    return thing(1)


call_function_of_helpers = (1,)


def function_of_globals():
    return FACTOR, TABLE, NAMES, TAKEN, Kind.ROUND.value, common_module.CONSTANT


def make_function_of_globals():
    return function_of_globals


def probe_function_of_globals(thing):
    return thing()


call_function_of_globals = ()


def importing_inside(text):
    import json.decoder
    from collections import OrderedDict as ordered
    return json.decoder.JSONDecoder(object_pairs_hook=ordered).decode(text)['a']


def make_importing_inside():
    return importing_inside


def probe_importing_inside(thing):
    return thing('{"a": [1]}')


call_importing_inside = ('{"a": [1]}',)


def make_lambda():
    return lambda n: n + FACTOR


def probe_lambda(thing):
    return thing(1), thing.__name__


call_lambda = (1,)

named_lambda = lambda n: n + FACTOR   # noqa: E731


def make_named_lambda():
    return named_lambda


def probe_named_lambda(thing):
    return thing(2), thing.__qualname__


call_named_lambda = (2,)


def make_local_function():
    def local(n):
        return n * FACTOR
    return local


def probe_local_function(thing):
    return thing(2), thing.__qualname__


call_local_function = (2,)


def make_closure():
    offset, notes = 5, {'a': 1}

    def closure(n):
        return n + offset, notes
    return closure


def probe_closure(thing):
    return thing(1), sorted(thing.__code__.co_freevars)


call_closure = (1,)


def make_shared_cell():
    value = 0

    def add(n):
        nonlocal value
        value += n
        return value

    def get():
        return value
    return add, get


def probe_shared_cell(thing):
    add, get = thing
    before = get()
    add(5)
    after = get()
    add(-5)
    return after - before, get() - before, add.__closure__[0] is get.__closure__[0]


def make_counting_closure():
    calls = 0

    def counting():
        nonlocal calls
        calls += 1
        return calls
    return counting


def probe_counting_closure(thing):
    return thing() - thing()


def make_recursive_closure():
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)
    return fib


def probe_recursive_closure(thing):
    return thing(10)


call_recursive_closure = (10,)


def make_mutual_closures():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)
    return even


def probe_mutual_closures(thing):
    return thing(10), thing(7)


call_mutual_closures = (10,)


def make_empty_cell():
    if FACTOR == 0:
        missing = 1

    def uses_missing():
        try:
            return missing
        except NameError as exc:
            return type(exc).__name__
    return uses_missing


def probe_empty_cell(thing):
    return thing()


call_empty_cell = ()


def make_closures_of_a_loop():
    return [lambda n, step=step: n + step for step in range(3)]


def probe_closures_of_a_loop(thing):
    return [function(10) for function in thing]


def make_closure_over_class():
    class Local:
        value = 4

    def closure():
        return Local.value, type(Local()).__name__, isinstance(Local(), Local)
    return closure


def probe_closure_over_class(thing):
    return thing()


call_closure_over_class = ()


def make_closure_over_module():
    import math as own

    def closure(n):
        return own.floor(n), own is math
    return closure


def probe_closure_over_module(thing):
    return thing(2.5)


call_closure_over_module = (2.5,)


def generator_function(n):
    for i in range(n):
        yield i * FACTOR


def make_generator_function():
    return generator_function


def probe_generator_function(thing):
    return list(thing(4)), inspect.isgeneratorfunction(thing)


async def async_function(n):
    await asyncio.sleep(0)
    return n * FACTOR


def make_async_function():
    return async_function


def probe_async_function(thing):
    return asyncio.run(thing(2)), inspect.iscoroutinefunction(thing)


async def async_generator_function(n):
    for i in range(n):
        yield i


async def _collect(function):
    return [item async for item in function(3)]


def make_async_generator_function():
    return async_generator_function


def probe_async_generator_function(thing):
    return asyncio.run(_collect(thing)), inspect.isasyncgenfunction(thing)


def make_function_of_exec():
    space = {'__name__': __name__, 'FACTOR': FACTOR}
    exec('def made(n):\n    return n * FACTOR\n', space)
    return space['made']


def probe_function_of_exec(thing):
    return thing(2), thing.__module__ == __name__


def finding_its_module():
    return sys.modules[__name__].__name__ == __name__, finding_its_module.__module__ == __name__


def make_finding_its_module():
    return finding_its_module


def probe_finding_its_module(thing):
    return thing()


call_finding_its_module = ()


def make_star_arguments():
    return _star


def _star(*args, **kwargs):
    return list(args), kwargs


def probe_star_arguments(thing):
    return thing(1, 2, a=3)


call_star_arguments = (1, 2)


def set_global(value):
    global _set_here
    _set_here = value
    return _set_here


_set_here = 'nothing'


def make_function_that_sets_a_global():
    return set_global


def probe_function_that_sets_a_global(thing):
    before = thing('nothing')
    seen = thing(5), _set_here
    thing('nothing')
    return before, seen, _set_here


@contextlib.contextmanager
def managing(n):
    yield n + 1


def make_contextmanager():
    return managing


def probe_contextmanager(thing):
    with thing(1) as value:
        return value


# -- functools and operator ------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def cached_fib(n):
    return n if n < 2 else cached_fib(n - 1) + cached_fib(n - 2)


def make_lru_cache_function():
    return cached_fib


def probe_lru_cache_function(thing):
    return (thing(10), type(thing).__name__, thing.cache_info().maxsize, thing.__wrapped__(1),
            thing is cached_fib)


call_lru_cache_function = (10,)


@functools.lru_cache(maxsize=16)
def cached_square(n):
    return n * n


def calling_a_cached(n):
    before = cached_square.cache_info()
    cached_square(n)
    cached_square(n)
    after = cached_square.cache_info()
    return cached_square(n), after.hits + after.misses - before.hits - before.misses, after.maxsize


def make_caller_of_lru_cache():
    return calling_a_cached


def probe_caller_of_lru_cache(thing):
    return thing(4)


call_caller_of_lru_cache = (4,)


class WithCachedMethod:
    def __init__(self, n):
        self.n = n

    @functools.lru_cache(maxsize=None)
    def power(self, k):
        return self.n ** k


def make_lru_cache_method():
    return WithCachedMethod(3)


def probe_lru_cache_method(thing):
    return thing.power(2), type(thing) is WithCachedMethod, type(WithCachedMethod.power).__name__


def make_class_with_lru_cache_method():
    return WithCachedMethod


def probe_class_with_lru_cache_method(thing):
    return thing(2).power(3), thing is WithCachedMethod


class WithCachedProperty:
    def __init__(self, side):
        self.side = side

    @functools.cached_property
    def area(self):
        return self.side ** 2


def make_cached_property():
    return WithCachedProperty(4)


def probe_cached_property(thing):
    return thing.area, isinstance(thing, WithCachedProperty)


def make_cached_property_filled():
    thing = WithCachedProperty(4)
    thing.side, _ = 5, thing.area
    return thing


def probe_cached_property_filled(thing):
    return thing.area, thing.side


#: since 3.9
@functools.cache
def cached_forever(n):
    return n + 1


def make_cache_function():
    return cached_forever


def probe_cache_function(thing):
    return thing(1), thing is cached_forever


call_cache_function = (1,)


#: end
@functools.singledispatch
def dispatching(value):
    return 'object'


@dispatching.register(int)
def _dispatching_int(value):
    return 'int'


@dispatching.register(Base)
def _dispatching_base(value):
    return 'base'


def make_singledispatch():
    return dispatching


def probe_singledispatch(thing):
    return thing('a'), thing(1), thing(Base()), len(thing.registry)


call_singledispatch = (1,)


class WithSingleDispatch:
    @functools.singledispatchmethod
    def show(self, value):
        return 'object'

    @show.register(int)
    def _(self, value):
        return 'int', value


def make_singledispatchmethod():
    return WithSingleDispatch()


def probe_singledispatchmethod(thing):
    return thing.show('a'), thing.show(1), type(thing) is WithSingleDispatch


def make_partial():
    return functools.partial(function_with_defaults, 1, times=3)


def probe_partial(thing):
    return thing(), thing.args, thing.keywords, thing.func.__name__


call_partial = ()


def make_partial_of_lambda():
    return functools.partial(lambda a, b: a * b, 6)


def probe_partial_of_lambda(thing):
    return thing(7)


call_partial_of_lambda = (7,)


def make_partial_of_partial():
    return functools.partial(functools.partial(max, 3), key=abs)


def probe_partial_of_partial(thing):
    return thing(-5), thing(2)


call_partial_of_partial = (-5,)


def make_partial_of_method():
    return functools.partial(Shape(2).scaled, 3)


def probe_partial_of_method(thing):
    return thing(), type(thing.func.__self__) is Shape


call_partial_of_method = ()


class OwnPartial(functools.partial):
    """A subclass with an attribute."""


def make_own_partial():
    thing = OwnPartial(plain_function, 3)
    thing.label = 'mine'
    return thing


def probe_own_partial(thing):
    return thing(), thing.label, type(thing) is OwnPartial


call_own_partial = ()


class WithPartialMethod:
    def scale(self, k, n):
        return k * n

    double = functools.partialmethod(scale, 2)


def make_partialmethod():
    return WithPartialMethod()


def probe_partialmethod(thing):
    return thing.double(4), type(thing) is WithPartialMethod


def make_reduce():
    return functools.partial(functools.reduce, operator.add)


def probe_reduce(thing):
    return thing([1, 2, 3])


call_reduce = ([1, 2, 3],)


def _longer(a, b):
    return len(a) - len(b)


def make_cmp_to_key():
    return functools.cmp_to_key(_longer)


def probe_cmp_to_key(thing):
    return sorted(['aaa', 'b', 'cc'], key=thing)


def make_itemgetter():
    return operator.itemgetter(1, 0)


def probe_itemgetter(thing):
    return thing(['a', 'b'])


call_itemgetter = (['a', 'b'],)


def make_attrgetter():
    return operator.attrgetter('real', 'imag')


def probe_attrgetter(thing):
    return thing(1 + 2j)


call_attrgetter = (1 + 2j,)


def make_methodcaller():
    return operator.methodcaller('split', ',')


def probe_methodcaller(thing):
    return thing('a,b')


call_methodcaller = ('a,b',)


def make_builtin_function():
    return len


def probe_builtin_function(thing):
    return thing('four'), thing is len


call_builtin_function = ('four',)


def make_function_of_c():
    return math.sqrt


def probe_function_of_c(thing):
    return thing(4), thing is math.sqrt


call_function_of_c = (4,)


# -- methods and callables -------------------------------------------------------------------------

class Shape(Base):
    """The class of most instances here."""
    kind = Kind.ROUND
    made = 'things'
    count = 0

    def scaled(self, k):
        return self.value * k

    @classmethod
    def named(cls, value):
        return cls.__name__, value, cls.kind is Kind.ROUND

    @staticmethod
    def fixed(value):
        return 'fixed', value

    @property
    def double(self):
        return 2 * self.value

    def __eq__(self, other):
        return type(other) is Shape and other.value == self.value

    def __hash__(self):
        return hash(self.value)

    def __lt__(self, other):
        return self.value < other.value

    def parent(self):
        return super().describe()


def make_bound_method():
    return Shape(5).scaled


def probe_bound_method(thing):
    return (thing(2), type(thing.__self__) is Shape, thing.__self__ == Shape(5),
            thing.__func__ is Shape.scaled)


call_bound_method = (2,)


def make_class_method():
    return Shape.named


def probe_class_method(thing):
    return thing(2), thing.__self__ is Shape


call_class_method = (2,)


def make_static_method():
    return Shape.fixed


def probe_static_method(thing):
    return thing(2)


call_static_method = (2,)


def make_unbound_method():
    return Shape.scaled


def probe_unbound_method(thing):
    return thing(Shape(3), 2), thing.__qualname__


def make_inherited_method():
    return Shape(6).describe


def probe_inherited_method(thing):
    return thing(), thing.__self__ == Shape(6)


call_inherited_method = ()


def make_method_of_builtin():
    return 'a,b'.split


def probe_method_of_builtin(thing):
    return thing(',')


call_method_of_builtin = (',',)


def make_method_of_list():
    return [3, 1].index


def probe_method_of_list(thing):
    return thing(1)


call_method_of_list = (1,)


def make_method_descriptor():
    return str.upper


def probe_method_descriptor(thing):
    return thing('a'), thing is str.upper


call_method_descriptor = ('a',)


def make_builtin_class_method():
    return dict.fromkeys


def probe_builtin_class_method(thing):
    return thing('ab')


call_builtin_class_method = ('ab',)


def make_slot_wrapper():
    return int.__add__


def probe_slot_wrapper(thing):
    return thing(1, 2)


call_slot_wrapper = (1, 2)


class Callable:
    def __init__(self, offset):
        self.offset = offset
        self.calls = 0

    def __call__(self, n):
        self.calls += 1
        return n + self.offset


def make_callable_instance():
    return Callable(7)


def probe_callable_instance(thing):
    copied = copy.copy(thing)
    return copied(1), copied.calls - thing.calls, type(thing) is Callable


call_callable_instance = (1,)


class CallableWithLambda:
    def __init__(self):
        self.function = lambda n: n * FACTOR

    def __call__(self, n):
        return self.function(n)


def make_callable_with_lambda():
    return CallableWithLambda()


def probe_callable_with_lambda(thing):
    return thing(2), isinstance(thing, CallableWithLambda)


call_callable_with_lambda = (2,)


# -- classes and instances -------------------------------------------------------------------------

def make_plain_class():
    return Shape


def probe_plain_class(thing):
    return (thing is Shape, thing(3).double, issubclass(thing, Base), thing.__mro__[1] is Base,
            thing.__module__ == __name__)


def make_instance():
    return Shape(3)


def probe_instance(thing):
    return (type(thing) is Shape, isinstance(thing, Base), thing == Shape(3), thing.double,
            thing.parent(), thing.kind is Kind.ROUND, hash(thing) == hash(Shape(3)), vars(thing))


def make_instance_of_base():
    return Base(4)


def probe_instance_of_base(thing):
    return type(thing) is Base, thing.describe()


def make_class_of_other_module():
    return Base


def probe_class_of_other_module(thing):
    return thing is Base, thing(1).describe()


class Outer:
    class Inner:
        class Deep:
            value = 9

        def __init__(self, n):
            self.n = n

    class Color(enum.Enum):
        RED = 1


def make_nested_class():
    return Outer.Inner.Deep


def probe_nested_class(thing):
    return thing is Outer.Inner.Deep, thing.__qualname__, thing.value


def make_nested_instance():
    return Outer.Inner(2)


def probe_nested_instance(thing):
    return type(thing) is Outer.Inner, thing.n


def make_nested_enum_member():
    return Outer.Color.RED


def probe_nested_enum_member(thing):
    return thing is Outer.Color.RED


def make_local_class():
    class Local(Base):
        factor = FACTOR

        def parent(self):
            return super().describe(), __class__.__name__
    return Local


def probe_local_class(thing):
    return thing.__qualname__, thing(3).parent(), issubclass(thing, Base), thing.factor


def make_local_instance():
    class Local(Base):
        pass
    return Local(3)


def probe_local_instance(thing):
    return type(thing).__name__, thing.describe(), isinstance(thing, Base)


def make_local_class_and_instance():
    class Local:
        pass
    return Local, Local(), [Local()]


def probe_local_class_and_instance(thing):
    return type(thing[1]) is thing[0], isinstance(thing[2][0], thing[0])


def make_type_of_type():
    return type('Made', (Base,), {'value': 3, 'get': lambda self: self.value})


def probe_type_of_type(thing):
    return thing.__name__, thing(5).get(), issubclass(thing, Base)


class Slotted:
    __slots__ = ('a', 'b')

    def __init__(self, a):
        self.a = a


def make_slots():
    return Slotted(1)


def probe_slots(thing):
    return type(thing) is Slotted, thing.a, hasattr(thing, 'b'), hasattr(thing, '__dict__')


class PrivateSlots(Slotted):
    __slots__ = ('__hidden', 'c')

    def __init__(self, a, hidden):
        super().__init__(a)
        self.__hidden = hidden
        self.c = 'c'

    def reveal(self):
        return self.__hidden


def make_private_slots():
    return PrivateSlots(1, [2])


def probe_private_slots(thing):
    return type(thing) is PrivateSlots, thing.a, thing.reveal(), thing.c


class SlotsAndDict(Slotted):
    pass


def make_slots_and_dict():
    thing = SlotsAndDict(1)
    thing.more = 2
    return thing


def probe_slots_and_dict(thing):
    return thing.a, thing.more, vars(thing), isinstance(thing, Slotted)


class SlotsWithWeakref:
    __slots__ = ('n', '__weakref__')


def make_slots_with_weakref():
    thing = SlotsWithWeakref()
    thing.n = 4
    return thing


def probe_slots_with_weakref(thing):
    return weakref.ref(thing)() is thing, thing.n


def make_class_with_slots():
    return PrivateSlots


def probe_class_with_slots(thing):
    return thing is PrivateSlots, thing(1, 2).reveal()


class Mangled:
    __secret = 5

    def __init__(self):
        self.__own = 6

    def both(self):
        return self.__secret, self.__own


def make_mangled():
    return Mangled()


def probe_mangled(thing):
    return thing.both(), sorted(vars(thing))


@dataclasses.dataclass
class Point:
    x: int
    y: int = 2
    tags: list = dataclasses.field(default_factory=list)
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        self.total = self.x + self.y


def make_dataclass():
    return Point(1, tags=['a'])


def probe_dataclass(thing):
    return (type(thing) is Point, thing == Point(1, tags=['a']), dataclasses.asdict(thing),
            [field.name for field in dataclasses.fields(thing)], repr(thing))


def make_dataclass_class():
    return Point


def probe_dataclass_class(thing):
    return (thing is Point, thing(5).total, dataclasses.is_dataclass(thing),
            [field.name for field in dataclasses.fields(thing) if field.init])


@dataclasses.dataclass(frozen=True, order=True)
class Frozen:
    x: int
    y: str = 'y'


def make_frozen_dataclass():
    return Frozen(1)


def probe_frozen_dataclass(thing):
    try:
        thing.x = 2
    except dataclasses.FrozenInstanceError as exc:
        error = type(exc).__name__
    return (thing == Frozen(1), hash(thing) == hash(Frozen(1)), thing < Frozen(2), error,
            {thing: 1}[Frozen(1)])


@dataclasses.dataclass
class WithInitVar:
    x: int
    scale: dataclasses.InitVar[int] = 1
    count: typing.ClassVar[int] = 7

    def __post_init__(self, scale):
        self.x *= scale


def make_dataclass_with_initvar():
    return WithInitVar(2, 3)


def probe_dataclass_with_initvar(thing):
    return thing.x, thing.count, thing == WithInitVar(6), dataclasses.replace(thing, scale=2).x


#: since 3.10
@dataclasses.dataclass(slots=True)
class SlottedPoint:
    x: int
    y: list


def make_dataclass_with_slots():
    return SlottedPoint(1, [2])


def probe_dataclass_with_slots(thing):
    return type(thing) is SlottedPoint, thing == SlottedPoint(1, [2]), hasattr(thing, '__dict__')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSlotted:
    x: int
    y: int = 0


def make_frozen_dataclass_with_slots():
    return FrozenSlotted(x=1)


def probe_frozen_dataclass_with_slots(thing):
    return (thing == FrozenSlotted(x=1), hash(thing) == hash(FrozenSlotted(x=1)),
            type(thing) is FrozenSlotted)


#: end
Pair = collections.namedtuple('Pair', 'first second', defaults=[2])


def make_namedtuple():
    return Pair(1)


def probe_namedtuple(thing):
    return type(thing) is Pair, thing == Pair(1, 2), thing._asdict(), thing.second


class Row(typing.NamedTuple):
    """A typed row."""
    name: str
    size: int = 0

    def longer(self):
        return self.name * self.size


def make_typed_namedtuple():
    return Row('ab', 2)


def probe_typed_namedtuple(thing):
    return isinstance(thing, Row), thing.longer(), thing._fields, thing._replace(size=1).longer()


def make_namedtuple_class():
    return Row


def probe_namedtuple_class(thing):
    return thing is Row, thing('a').size, thing.__doc__


class Movie(typing.TypedDict, total=False):
    title: str
    year: int


def make_typed_dict():
    return Movie(title='x')


def probe_typed_dict(thing):
    return thing, type(thing) is dict


def make_typed_dict_class():
    return Movie


def probe_typed_dict_class(thing):
    return thing is Movie, sorted(thing.__annotations__), thing.__total__, thing(year=1)


class WithAnnotations:
    size: int
    name: 'str' = ''


class MoreAnnotations(WithAnnotations):
    weight: float


def make_class_with_annotations():
    return MoreAnnotations


def probe_class_with_annotations(thing):
    return (thing is MoreAnnotations, thing.__annotations__ == {'weight': float},
            sorted(typing.get_type_hints(thing)), vars(thing)['__module__'] == thing.__module__)


#: since 3.14
import annotationlib   # noqa: E402


def of_names_to_come(part: ToCome, *rest: OnlyForTypeCheckers) -> ToCome:   # noqa: F821
    return part, rest


class ToCome:
    after: ToCome   # noqa: F821
    owner: OnlyForTypeCheckers   # noqa: F821


@dataclasses.dataclass
class Linked:
    number: int = 1
    after: Linked | None = None   # noqa: F821
    owner: OnlyForTypeCheckers = None   # noqa: F821


def make_function_of_names_to_come():
    return of_names_to_come


def probe_function_of_names_to_come(thing):
    names = annotationlib.get_annotations(thing, format=annotationlib.Format.STRING)
    return thing(1, 2), thing.__name__, names


def make_class_of_names_to_come():
    return ToCome


def probe_class_of_names_to_come(thing):
    names = annotationlib.get_annotations(thing, format=annotationlib.Format.STRING)
    return thing is ToCome, names


def make_dataclass_of_names_to_come():
    return Linked(2, Linked())


def probe_dataclass_of_names_to_come(thing):
    names = [field.name for field in dataclasses.fields(thing)]
    return type(thing) is Linked, thing.number, thing.after == Linked(), names
#: end


# -- enums -----------------------------------------------------------------------------------------

class Color(enum.Enum):
    RED = 1
    GREEN = 'green'
    ALIAS = 1

    def shout(self):
        return self.name + '!'

    @classmethod
    def default(cls):
        return cls.RED

    @property
    def quiet(self):
        return self.name.lower()


def make_enum_member():
    return Color.RED


def probe_enum_member(thing):
    return (thing is Color.RED, thing == Color.RED, thing in Color, thing.shout(), thing.quiet,
            thing is Color.ALIAS, {Color.RED: 1}[thing])


def make_enum_class():
    return Color


def probe_enum_class(thing):
    return (thing is Color, [member.name for member in thing], thing.default() is Color.RED,
            thing('green') is Color.GREEN)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def make_int_enum():
    return Level.HIGH


def probe_int_enum(thing):
    return thing is Level.HIGH, thing == 2, thing > Level.LOW, thing + 1


class Permission(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()
    BOTH = READ | WRITE


def make_flag():
    return Permission.READ | Permission.WRITE


def probe_flag(thing):
    return (thing is Permission.BOTH, Permission.READ in thing, thing.value,
            (thing & Permission.READ) is Permission.READ)


class Bits(enum.IntFlag):
    ONE = 1
    TWO = 2


def make_int_flag():
    return Bits.ONE | Bits.TWO


def probe_int_flag(thing):
    return thing == 3, Bits.ONE in thing, isinstance(thing, Bits)


class Word(str, enum.Enum):
    YES = 'yes'
    NO = 'no'


def make_enum_of_text():
    return Word.YES


def probe_enum_of_text(thing):
    return thing is Word.YES, thing == 'yes', thing.upper()


class Auto(enum.Enum):
    def _generate_next_value_(name, start, count, last_values):
        return name.lower()

    FIRST = enum.auto()
    SECOND = enum.auto()


def make_enum_with_auto():
    return Auto.SECOND


def probe_enum_with_auto(thing):
    return thing is Auto.SECOND, thing.value


class Planet(enum.Enum):
    EARTH = (5.97, 6.37)
    MARS = (0.64, 3.39)

    def __init__(self, mass, radius):
        self.mass = mass
        self.radius = radius


def make_enum_with_init():
    return Planet.MARS


def probe_enum_with_init(thing):
    return thing is Planet.MARS, thing.radius, thing.value


class Coded(bytes, enum.Enum):
    def __new__(cls, code, label):
        member = bytes.__new__(cls, [code])
        member._value_ = code
        member.label = label
        return member

    A = (65, 'letter A')


def make_enum_with_new():
    return Coded.A


def probe_enum_with_new(thing):
    return thing is Coded.A, thing.label, bytes(thing).decode()


Animal = enum.Enum('Animal', 'CAT DOG', module=__name__)


def make_functional_enum():
    return Animal.DOG


def probe_functional_enum(thing):
    return thing is Animal.DOG, thing.value


#: since 3.11
class Text(enum.StrEnum):
    ONE = enum.auto()


def make_str_enum():
    return Text.ONE


def probe_str_enum(thing):
    return thing is Text.ONE, str(thing)


#: end
def make_enum_of_other_module():
    return Kind.SQUARE


def probe_enum_of_other_module(thing):
    return thing is Kind.SQUARE


def make_local_enum():
    class LocalColor(enum.Enum):
        RED = 1
        BLUE = 2
    return LocalColor.RED, LocalColor, {LocalColor.RED: 'red'}


def probe_local_enum(thing):
    member, cls, names = thing
    return member is cls.RED, names[cls.RED], member.name, [other.name for other in cls]


def make_enum_as_key():
    return {Color.RED: [Color.GREEN], Level.LOW: {Kind.ROUND}}


def probe_enum_as_key(thing):
    return thing[Color.RED][0] is Color.GREEN, Kind.ROUND in thing[Level.LOW]


# -- abstract classes, metaclasses, descriptors ----------------------------------------------------

class Abstract(abc.ABC):
    @abc.abstractmethod
    def value(self):
        """What it is worth."""

    @property
    @abc.abstractmethod
    def label(self):
        """What it is called."""


class Concrete(Abstract):
    label = 'concrete'

    def value(self):
        return 3


@Abstract.register
class Registered:
    pass


def make_abstract_class():
    return Abstract


def probe_abstract_class(thing):
    try:
        thing()
    except TypeError as exc:
        error = type(exc).__name__
    return (thing is Abstract, sorted(thing.__abstractmethods__), error,
            issubclass(Registered, thing), type(thing) is abc.ABCMeta)


def make_instance_of_abstract():
    return Concrete()


def probe_instance_of_abstract(thing):
    return isinstance(thing, Abstract), thing.value(), type(thing) is Concrete


def make_virtual_subclass():
    return Registered()


def probe_virtual_subclass(thing):
    return isinstance(thing, Abstract), isinstance(thing, Registered)


def make_local_abstract():
    class LocalAbstract(abc.ABC):
        @abc.abstractmethod
        def value(self):
            pass

    class LocalConcrete(LocalAbstract):
        def value(self):
            return 1
    LocalAbstract.register(int)
    return LocalAbstract, LocalConcrete()


def probe_local_abstract(thing):
    return isinstance(thing[1], thing[0]), thing[1].value(), isinstance(3, thing[0])


@typing.runtime_checkable
class Sized(typing.Protocol):
    def size(self) -> int: ...


class HasSize:
    def size(self):
        return 5


def make_protocol():
    return Sized


def probe_protocol(thing):
    return thing is Sized, isinstance(HasSize(), thing), isinstance(3, thing)


class Meta(type):
    registry = []

    def __new__(mcs, name, bases, space, **options):
        cls = super().__new__(mcs, name, bases, space)
        cls.options = options
        return cls

    def __init__(cls, name, bases, space, **options):
        super().__init__(name, bases, space)

    def __call__(cls, *args):
        instance = super().__call__(*args)
        instance.by_meta = True
        return instance

    @property
    def doubled(cls):
        return cls.__name__ * 2


class OfMeta(metaclass=Meta, size=3):
    pass


def make_class_of_metaclass():
    return OfMeta


def probe_class_of_metaclass(thing):
    return type(thing) is Meta, thing.options, thing().by_meta, thing.doubled, thing is OfMeta


def make_instance_of_metaclass():
    return OfMeta()


def probe_instance_of_metaclass(thing):
    return isinstance(thing, OfMeta), type(type(thing)) is Meta, thing.by_meta


def make_metaclass():
    return Meta


def probe_metaclass(thing):
    return thing is Meta, isinstance(OfMeta, thing)


class Ordered(type):
    @classmethod
    def __prepare__(mcs, name, bases):
        return collections.OrderedDict(prepared=True)


class OfOrdered(metaclass=Ordered):
    b = 1
    a = 2


def make_class_of_prepare():
    return OfOrdered


def probe_class_of_prepare(thing):
    return thing.prepared, type(thing) is Ordered, [name for name in vars(thing) if len(name) == 1]


class Plugin:
    known = {}

    def __init_subclass__(cls, label='', **options):
        super().__init_subclass__(**options)
        Plugin.known[label] = cls


class PluginA(Plugin, label='a'):
    pass


class PluginB(Plugin, label='b'):
    pass


def make_init_subclass():
    return Plugin


def probe_init_subclass(thing):
    return (sorted(thing.known), thing.known['a'] is PluginA, type(thing.known['b']()) is PluginB,
            thing is Plugin)


def make_instance_of_plugin():
    return PluginA()


def probe_instance_of_plugin(thing):
    return (type(thing) is Plugin.known['a'] is PluginA, len(Plugin.known),
            Plugin.known['b'] is PluginB)


class Indexed:
    def __class_getitem__(cls, item):
        return cls.__name__, item


def make_class_getitem():
    return Indexed


def probe_class_getitem(thing):
    return thing[3], thing is Indexed


class Typed:
    """A descriptor."""

    def __set_name__(self, owner, name):
        self.name = '_' + name
        self.owner = owner.__name__

    def __get__(self, instance, owner=None):
        return self if instance is None else getattr(instance, self.name)

    def __set__(self, instance, value):
        if not isinstance(value, int):
            raise TypeError('it must be an int')
        setattr(instance, self.name, value)


class WithDescriptor:
    width = Typed()

    def __init__(self, width):
        self.width = width


def make_descriptor_instance():
    return WithDescriptor(3)


def probe_descriptor_instance(thing):
    try:
        WithDescriptor('x')
    except TypeError as exc:
        error = str(exc)
    return thing.width, vars(thing), error, isinstance(WithDescriptor.width,
                                                       Typed), WithDescriptor.width.owner


def make_property_object():
    return Shape.double


def probe_property_object(thing):
    return thing.fget(Shape(3)), thing.fset is None, type(thing) is property


class WithProperty:
    def __init__(self):
        self._n = 1

    @property
    def n(self):
        """A number."""
        return self._n

    @n.setter
    def n(self, value):
        self._n = value * 2

    @n.deleter
    def n(self):
        self._n = None


def make_property():
    return WithProperty()


def probe_property(thing):
    copied = copy.copy(thing)
    copied.n = 4
    seen = copied.n
    del copied.n
    return thing.n, seen, copied.n, WithProperty.n.__doc__


class WithLock:
    lock = threading.Lock()
    local = threading.local()
    shared = {}

    def work(self, n):
        with self.lock:
            return n + 1


def make_instance_with_lock_in_class():
    return WithLock()


def probe_instance_with_lock_in_class(thing):
    return (thing.work(1), type(thing) is WithLock, WithLock.lock.locked(),
            thing.lock is WithLock.lock)


def make_class_with_lock():
    return WithLock


def probe_class_with_lock(thing):
    return thing().work(2), thing is WithLock


class WithLambda:
    convert = staticmethod(lambda n: n + FACTOR)
    table = {'inc': lambda n: n + 1}
    bound = lambda self, n: n * 2   # noqa: E731


def make_class_with_lambdas():
    return WithLambda()


def probe_class_with_lambdas(thing):
    return thing.convert(1), thing.table['inc'](1), thing.bound(2), isinstance(thing, WithLambda)


class Dynamic:
    def __init__(self, **values):
        self.__dict__['values'] = values

    def __getattr__(self, name):
        try:
            return self.__dict__['values'][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self.values[name] = value


def make_getattr():
    return Dynamic(a=1)


def probe_getattr(thing):
    return thing.a, hasattr(thing, 'b'), isinstance(thing, Dynamic)


class CountsNew:
    def __new__(cls, *args):
        instance = super().__new__(cls)
        instance.args = args
        return instance


def make_new():
    return CountsNew(1, 2)


def probe_new(thing):
    return thing.args, type(thing) is CountsNew


class Singleton:
    _instance = None

    def __new__(cls):
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance


def make_singleton():
    return Singleton()


def probe_singleton(thing):
    return thing is Singleton(), type(thing) is Singleton


class SelfReferring:
    registry = {}

    @classmethod
    def make(cls, name):
        return SelfReferring.registry.get(name, cls)


SelfReferring.registry['own'] = SelfReferring


def make_class_that_refers_to_itself():
    return SelfReferring


def probe_class_that_refers_to_itself(thing):
    return thing.make('own') is SelfReferring, thing.make('x') is thing


def label(text):
    def decorate(cls):
        cls.label = text
        return cls
    return decorate


@label('decorated')
@functools.total_ordering
class Ranked:
    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return self.n == other.n

    def __lt__(self, other):
        return self.n < other.n


def make_decorated_class():
    return Ranked(2)


def probe_decorated_class(thing):
    return thing >= Ranked(1), thing.label, thing > Ranked(3), type(thing) is Ranked


class LoggingMixin:
    def log(self):
        return 'log ' + type(self).__name__


class SortingMixin:
    def log(self):
        return 'sort ' + super().log()


class Mixed(SortingMixin, LoggingMixin, dict):
    pass


def make_mixins():
    thing = Mixed(a=1)
    thing.extra = 2
    return thing


def probe_mixins(thing):
    return thing.log(), thing['a'], thing.extra, [cls.__name__ for cls in type(thing).__mro__]


# -- how instances are pickled ---------------------------------------------------------------------

class WithState:
    def __init__(self):
        self.n = 1
        self.lock = threading.Lock()

    def __getstate__(self):
        return {'n': self.n}

    def __setstate__(self, state):
        self.n = state['n']
        self.lock = threading.Lock()


def make_getstate():
    return WithState()


def probe_getstate(thing):
    return (thing.n, thing.lock.acquire(False) and thing.lock.release() is None,
            type(thing) is WithState)


class WithReduce:
    def __init__(self, path, mode='r'):
        self.path = path
        self.mode = mode
        self.hidden = lambda: 1

    def __reduce__(self):
        return WithReduce, (self.path, self.mode)


def make_reduce_method():
    return WithReduce('p', 'w')


def probe_reduce_method(thing):
    return thing.path, thing.mode, thing.hidden(), type(thing) is WithReduce


class WithReduceEx:
    def __init__(self, value):
        self.value = value

    def __reduce_ex__(self, protocol):
        return _restore, (self.value,), {'extra': 5}


def _restore(value):
    return WithReduceEx(value)


def make_reduce_ex():
    thing = WithReduceEx(4)
    thing.extra = 5
    return thing


def probe_reduce_ex(thing):
    return thing.value, thing.extra, isinstance(thing, WithReduceEx)


class WithNewArgs(tuple):
    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))

    def __getnewargs__(self):
        return tuple(self)


def make_getnewargs():
    return WithNewArgs(1, 2)


def probe_getnewargs(thing):
    return list(thing), type(thing) is WithNewArgs


class WithNewArgsEx(str):
    def __new__(cls, text, *, unit):
        thing = super().__new__(cls, text)
        thing.unit = unit
        return thing

    def __getnewargs_ex__(self):
        return (str(self),), {'unit': self.unit}


def make_getnewargs_ex():
    return WithNewArgsEx('5', unit='m')


def probe_getnewargs_ex(thing):
    return thing + thing.unit, type(thing) is WithNewArgsEx


class Copyreg:
    def __init__(self, n):
        self.n = n
        self.handle = threading.Lock()


def _copy_registered(thing):
    return Copyreg, (thing.n,)


copyreg.pickle(Copyreg, _copy_registered)


def make_copyreg():
    return Copyreg(3)


def probe_copyreg(thing):
    return thing.n, type(thing) is Copyreg


class Sentinel:
    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return self.name

    def __repr__(self):
        return '<%s>' % self.name


MISSING = Sentinel('MISSING')


def make_sentinel_by_name():
    return MISSING


def probe_sentinel_by_name(thing):
    return thing is MISSING, repr(thing)


UNSET = object()


def with_sentinel(value=UNSET):
    return value is UNSET, type(UNSET) is object


def make_default_is_a_sentinel():
    return with_sentinel


def probe_default_is_a_sentinel(thing):
    return thing(), thing(1)


call_default_is_a_sentinel = ()


def make_plain_object():
    return UNSET


def probe_plain_object(thing):
    return type(thing) is object, thing == thing


class Absent:
    """A class that is its own sentinel."""


def make_class_as_sentinel():
    return Absent


def probe_class_as_sentinel(thing):
    return thing is Absent


class SlotSentinel:
    __slots__ = ()
    _only = None

    def __new__(cls):
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def __reduce__(self):
        return SlotSentinel, ()

    def __bool__(self):
        return False


NOTHING = SlotSentinel()


def make_sentinel_by_class():
    return NOTHING


def probe_sentinel_by_class(thing):
    return thing is NOTHING, bool(thing)


class Node:
    def __init__(self, name):
        self.name = name
        self.links = []


def make_cycle():
    first, second = Node('a'), Node('b')
    first.links += [second, first]
    second.links.append(first)
    return first


def probe_cycle(thing):
    return thing.links[0].links[0] is thing, thing.links[1] is thing, type(thing) is Node


def make_shared_references():
    inner = [Shape(1)]
    return [inner, inner, {'inner': inner}, inner[0]]


def probe_shared_references(thing):
    return (thing[0] is thing[1], thing[2]['inner'] is thing[0], thing[3] is thing[0][0],
            type(thing[3]) is Shape)


def make_list_in_itself():
    thing = [1]
    thing.append(thing)
    return thing


def probe_list_in_itself(thing):
    return thing[1] is thing, thing[0]


def make_instances_as_keys():
    return {Shape(1): 'one',
            (Shape(2), Kind.ROUND): 'two'}, {Shape(3), Shape(4)}, frozenset([Frozen(1)])


def probe_instances_as_keys(thing):
    return thing[0][Shape(1)], thing[0][Shape(2),
                                        Kind.ROUND], Shape(3) in thing[1], Frozen(1) in thing[2]


def make_mixed_containers():
    return {'shapes': [Shape(n) for n in range(3)], 'function': plain_function, 'class': Shape,
            'level': Level.LOW, 'nested': ({'a': Point(1)},)}


def probe_mixed_containers(thing):
    return (sorted(thing['shapes'])[0] == Shape(0), thing['function'](1),
            type(thing['shapes'][0]) is thing['class'] is Shape,
            thing['level'] is Level.LOW, thing['nested'][0]['a'] == Point(1))


# -- subclasses of built-in types ------------------------------------------------------------------

class OwnDict(dict):
    def __missing__(self, key):
        return 'missing ' + key


def make_own_dict():
    thing = OwnDict(a=1)
    thing.note = 'n'
    return thing


def probe_own_dict(thing):
    return thing['a'], thing['b'], thing.note, type(thing) is OwnDict


class OwnList(list):
    def __init__(self, items=(), label=''):
        super().__init__(items)
        self.label = label


def make_own_list():
    return OwnList([1, 2], 'l')


def probe_own_list(thing):
    return list(thing), thing.label, type(thing) is OwnList


class OwnSet(set):
    pass


def make_own_set():
    thing = OwnSet([1])
    thing.label = 's'
    return thing


def probe_own_set(thing):
    return sorted(thing), thing.label, isinstance(thing, OwnSet)


class OwnInt(int):
    def __new__(cls, value, unit=''):
        thing = super().__new__(cls, value)
        thing.unit = unit
        return thing


def make_own_int():
    return OwnInt(3, 'm')


def probe_own_int(thing):
    return thing + 1, thing.unit, type(thing) is OwnInt


class OwnText(str):
    def shout(self):
        return self.upper() + '!'


def make_own_text():
    return OwnText('a')


def probe_own_text(thing):
    return thing.shout(), type(thing) is OwnText


class OwnBytes(bytes):
    pass


def make_own_bytes():
    return OwnBytes(b'ab')


def probe_own_bytes(thing):
    return list(thing), type(thing) is OwnBytes


class OwnFloat(float):
    __slots__ = ('unit',)


def make_own_float():
    thing = OwnFloat(1.5)
    thing.unit = 'kg'
    return thing


def probe_own_float(thing):
    return thing * 2, thing.unit, type(thing) is OwnFloat


class OwnDate(datetime.date):
    def next(self):
        return type(self).fromordinal(self.toordinal() + 1)


def make_own_date():
    return OwnDate(2024, 2, 29)


def probe_own_date(thing):
    return thing.isoformat(), thing.next().isoformat(), type(thing) is OwnDate


class OwnUserDict(collections.UserDict):
    def __setitem__(self, key, value):
        super().__setitem__(key.lower(), value)


def make_user_dict():
    return OwnUserDict(A=1)


def probe_user_dict(thing):
    return dict(thing), isinstance(thing, OwnUserDict)


class OwnThread(threading.Thread):
    done = False

    def run(self):
        self.done = True


def make_class_of_thread():
    return OwnThread


def probe_class_of_thread(thing):
    thread = thing()
    thread.start()
    thread.join()
    return thread.done, thing is OwnThread


class OwnModule(types.ModuleType):
    value = 3


def make_class_of_module():
    return OwnModule


def probe_class_of_module(thing):
    return thing('x').value, thing is OwnModule


# -- typing ----------------------------------------------------------------------------------------

T = typing.TypeVar('T')
Number = typing.TypeVar('Number', int, float)
UserId = typing.NewType('UserId', int)


class Stack(typing.Generic[T]):
    def __init__(self):
        self.items = []

    def push(self, item: T) -> 'Stack[T]':
        self.items.append(item)
        return self


def make_typevar():
    return T


def probe_typevar(thing):
    return thing is T, thing.__name__, Number.__constraints__ == (int, float)


def make_generic_class():
    return Stack


def probe_generic_class(thing):
    return thing is Stack, thing[int]().push(1).items, thing.__parameters__ == (T,)


def make_generic_instance():
    return Stack[int]().push(3)


def probe_generic_instance(thing):
    return type(thing) is Stack, thing.items


def make_generic_alias_of_own():
    return Stack[int]


def probe_generic_alias_of_own(thing):
    return thing.__origin__ is Stack, thing.__args__ == (int,), thing == Stack[int], thing().items


class IntStack(Stack[int]):
    pass


def make_subclass_of_generic():
    return IntStack()


def probe_subclass_of_generic(thing):
    return type(thing) is IntStack, thing.push(1).items[-1], isinstance(thing, Stack)


def make_typing_alias():
    return typing.Dict[str, typing.Optional[Shape]]


def probe_typing_alias(thing):
    return thing == typing.Dict[str, typing.Optional[Shape]], thing.__args__[1].__args__[0] is Shape


def make_newtype():
    return UserId


def probe_newtype(thing):
    return thing(5), thing.__name__, thing.__supertype__ is int


call_newtype = (5,)


def make_typing_any():
    return [typing.Any, typing.Union[int, str], typing.Callable[[int], str], typing.Tuple[int, ...]]


def probe_typing_any(thing):
    return (thing[0] is typing.Any, thing[1] == typing.Union[int, str],
            thing[2].__args__ == (int, str), thing[3] == typing.Tuple[int, ...])


def make_literal():
    return typing.Literal['a', 1]


def probe_literal(thing):
    return thing == typing.Literal['a', 1], thing.__args__


def make_local_typevar():
    local = typing.TypeVar('local', bound=Base)

    class LocalGeneric(typing.Generic[local]):
        pass
    return local, LocalGeneric


def probe_local_typevar(thing):
    return thing[1].__parameters__[0] is thing[0], thing[0].__bound__ is Base


#: since 3.9
def make_builtin_alias():
    return dict[str, list[Shape]]


def probe_builtin_alias(thing):
    return thing == dict[str, list[Shape]], type(thing).__name__


#: end
#: since 3.10
P = typing.ParamSpec('P')


def keeping(function: typing.Callable[P, T]) -> typing.Callable[P, T]:
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)
    return inner


@keeping
def kept(n: int) -> int:
    return n + 1


def make_paramspec():
    return P


def probe_paramspec(thing):
    return thing is P, thing.__name__


def make_decorated_with_paramspec():
    return kept


def probe_decorated_with_paramspec(thing):
    return thing(1), sorted(thing.__annotations__)


def make_union_of_types():
    return int | Shape


def probe_union_of_types(thing):
    return thing == int | Shape, isinstance(Shape(1), thing), isinstance('', thing)


#: end
# -- exceptions ------------------------------------------------------------------------------------

class Trouble(Exception):
    """The simplest of the user's own."""


def make_exception():
    return Trouble('it was 5', 5, Kind.ROUND)


def probe_exception(thing):
    return type(thing) is Trouble, thing.args[:2], thing.args[2] is Kind.ROUND


def make_exception_class():
    return Trouble


def probe_exception_class(thing):
    try:
        raise thing('x')
    except Trouble as exc:
        return str(exc), thing is Trouble


class CodedError(Exception):
    def __init__(self, code, text='none'):
        super().__init__('%s: %s' % (code, text))
        self.code = code
        self.text = text


def make_exception_with_init():
    thing = CodedError(5, 'five')
    thing.more = [1]
    return thing


def probe_exception_with_init(thing):
    return type(thing) is CodedError, thing.code, thing.text, str(thing), thing.more


class NeedsTwo(Exception):
    def __init__(self, first, second):
        self.first = first
        self.second = second
        super().__init__('%s and %s' % (first, second))


def make_exception_that_needs_two():
    return NeedsTwo(1, Shape(2))


def probe_exception_that_needs_two(thing):
    return type(thing) is NeedsTwo, thing.first, thing.second == Shape(2)


class KeywordError(Exception):
    def __init__(self, *, reason):
        super().__init__()
        self.reason = reason

    def __reduce__(self):
        return functools.partial(KeywordError, reason=self.reason), ()


def make_exception_with_keyword():
    return KeywordError(reason='r')


def probe_exception_with_keyword(thing):
    return type(thing) is KeywordError, thing.reason


def make_exception_with_cause():
    try:
        try:
            raise KeyError('inner')
        except KeyError as exc:
            raise Trouble('outer') from exc
    except Trouble as exc:
        exc.__traceback__ = None
        return exc


def probe_exception_with_cause(thing):
    return type(thing) is Trouble, thing.args


class OwnOSError(OSError):
    pass


def make_own_oserror():
    return OwnOSError(2, 'no such thing', 'path')


def probe_own_oserror(thing):
    return type(thing) is OwnOSError, thing.errno, thing.strerror, thing.filename


def make_unicode_error():
    return UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'bad')


def probe_unicode_error(thing):
    return thing.encoding, thing.start, thing.reason


class OwnKeyError(KeyError, AttributeError):
    pass


def make_exception_of_two_bases():
    return OwnKeyError('k')


def probe_exception_of_two_bases(thing):
    return isinstance(thing, AttributeError), isinstance(thing, OwnKeyError), thing.args


class OwnWarning(UserWarning):
    pass


def make_warning_class():
    return OwnWarning


def probe_warning_class(thing):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        warnings.warn('w', thing)
    return seen[0].category is OwnWarning


def make_local_exception():
    class LocalError(Trouble):
        pass
    return LocalError('x')


def probe_local_exception(thing):
    return isinstance(thing, Trouble), type(thing).__name__, thing.args


#: since 3.11
def make_exception_with_notes():
    thing = Trouble('x')
    thing.add_note('first')
    thing.add_note('second')
    return thing


def probe_exception_with_notes(thing):
    return thing.__notes__[:2], type(thing) is Trouble


def make_exception_group():
    return ExceptionGroup('several', [Trouble('a'), CodedError(1),
                                      ExceptionGroup('inner', [OwnOSError(1, 'b')])])


def probe_exception_group(thing):
    matched, rest = thing.split(Trouble)
    return (len(thing.exceptions), type(matched.exceptions[0]) is Trouble,
            type(rest.exceptions[1].exceptions[0]) is OwnOSError, thing.message)


class OwnGroup(ExceptionGroup):
    def derive(self, exceptions):
        return OwnGroup(self.message, exceptions)


def make_own_exception_group():
    return OwnGroup('g', [Trouble('a'), ValueError('b')])


def probe_own_exception_group(thing):
    return type(thing) is OwnGroup, type(thing.subgroup(Trouble)) is OwnGroup


#: end
# -- threads and contexts --------------------------------------------------------------------------

def make_lock():
    return threading.Lock()


def probe_lock(thing):
    with thing:
        return thing.locked()


def make_rlock():
    return threading.RLock()


def probe_rlock(thing):
    with thing, thing:
        return type(thing).__name__


def make_condition():
    return threading.Condition()


def probe_condition(thing):
    with thing:
        return thing.wait(0)


def make_event():
    thing = threading.Event()
    thing.set()
    return thing


def probe_event(thing):
    return thing.is_set(), thing.wait(0)


def make_semaphore():
    return threading.BoundedSemaphore(2)


def probe_semaphore(thing):
    with thing:
        return thing.acquire(False) and thing.release() is None


def make_queue():
    thing = queue.Queue(5)
    thing.put('a')
    return thing


def probe_queue(thing):
    return thing.qsize(), thing.maxsize


def make_simple_queue():
    return queue.SimpleQueue()


def probe_simple_queue(thing):
    thing.put(1)
    return thing.get(), thing.empty()


def make_thread_local():
    return _local


_local = threading.local()


def probe_thread_local(thing):
    thing.value = 5
    seen = thing.value
    del thing.value
    return seen, type(thing) is threading.local


class OwnLocal(threading.local):
    def __init__(self):
        self.count = 0


def make_own_thread_local():
    return OwnLocal()


def probe_own_thread_local(thing):
    return thing.count, type(thing) is OwnLocal


def make_thread():
    return threading.Thread(target=plain_function, args=(1,), name='unstarted')


def probe_thread(thing):
    return thing.name, thing.is_alive()


REQUEST = contextvars.ContextVar('REQUEST', default='nobody')


def make_context_variable():
    return REQUEST


def probe_context_variable(thing):
    token = thing.set('somebody')
    seen = thing.get(), REQUEST.get()
    thing.reset(token)
    return seen, thing.get(), thing is REQUEST


def make_context():
    return contextvars.Context()


def probe_context(thing):
    return thing.run(len, 'abc'), len(thing)


def make_asyncio_lock():
    return _AsyncHolder()


class _AsyncHolder:
    def __init__(self):
        self.tasks = {}

    async def work(self):
        async with asyncio.Lock():
            return 'worked'


def probe_asyncio_lock(thing):
    return asyncio.run(thing.work()), type(thing) is _AsyncHolder


def make_future():
    thing = concurrent.futures.Future()
    thing.set_result(3)
    return thing


def probe_future(thing):
    return thing.result(0), thing.done()


def _rate_limited():
    """A function whose module holds a lock that it uses."""
    with common_module.LOCK:
        return 'worked', common_module.LOCK.locked()


def make_function_with_lock():
    return _rate_limited


def probe_function_with_lock(thing):
    return thing()


call_function_with_lock = ()


# -- weak references -------------------------------------------------------------------------------

class Owner:
    """Holds its things both strongly and weakly."""

    def __init__(self):
        self.strong = [Shape(1), Shape(2)]
        self.weak_set = weakref.WeakSet(self.strong)
        self.weak_values = weakref.WeakValueDictionary({'one': self.strong[0]})
        self.weak_keys = weakref.WeakKeyDictionary({self.strong[1]: 'two'})


def make_weak_set():
    owner = Owner()
    return owner.strong, owner.weak_set


def probe_weak_set(thing):
    return thing[0][0] in thing[1], len(thing[1]), type(thing[1]).__name__


def make_weak_value_dictionary():
    owner = Owner()
    return owner.strong, owner.weak_values


def probe_weak_value_dictionary(thing):
    return thing[1]['one'] is thing[0][0], len(thing[1])


def make_weak_key_dictionary():
    owner = Owner()
    return owner.strong, owner.weak_keys


def probe_weak_key_dictionary(thing):
    return thing[1][thing[0][1]], len(thing[1])


_tracked = weakref.WeakSet()


class Tracked:
    def __init__(self):
        _tracked.add(self)


def make_class_with_weak_registry():
    return Tracked


def probe_class_with_weak_registry(thing):
    kept = thing()
    return kept in _tracked, thing is Tracked


def make_weak_reference():
    return weakref.ref(Shape)


def probe_weak_reference(thing):
    return thing() is Shape


# -- modules and names -----------------------------------------------------------------------------

def make_module_of_the_library():
    return math


def probe_module_of_the_library(thing):
    return thing is math, thing.floor(2.5)


def make_submodule_of_the_library():
    import os.path
    return os.path


def probe_submodule_of_the_library(thing):
    return thing is os.path, thing.basename('a/b')


def make_own_module():
    return common_module


def probe_own_module(thing):
    return (thing is common_module, thing.CONSTANT, thing.Base is Base,
            thing.__name__ == common_module.__name__)


def make_module_in_a_container():
    return {'modules': [math, common_module], 'function': common_module.twice}


def probe_module_in_a_container(thing):
    return thing['modules'][1].twice(3), thing['function'](2), thing['modules'][0] is math


def make_module_made_here():
    thing = types.ModuleType('made_here')
    thing.value = 5
    exec('def get():\n    return value\n', vars(thing))
    return thing


def probe_module_made_here(thing):
    return thing.get(), thing.__name__, thing.value


def make_logger():
    return logging.getLogger('objects.test')


def probe_logger(thing):
    return thing is logging.getLogger('objects.test'), thing.name, type(thing).__name__


def make_logger_adapter():
    return logging.LoggerAdapter(logging.getLogger('objects.test'), {'a': 1})


def probe_logger_adapter(thing):
    return thing.logger is logging.getLogger('objects.test'), thing.extra


def make_instance_with_logger():
    thing = Shape(3)
    thing.log = logging.getLogger('objects.deep')
    return thing


def probe_instance_with_logger(thing):
    return thing.log is logging.getLogger('objects.deep'), thing == Shape(3)


# -- values ----------------------------------------------------------------------------------------

def make_namespace():
    return types.SimpleNamespace(a=1, shape=Shape(2))


def probe_namespace(thing):
    return thing.a, thing.shape == Shape(2), type(thing) is types.SimpleNamespace


def make_mapping_proxy():
    return types.MappingProxyType({'a': Kind.ROUND})


def probe_mapping_proxy(thing):
    return type(thing).__name__, thing['a'] is Kind.ROUND


def make_pattern():
    return re.compile(r'(?P<word>\w+)', re.IGNORECASE)


def probe_pattern(thing):
    return thing.match('Ab c')['word'], thing.flags & re.IGNORECASE == re.IGNORECASE


def make_deque():
    return collections.deque([1, Kind.ROUND], maxlen=3)


def probe_deque(thing):
    return thing.maxlen, thing[0], thing[1] is Kind.ROUND


def make_counter():
    return collections.Counter('abca')


def probe_counter(thing):
    return thing.most_common(1), type(thing) is collections.Counter


def make_ordered_dict():
    return collections.OrderedDict([('b', 1), ('a', 2)])


def probe_ordered_dict(thing):
    return list(thing), type(thing) is collections.OrderedDict


def make_defaultdict():
    return collections.defaultdict(list, a=[1])


def probe_defaultdict(thing):
    return thing['a'], thing.default_factory is list


def make_defaultdict_of_lambda():
    return collections.defaultdict(lambda: FACTOR, a=1)


def probe_defaultdict_of_lambda(thing):
    return thing['a'], thing.default_factory()


def make_defaultdict_of_own():
    return collections.defaultdict(Shape)


def probe_defaultdict_of_own(thing):
    return type(thing.default_factory()) is Shape


def make_tree_of_defaultdicts():
    def tree():
        return collections.defaultdict(tree)
    thing = tree()
    thing['a']['b'] = 1
    return thing


def probe_tree_of_defaultdicts(thing):
    return thing['a']['b'], type(thing.default_factory()['x']).__name__


def make_chain_map():
    return collections.ChainMap({'a': 1}, {'a': 2, 'b': 3})


def probe_chain_map(thing):
    return thing['a'], thing['b'], len(thing.maps)


def make_array():
    return array.array('d', [1.5, 2.5])


def probe_array(thing):
    return thing.typecode, list(thing)


def make_memoryview():
    return memoryview(b'abc')


def probe_memoryview(thing):
    return bytes(thing).decode(), thing[1]


def make_bytearray():
    return bytearray(b'abc')


def probe_bytearray(thing):
    return type(thing).__name__, list(thing)


def make_range_and_slice():
    return range(1, 10, 3), slice(1, None, 2), slice(None)


def probe_range_and_slice(thing):
    return list(thing[0]), 'abcd'[thing[1]], thing[2].stop


def make_ellipsis():
    return [Ellipsis, NotImplemented, None]


def probe_ellipsis(thing):
    return thing[0] is Ellipsis, thing[1] is NotImplemented, thing[2] is None


def make_types_of_singletons():
    return [type(None), type(Ellipsis), type(NotImplemented), type(plain_function),
            types.GeneratorType, type({}.keys()), types.MethodType]


def probe_types_of_singletons(thing):
    return [kind.__name__ for kind in thing], thing[0] is type(None), thing[5] is type({}.keys())


def make_numbers():
    return [2 ** 100, 1.5, float('inf'), 3 + 4j, True, -0.0]


def probe_numbers(thing):
    return (thing[0] == 2 ** 100, thing[1], math.isinf(thing[2]), abs(thing[3]), thing[4] is True,
            math.copysign(1, thing[5]))


def make_decimal():
    return decimal.Decimal('1.10'), decimal.Context(prec=5)


def probe_decimal(thing):
    return (str(thing[0]), thing[1].prec,
            str(thing[1].divide(decimal.Decimal(1), decimal.Decimal(3))))


def make_fraction():
    return fractions.Fraction(1, 3)


def probe_fraction(thing):
    return thing + thing == fractions.Fraction(2, 3), thing.denominator


def make_datetime():
    zone = datetime.timezone(datetime.timedelta(hours=2), 'X')
    return (datetime.datetime(2024, 1, 2, 3, 4, tzinfo=zone), datetime.timezone.utc,
            datetime.timedelta(days=1), datetime.time(1, 2))


def probe_datetime(thing):
    return (thing[0].isoformat(), thing[0].tzname(), thing[1] is datetime.timezone.utc,
            thing[2].days, str(thing[3]))


class OwnZone(datetime.tzinfo):
    def utcoffset(self, when):
        return datetime.timedelta(hours=1)

    def dst(self, when):
        return None

    def tzname(self, when):
        return 'own'


def make_own_zone():
    return datetime.datetime(2024, 1, 2, tzinfo=OwnZone())


def probe_own_zone(thing):
    return thing.isoformat(), thing.tzname(), type(thing.tzinfo) is OwnZone


#: since 3.9
#: needs zoneinfo
def make_zoneinfo():
    import zoneinfo
    return datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo('UTC'))


def probe_zoneinfo(thing):
    import zoneinfo
    return thing.tzinfo is zoneinfo.ZoneInfo('UTC'), thing.isoformat()


#: end
#: end
def make_uuid():
    return uuid.UUID(int=5)


def probe_uuid(thing):
    return str(thing), thing == uuid.UUID(int=5)


def make_path():
    return (pathlib.Path('a') / 'b.txt', pathlib.PurePosixPath('/x'),
            pathlib.PureWindowsPath('c:\\x'))


def probe_path(thing):
    return thing[0].suffix, isinstance(thing[0], pathlib.Path), str(thing[1]), thing[2].drive


def make_address():
    return ipaddress.ip_address('10.0.0.1'), ipaddress.ip_network('10.0.0.0/8')


def probe_address(thing):
    return thing[0] in thing[1], str(thing[0] + 1)


def make_random():
    return random.Random(5)


def probe_random(thing):
    copied = copy.copy(thing)
    return copied.random(), copied.randint(0, 100), type(thing) is random.Random


class OwnRandom(random.Random):
    def pick(self):
        return self.randint(1, 6)


def make_own_random():
    return OwnRandom(7)


def probe_own_random(thing):
    return copy.copy(thing).pick(), type(thing) is OwnRandom


def make_string_io():
    thing = io.StringIO('abc')
    thing.read(1)
    return thing


def probe_string_io(thing):
    return thing.getvalue(), thing.tell()


def make_bytes_io():
    return io.BytesIO(b'abc')


def probe_bytes_io(thing):
    return thing.getvalue().decode()


def make_struct():
    return struct.Struct('<id')


def probe_struct(thing):
    return thing.size, thing.format


def make_template():
    return string.Template('$a b')


def probe_template(thing):
    return thing.substitute(a=1)


def make_parsed_arguments():
    return argparse.Namespace(n=1, shape=Shape(2))


def probe_parsed_arguments(thing):
    return thing.n, thing.shape == Shape(2), thing == argparse.Namespace(n=1, shape=Shape(2))


def make_argument_parser():
    thing = argparse.ArgumentParser(prog='p')
    thing.add_argument('--n', type=int, default=3)
    return thing


def probe_argument_parser(thing):
    return thing.parse_args(['--n', '5']).n


def make_signature():
    return inspect.signature(annotated)


def probe_signature(thing):
    return list(thing.parameters), thing.parameters['n'].annotation is int


def make_syntax_tree():
    return ast.parse('a + 1', mode='eval')


def probe_syntax_tree(thing):
    return type(thing.body).__name__, thing.body.right.value


def make_code():
    return compile('n * 2', 'made', 'eval')


def probe_code(thing):
    return eval(thing, {'n': 4}), thing.co_filename


def make_text_with_surrogates():
    return 'a\udcff', 'ä€😀', b'\x00\xff'


def probe_text_with_surrogates(thing):
    return [ord(char) for char in thing[0]], thing[1], list(thing[2])


def make_interned_key():
    return {('a', 1): {'b': {1, 2}}, None: frozenset([1])}


def probe_interned_key(thing):
    return sorted(thing['a', 1]['b']), sorted(thing[None])


# -- iterators -------------------------------------------------------------------------------------

def make_count():
    return itertools.count(5, 2)


def probe_count(thing):
    return type(thing).__name__, repr(thing)


def make_list_iterator():
    return iter([1, 2, 3])


def probe_list_iterator(thing):
    return type(thing).__name__, operator.length_hint(thing)


def make_map_and_zip():
    return map(plain_function, [1, 2]), zip([1], [2]), enumerate(['a']), reversed([1, 2])


def probe_map_and_zip(thing):
    return [type(item).__name__ for item in thing]


class OwnIterator:
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def make_iterable():
    return OwnIterator(3)


def probe_iterable(thing):
    return list(thing), type(thing) is OwnIterator


# -- ctypes ----------------------------------------------------------------------------------------

class Pixel(ctypes.Structure):
    _fields_ = [('x', ctypes.c_int), ('y', ctypes.c_double)]


_libc = ctypes.CDLL(None)


def make_structure():
    return Pixel(1, 2.5)


def probe_structure(thing):
    return thing.x, thing.y, type(thing) is Pixel


def make_structure_class():
    return Pixel


def probe_structure_class(thing):
    return thing is Pixel, [name for name, _ in thing._fields_], ctypes.sizeof(thing)


def make_ctypes_array():
    return (ctypes.c_int * 3)(1, 2, 3)


def probe_ctypes_array(thing):
    return list(thing)


def calling_c(n):
    return _libc.abs(n)


def make_function_of_a_library():
    return calling_c


def probe_function_of_a_library(thing):
    return thing(-4)


call_function_of_a_library = (-4,)


def make_library():
    return _libc


def probe_library(thing):
    return thing.abs(-3), type(thing) is ctypes.CDLL


# -- numpy -----------------------------------------------------------------------------------------

#: needs numpy
import numpy   # noqa: E402


def make_numpy_array():
    return numpy.arange(6).reshape(2, 3)


def probe_numpy_array(thing):
    return thing.tolist(), str(thing.dtype), thing.flags.writeable, type(thing) is numpy.ndarray


def make_numpy_scalar():
    return numpy.float32(1.5), numpy.int64(3)


def probe_numpy_scalar(thing):
    return type(thing[0]) is numpy.float32, float(thing[0]), int(thing[1])


def make_numpy_structured():
    return numpy.array([(1, 2.5)], dtype=[('a', 'i4'), ('b', 'f8')])


def probe_numpy_structured(thing):
    return thing['a'].tolist(), thing.dtype.names


def make_numpy_objects():
    return numpy.array([Shape(1), Kind.ROUND], dtype=object)


def probe_numpy_objects(thing):
    return thing[0] == Shape(1), thing[1] is Kind.ROUND


class OwnArray(numpy.ndarray):
    pass


def make_numpy_subclass():
    return numpy.arange(3).view(OwnArray)


def probe_numpy_subclass(thing):
    return type(thing) is OwnArray, thing.tolist()


def make_numpy_function():
    return numpy.add


def probe_numpy_function(thing):
    return int(thing(1, 2)), thing is numpy.add


def make_numpy_random():
    return numpy.random.default_rng(5)


def probe_numpy_random(thing):
    return float(copy.deepcopy(thing).random()) < 1, type(thing.bit_generator).__name__


#: end
# -- what only a forked process can have -----------------------------------------------------------

def make_open_file():
    return open(os.devnull)


def probe_open_file(thing):
    return thing.closed, thing.name, thing.read()


def make_socket():
    return socket.socket()


def probe_socket(thing):
    return thing.fileno() >= 0, thing.family == socket.AF_INET


def make_generator():
    return generator_function(3)


def probe_generator(thing):
    return inspect.getgeneratorstate(thing), type(thing).__name__


def make_async_generator():
    return async_generator_function(3)


def probe_async_generator(thing):
    return type(thing).__name__


def make_shared_value():
    return multiprocessing.Value('i', 5)


def probe_shared_value(thing):
    with thing.get_lock():
        return thing.value


def make_process_lock():
    return multiprocessing.Lock()


def probe_process_lock(thing):
    with thing:
        return True


def make_process_queue():
    return multiprocessing.SimpleQueue()


def probe_process_queue(thing):
    return thing.empty()


def make_process_event():
    return multiprocessing.Event()


def probe_process_event(thing):
    return thing.is_set()


def make_hash():
    return hashlib.sha256(b'a')


def probe_hash(thing):
    return thing.hexdigest()[:8], thing.name


def make_match():
    return re.match('a(.)', 'ab')


def probe_match(thing):
    return thing.group(1)


def make_dict_view():
    return {'a': 1}.keys()


def probe_dict_view(thing):
    return sorted(thing)


def make_instance_with_open_file():
    thing = Shape(1)
    thing.file = open(os.devnull)
    return thing


def probe_instance_with_open_file(thing):
    return thing.file.closed, thing.value
