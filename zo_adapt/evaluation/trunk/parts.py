"""The rows of a model's call in parts of canonical shapes.

What a kernel makes of a row may differ in the last bits from one shape of a batch to another. Parts
have the row's own length and a fixed number of rows, so that their shapes, and with them the bits,
depend on the row alone: on a CPU one row at a time, on a GPU, where so small parts would be bound
by launches, 16 rows of a length rounded up to a multiple of 16 tokens (the last row repeated).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_adapt.evaluation.trunk.keys import Rows

ROWS = {"cpu": 1, "cuda": 16}
WIDTHS = {"cpu": 1, "cuda": 16}
"""Rows of a part, and what its width is a multiple of, by device; others are as a GPU."""


class Part(NamedTuple):
    """Some rows of a call, as a call of its own.

    Args:
        rows: Their keys and spans.
        args, kwargs: What the model is called with.
    """

    rows: Rows
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parts_of(rows: Rows, chosen: Sequence[int], arguments: tuple[Any, Any]) -> Iterator[Part]:
    """The chosen rows of a call in canonical parts, shortest first.

    Args:
        rows: All rows of the call.
        chosen: Numbers of those wanted.
        arguments: Positional and named arguments of the call.
    """
    tensors = list(tensors_of(arguments))
    device = next((t.device.type for t in tensors), "cpu")
    device = device if device in ROWS else "cuda"
    size, width = len(rows.keys), rows.width
    # Only what has one entry for every position can be cut to a row's length.
    cuts = rows.stops is not None and all(
        t.dim() < 2 or t.shape[:2] == (size, width) for t in tensors if t.dim() and len(t) == size
    )
    lengths: dict[int, list[int]] = {}
    for row in chosen:
        length = int(rows.stops[row]) if cuts and rows.stops is not None else width
        length = min(-(-length // WIDTHS[device]) * WIDTHS[device], width)
        lengths.setdefault(length, []).append(row)
    for length, same in sorted(lengths.items()):
        for first in range(0, len(same), ROWS[device]):
            index = same[first : first + ROWS[device]]
            filled = index + [index[-1]] * (ROWS[device] - len(index))
            args, kwargs = _cut(arguments, filled, size, (width, length) if cuts else None)
            yield Part(_some(rows, filled, length if cuts else width), args, kwargs)


def _some(rows: Rows, index: Sequence[int], width: int) -> Rows:
    def of(bounds: np.ndarray | None) -> np.ndarray | None:
        return None if bounds is None else bounds[list(index)]

    keys = tuple(rows.keys[row] for row in index)
    return Rows(keys, of(rows.starts), of(rows.stops), width)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def _cut(value: Any, index: Sequence[int], size: int, widths: tuple[int, int] | None) -> Any:
    """The same arguments of some rows only, cut from one width to another."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or len(value) != size:
            return value
        chosen = value.index_select(0, torch.tensor(list(index), device=value.device))
        cut = widths is not None and value.dim() > 1 and value.shape[1] == widths[0]
        return chosen[:, : widths[1]] if cut and widths is not None else chosen
    if isinstance(value, Mapping):
        return {name: _cut(item, index, size, widths) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cut(item, index, size, widths) for item in value)
    return value
