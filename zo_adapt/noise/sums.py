"""What is added to the weights in one call, on the host and as a GPU reads it, sent there without
being waited for.
"""

import struct
from collections.abc import Sequence
from contextvars import ContextVar
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS = 64
"""Copies that may be under way at a time."""


def sendable(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of these numbers from which a device can copy without being waited for.

    For a GPU it is made in pinned memory, which torch gives out again once it is copied. (Pinning a
    tensor that is there asks the driver about it first, which takes longer than the copy; without
    it the copy waits for the work before it.)
    """
    if device.type != "cuda":
        return torch.from_numpy(numbers.copy())
    dtype = torch.from_numpy(numbers[:0].copy()).dtype
    tensor = torch.empty(numbers.shape, dtype=dtype, pin_memory=True)
    tensor.numpy()[...] = numbers
    return tensor


class Sender:
    """Copies numbers to a GPU again and again, by way of pinned memory that stays.

    Finding pinned memory for every copy takes longer than the copy. Its rows are used in turn, each
    again when its last copy is done.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._bytes: list[memoryview] = []
        self._copied: list[torch.cuda.Event] = []
        self._next = 0

    def send(self, numbers: bytes, there: Tensor) -> None:
        """Copy int64 numbers to a tensor of as many, in the order of the GPU's other work."""
        count = len(numbers) // 8
        if self._rows is None or self._rows.shape[1] < count:
            self._rows = torch.empty((ROWS, 2 * count + 128), dtype=torch.int64, pin_memory=True)
            self._bytes = [memoryview(row) for row in self._rows.numpy().view(np.uint8)]
            self._copied = [torch.cuda.Event() for _ in range(ROWS)]
        row = self._next = (self._next + 1) % ROWS
        self._copied[row].synchronize()
        self._bytes[row][: len(numbers)] = numbers
        there.copy_(self._rows[row, :count], non_blocking=True)
        self._copied[row].record(torch.cuda.current_stream(there.device))


HEADER = 3
"""Numbers that describe a sum to a kernel."""


class Sum(NamedTuple):
    """What is added: sum c z(seed), to ``decay`` times what was there.

    Args:
        terms: (seed, coefficient) pairs, added in this order.
        decay: Factor on the weights.
    """

    terms: Sequence[tuple[int, float]] = ()
    decay: float = 1.0


class Sums:
    """The sums of one call and how results are rounded; on a GPU, packed once for many launches.

    Args:
        sums: One for each index that places name.
        rounding: Seed of stochastic rounding in fp16 and bf16; None rounds to the nearest.
        memory: Where they lie on a GPU; None is wherever there is room.
    """

    def __init__(
        self,
        sums: Sequence[Sum],
        rounding: int | None = None,
        memory: "Memory | None" = None,
    ) -> None:
        self.sums, self.rounding = sums, rounding
        self._memory = memory
        self._packed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Header and terms as int64 in a device's memory.

        The header holds the rounding's seed and, for each sum, its first term, the number of its
        terms and the bits of its decay; a term is a seed and the bits of its coefficient.
        """
        if device not in self._packed:
            numbers = self._numbers()
            if self._memory is None:
                there = sendable(np.frombuffer(numbers, np.int64), device)
                there = there.to(device, non_blocking=True)
            else:
                there = self._memory.holding(numbers, device)
            first_term = 1 + HEADER * len(self.sums)
            self._packed[device] = there[:first_term], there[first_term:]
        return self._packed[device]

    @property
    def generation(self) -> int:
        """How often the memory they lie in has moved: a captured graph reads them there."""
        return 0 if self._memory is None else self._memory.generation

    def _numbers(self) -> bytes:
        described: list[int | float] = []
        terms: list[int | float] = []
        for pairs, decay in self.sums:
            described += (len(terms) // 2, len(pairs), decay)
            terms += chain.from_iterable(pairs)
        layout = f"=Q{len(self.sums) * 'qqd'}{len(terms) // 2 * 'Qd'}"
        return struct.pack(layout, self.rounding or 0, *described, *terms)


GRAPH_TABLES: ContextVar[list[Tensor] | None] = ContextVar("graph_tables", default=None)
"""While a graph is captured: what its kernels read at every replay, for the graph to keep."""


class Memory:
    """Room on each GPU for the sums of one call after another, always at the same address.

    A captured graph reads there what the next call has written. ``generation`` counts the times
    that the room became too small and was moved.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._rooms: dict[torch.device, tuple[Tensor, Sender]] = {}

    def holding(self, numbers: bytes, device: torch.device) -> Tensor:
        """The int64 numbers on the device, in place of those of the call before."""
        count = len(numbers) // 8
        buffer, sender = self._rooms.get(device) or (None, Sender())
        if buffer is None or len(buffer) < count:
            buffer = torch.empty(2 * count + 512, dtype=torch.int64, device=device)
            self._rooms[device] = buffer, sender
            self.generation += 1
        there = buffer[:count]
        sender.send(numbers, there)
        return there
