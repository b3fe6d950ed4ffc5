"""What an objective was made with, in all its parts: compared when a run is gone on with.

Apart from ``origin.described``, which files of before have: it looks at fewer arguments.
"""

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

from zo_adapt.evaluation.objective import Objective
from zo_adapt.loops.origin import LONGEST, arguments_of, bound_values, described, kind_of

DEPTH = 8
"""Parts in parts that are looked at."""
TOKENS = 64
"""Tokens of a vocabulary that are looked at, evenly spaced."""
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
"""Names that every process may have its own of."""


def made_with(value: Any, depth: int = DEPTH) -> Any:
    """An objective as JSON: the class of every part of it, and the arguments that are plain.

    These are the attributes with names of arguments, and what ``Objective.made_with`` says. Of
    models and other large things it is the class alone.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass
        ... class Length:
        ...     weight: float
        ...     def __call__(self, batch):
        ...         return self.weight * len(batch)
        >>> made_with(Length(0.5))["weight"]
        0.5
    """
    if isinstance(value, Enum | PurePath):
        return str(value)
    if isinstance(value, str) and DEVICE.fullmatch(value):
        return "a device"  # a run may go on elsewhere, and every process has its own
    if inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, partial):
        return {"code": described(value, 0), "values around it": bound_values(value)}
    if isinstance(value, list | tuple) and depth and len(value) <= LONGEST:
        return [made_with(entry, depth - 1) for entry in value]
    if isinstance(value, Mapping) and depth and len(value) <= LONGEST:
        return {str(key): made_with(entry, depth - 1) for key, entry in value.items()}
    if callable(getattr(value, "convert_ids_to_tokens", None)):
        return _tokenizer(value)
    if isinstance(value, type) or not depth or not has_parts(value):
        return described(value, 0)
    return {"class": kind_of(type(value))} | {
        name: _own_class(entry, depth - 1) if name == "wrapped" else made_with(entry, depth - 1)
        for name, entry in _parts(value)
    }


def has_parts(value: Any) -> bool:
    """Whether a value's arguments say what it does: an objective, or what says so itself."""
    return (
        isinstance(value, Objective)
        or hasattr(value, "made_with")
        or dataclasses.is_dataclass(value)
    )


def _own_class(value: Any, depth: int) -> Any:
    """Of what was no objective before it was wrapped; a function is its code."""
    if has_parts(value) or not hasattr(value, "__dict__") or hasattr(value, "__code__"):
        return made_with(value, depth)
    parts = {name: made_with(entry, depth) for name, entry in arguments_of(value)}
    return {"class": kind_of(type(value))} | parts


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    yield from arguments_of(value)
    yield from sorted(getattr(value, "made_with", {}).items())


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Its class, its size, some of its tokens, and how it writes messages."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    places = sorted({size * number // TOKENS for number in range(TOKENS)}) if size else []
    texts = tokenizer.convert_ids_to_tokens(places), getattr(tokenizer, "chat_template", None)
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
    return {"class": kind_of(type(tokenizer)), "size": size, "tokens and template": digest}
