"""The counter-based generator, Philox4x64-10 (Salmon et al., SC 2011), and what its words are for.

``random_words(key, counter)`` is a pure function of two 64-bit keys and a counter, so a number does
not depend on device, chunking, order or the number of workers. On the CPU numpy's own generator of
that name computes it; on any other device the same function is written in torch's int64 arithmetic.
Its words are the seeds of a run, the entries of a direction, and what rounds to half precision.
"""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

WORDS = 4
"""64-bit words that one counter value gives."""

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_local = threading.local()


def _state() -> dict[str, Any]:
    """Of a generator of which nothing was drawn yet."""
    return {
        "bit_generator": "Philox",
        "state": {"counter": np.zeros(4, np.uint64), "key": np.zeros(2, np.uint64)},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }


def words_numpy(seed: int, key: int, stream: int, start: int, blocks: int) -> np.ndarray:
    """Blocks ``start .. start + blocks`` of one stream as uint64, shape (blocks * 4,).

    Args:
        seed: First key word (the direction).
        key: Second key word (the tensor).
        stream: Last counter word (what the numbers are for).
        start: First block.
        blocks: How many blocks of four words.
    """
    generator = getattr(_local, "generator", None)
    if generator is None:
        # Constructing one reads the system's entropy (12 us); setting its state does not (2 us).
        generator = np.random.Philox(key=[0, 0])
        _local.state = _state()
        _local.generator = generator  # last: an interrupt in between leaves no half of it
    inner = _local.state["state"]
    # numpy increments the counter before it is used: block b is made from counter b + 1.
    inner["counter"][0], inner["counter"][3] = start, stream
    inner["key"][0], inner["key"][1] = seed, key
    generator.state = _local.state  # copied
    words: np.ndarray = generator.random_raw(blocks * WORDS)
    return words


def signed(value: int) -> int:
    """The int64 with the same bits as the uint64 ``value``."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned product, from 32-bit limbs."""
    c_high, c_low = constant >> 32, constant & _MASK32
    x_high, x_low = (x >> 32) & _MASK32, x & _MASK32
    middle = x_high * c_low + ((x_low * c_low >> 32) & _MASK32)
    other = x_low * c_high + (middle & _MASK32)
    high = x_high * c_high + ((middle >> 32) & _MASK32) + ((other >> 32) & _MASK32)
    return high, x * signed(constant)


def words_torch(seed: int, keys: Tensor, stream: int, blocks: Tensor) -> Tensor:
    """The words of the given blocks as int64 (bits of uint64), shape (4, n).

    Args:
        seed: First key word.
        keys: Second key word of each block, int64 bits, shape (n,).
        stream: Last counter word.
        blocks: Block numbers, int64, shape (n,).
    """
    c0, c1 = blocks + 1, torch.zeros_like(blocks)
    c2, c3 = torch.zeros_like(blocks), torch.full_like(blocks, signed(stream))
    for round_number in range(_ROUNDS):
        k0 = signed(seed + round_number * _WEYL[0])
        k1 = keys + signed(round_number * _WEYL[1])
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return torch.stack((c0, c1, c2, c3))


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
    words = words_numpy(seed, key, DIRECTION_STREAM, block, blocks)
    return entries.from_numpy_words(words)[offset : offset + size]


def torch_entries(entries: Entries, seed: int, key: int, size: int, device: torch.device) -> Tensor:
    """Entries ``0 .. size``, made on a device."""
    numbers = torch.arange(-(-size // entries.per_block), device=device)
    keys = torch.full_like(numbers, signed(key))
    return entries.from_torch_words(words_torch(seed, keys, DIRECTION_STREAM, numbers))[:size]


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
        block = first // WORDS
        blocks = -(-(first + count) // WORDS) - block
        words = words_numpy(self.key, 0, SEED_STREAM, block, blocks)
        seeds: list[int] = words[first % WORDS :][:count].tolist()
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


PER_BLOCK = 16
"""Elements that one block of the generator rounds: 16 bits each."""


def fractions(seed: int, key: int, first: int, size: int) -> np.ndarray:
    """Uniform 16-bit numbers, one an element."""
    block, offset = divmod(first, PER_BLOCK)
    blocks = -(-(offset + size) // PER_BLOCK)
    words = words_numpy(seed, key, ROUNDING_STREAM, block, blocks)
    return words.view(np.uint16)[offset : offset + size]


def round_at_random(total: np.ndarray, dtype: torch.dtype, fractions: np.ndarray) -> None:
    """Make every value one that the dtype holds: up with the probability that keeps the mean.

    The bits that the dtype drops, and a uniform number of as many bits, are added; their carry is
    the rounding. What the dtype holds exactly stays.
    """
    if dtype == torch.bfloat16:
        bits = total.view(np.uint32)
        bits += fractions
        bits &= np.uint32(0xFFFF0000)
        return
    # Scaled by 2**-112, fp16's small numbers, evenly spaced, become those of fp32.
    total *= np.float32(2.0**-112)
    bits = total.view(np.uint32)
    bits += fractions >> np.uint16(3)
    bits &= np.uint32(0xFFFFE000)
    total *= np.float32(2.0**112)
