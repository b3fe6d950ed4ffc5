"""Directions along one coordinate each: z(s) = +-sqrt(d) e_l with l = s mod d.

The length is that of the other kinds, so that a mu means as much: over random seeds E z = 0 and
E z z^T = I. The sign is the seed's highest bit. The seeds 0 .. d - 1 are all coordinates, once each
and upwards: the mean of their estimates,

    1/d sum_l [f(theta + h e_l) - f(theta - h e_l)] / (2 mu) z_l
        = sum_l [f(theta + h e_l) - f(theta - h e_l)] / (2 h) e_l,    h = mu sqrt(d),

is the gradient by coordinates (Liu et al. 2018, arXiv 1805.10367, CoordGradEst).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import OptionError
from zo_adapt.noise.entries import Entries, tensor_key

MOST_COORDINATES = 4_000
"""Scalars of a view: so many seeds with their coefficients fit a record of the trajectory."""
UPWARDS = 1 << 63
"""Seeds from here on point downwards."""


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a view's scalars, counted through its tensors in their order.

    Args:
        starts: The number of a tensor's first scalar, by the tensor's key; others stay as they are.
        count: d, how many scalars there are.

    Example:
        >>> both = Coordinates().over({"a": 3, "b": 1})
        >>> both.at(3), both.at(2**63 + 1)
        ((3, 2.0), (1, -2.0))
    """

    starts: Mapping[int, int] = field(default_factory=dict)
    count: int = 0

    name = "coordinates-v1"

    def over(self, sizes: Mapping[str, int]) -> Self:
        """Those of tensors by name.

        Raises:
            OptionError: More scalars than ``MOST_COORDINATES``.
        """
        starts, count = dict[int, int](), 0
        for name, size in sizes.items():
            starts[tensor_key(name)], count = count, count + size
        if count > MOST_COORDINATES:
            raise OptionError(
                f"noise='coordinates' over {count:,} scalars that move; it is for small views, of "
                f"at most {MOST_COORDINATES:,}: choose a smaller view, or 'gaussian'"
            )
        return type(self)(starts, count)

    @property
    def largest(self) -> float:
        """Sqrt(d)."""
        return math.sqrt(self.count)

    @property
    def entries(self) -> Entries:
        """There are none: a seed says which coordinate it is, and nothing is drawn."""
        raise TypeError("directions along coordinates are not drawn")

    def matrices(self, shape: Sequence[int]) -> None:
        """None."""

    def at(self, seed: int) -> tuple[int, float]:
        """The scalar that a direction moves, and how far, a number of fp32."""
        root = float(np.float32(self.largest))
        return seed % max(self.count, 1), root if seed < UPWARDS else -root

    def values(self, seed: int, key: int, size: int, device: torch.device) -> Tensor:
        """z(seed) of one tensor, flat."""
        z = torch.zeros(size, device=device)
        number, value = self.at(seed)
        if key in self.starts and 0 <= (element := number - self.starts[key]) < size:
            z[element] = value
        return z
