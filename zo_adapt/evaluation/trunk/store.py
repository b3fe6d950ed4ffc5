"""Activations of rows of any length, within a limit of bytes, on a device, the host or a disk."""

import logging
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_adapt.evaluation.trunk.keys import Rows

logger = logging.getLogger(__name__)
Storage = Literal["device", "host", "disk"]
PARTS = 16
"""The room is taken in so many parts, each when it is needed."""
REMEMBERED = 64
"""Batches whose places are remembered, so that evaluating one again costs no index."""


class _Piece(NamedTuple):
    """Where part of a batch lies: ``out[positions] = part[slots]``."""

    part: int
    slots: Tensor
    positions: Tensor


class Store:
    """Keeps (length, ...) activations by key; when full, the longest unused make room.

    Every position of every row has a slot of its own, so rows of any lengths fill the room, and a
    padded batch is put together by one gather for each part of the room that it is spread over.

    Args:
        max_bytes: Most bytes of activations.
        storage: "device" (where the activations are made), "host", or "disk": memory-mapped files
            that have no name any more, so that nothing is left behind.
    """

    def __init__(self, max_bytes: int, storage: Storage) -> None:
        self.max_bytes, self.storage = max_bytes, storage
        self._warned = False
        self.clear()

    def clear(self) -> None:
        """Forget every row and give the room back."""
        self._parts: list[Tensor] = []
        self._slots: dict[bytes, np.ndarray] = {}
        self._free: list[int] = []
        self._places: dict[tuple[object, ...], list[_Piece]] = {}
        self._limit: int | None = None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes occupied."""
        return sum(part.nbytes for part in self._parts)

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Whether every row is here; those that are count as used now."""
        for key in keys:
            if key in self._slots:
                self._slots[key] = self._slots.pop(key)
        return all(key in self._slots for key in keys)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Numbers of the rows that are not here, each key once."""
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self._slots:
                first.setdefault(key, row)
        return list(first.values())

    def put(self, rows: Rows, hidden: Tensor, beside: Collection[bytes] = ()) -> None:
        """Keep the rows of (b, t, ...) activations that are not here yet, as far as there is room.

        Args:
            rows: Their keys and spans.
            hidden: The activations.
            beside: Further keys that must not make room.

        Raises:
            ValueError: They have another shape or dtype than those before.
        """
        self._begin(hidden)
        width, used = hidden.shape[1], {*rows.keys, *beside}
        slots: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        for row, key in enumerate(rows.keys):
            if key in self._slots:
                continue
            start, stop = rows.span(row, width)
            found = self._take(stop - start, used)
            if found is None:
                self._tell()
                continue
            self._slots[key] = found
            slots.append(found)
            positions.append(np.arange(row * width + start, row * width + stop))
        flat = hidden.reshape(hidden.shape[0] * width, -1)
        for piece in self._pieces(slots, positions):
            values = flat.index_select(0, piece.positions.to(flat.device))
            part = self._parts[piece.part]
            part.index_copy_(0, piece.slots, values.to(part.device))

    def get(self, rows: Rows, width: int, device: torch.device) -> Tensor:
        """The activations (b, width, ...) of rows that are here, zero where they are padded."""
        starts = None if rows.starts is None else rows.starts.tobytes()
        place = (rows.keys, starts, width)
        if place not in self._places:
            if len(self._places) >= REMEMBERED:
                self._places.clear()
            slots = [self._slots[key] for key in rows.keys]
            spans = [rows.span(row, width) for row in range(len(rows.keys))]
            positions = [np.arange(r * width + a, r * width + b) for r, (a, b) in enumerate(spans)]
            self._places[place] = self._pieces(slots, positions)
        size, first = len(rows.keys) * width, self._parts[0]
        pinned = first.device.type == "cpu" and device.type == "cuda"
        flat = torch.zeros(
            (size, first.shape[1]), dtype=first.dtype, device=first.device, pin_memory=pinned
        )
        for piece in self._places[place]:
            values = self._parts[piece.part].index_select(0, piece.slots)
            if len(piece.positions) == size:
                flat = values if not pinned else flat.copy_(values)
            else:
                flat.index_copy_(0, piece.positions, values)
        out = flat.view(len(rows.keys), width, *self._shape)
        return out.to(device, non_blocking=True)

    def _begin(self, hidden: Tensor) -> None:
        """Settle shape, dtype and place with the first activations."""
        made = (tuple(hidden.shape[2:]), hidden.dtype, hidden.device)
        if self._limit is None:
            self._shape, self._dtype, self._device = made
            width = hidden[0, 0].numel() * hidden.element_size()
            self._limit = self.max_bytes // max(width, 1)
        if made != (self._shape, self._dtype, self._device):
            raise ValueError(f"activations of {made} after {self._shape, self._dtype}")

    def _take(self, count: int, used: set[bytes]) -> np.ndarray | None:
        """Slots for a row; room is made by dropping rows that the batch does not use."""
        while len(self._free) < count and self._grow():
            pass
        while len(self._free) < count:
            # The batch's own rows are the latest in the order, so this ends at the first or second.
            oldest = next((key for key in self._slots if key not in used), None)
            if oldest is None:
                return None
            self._free += self._slots.pop(oldest).tolist()
            self._places.clear()
            self._tell()
        found = np.array(self._free[len(self._free) - count :], dtype=np.int64)
        del self._free[len(self._free) - count :]
        return found

    def _grow(self) -> bool:
        """One more part of the room, if the limit and the machine allow it."""
        taken, limit = sum(map(len, self._parts)), self._limit or 0
        size = min(-(-limit // PARTS), limit - taken)
        if size < 1:
            return False
        width = int(np.prod(self._shape, dtype=np.int64))
        try:
            part = self._room(size, width)
        except (OSError, RuntimeError):  # torch's own out-of-memory errors are RuntimeErrors
            self._limit = taken
            return False
        self._parts.append(part)
        self._free += range(taken + size - 1, taken - 1, -1)
        return True

    def _room(self, size: int, width: int) -> Tensor:
        if self.storage != "disk":
            device = self._device if self.storage == "device" else torch.device("cpu")
            return torch.empty((size, width), dtype=self._dtype, device=device)
        with tempfile.TemporaryDirectory(prefix="zo_adapt-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "activations"
            with path.open("wb") as file:
                # A hole in the file that finds no room later would be a bus error.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size * width * self._dtype.itemsize)
            name = str(path)
            mapped = torch.from_file(name, shared=True, size=size * width, dtype=self._dtype)
        return mapped.view(size, width)

    def _pieces(self, slots: list[np.ndarray], positions: list[np.ndarray]) -> list[_Piece]:
        """The places of slots, part by part; the parts are equal but for the last."""
        if not slots:
            return []
        size = len(self._parts[0])
        slot, position = np.concatenate(slots), np.concatenate(positions)
        pieces = []
        for part in np.unique(slot // size).tolist():
            here = slot // size == part
            index = [torch.from_numpy(a) for a in (slot[here] - part * size, position[here])]
            on = self._parts[part].device
            pieces.append(_Piece(part, index[0].to(on), index[1].to(on)))
        return pieces

    def _tell(self) -> None:
        if not self._warned:
            self._warned = True
            logger.info(
                "%d rows fill the %d bytes kept for the frozen layers; more bytes, more reuse",
                len(self),
                self.max_bytes,
            )
