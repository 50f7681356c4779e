# Types of dispynode, for type checkers and editors. See "Type checkers" in examples/README.md.

import logging
from collections.abc import Sequence

__all__ = ['DispyError', 'SecretError', 'main']

__version__: str
dispynode_logger: logging.Logger

class Listed(type): ...

class DispyError(Exception, metaclass=Listed): ...
class SecretError(DispyError, ValueError): ...

def main(argv: Sequence[str] | None = None) -> int: ...
