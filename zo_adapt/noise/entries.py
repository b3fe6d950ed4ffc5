"""What the words of the generator are used for: the seeds of a run, the entries of a direction."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt.noise import philox

DIRECTION_STREAM, ROUNDING_STREAM = 0, 5
"""Counter words of directions and of stochastic rounding; every other use takes another."""


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


SEED_STREAM = 3
NAME = "philox-words-v1"
"""Versioned: kept in every trajectory, whose records name seeds by their counter."""
LOOK_BACK = 8192
"""Counters searched for a seed: more than the directions of one record."""


class Seeds(NamedTuple):
    """seed number c = word c of the generator's stream 3 under a key.

    Args:
        key: The run's seed, 0 <= key < 2**64.

    Example:
        >>> stream = Seeds(key=0)
        >>> stream.take(5, 2) == stream.take(0, 7)[5:]
        True
    """

    key: int

    def take(self, first: int, count: int) -> list[int]:
        """Seeds number ``first`` to ``first + count - 1``."""
        block = first // philox.WORDS
        blocks = -(-(first + count) // philox.WORDS) - block
        words = philox.words_numpy(self.key, 0, SEED_STREAM, block, blocks)
        seeds: list[int] = words[first % philox.WORDS :][:count].tolist()
        return seeds

    def find(self, wanted: Sequence[int], drawn: int) -> list[int | None]:
        """The numbers of some seeds among those drawn last; None for one that is not there.

        Args:
            wanted: Seeds.
            drawn: How many seeds of the stream were drawn so far.
        """
        span = len(wanted)
        while True:
            # Most steps use what was drawn last; a step that refers to a snapshot, older ones.
            first = max(drawn - min(span, LOOK_BACK), 0)
            number = {seed: first + i for i, seed in enumerate(self.take(first, drawn - first))}
            found = [number.get(seed) for seed in wanted]
            if None not in found or first == 0 or span >= LOOK_BACK:
                return found
            span *= 8
