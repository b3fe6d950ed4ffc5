"""The counter-based generator: Philox4x64-10 (Salmon et al., SC 2011).

``random_words(key, counter)`` is a pure function of two 64-bit keys and a counter, so a number does
not depend on device, chunking, order or the number of workers. On the CPU numpy's own generator of
that name computes it; on any other device the same function is written in torch's int64 arithmetic.
"""

import threading
from typing import Any

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
