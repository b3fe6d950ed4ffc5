"""Whether a fast way of evaluating may be trusted: its values are compared with plain ones, once.

Joint forwards are compared with single ones (``JointCheck``); a model whose frozen layers were not
run with one whose layers were (``same_calls``, ``close``). Each costs a few forwards, which are not
counted as queries: no optimizer sees them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_adapt.data.rows import NoRowsError, as_matrix, select_rows
from zo_adapt.data.sources import Batch
from zo_adapt.errors import ObjectiveError
from zo_adapt.evaluation.joint.candidates import Candidates, NotJoint
from zo_adapt.evaluation.joint.low_rank import LowRankCandidates
from zo_adapt.evaluation.joint.row_blocks import JointBatch
from zo_adapt.evaluation.places import OnePoint, Route
from zo_adapt.evaluation.trunk.call import Call
from zo_adapt.evaluation.values import as_float64
from zo_adapt.interrupt import is_from_handler
from zo_adapt.term import HERE, Shift, Terms
from zo_adapt.view.parameters import ParameterView

Score = Callable[[list[Any]], Any]
CHECK_SEED = 5
FARTHER, TRIES = 4.0, 6
"""The check's shift grows by this factor, so often, until it is beyond doubt."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2}
COARSE = 5e-2
"""bf16, autocast, quantised weights: what another composition of a batch may do to a value."""
TF32 = 1e-3


class JointCheck:
    """Compares a joint forward with single ones on two batches, or a single one along factors.

    Rows must not know of each other, and every module must see them in blocks of one candidate
    each; and no other code may read the weights that are not written. None of it can be read off a
    model or an objective.

    Args:
        candidates: What is checked.
        route: What computes values.
        score: Makes a value of predictions; None for an objective without them.
    """

    def __init__(
        self, candidates: Candidates | LowRankCandidates, route: Route, score: Score | None
    ) -> None:
        self._candidates, self._view = candidates, candidates.view
        self._route, self._score = route, score

    def why_not(self, first: Batch, last: Batch) -> str | None:
        """Why probes must be evaluated one at a time; None if they need not.

        What is wrong with the objective or the data themselves is a reason too: evaluated one at a
        time they raise the error for the user to see.
        """
        return self._or_error(lambda: self._difference(first, last))

    def why_not_alone(self, batch: Batch) -> str | None:
        """Why a single point must be shifted to; None if its forward needs no weight written."""
        return self._or_error(lambda: self._difference_alone(batch))

    def _or_error(self, difference: Callable[[], str | None]) -> str | None:
        try:
            return difference()
        except (NoRowsError, NotJoint) as error:
            return str(error)
        except Exception as error:
            if is_from_handler(error):
                raise
            return f"{type(error).__name__}: {error}"

    def _difference(self, first: Batch, last: Batch) -> str | None:
        if last.rows == first.rows:  # other neighbours at least
            last = Batch(first.source, first.rows[::-1])
        batch = JointBatch([first, last])
        base, other = (self._one(batch.part(index), ()) for index in (0, 1))

        def error(terms: Terms, shifted: np.ndarray) -> tuple[Any, float]:
            place = self._candidates.at([HERE, Shift(terms)], batch.leads)
            with place.entered():
                pieces = batch.read(self._route(batch.content, place.key))
            joint = [as_matrix(piece, n) for piece, n in zip(pieces, batch.sizes, strict=True)]
            alone = [base[: batch.sizes[0]], shifted[: batch.sizes[1]]]
            return place, _rms(np.concatenate(joint) - np.concatenate(alone))

        said = "together they differ from single ones"
        return self._compared(said, batch.part(1), other, error)

    def _difference_alone(self, part: Batch) -> str | None:
        base = self._one(part, (), by_row=False)

        def error(terms: Terms, shifted: np.ndarray) -> tuple[Any, float]:
            place = self._candidates.at([Shift(terms)], ())
            with place.entered():
                returned = self._route(part.content, place.key)
            return place, _rms(self._read(returned, len(part), by_row=False) - shifted)

        return self._compared("along factors it differs", part, base, error, by_row=False)

    def _compared(
        self,
        said: str,
        part: Batch,
        base: np.ndarray,
        error: Callable[[Terms, np.ndarray], tuple[Any, float]],
        by_row: bool = True,
    ) -> str | None:
        """How far values differ where that can be told best; None: by rounding at most."""
        least, found = 0.1 if self._is_coarse else 0.01, list[float]()
        for terms, shifted in self._shifts(part, base, by_row):
            effect = _rms(shifted - base)
            if effect > 0:
                place, difference = error(terms, shifted)
                found.append(difference / effect)
                if found[-1] <= least:
                    return self._read_elsewhere(place, part, terms, base, effect)
        if not found:
            return "the objective does not change with the weights"
        return f"{said} by {min(found):.1%} of the effect of a shift"

    def _read_elsewhere(
        self, place: Any, part: Batch, terms: Terms, base: np.ndarray, effect: float
    ) -> str | None:
        unused = {name: t for name, t in self._view.tensors.items() if name not in place.used}
        if unused and self._moved_by(unused, part, terms, base) > 1e-4 * effect:
            return f"{next(iter(unused))!r} is read by another module than its own"
        return None

    def _shifts(
        self, part: Batch, base: np.ndarray, by_row: bool
    ) -> Iterator[tuple[Terms, np.ndarray]]:
        """Shifts at which to compare, and the values there.

        In fp32 the nearest whose effect is far beyond rounding, and no farther: where weights are
        huge, rounding itself changes the values. Of coarse weights all up to there, one after the
        other: near ones drown in rounding, far ones make a deep model chaotic, and some between
        them tell.
        """
        best: tuple[Terms, np.ndarray] = (), base
        for power in range(TRIES):
            view = self._view
            terms = view.everywhere(CHECK_SEED, view.displacement * FARTHER**power)
            try:
                values = self._one(part, terms, by_row)
            except ObjectiveError:
                break
            if not np.isfinite(values).all():
                break
            if self._is_coarse:
                yield terms, values
            if _rms(values - base) > _rms(best[1] - base):
                best = terms, values
            beyond = 0.5 if self._is_coarse else 0.05
            if _rms(values - base) >= beyond * max(_rms(values), _rms(base)):
                break
        if not self._is_coarse:
            yield best

    @property
    def _is_coarse(self) -> bool:
        return _coarsest(self._view) > 1e-4

    def _one(self, part: Batch, terms: Terms, by_row: bool = True) -> np.ndarray:
        """The values at one point.

        Raises:
            NoRowsError: There is not one for each row.
        """
        place = OnePoint(self._view, Shift(terms))
        with place.entered():
            returned = self._route(part.content, place.key)
            inside = self._scored(returned)
        if inside != self._scored(returned):
            raise NoRowsError("the score is not of the predictions alone")
        return self._read(returned, len(part), by_row)

    def _read(self, returned: Any, rows: int, by_row: bool) -> np.ndarray:
        """Numbers to compare: the predictions, or their score where these are none.

        Raises:
            NoRowsError: There is not one entry for each row, where there must be.
        """
        try:
            return as_matrix(select_rows(returned, slice(None), rows), rows)
        except NoRowsError:
            if by_row:
                raise
            value = returned if self._score is None else self._score([returned])
            return as_float64(value, "the objective returned", "return numbers").reshape(1, -1)

    def _scored(self, returned: Any) -> str:
        """The score of predictions or the error that they give."""
        if self._score is None:
            return ""
        try:
            return repr(self._score([returned]))
        except Exception as error:
            if is_from_handler(error):
                raise
            return repr(error)

    def _moved_by(
        self, tensors: dict[str, Tensor], part: Batch, terms: Terms, base: np.ndarray
    ) -> float:
        """Effect of a shift of some tensors alone."""
        view = ParameterView(tensors, noise=self._view.noise.name, groups=())
        place = OnePoint(view, Shift(terms))
        with place.entered():
            returned = self._route(part.content, place.key)
        return _rms(self._read(returned, len(part), by_row=len(base) == len(part)) - base)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _coarsest(view: ParameterView) -> float:
    """Resolution of the coarsest dtype that the model has."""
    parameters = [] if view.model is None else view.model.parameters()
    dtypes = {p.dtype for p in (*parameters, *view.tensors.values()) if p.is_floating_point()}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def tolerance_of(weights: Iterable[Tensor]) -> float:
    """What rounding alone may do to a value, relative to the largest."""
    weights = list(weights)
    devices = {tensor.device.type for tensor in weights}
    if any(torch.is_autocast_enabled(device) for device in devices):
        return COARSE
    dtypes = {t.dtype for t in weights if t.is_floating_point() or t.numel() > 1 << 16}
    tolerance = max((TOLERANCE.get(dtype, COARSE) for dtype in dtypes), default=COARSE)
    exact = devices == {"cpu"} or torch.get_float32_matmul_precision() == "highest"
    return tolerance if exact else max(tolerance, TF32)


def same_calls(served: Sequence[Call], plain: Sequence[Call], tolerance: float) -> bool:
    """Whether the tuned layers were given the same, call by call."""
    if len(served) != len(plain):
        return False
    pairs = [(a, b) for a, b in zip(served, plain, strict=True) if a.served and a.watched]
    return all(
        _same_states(a, b, tolerance) and close(a.inputs, b.inputs, tolerance) for a, b in pairs
    )


def close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two nested values are equal up to rounding; of unknown objects, the type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        if not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, other)
        return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        same = list(one) == list(other)
        return same and all(close(one[name], other[name], tolerance) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        same = len(one) == len(other)
        return same and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray | np.number | float) and np.shape(one) == np.shape(other):
        return np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    if one is None or isinstance(one, bool | int | str):
        return type(one) is type(other) and one == other
    return type(one) is type(other)


def _same_states(one: Call, other: Call, tolerance: float) -> bool:
    a, b = one.entering, other.entering
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or one.rows is None:
        return False
    counted = torch.zeros(a.shape[:2], dtype=torch.bool)
    for row in range(len(a)):
        start, stop = one.rows.span(row, a.shape[1])
        counted[row, start:stop] = True
    a, b = (hidden[counted.to(hidden.device)].double() for hidden in (a, b))
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
