"""From the host to a device without being waited for."""

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
