"""Noise: z(seed, tensor name, element), a pure function of the three.

Both kinds map the words of a counter-based generator through a table of constants, so that the
numbers are bit-identical on every device; nothing reads or moves the global generators.

Memory: no state. The Gaussian's table holds 65,536 fp32 values (256 KiB) per device.
"""

import functools
import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt import philox
from zo_adapt.errors import OptionError

LARGEST_VALUE = 4.5
"""No |z| is larger, whatever the noise."""
DIRECTION_STREAM = 0
"""Counter word of the directions; every other use of the generator takes another."""


class Noise(Protocol):
    """A distribution with zero mean and unit variance, addressed by block.

    ``name`` is versioned: a log written with it can be replayed only by the same mapping.
    """

    @property
    def name(self) -> str:
        """Versioned."""

    @property
    def per_block(self) -> int:
        """Elements that one block of the generator gives."""

    def from_numpy_words(self, words: np.ndarray) -> np.ndarray:
        """The fp32 values of some blocks."""

    def from_torch_words(self, words: Tensor) -> Tensor:
        """The fp32 values of some blocks."""

    def levels(self, device: torch.device) -> Tensor:
        """The values that z takes; a field of the words is an index into them."""


def tensor_key(name: str) -> int:
    """The 64-bit key of a tensor: equal shapes with different names get different noise."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@functools.cache
def _gaussian_table(device: torch.device) -> Tensor:
    levels = 1 << 16
    probability = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    quantile = torch.special.ndtri(probability)
    # The midpoints' variance is 1 - 4e-6; the estimators need E[z z^T] = I.
    quantile /= quantile.square().mean().sqrt()
    table: Tensor = quantile.float().to(device)
    return table


@functools.cache
def _sign_table(device: torch.device) -> Tensor:
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).float().to(device)


class Gaussian:
    """N(0, 1) on 65,536 equally likely quantiles (|z| < 4.4): 16 bits an element.

    Example:
        >>> GAUSSIAN.name, GAUSSIAN.per_block
        ('gaussian-philox-v1', 16)
    """

    name = "gaussian-philox-v1"
    per_block = 16

    def from_numpy_words(self, words: np.ndarray) -> np.ndarray:
        """The fp32 values of some blocks."""
        table = _gaussian_table(torch.device("cpu")).numpy()
        values: np.ndarray = table.take(words.view(np.uint16))
        return values

    def from_torch_words(self, words: Tensor) -> Tensor:
        """The fp32 values of some blocks."""
        index = words.T.contiguous().view(torch.int16).flatten().int() & 0xFFFF
        values: Tensor = _gaussian_table(words.device)[index]
        return values

    def levels(self, device: torch.device) -> Tensor:
        """The values that z takes, in order of the field."""
        return _gaussian_table(device)


class Rademacher:
    """+1 or -1 with equal probability: one bit an element.

    Example:
        >>> RADEMACHER.name, RADEMACHER.per_block
        ('rademacher-philox-v1', 256)
    """

    name = "rademacher-philox-v1"
    per_block = 256

    def from_numpy_words(self, words: np.ndarray) -> np.ndarray:
        """The fp32 values of some blocks."""
        table = _sign_table(torch.device("cpu")).numpy()
        values: np.ndarray = table.take(words.view(np.uint8), axis=0).reshape(-1)
        return values

    def from_torch_words(self, words: Tensor) -> Tensor:
        """The fp32 values of some blocks."""
        index = words.T.contiguous().view(torch.uint8).flatten().int()
        return _sign_table(words.device)[index].flatten()

    def levels(self, device: torch.device) -> Tensor:
        """The values that z takes, in order of the field."""
        return _sign_table(device)[:2, 0].contiguous()


GAUSSIAN = Gaussian()
RADEMACHER = Rademacher()
_KINDS: dict[str, Noise] = {"gaussian": GAUSSIAN, "rademacher": RADEMACHER}


def noise_named(name: str) -> Noise:
    """The noise of a short name (``gaussian``) or a versioned one (``gaussian-philox-v1``).

    Raises:
        OptionError: No such noise.
    """
    for short, noise in _KINDS.items():
        if name in (short, noise.name):
            return noise
    raise OptionError(f"noise {name!r} is unknown; choose one of {sorted(_KINDS)}")


def draw(noise: Noise, seed: int, name: str, numel: int, device: torch.device) -> Tensor:
    """z(seed, name) for elements 0 .. numel, as fp32 of shape (numel,): the reference.

    Args:
        noise: Which distribution.
        seed: The direction, 0 <= seed < 2**64.
        name: The tensor's name in the view.
        numel: How many elements, in row-major order.
        device: Where the numbers are made; they are the same everywhere.

    Example:
        >>> draw(RADEMACHER, 7, "weight", 4, torch.device("cpu"))
        tensor([-1.,  1., -1., -1.])
    """
    blocks = -(-numel // noise.per_block)
    key = philox.signed(tensor_key(name))
    numbers = torch.arange(blocks, device=device)
    words = philox.words_torch(seed, torch.full_like(numbers, key), DIRECTION_STREAM, numbers)
    return noise.from_torch_words(words)[:numel]
