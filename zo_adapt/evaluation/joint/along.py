"""Whether points of a view with low-rank noise are computed along factors, no weight written."""

import logging
from functools import cached_property
from typing import Any

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.joint.low_rank import LowRankCandidates
from zo_adapt.evaluation.objective import Objective, SetObjective
from zo_adapt.evaluation.places import OnePoint, Place, Route
from zo_adapt.evaluation.routes import Direct
from zo_adapt.evaluation.trust import JointCheck
from zo_adapt.term import Shift
from zo_adapt.view.kept import KeptPlace
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import WHY_SHARDED

logger = logging.getLogger(__name__)


class AlongFactors:
    """Single points, along factors where that was found to give the values of shifted weights.

    Args:
        objective: How values are checked.
        view: Where the points lie.
    """

    def __init__(self, objective: Objective, view: ParameterView) -> None:
        self._view, self._stand_in = view, objective.stand_in
        self._score: Any = objective.score if isinstance(objective, SetObjective) else None
        self._checked = False
        self._why_not: str | None = None

    @cached_property
    def candidates(self) -> LowRankCandidates | None:
        """What computes them; None where nothing can."""
        if not self._view.has_factors:
            return None
        if self._view.is_sharded:
            self._why_not = WHY_SHARDED
            return None
        candidates = LowRankCandidates(self._view)
        self._why_not = candidates.why_not
        return candidates if candidates.why_not is None else None

    @property
    def why_not(self) -> str | None:
        """Why weights are made for each point; None: they are not, or not known yet."""
        return self._why_not

    def place(self, at: Shift, batch: Batch, route: Route) -> Place:
        """Where a point's values are computed.

        Args:
            at: The point.
            batch: Rows that it is asked about, to find out whether it can be done.
            route: What computes values.
        """
        shifted = OnePoint(self._view, at)
        if (
            not at.terms
            or isinstance(at, KeptPlace)
            or self.candidates is None
            or not self._is_sound(batch, route)
        ):
            return shifted
        try:
            return self.candidates.at([at], ())
        except NotJoint as reason:
            logger.debug("weights are made for a point: %s", reason)
            return shifted

    def _is_sound(self, batch: Batch, route: Route) -> bool:
        if not self._checked and self.candidates is not None:
            smooth = route if self._stand_in is None else Direct(self._stand_in)
            score = self._score if self._stand_in is None else None
            self._why_not = JointCheck(self.candidates, smooth, score).why_not_alone(batch)
            self._checked = True
            if self._why_not is not None:
                logger.info("weights are made for each point: %s", self._why_not)
        return self._why_not is None
