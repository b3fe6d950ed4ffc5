"""What a model is asked, row by row, and the rows of a call in parts of canonical shapes.

Equal keys mean equal activations of the frozen layers: a key is a digest of everything that the
model is called with for a row, its tokens up to the last one that the attention mask lets through,
its mask, its positions, and the arguments that all rows share. So a collator that draws anew, a
repeated row and a row with more padding all come out right.

What a kernel makes of a row may differ in the last bits from one shape of a batch to another. Parts
have the row's own length and a fixed number of rows, so that their shapes, and with them the bits,
depend on the row alone: on a CPU one row at a time, on a GPU, where so small parts would be bound
by launches, 16 rows of a length rounded up to a multiple of 16 tokens (the last row repeated).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

REMEMBERED = 1 << 20
"""Bytes of calls' tensors that are held, so that their keys are known; at least one call's are."""
Leaf = Tensor | str
Leaves = list[tuple[str, Leaf]]


class ForeignArgumentError(Exception):
    """A call has an argument whose content is not known, such as a cache of keys and values."""


class Rows(NamedTuple):
    """The rows of one call.

    Args:
        keys: One for each row.
        starts: First position that counts; None: all of every row.
        stops: One past the last.
        width: Positions of a row, where there are ``starts``.
    """

    keys: tuple[bytes, ...]
    starts: np.ndarray | None = None
    stops: np.ndarray | None = None
    width: int = 0

    @property
    def padded(self) -> bool:
        """Whether some row is shorter than the batch."""
        return self.starts is not None and bool((self.stops - self.starts < self.width).any())

    def span(self, row: int, width: int) -> tuple[int, int]:
        """The positions of a row that count, of ``width``."""
        if self.starts is None or self.stops is None:
            return 0, width
        return int(self.starts[row]), int(self.stops[row])


class Keys:
    """Makes the keys of calls; remembers those of the latest.

    Args:
        trims: Leave out what the attention mask hides at either end of a row.
    """

    def __init__(self, trims: bool) -> None:
        self.trims = trims
        self._known: dict[tuple[Any, ...], tuple[list[Tensor], Rows]] = {}

    def of(self, arguments: Mapping[str, Any]) -> Rows:
        """The rows of a call.

        Raises:
            ForeignArgumentError: An argument is not made of tensors and plain values.
        """
        leaves = list(_leaves("", arguments))
        leaves.append(("autocast", _autocast()))
        tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
        if any(tensor.is_inference() for tensor in tensors):
            return read_rows(leaves, self.trims)
        same = tuple(
            (label, id(leaf), leaf._version) if isinstance(leaf, Tensor) else (label, leaf)
            for label, leaf in leaves
        )
        if same not in self._known:
            while self._known and self._bytes() + sum(t.nbytes for t in tensors) > REMEMBERED:
                del self._known[next(iter(self._known))]
            # The tensors are kept too, so that no other gets their id.
            self._known[same] = tensors, read_rows(leaves, self.trims)
        return self._known[same][1]

    def _bytes(self) -> int:
        return sum(t.nbytes for tensors, _ in self._known.values() for t in tensors)


def _leaves(label: str, value: Any) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, Tensor):
        yield label, value
    elif isinstance(value, Mapping):
        for name in value:
            yield from _leaves(f"{label}.{name}", value[name])
    elif type(value) in (tuple, list):
        for index, item in enumerate(value):
            yield from _leaves(f"{label}.{index}", item)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        yield label, repr(value)
    else:
        raise ForeignArgumentError(type(value).__name__)


def _autocast() -> str:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return repr([(kind, torch.get_autocast_dtype(kind)) for kind in kinds])


def read_rows(leaves: Leaves, trims: bool) -> Rows:
    """The rows of a call's tensors, each by a hash of its content: this waits for a GPU."""
    size = max((len(t) for _, t in leaves if isinstance(t, Tensor) and t.dim() > 1), default=0)
    mask = dict(leaves).get(".attention_mask") if trims else None
    starts, stops, width = _spans(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    common, columns = hashlib.blake2b(digest_size=16), []
    for label, leaf in leaves:
        if isinstance(leaf, str):
            common.update(f"{label}={leaf};".encode())
            continue
        bits = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        by_row = leaf.dim() > 0 and len(leaf) == size
        cut = stops is not None and leaf.shape[:2] == (size, width)
        shape = tuple(leaf.shape[2 if cut else 1 if by_row else 0 :])
        common.update(f"{label}:{leaf.dtype}{by_row}{shape};".encode())
        if by_row:
            columns.append((bits.reshape(size, bits.size // size), cut))
        else:
            common.update(bits.data)
    keys = []
    for row in range(size):
        key = common.copy()
        for column, cut in columns:
            used = (
                column.shape[1] * int(stops[row]) // width
                if cut and stops is not None
                else column.shape[1]
            )
            key.update(used.to_bytes(8, "little"))
            key.update(column[row, :used].data)
        keys.append(key.digest())
    return Rows(tuple(keys), starts, stops, width)


def _spans(mask: Tensor | None) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """First and one past the last position that counts; a row without any counts whole."""
    if mask is None:
        return None, None, 0
    counts = mask.detach().cpu().numpy() != 0
    width = counts.shape[1]
    empty = ~counts.any(1)
    starts = np.where(empty, 0, counts.argmax(1))
    stops = np.where(empty, width, width - counts[:, ::-1].argmax(1))
    return starts, stops, width


ROWS = {"cpu": 1, "cuda": 16}
WIDTHS = {"cpu": 1, "cuda": 16}
"""Rows of a part, and what its width is a multiple of, by device; others are as a GPU."""


class Part(NamedTuple):
    """Some rows of a call, as a call of its own."""

    rows: Rows
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parts_of(rows: Rows, chosen: Sequence[int], arguments: tuple[Any, Any]) -> Iterator[Part]:
    """The chosen rows of a call in canonical parts, shortest first."""
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
