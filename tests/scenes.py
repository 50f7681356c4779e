"""Functions that tests let run as jobs, and what these meet there. Nothing of the tests is imported
here, so that a node that has no pytest can import it."""

import hashlib
import os
import time


def square(n):
    return n * n


def where(seconds=0.0):
    """The node on which it ran."""
    time.sleep(seconds)
    return dispy_node_name   # noqa: F821


def weather_here():
    """The version of a package of this name, and which Python has it."""
    import sys
    import weather
    return weather.version, sys.prefix, sys.version_info[:2]


def set_up_weather():
    """A setup that needs it."""
    global version
    import weather
    version = weather.version


def weather_of_setup():
    return version   # noqa: F821


class Gate:
    """Jobs of `hold` run until it is opened."""

    def __init__(self, path):
        self.path = str(path)
        os.makedirs(self.path + '.started')

    def started(self):
        """The names of those that have begun."""
        return sorted(os.listdir(self.path + '.started'))

    def open(self):
        with open(self.path, 'w'):
            pass


def hold(path, name=None):
    """Note that it has begun, wait until the gate at this path is open, and return the name: its
    own, or that of the node."""
    with open(os.path.join(path + '.started', str(name or os.getpid())), 'w'):
        pass
    while not os.path.exists(path):
        time.sleep(0.01)
    return dispy_node_name if name is None else name   # noqa: F821


def fill(directory):
    """Fill the file system of a directory until nothing fits; the path of what fills it is
    returned."""
    path = os.path.join(directory, 'filler')
    with open(path, 'wb', buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b'x' * size)
            except OSError:
                continue
    return path


def pattern(size, seed=b''):
    """Bytes that differ everywhere."""
    return hashlib.shake_128(seed).digest(size)
