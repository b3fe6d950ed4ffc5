"""Whether a step's probes may go together at all, and where they then are computed."""

import logging
from collections.abc import Sequence

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.joint.along import AlongFactors
from zo_adapt.evaluation.joint.batch import JointBatch
from zo_adapt.evaluation.joint.candidates import Candidates, ManyPoints
from zo_adapt.evaluation.joint.groups import Groups
from zo_adapt.evaluation.joint.low_rank import LowRankCandidates, LowRankPoints
from zo_adapt.evaluation.objective import Objective, SetObjective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.places import Route
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.evaluation.routes import Direct
from zo_adapt.evaluation.trust import JointCheck
from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import WHY_SHARDED

ROWS_DEPEND = "the objective says that the value of a row depends on the others"

logger = logging.getLogger(__name__)


class Joint:
    """Puts probes together where that is asked for, possible, and gives the values of single ones.

    Args:
        objective: Whether its rows know of each other, and how it is scored.
        view: Where the probes shift.
        options: How many rows, or "off".
        batch_size: Most rows of a probe that is put together with others.
        along: Single points along factors, of the same view.

    Attributes:
        why_not: Why probes are evaluated one at a time; None: they are not, or not known yet.
        most: Most probes that have gone together so far.
    """

    def __init__(
        self,
        objective: Objective,
        view: ParameterView,
        options: EvaluationOptions,
        batch_size: int | None,
        along: AlongFactors,
    ) -> None:
        self._view, self._is_sound, self._along = view, False, along
        self._score = objective.score if isinstance(objective, SetObjective) else None
        self._stand_in = objective.stand_in
        self._candidates: Candidates | LowRankCandidates | None = None
        self._groups: Groups | None = None
        self.most, self.why_not = 1, None if objective.independent_rows else ROWS_DEPEND
        if options.joint_rows == "off" or view.is_sharded:
            self.why_not = WHY_SHARDED if view.is_sharded else "it is switched off"
            return
        rows = "auto" if options.joint_rows == "measured" else options.joint_rows
        self._groups = Groups(view, rows, options.micro_batch_size, batch_size, objective.row_bytes)

    def groups(self, probes: Sequence[Probe]) -> list[list[int]]:
        """Indices of the probes that go together, at least two each; none where none may."""
        if self.why_not is None and self._candidates is None and len(probes) > 1:
            self._candidates = self._along.candidates or Candidates(self._view)
            self.why_not = self._candidates.why_not
        if self._candidates is None or self._groups is None or self.why_not is not None:
            return []
        self._groups.point_bytes = self._candidates.nbytes
        return self._groups.of(probes)

    @property
    def memory(self) -> int | None:
        """Bytes that candidates may take together, beside the model; None where none do."""
        return None if self._groups is None else self._groups.memory

    @memory.setter
    def memory(self, nbytes: int | None) -> None:
        if self._groups is not None and nbytes is not None:
            self._groups.memory = nbytes

    @property
    def tokens(self) -> int | None:
        """Tokens up to which candidates go together, where that was measured."""
        return None if self._groups is None else self._groups.tokens

    @tokens.setter
    def tokens(self, tokens: int | None) -> None:
        if self._groups is not None:
            self._groups.tokens = tokens

    def is_sound(self, first: Batch, last: Batch, route: Route) -> bool:
        """Whether joint values are those of single ones; found out once, on two batches."""
        if self._candidates is not None and not self._is_sound and self.why_not is None:
            if self._stand_in is None:
                check = JointCheck(self._candidates, route, self._score)
            else:
                check = JointCheck(self._candidates, Direct(self._stand_in), None)
            self.why_not = check.why_not(first, last)
            self._is_sound = self.why_not is None
            if self.why_not is not None:
                logger.info("probes are evaluated one at a time: %s", self.why_not)
        return self._is_sound

    def at(self, points: Sequence[Shift], batch: JointBatch) -> ManyPoints | LowRankPoints:
        """The place where block i of the batch is computed at point i."""
        if self._candidates is None:
            raise RuntimeError("groups() comes first")
        place = self._candidates.at(points, batch.leads)
        self.most = max(self.most, len(points))
        return place
