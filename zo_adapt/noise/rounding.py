"""Stochastic rounding to half precision, by the generator of the noise."""

import numpy as np
import torch

from zo_adapt.noise import philox

ROUNDING_STREAM = 5
"""Counter word of stochastic rounding; every other use takes another."""
PER_BLOCK = 16
"""Elements that one block of the generator rounds: 16 bits each."""


def fractions(seed: int, key: int, first: int, size: int) -> np.ndarray:
    """Uniform 16-bit numbers, one an element."""
    block, offset = divmod(first, PER_BLOCK)
    blocks = -(-(offset + size) // PER_BLOCK)
    words = philox.words_numpy(seed, key, ROUNDING_STREAM, block, blocks)
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
