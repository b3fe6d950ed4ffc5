"""Whether a joint forward may be trusted: compared with single ones, once.

Rows must not know of each other, and every module must see them in blocks of one candidate each.
Neither can be read off a model or an objective.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_adapt.data.batches import Batch
from zo_adapt.data.rows import NoRowsError, numbers, taken
from zo_adapt.errors import ObjectiveError
from zo_adapt.evaluation.joint.batch import JointBatch
from zo_adapt.evaluation.joint.candidates import Candidates, NotJoint
from zo_adapt.term import HERE, Shift, Term, Terms
from zo_adapt.view.parameters import ParameterView

CHECK_SEED = 5
FARTHER, TRIES = 4.0, 6
"""The check's shift grows by this factor, so often, until it is beyond doubt."""

logger = logging.getLogger(__name__)


class Check:
    """Compares a joint forward with single ones. Costs a few forwards, which are not counted.

    Args:
        candidates: What is checked.
        call, score: As for ``Joint``.
    """

    def __init__(
        self,
        candidates: Candidates,
        call: Callable[[Batch], Any],
        score: Callable[[list[Any]], Any] | None,
    ) -> None:
        self.candidates, self.view = candidates, candidates.view
        self._call, self._score = call, score

    def failure(self, first: Batch, last: Batch) -> str | None:
        """Why probes must be evaluated one at a time; None if they need not."""
        try:
            reason = self._failure(first, last)
        except (NoRowsError, NotJoint) as error:  # nothing is amiss: this model is not of that kind
            logger.info("probes are evaluated one at a time: %s", error)
            return str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            logger.warning("probes are evaluated one at a time: %s", reason)
        return reason

    def _failure(self, first: Batch, last: Batch) -> str | None:
        if last.rows == first.rows:  # other neighbours at least
            last = Batch(first.source, first.rows[::-1])
        batch = JointBatch([first, last])
        base, other = (self._one(batch.part(index), ()) for index in (0, 1))
        terms, shifted = self._far(batch.part(1), other)
        effect = _rms(shifted - other)
        coarse = _coarsest(self.view) > 1e-4
        if not effect > 0:
            return "the objective does not change with the weights"
        with self.candidates.at([HERE, Shift(terms)], batch.leads) as used:
            pieces = batch.cut(self._call(batch))
        joint = [numbers(piece, size) for piece, size in zip(pieces, batch.sizes, strict=True)]
        alone = [base[: batch.sizes[0]], shifted[: batch.sizes[1]]]
        error = _rms(np.concatenate(joint) - np.concatenate(alone)) / effect
        if not error <= (0.1 if coarse else 0.01):
            return f"together they differ from single ones by {error:.1%} of the effect of a shift"
        unused = {name: t for name, t in self.view.tensors.items() if name not in used}
        if unused and self._moved_by(unused, batch.part(1), terms, other) > 1e-4 * effect:
            return f"{next(iter(unused))!r} is read by another module than its own"
        return None

    def _far(self, part: Batch, base: np.ndarray) -> tuple[Terms, np.ndarray]:
        """A shift whose effect is far beyond rounding, and the values there.

        No farther than that: where weights are huge, rounding itself changes the values.
        """
        beyond = 0.5 if _coarsest(self.view) > 1e-4 else 0.05
        best: tuple[Terms, np.ndarray] = (), base
        for power in range(TRIES):
            terms = (Term(CHECK_SEED, self.view.reach * FARTHER**power),)
            try:
                values = self._one(part, terms)
            except ObjectiveError:
                break
            if not np.isfinite(values).all():
                break
            if _rms(values - base) > _rms(best[1] - base):
                best = terms, values
            if _rms(values - base) >= beyond * max(_rms(values), _rms(base)):
                break
        return best

    def _one(self, part: Batch, terms: Terms) -> np.ndarray:
        """The values at one point.

        Raises:
            NoRowsError: There is not one for each row.
        """
        with self.view.shifted(terms):
            returned = self._call(part)
            inside = self._scored(returned)
        if inside != self._scored(returned):
            raise NoRowsError("the score is not of the predictions alone")
        return numbers(taken(returned, slice(None), len(part)), len(part))

    def _scored(self, returned: Any) -> str:
        """The score of predictions or the error that they give."""
        if self._score is None:
            return ""
        try:
            return repr(self._score([returned]))
        except Exception as error:
            return repr(error)

    def _moved_by(
        self, tensors: dict[str, Tensor], part: Batch, terms: Terms, base: np.ndarray
    ) -> float:
        """Effect of a shift of some tensors alone."""
        view = ParameterView(tensors, noise=self.view.noise.name, groups=())
        with view.shifted(terms):
            return _rms(numbers(self._call(part), len(part)) - base)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _coarsest(view: ParameterView) -> float:
    """Resolution of the coarsest dtype that the model has."""
    parameters = [] if view.model is None else view.model.parameters()
    dtypes = {p.dtype for p in (*parameters, *view.tensors.values()) if p.is_floating_point()}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
