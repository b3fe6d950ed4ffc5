"""What functions read beside their arguments: globals, other functions of one's own, tensors.

Apart from ``origin.described`` and ``bound_values``, which files of before have.
"""

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from itertools import chain
from pathlib import PurePath
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_adapt.loops.code_names import Read, Written, attribute_names, global_names, reads
from zo_adapt.loops.contents import PLAIN
from zo_adapt.loops.objective_parts import DEPTH, DEVICE, has_parts
from zo_adapt.loops.origin import LONGEST, NOT_OWN, arguments_of, bound_to, described
from zo_adapt.view.identity import SAMPLED, WHOLE_BYTES, bits
from zo_adapt.view.inspection import Addresses, tensors_held
from zo_adapt.view.parameters import ParameterView

SHOWN = 64
"""Letters of a value that is kept as it is; of a longer one a hash."""
_ENTRIES = ("__call__", "forward", "predict", "score", "collate")
"""Methods that evaluations call; others are found by their names."""
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def read_around(view: ParameterView, *objectives: Any) -> dict[str, Any]:
    """What an objective's functions depend on that is none of their arguments, by name.

    Of every function of the caller's own, of those that it calls by a global name and of the
    methods of classes of the caller's own, the model's modules among them: the code; globals that
    are plain and that no function of their module assigns; what it takes from globals by a fixed
    key (``settings.SCALE``, ``CONFIG["scale"]``), if no function of its module writes there; and
    tensors and arrays, also among the arguments of an objective. Not lists and mappings as a whole,
    which may be filled as it is called, and not weights.

    Args:
        view: Whose tensors, and those of its model, are known otherwise.
        objectives: Objectives, collate functions, or None.
    """
    walk, found = _Walk(view), dict[str, Any]()
    modules = () if view.model is None else view.model.modules()
    kinds = dict.fromkeys(map(type, modules))
    each = [walk.of(objective, "", DEPTH) for objective in objectives]
    for name, value in chain(*each, *map(walk.of_class, kinds)):
        if len(found) < LONGEST:
            found.setdefault(name, value)
    return found


class _Walk:
    """Goes through an objective, each function once."""

    def __init__(self, view: ParameterView) -> None:
        held = dict(view.tensors)
        if view.model is not None:
            dense = (t for t in tensors_held(view.model) if type(t) in (Tensor, nn.Parameter))
            held |= {str(number): tensor for number, tensor in enumerate(dense)}
        self._weights = Addresses(held)
        self._seen: set[int] = set()
        self._written: dict[int, Written] = {}

    def of(self, value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
        """The names and values in an objective, or in an argument of one."""
        if inspect.ismethod(value):
            value = value.__func__
        if isinstance(value, partial):
            yield from self.of([value.func, value.args, value.keywords], name, depth)
        elif inspect.isfunction(value):
            yield from self._of_function(value, depth)
        elif isinstance(value, Tensor | np.ndarray):
            if (text := self._numbers(value)) is not None:
                yield name, text
        elif depth and isinstance(value, list | tuple) and len(value) <= LONGEST:
            for index, entry in enumerate(value):
                yield from self.of(entry, f"{name}[{index}]", depth - 1)
        elif depth and isinstance(value, Mapping) and len(value) <= LONGEST:
            for key, entry in value.items():
                yield from self.of(entry, f"{name}[{key!r:.40}]", depth - 1)
        elif depth and (has_parts(value) or depth == DEPTH or name.endswith("wrapped")):
            yield from self._of_object(value, name, depth)

    def _of_object(self, value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
        for argument, entry in arguments_of(value):
            yield from self.of(entry, f"{name}.{argument}" if name else argument, depth - 1)
        yield from self.of_class(type(value), depth - 1)

    def of_class(self, kind: type, depth: int = DEPTH) -> Iterator[tuple[str, Any]]:
        """Those of a class's methods that an evaluation may call."""
        methods: dict[str, Any] = {}
        for base in kind.__mro__:
            own = {name: value for name, value in vars(base).items() if inspect.isfunction(value)}
            methods = own | methods
        left = [name for name in _ENTRIES if name in methods]
        while left:
            method = methods.pop(left.pop(), None)
            if method is not None and _is_own(method):
                left += [name for name in attribute_names(method.__code__) if name in methods]
                yield from self._of_function(method, depth)

    def _of_function(self, function: Any, depth: int) -> Iterator[tuple[str, Any]]:
        function = inspect.unwrap(function)
        if id(function) in self._seen or not depth or not _is_own(function):
            return
        self._seen.add(id(function))
        name = function.__qualname__
        yield name, described(function, 0)
        for around, value in self._read_by(function):
            if inspect.isfunction(value):
                yield from self._of_function(value, depth - 1)
            elif isinstance(value, Tensor | np.ndarray):
                if (text := self._numbers(value)) is not None:
                    yield f"{around} of {name}", text
            elif value is not None and (text := _text(value)) is not None:
                yield f"{around} of {name}", text

    def _read_by(self, function: FunctionType) -> Iterator[tuple[str, Any]]:
        """Names and values from around a function; not what its module's functions write."""
        around, bound = function.__globals__, dict(bound_to(function))
        if id(around) not in self._written:
            self._written[id(around)] = Written.by(around)
        written = self._written[id(around)]
        yield from bound.items()
        for name in sorted(global_names(function.__code__) - written.names):
            if name in around:
                yield name, around[name]
        for read in reads(function.__code__):
            held = bound.get(read.name, around.get(read.name))
            kept = written.filled if read.is_entry else written.attributes
            if (
                read.name not in written.names
                and (read.name if read.is_entry else read.key) not in kept
            ):
                yield str(read), _entry(held, read)

    def _numbers(self, value: Any) -> str | None:
        """A hash of a tensor's numbers; None of weights."""
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                return None
            tensor = torch.as_tensor(value if value.flags.writeable else value.copy())
        else:
            tensor = value
        if self._weights.meeting(tensor):
            return None
        digest = hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bits(tensor, None if tensor.nbytes <= WHOLE_BYTES else SAMPLED))
        return digest.hexdigest()[:16]


def _text(value: Any) -> str | None:
    """A value that cannot change as it is used; None of others, and of the name of a device."""
    if isinstance(value, frozenset):
        value = tuple(sorted(map(repr, value)))
    is_plain = isinstance(value, (*PLAIN, Enum, PurePath))
    if not is_plain and not (isinstance(value, tuple) and all(isinstance(v, PLAIN) for v in value)):
        return None
    if isinstance(value, str) and DEVICE.fullmatch(value):
        return None
    text = repr(value)
    return text if len(text) <= SHOWN else hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_own(function: FunctionType) -> bool:
    """Whether a function is of nobody's library, whose version would have to stay the same."""
    root = (function.__module__ or "").partition(".")[0]
    return root not in NOT_OWN and not function.__code__.co_filename.startswith(_LIBRARIES)


def _entry(held: Any, read: Read) -> Any:
    """What is read; None where it is no entry, or an attribute of something that is no setting."""
    if read.is_entry:
        is_there = isinstance(held, Mapping | list | tuple)
        with suppress(LookupError, TypeError):
            return held[read.key] if is_there else None
        return None
    if isinstance(held, ModuleType) and not _is_of_no_library(held):
        return None
    own = {} if isinstance(held, nn.Module | Tensor) else getattr(held, "__dict__", {})
    return own.get(read.key)


def _is_of_no_library(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None) or ""
    root = module.__name__.partition(".")[0]
    is_built_in = root in sys.builtin_module_names or root in sys.stdlib_module_names
    return not (is_built_in or root in NOT_OWN or path.startswith(_LIBRARIES))
