"""Noise: z(seed, tensor name, element), a pure function of the three.

Both kinds map the words of a counter-based generator by additions and multiplications of fp32
constants, in one order, so that the numbers are bit-identical on every device; nothing reads or
moves the global generators.

Memory: no state. On the CPU the Gaussian's 65,536 values lie in a table (256 KiB).
"""

import functools
import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import OptionError
from zo_adapt.noise import philox

LARGEST_VALUE = 4.5
"""No |z| is larger, whatever the noise."""
DIRECTION_STREAM, ROUNDING_STREAM = 0, 5
"""Counter words of directions and of stochastic rounding; every other use takes another."""


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


def tensor_key(name: str) -> int:
    """The 64-bit key of a tensor: equal shapes with different names get different noise."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


QUANTILE = (
    (4.32492924, 0.0, 0.0, 0.0),
    (4.07621622, 0.0, 0.0, 0.0),
    (4.15871143, -0.324718207, 0.0, 0.0),
    (4.19463778, -0.980616808, 0.643526018, -0.189446554),
    (4.03927088, -1.03423965, 0.68536979, -0.203506678),
    (3.87633157, -1.08555388, 0.720604122, -0.214351013),
    (3.70595312, -1.13895762, 0.754393101, -0.224256769),
    (3.52813268, -1.19893897, 0.79145956, -0.235144645),
    (3.3420155, -1.26752746, 0.832588911, -0.247133255),
    (3.14659572, -1.34780002, 0.879313469, -0.260676473),
    (2.94057155, -1.44389176, 0.93334496, -0.276282042),
    (2.72227454, -1.56174254, 0.99659133, -0.294531822),
    (2.4895978, -1.71052659, 1.07107854, -0.31618011),
    (2.23988485, -1.90523672, 1.1579926, -0.34245497),
    (1.97000611, -2.17277789, 1.255355, -0.378272057),
    (1.68517447, -2.60821986, 1.42315209, -0.500280499),
)
"""|z| = c_0 + c_1 m + c_2 m^2 + c_3 m^3 in the mantissa 1/2 <= m < 1 of t = m 2^e; row e.

t = k + 1/2 for k = 0 .. 32767; t / 65536 is the probability of a larger value. At most 2e-4 from
the normal quantile, and scaled so that the mean of z^2 is 1: the estimators need E[z z^T] = I.
"""


@functools.cache
def _gaussian_table(device: torch.device) -> Tensor:
    mantissa, row = torch.frexp(torch.arange(1 << 15, dtype=torch.float32) + 0.5)
    c0, c1, c2, c3 = torch.tensor(QUANTILE)[row.long()].unbind(1)
    size = ((c3 * mantissa + c2) * mantissa + c1) * mantissa + c0
    table: Tensor = torch.stack((size, -size), 1).flatten().to(device)  # odd fields are negative
    return table


@functools.cache
def _sign_table(device: torch.device) -> Tensor:
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).float().to(device)


@functools.cache
def _gaussian_array() -> np.ndarray:
    return _gaussian_table(torch.device("cpu")).numpy()


@functools.cache
def _sign_array() -> np.ndarray:
    return _sign_table(torch.device("cpu")).numpy()


class Gaussian:
    """N(0, 1) on 65,536 equally likely quantiles (|z| < 4.33): 16 bits an element.

    Example:
        >>> GAUSSIAN.name, GAUSSIAN.per_block
        ('gaussian-philox-v1', 16)
    """

    name = "gaussian-philox-v1"
    per_block = 16

    def from_numpy_words(self, words: np.ndarray) -> np.ndarray:
        """The fp32 values of some blocks."""
        values: np.ndarray = _gaussian_array().take(words.view(np.uint16))
        return values

    def from_torch_words(self, words: Tensor) -> Tensor:
        """The fp32 values of some blocks."""
        index = words.T.contiguous().view(torch.int16).flatten().int() & 0xFFFF
        values: Tensor = _gaussian_table(words.device)[index]
        return values


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
        values: np.ndarray = _sign_array().take(words.view(np.uint8), axis=0).reshape(-1)
        return values

    def from_torch_words(self, words: Tensor) -> Tensor:
        """The fp32 values of some blocks."""
        index = words.T.contiguous().view(torch.uint8).flatten().int()
        return _sign_table(words.device)[index].flatten()


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
