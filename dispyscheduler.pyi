# Types of dispyscheduler, for type checkers and editors. See "Type checkers" in examples/README.md.

from collections.abc import Sequence

__all__ = ['main']

def main(argv: Sequence[str] | None = None) -> int: ...
