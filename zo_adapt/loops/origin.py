"""What a run depends on beside its view and settings: data and objective.

Each as a short text that is the same on every device and in every process, to be kept in a header
and compared on resuming. Large things are looked at in places: enough to tell one checkpoint or
data set from another, not to prove that no number differs.
"""

import dis
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor

from zo_adapt.data.sources import Source
from zo_adapt.evaluation.objective import Objective
from zo_adapt.loops.contents import PLAIN, feed
from zo_adapt.view.identity import SAMPLED, bits

ROWS = 32
"""Rows of the data that are looked at, evenly spaced."""
_DEPTH = 6
LONGEST = 256
"""Entries of a list that are listed in a description."""


def rows_hash(source: Source) -> str | None:
    """sha256 over some rows of the data; None where they cannot be read without side effects.

    Read are tensors and arrays, lists of examples, and ``datasets`` tables, of which the stored
    values, not what a transform makes of them. Rows of another kind of data set may be made as they
    are read, at random: they are not.
    """
    read = _reader(getattr(source, "examples", None))
    if read is None or not len(source):
        return None
    digest = hashlib.sha256()
    for row in np.unique(np.linspace(0, len(source) - 1, ROWS).astype(np.int64)).tolist():
        feed(digest.update, read(row), _in_places)
    return digest.hexdigest()


def _reader(examples: Any) -> Callable[[int], Any] | None:
    """``row -> its values`` for data in memory."""
    if isinstance(examples, Mapping):
        return lambda row: {name: column[row] for name, column in examples.items()}
    if hasattr(examples, "with_format") and hasattr(examples, "column_names"):
        stored = examples.with_format("arrow")
        return lambda row: stored[row].to_pylist()
    if isinstance(examples, Tensor | np.ndarray):
        return lambda row: examples[row]
    if not isinstance(examples, list | tuple) or not examples:
        return None
    if isinstance(examples, tuple) and all(isinstance(e, Tensor | np.ndarray) for e in examples):
        return lambda row: [column[row] for column in examples]
    return lambda row: examples[row]


def labels_hash(classes: Any) -> str | None:
    """sha256 over the classes that the passes are stratified by."""
    if classes is None:
        return None
    return hashlib.sha256(np.asarray(classes).astype(np.int64).tobytes()).hexdigest()


def _in_places(value: Any) -> bytes | None:
    """As versions did that looked at a few rows alone, and whose files are gone on with."""
    if isinstance(value, Tensor):
        return str((list(value.shape), value.dtype)).encode() + bits(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return str((value.shape, value.dtype)).encode() + value.tobytes()[: 8 * SAMPLED]
    return repr(value).encode() if isinstance(value, PLAIN) else None


def described(objective: Any, depth: int = _DEPTH) -> Any:
    """An objective as JSON: its class, and those arguments it was made with that are plain.

    A function is its name and a hash of its code, which is comparable within one version of Python;
    what it has from around it is ``bound_values``.
    Attributes that no argument has the name of are left out: they may change as it is called.
    """
    if isinstance(objective, float | np.floating):
        return float(objective)
    if isinstance(objective, bool | type(None) | str):
        return objective
    if isinstance(objective, int | np.integer):
        return int(objective)
    if isinstance(objective, list | tuple | Mapping) and len(objective) > LONGEST:
        return f"{kind_of(type(objective))} of {len(objective)}"
    if depth and isinstance(objective, list | tuple):
        return [described(entry, depth - 1) for entry in objective]
    if depth and isinstance(objective, Mapping):
        return {str(key): described(entry, depth - 1) for key, entry in objective.items()}
    if isinstance(objective, functools.partial):
        return [described(objective.func), described(objective.args), described(objective.keywords)]
    if inspect.ismethod(objective):
        return [described(objective.__func__), kind_of(type(objective.__self__))]
    if inspect.isfunction(objective):
        return [kind_of(objective), *_version(), _code(objective.__code__)]
    if depth and (isinstance(objective, Objective) or depth == _DEPTH):
        return {"class": kind_of(type(objective)), **_arguments(objective, depth - 1)}
    return kind_of(type(objective))  # models, tokenizers


def _arguments(objective: Any, depth: int) -> dict[str, Any]:
    return {name: described(value, depth) for name, value in arguments_of(objective)}


def arguments_of(objective: Any) -> list[tuple[str, Any]]:
    """The attributes that arguments have the names of."""
    own = getattr(objective, "__dict__", {})
    names = _parameters(type(objective))
    names |= {"wrapped", "maximize", "mean_over_rows", "min_rows", "step_like"} & own.keys()
    found = {name: own[key] for name in names for key in (name, f"_{name}") if key in own}
    return sorted(found.items())


def bound_values(*objectives: Any) -> str | None:
    """A hash of the plain values that functions have as defaults or from around them, if any.

    Apart from ``described``, since ranks may differ in them: a function may know its own device.
    """
    digest, count = hashlib.sha256(), 0
    for objective in objectives:
        for function in _functions(objective, _DEPTH):
            for name, value in bound_to(function):
                if isinstance(value, PLAIN):
                    digest.update(repr((name, value)).encode())
                    count += 1
    return digest.hexdigest()[:16] if count else None


def _functions(value: Any, depth: int) -> Iterator[FunctionType]:
    """A function, or those that an objective was made with."""
    if inspect.isfunction(value):
        yield value
    elif inspect.ismethod(value):
        yield from _functions(value.__func__, depth)
    elif isinstance(value, functools.partial):
        yield from _functions(value.func, depth)
    elif depth and isinstance(value, list | tuple) and len(value) <= LONGEST:
        for entry in value:
            yield from _functions(entry, depth - 1)
    elif depth and (isinstance(value, Objective) or depth == _DEPTH):
        for _, entry in arguments_of(value):
            yield from _functions(entry, depth - 1)


def _parameters(kind: type) -> set[str]:
    try:
        return set(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # written in C
        return set()


def kind_of(value: Any) -> str:
    """The full name of a class or a function."""
    bases = getattr(value, "__bases__", ())
    if bases and bases[0].__name__ == "FSDPModule":  # of a model in parts, what the whole one is
        value = bases[1]
    return f"{value.__module__}.{value.__qualname__}"


def _version() -> list[str]:
    return [f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"]


def collate_described(source: Source) -> Any:
    """A caller's own collate function; None for those of this package and of torch."""
    collate = getattr(source, "collate", None)
    owner = getattr(collate, "__func__", collate)
    module = str(getattr(owner, "__module__", None) or type(owner).__module__)
    return None if module.partition(".")[0] in NOT_OWN else described(collate)


NOT_OWN = ("zo_adapt", "objectives", "torch", "transformers", "builtins")
"""Packages whose functions are known by their versions."""


def _code(code: CodeType) -> str:
    digest = hashlib.sha256()
    _feed_code(digest.update, code)
    return digest.hexdigest()[:16]


def bound_to(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Defaults, and values from around the function, of those that it does not assign to itself."""
    for index, value in enumerate(function.__defaults__ or ()):
        yield f"default {index}", value
    yield from sorted((function.__kwdefaults__ or {}).items())
    assigned = {i.argval for i in dis.get_instructions(function) if i.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name not in assigned:
            with suppress(ValueError):  # not bound yet
                yield name, cell.cell_contents


def _feed_code(update: Callable[[bytes], None], code: CodeType) -> None:
    update(code.co_code + repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _feed_code(update, constant)
        elif not isinstance(constant, frozenset):  # of no fixed order
            update(repr(constant).encode())


def same_description(one: Any, other: Any) -> bool:
    """Whether two descriptions are of one objective; code of two versions of Python counts so."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = one.keys() == other.keys()
        return names and all(same_description(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) == len(other) == 3 and _is_code(one) and _is_code(other) and one[1] != other[1]:
            return bool(one[0] == other[0])
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same_description(*pair) for pair in pairs)
    return bool(one == other)


def _is_code(entry: list[Any]) -> bool:
    return isinstance(entry[1], str) and entry[1].startswith(f"{sys.implementation.name} ")
