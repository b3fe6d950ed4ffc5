"""Which names the code of a function reads and writes: as its instructions say, nothing is run."""

import dis
import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import CodeType
from typing import Any, NamedTuple

_OF_NAMES = ("LOAD_GLOBAL", "LOAD_DEREF")
_OF_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_WRITES_ENTRIES = ("STORE_SUBSCR", "DELETE_SUBSCR")
_CHANGING = (
    *("add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft"),
    *("remove", "reverse", "setdefault", "sort", "update"),
)
"""Methods that change a list, a set or a mapping."""


class Read(NamedTuple):
    """What is taken at once from what a name stands for.

    Args:
        name: A global, or a variable from around a function.
        key: An attribute's name, or a constant that an entry is asked for by.
        is_entry: Which of the two.
    """

    name: str
    key: Any
    is_entry: bool

    def __str__(self) -> str:
        return f"{self.name}[{self.key!r}]" if self.is_entry else f"{self.name}.{self.key}"


def global_names(code: CodeType) -> set[str]:
    """Globals that a function reads, or one inside it.

    Example:
        >>> sorted(global_names((lambda x: len(x) + (lambda: max(x))()).__code__))
        ['len', 'max']
    """
    each = (i for part in _codes(code) for i in dis.get_instructions(part))
    return {str(i.argval) for i in each if i.opname == "LOAD_GLOBAL"}


def attribute_names(code: CodeType) -> set[str]:
    """Names that a function, or one inside it, takes from anything."""
    return {name for each in _codes(code) for name in each.co_names}


def reads(code: CodeType) -> list[Read]:
    """What a function takes from its globals, and from variables around it, by a fixed key.

    Example:
        >>> settings = {"scale": 2.0}
        >>> [str(read) for read in reads((lambda x: settings["scale"] * x.real).__code__)]
        ["settings['scale']"]
    """
    found: dict[str, Read] = {}
    for each in _codes(code):
        steps = list(dis.get_instructions(each))
        for index, (first, second) in enumerate(pairwise(steps)):
            if first.opname not in _OF_NAMES:
                continue
            if second.opname in _OF_ATTRIBUTES:
                read = Read(str(first.argval), str(second.argval), False)
            elif second.opname.startswith("LOAD_") and _is_entry(second, steps[index + 2 :][:1]):
                read = Read(str(first.argval), second.argval, True)
            else:
                continue
            found[str(read)] = read
    return [found[name] for name in sorted(found)]


def _is_entry(key: dis.Instruction, after: list[dis.Instruction]) -> bool:
    is_constant = isinstance(key.argval, str | int) and key.opname in (
        "LOAD_CONST",
        "LOAD_SMALL_INT",
    )
    is_asked = any(
        i.opname == "BINARY_SUBSCR" or (i.opname == "BINARY_OP" and i.argrepr == "[]")
        for i in after
    )
    return is_constant and is_asked


class Written(NamedTuple):
    """What the functions of a module write.

    Args:
        names: Globals that they assign.
        attributes: Names of attributes that they assign, of whatever object.
        filled: Names of what they may put entries into.
    """

    names: frozenset[str]
    attributes: frozenset[str]
    filled: frozenset[str]

    @classmethod
    def by(cls, around: Mapping[str, Any]) -> "Written":
        """By the functions and methods among a module's globals."""
        names, attributes, filled = set[str](), set[str](), set[str]()
        for code in _codes_of_module(around):
            steps = list(dis.get_instructions(code))
            names |= {str(i.argval) for i in steps if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
            # An object's own attributes are made where it is made.
            if code.co_name != "__init__":
                attributes |= {str(i.argval) for i in steps if i.opname == "STORE_ATTR"}
            targets = [i for i in steps if i.opname in _WRITES_ENTRIES]
            loaded = [i for i in steps if i.opname in _OF_NAMES]
            filled |= {str(i.argval) for i in loaded if any(_lies_in(i, t) for t in targets)}
            filled |= {
                str(first.argval)
                for first, second in pairwise(steps)
                if first.opname in _OF_NAMES and second.argval in _CHANGING
            }
        return cls(frozenset(names), frozenset(attributes), frozenset(filled))


def _lies_in(one: dis.Instruction, other: dis.Instruction) -> bool:
    """Whether an instruction is of a part of the source of another; so where nothing says."""
    a, b = one.positions, other.positions
    if a is None or b is None or None in (*a, *b):
        return True
    begins = (b.lineno, b.col_offset) <= (a.lineno, a.col_offset)
    return begins and (a.end_lineno, a.end_col_offset) <= (b.end_lineno, b.end_col_offset)


def _codes_of_module(around: Mapping[str, Any]) -> Iterator[CodeType]:
    classes = [value for value in list(around.values()) if inspect.isclass(value)]
    own = [*around.values(), *(value for kind in classes for value in vars(kind).values())]
    for function in own:
        if inspect.isfunction(function) and function.__globals__ is around:
            yield from _codes(function.__code__)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's, and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
