"""What the weights' dtypes hold: steps that stay in range, perturbations that rounding leaves."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zo_adapt.errors import PerturbationError, StepTooLargeError
from zo_adapt.term import Shift, Term
from zo_adapt.view.shards import Shards
from zo_adapt.view.tuned import TunedTensors


class Room:
    """Bounds what steps can make of the weights, by the largest weight and the coefficients.

    |theta + sum_k c_k z_k| <= max |theta| + max |z| sum_k |c_k|

    The largest weight is looked for once; from then on its bound grows with every step, and the
    weights are looked at again only where the bound no longer tells.

    Args:
        tensors: The live weights, as far as they are here.
        largest: max |z|.
        shards: Of the view.
    """

    def __init__(self, tensors: Iterable[Tensor], largest: float, shards: Shards) -> None:
        self._tensors, self._largest, self._shards = list(tensors), largest, shards
        self._most: dict[torch.dtype, float] = {}
        """Bounds of the weights; empty where nothing is known."""
        self._version = 0

    def check(self, terms: Sequence[Term], decay: float = 1.0) -> None:
        """Refuse a step that might leave the range of a dtype.

        Raises:
            StepTooLargeError: It might, or a coefficient is not finite.
        """
        farthest, growth = self._farthest(terms), max(decay, 1.0)
        # Weights at the edge are rounded up at random: not even a small step is safe unseen.
        if self._version != self._versions() or not self._holds(farthest, growth):
            self._look()
        for dtype, most in self._most.items():
            limit = torch.finfo(dtype).max
            if not growth * most + farthest <= limit:
                raise StepTooLargeError(
                    f"a step of up to {farthest:.3g} from weights of up to {most:.3g} does not fit "
                    f"{dtype} (at most {limit:.3g}); use a smaller lr"
                )

    def moved(self, terms: Sequence[Term], decay: float = 1.0) -> None:
        """Take note of a step that was made."""
        farthest, growth = self._farthest(terms), max(decay, 1.0)
        self._most = {dtype: growth * most + farthest for dtype, most in self._most.items()}
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

    def _holds(self, farthest: float, growth: float) -> bool:
        return bool(self._most) and all(
            growth * most + farthest <= torch.finfo(dtype).max for dtype, most in self._most.items()
        )

    def _look(self) -> None:
        self._most, self._version = {}, self._versions()
        # vector_norm makes no temporary copy, as abs() would.
        own = [
            float(torch.linalg.vector_norm(t.detach(), math.inf)) if t.numel() else 0.0
            for t in self._tensors
        ]
        for tensor, largest in zip(self._tensors, self._shards.largest(own), strict=True):
            self._most[tensor.dtype] = max(self._most.get(tensor.dtype, 0.0), largest)

    def _versions(self) -> int:
        """Grows with every write by torch: a model may be loaded anew between two steps."""
        return sum(tensor._version for tensor in self._tensors)

    def _farthest(self, terms: Sequence[Term]) -> float:
        # Not fsum, which raises where the sum overflows; and NaN is not within any room.
        return self._largest * sum(abs(term.coefficient) for term in terms)


SHARE, STEP_LIKE_SHARE = 1 / 25, 1 / 2.5
"""Of the way that a run goes: what a difference spans, on a smooth objective and on a count."""


def usual_perturbation(displacement: float, finest: float, step_like: bool) -> float:
    """The mu of a run that is given none.

    Ten times as far for a count: of LoRA on texts, 20,000 queries, two seeds, from base points, the
    accuracy at 1, 3, 10 and 20 times the scale for a loss was 0.22, 0.33, 0.38 and 0.34 tuned by
    the hard count, and 0.24, 0.26, 0.31 and 0.29 by macro-F1 (benchmarks/accuracy.py has these
    scales as methods).

    Args:
        displacement: How far a weight may go over the run, in the parameters' units.
        finest: The smallest mu that the dtype resolves.
        step_like: Whether the objective changes in jumps.
    """
    share = STEP_LIKE_SHARE if step_like else SHARE
    return max(share * displacement, 4 * finest)


def finest_perturbation(view: TunedTensors) -> float:
    """The mu that half of the view's scalars resolve.

    A scalar resolves mu if half a unit in the last place, at its tensor's root mean square, is not
    larger than mu times its group's factor.

    Raises:
        ViewError: The weights are not finite.
    """
    # Once: a norm reads the whole tensor, and a view may be a whole model.
    tensors = sorted(_finest(view))
    seen, half = 0, sum(numel for _, numel in tensors) / 2
    for smallest, numel in tensors:
        seen += numel
        if seen >= half:
            return smallest
    return 0.0


def check_resolution(view: TunedTensors, perturbation_scale: float, finest: float) -> None:
    """Refuse a perturbation that rounding would swallow in most of the view."""
    if perturbation_scale < finest:
        dtypes = sorted({str(tensor.dtype) for tensor in view.tensors.values()})
        raise PerturbationError(
            f"perturbation_scale={perturbation_scale:.3g} is below the resolution of most of the "
            f"view ({', '.join(dtypes)}); choose at least {finest:.3g}, or float32 tensors"
        )


def _finest(view: TunedTensors) -> list[tuple[float, int]]:
    """Smallest usable mu and number of scalars of every tensor that is perturbed."""
    rows, norms = [], view.norms()
    for name, tensor in view.tensors.items():
        factor = view.group_of(name).perturbation_scale
        if factor > 0:
            rms = norms[name] / math.sqrt(tensor.numel())
            rows.append((0.5 * torch.finfo(tensor.dtype).eps * rms / factor, tensor.numel()))
    return rows
