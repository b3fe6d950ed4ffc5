"""The entries of a direction in a tensor: what the words of the generator become."""

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt.noise import philox

DIRECTION_STREAM = 0
"""Counter word of directions; every other use takes another."""


class Entries(Protocol):
    """A distribution with zero mean and unit variance, addressed by block of the generator."""

    @property
    def per_block(self) -> int:
        """Elements that one block of the generator gives."""

    def from_numpy_words(self, words: np.ndarray) -> np.ndarray:
        """The fp32 values of some blocks."""

    def from_torch_words(self, words: Tensor) -> Tensor:
        """The fp32 values of some blocks."""


def tensor_key(name: str) -> int:
    """The 64-bit key of a tensor: equal shapes with different names get different noise."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def numpy_entries(entries: Entries, seed: int, key: int, first: int, size: int) -> np.ndarray:
    """Entries ``first .. first + size`` of a direction in a tensor, as fp32.

    Args:
        entries: Of which distribution.
        seed: The direction.
        key: The tensor's.
        first: May lie within a block.
        size: How many.
    """
    block, offset = divmod(first, entries.per_block)
    blocks = -(-(offset + size) // entries.per_block)
    words = philox.words_numpy(seed, key, DIRECTION_STREAM, block, blocks)
    return entries.from_numpy_words(words)[offset : offset + size]


def torch_entries(entries: Entries, seed: int, key: int, size: int, device: torch.device) -> Tensor:
    """Entries ``0 .. size``, made on a device."""
    numbers = torch.arange(-(-size // entries.per_block), device=device)
    keys = torch.full_like(numbers, philox.signed(key))
    return entries.from_torch_words(philox.words_torch(seed, keys, DIRECTION_STREAM, numbers))[
        :size
    ]
