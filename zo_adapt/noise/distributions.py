"""Noise: z(seed, tensor name, element), a pure function of the three.

Every kind maps the words of a counter-based generator by additions and multiplications of fp32
constants, in one order, so that the numbers are bit-identical on every device; nothing reads or
moves the global generators.

Memory: no state. On the CPU the Gaussian's 65,536 values lie in a table (256 KiB).
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import OptionError
from zo_adapt.noise.coordinates import Coordinates
from zo_adapt.noise.entries import Entries, tensor_key, torch_entries
from zo_adapt.noise.low_rank import Matrices, as_matrices, torch_factors, torch_values


class Noise(Protocol):
    """Directions with zero mean and the identity as covariance.

    ``name`` is versioned: a log written with it can be replayed only by the same mapping.
    """

    @property
    def name(self) -> str:
        """Versioned."""

    @property
    def largest(self) -> float:
        """No |z| is larger."""

    @property
    def entries(self) -> Entries:
        """What is drawn: the elements of a tensor, or of the factors of its matrices."""

    def matrices(self, shape: Sequence[int]) -> Matrices | None:
        """How a tensor is made of factors; None: every element is drawn for itself."""


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


class _ByElement:
    """Every element is drawn for itself."""

    largest = 4.5

    @property
    def entries(self) -> Self:
        """Its own."""
        return self

    def matrices(self, shape: Sequence[int]) -> None:
        """None."""


class Gaussian(_ByElement):
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


class Rademacher(_ByElement):
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


@dataclass(frozen=True)
class LowRank:
    """Gaussian factors a and b; one Gaussian for every element of what is no matrix.

    Args:
        rank: r >= 1.

    Raises:
        OptionError: A rank below 1.

    Example:
        >>> LowRank().name, LowRank().matrices((6, 4))
        ('lowrank1-gaussian-philox-v1', Matrices(number=1, height=6, width=4, rank=1))
        >>> LowRank(4).matrices((8, 16, 32)), LowRank(4).matrices((6, 4)), LowRank().matrices((6,))
        (Matrices(number=8, height=16, width=32, rank=4), None, None)
    """

    rank: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise OptionError(f"a direction of rank {self.rank!r}; choose an integer >= 1")

    @property
    def name(self) -> str:
        """Versioned."""
        return f"lowrank{self.rank}-{GAUSSIAN.name}"

    @property
    def largest(self) -> float:
        """|sum_p a_p b_p| / sqrt(r) <= sqrt(r) max |a| max |b|."""
        return math.sqrt(self.rank) * GAUSSIAN.largest**2

    @property
    def entries(self) -> Gaussian:
        """Of the factors, and of what is no matrix."""
        return GAUSSIAN

    def matrices(self, shape: Sequence[int]) -> Matrices | None:
        """How a tensor is made of factors."""
        return as_matrices(shape, self.rank)


_KINDS: dict[str, Noise] = {
    "gaussian": GAUSSIAN,
    "rademacher": RADEMACHER,
    "coordinates": Coordinates(),
}
_LOW_RANK = re.compile(r"lowrank(?:-?([1-9]\d{0,3}))?(-gaussian-philox-v1)?")


def noise_named(name: str) -> Noise:
    """The noise of a short name (``gaussian``) or a versioned one (``gaussian-philox-v1``).

    Raises:
        OptionError: No such noise.

    Example:
        >>> noise_named("lowrank").name, noise_named("lowrank-4").name
        ('lowrank1-gaussian-philox-v1', 'lowrank4-gaussian-philox-v1')
    """
    for short, noise in _KINDS.items():
        if name in (short, noise.name):
            return noise
    found = _LOW_RANK.fullmatch(name) if isinstance(name, str) else None
    if found is not None:
        return LowRank(int(found[1] or 1))
    raise OptionError(
        f"noise {name!r} is unknown; choose one of {sorted(_KINDS)}, 'lowrank', or a rank as in "
        "'lowrank-4'"
    )


def draw(
    noise: Noise, seed: int, name: str, shape: int | Sequence[int], device: torch.device
) -> Tensor:
    """z(seed, name) of a tensor, as fp32: the reference.

    Args:
        noise: Which distribution.
        seed: The direction, 0 <= seed < 2**64.
        name: The tensor's name in the view.
        shape: Its shape, or the number of elements of a vector.
        device: Where the numbers are made; they are the same everywhere.

    Example:
        >>> draw(RADEMACHER, 7, "weight", 4, torch.device("cpu"))
        tensor([-1.,  1., -1., -1.])
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    key, numel, of = tensor_key(name), math.prod(shape), noise.matrices(shape)
    if isinstance(noise, Coordinates):
        return noise.values(seed, key, numel, device).view(shape)
    if of is None:
        return torch_entries(noise.entries, seed, key, numel, device).view(shape)
    a, b = torch_factors(noise.entries, seed, key, of, device)
    return torch_values(a, b, of, 0, numel).view(shape)
