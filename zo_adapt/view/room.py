"""Room for a step: whether the weights' dtype can hold what it would make of them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zo_adapt.errors import StepTooLargeError
from zo_adapt.term import Shift, Term


class Room:
    """Bounds what steps can make of the weights, by the largest weight and the coefficients.

    |theta + sum_k c_k z_k| <= max |theta| + max |z| sum_k |c_k|

    The largest weight is looked for once; from then on its bound grows with every step, and the
    weights are looked at again only where the bound no longer tells.

    Args:
        tensors: The live weights.
        largest: max |z|.
    """

    def __init__(self, tensors: Iterable[Tensor], largest: float) -> None:
        self._tensors, self._largest = list(tensors), largest
        self._most: dict[torch.dtype, float] = {}
        """Bounds of the weights; empty where nothing is known."""
        self._version = 0

    def check(self, terms: Sequence[Term]) -> None:
        """Refuse a step that might leave the range of a dtype.

        Raises:
            StepTooLargeError: It might, or a coefficient is not finite.
        """
        farthest = self._farthest(terms)
        # Weights at the edge are rounded up at random: not even a small step is safe unseen.
        if self._version != self._versions() or not self._holds(farthest):
            self._look()
        for dtype, most in self._most.items():
            limit = torch.finfo(dtype).max
            if not most + farthest <= limit:
                raise StepTooLargeError(
                    f"a step of up to {farthest:.3g} from weights of up to {most:.3g} does not fit "
                    f"{dtype} (at most {limit:.3g}); use a smaller lr"
                )

    def moved(self, terms: Sequence[Term]) -> None:
        """Take note of a step that was made."""
        farthest = self._farthest(terms)
        self._most = {dtype: most + farthest for dtype, most in self._most.items()}
        self._version = self._versions()

    def forget(self) -> None:
        """Look again before the next step: the weights are others."""
        self._most = {}

    def fits(self, terms: Sequence[Term]) -> bool:
        """Whether a step, from anywhere, is within the range of every dtype."""
        farthest = self._farthest(terms)
        return all(farthest <= torch.finfo(tensor.dtype).max for tensor in self._tensors)

    def holds(self, updates: Sequence[Shift]) -> bool:
        """Whether no weight can leave its dtype's range on the way through many steps."""
        self._look()
        for dtype, most in self._most.items():
            limit, bound = torch.finfo(dtype).max, most
            for terms, decay in updates:
                bound = bound * max(decay, 1.0) + self._farthest(terms)
                if not bound <= limit:
                    return False
        return True

    def _holds(self, farthest: float) -> bool:
        return bool(self._most) and all(
            most + farthest <= torch.finfo(dtype).max for dtype, most in self._most.items()
        )

    def _look(self) -> None:
        self._most, self._version = {}, self._versions()
        for tensor in self._tensors:
            # vector_norm makes no temporary copy, as abs() would.
            largest = torch.linalg.vector_norm(tensor.detach(), math.inf)
            self._most[tensor.dtype] = max(self._most.get(tensor.dtype, 0.0), float(largest))

    def _versions(self) -> int:
        """Grows with every write by torch: a model may be loaded anew between two steps."""
        return sum(tensor._version for tensor in self._tensors)

    def _farthest(self, terms: Sequence[Term]) -> float:
        # Not fsum, which raises where the sum overflows; and NaN is not within any room.
        return self._largest * sum(abs(term.coefficient) for term in terms)
