"""Which probes share a forward, whether they may at all, and where they then are computed.

Probes of one batch, K directions and any base point, stay together; further batches of nearly
the same number of rows join them as long as there is room. Where the numbers differ, the last row
of the shorter one is repeated and what comes of it is dropped. The plan depends on the sizes of
probes and batches, on the device and on the model alone, never on what memory is free at the
moment, and where that is asked for on a number that was measured before the first step and is kept
with the run: same seed, same run, also after resuming.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.joint.along import AlongFactors
from zo_adapt.evaluation.joint.candidates import Candidates, ManyPoints
from zo_adapt.evaluation.joint.low_rank import LowRankCandidates, LowRankPoints
from zo_adapt.evaluation.joint.row_blocks import JointBatch
from zo_adapt.evaluation.objective import Objective, SetObjective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.places import Route
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.evaluation.routes import Direct
from zo_adapt.evaluation.trust import JointCheck
from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import WHY_SHARDED

logger = logging.getLogger(__name__)
ROWS_DEPEND = "the objective says that the value of a row depends on the others"
SHARE = {"cuda": 0.7, "cpu": 0.25}
"""Of the memory beside the model: other processes, and the allocator's own loss, need some."""


def bytes_for_rows(view: ParameterView) -> int:
    """Bytes beside the weights on the device of a view's tensors."""
    device = next(iter(view.tensors.values())).device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = () if view.model is None else view.model.parameters()
    occupied = sum(w.nbytes for w in weights if w.device == device)
    return int(SHARE["cuda" if device.type == "cuda" else "cpu"] * max(0, total - occupied))


TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens up to which "auto" joins: beyond, one more candidate costs its own forward."""
STACKS = 0.25
"""Of the memory for rows, what stacks of perturbed tensors may take where tokens are the limit."""


class Groups:
    """Puts probes into groups that are evaluated together.

    Args:
        view: Where the probes shift.
        joint_rows: As in ``EvaluationOptions``, "off" excepted.
        micro_batch_size: Never more rows in one call; None is no limit.
        batch_size: Probes on more rows are left alone, being cut anyway; None is no limit.
        row_bytes: As an objective says it: memory is the limit then, and not a number of tokens.
    """

    def __init__(
        self,
        view: ParameterView,
        joint_rows: int | Literal["auto"],
        micro_batch_size: int | None,
        batch_size: int | None,
        row_bytes: Callable[[Any], int] | None = None,
    ) -> None:
        self._view, self._rows, self._row_bytes = view, joint_rows, row_bytes
        self.memory = bytes_for_rows(view)
        """Bytes that candidates may take: kept with a run, which goes on with the same."""
        self.point_bytes = view.nbytes
        """What a candidate takes beside its rows."""
        self.tokens: int | None = None
        """Tokens up to which "auto" joins, where that was measured: kept with a run, too."""
        self._most = math.inf if micro_batch_size is None else micro_batch_size
        self._usual = math.inf if batch_size is None else batch_size

    def of(self, probes: Sequence[Probe]) -> list[list[int]]:
        """Indices of the probes that go together, at least two each."""
        units: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for index, probe in enumerate(probes):
            if len(probe.batch) > self._usual:
                continue
            units.setdefault((id(probe.batch.source), probe.batch.rows), []).append(index)
        groups: list[list[int]] = []
        room: _Room | None = None
        for unit in units.values():
            own = self._room(probes[unit[0]].batch)
            both = room.with_(own) if room else None
            if both and len(groups[-1]) + len(unit) <= self._fits(both):
                groups[-1] += unit
                room = both
            else:
                parts = math.ceil(len(unit) / max(1, self._fits(own)))
                bounds = [len(unit) * i // parts for i in range(parts + 1)]
                groups += [unit[first:last] for first, last in pairwise(bounds)]
                # The parts of one batch go alone: the others would be padded to its length.
                room = own if parts == 1 else None
        return [group for group in groups if len(group) > 1]

    def _room(self, batch: Batch) -> "_Room":
        tokens = 1
        if self._row_bytes is not None:
            return _Room(batch.source, len(batch), len(batch), 1, self._row_bytes(batch.content))
        if self._rows == "auto":
            small = 2 * len(batch) <= min(self._most, self._tokens)
            tokens = batch.width if small else 0
        return _Room(batch.source, len(batch), len(batch), tokens)

    def _fits(self, room: "_Room") -> int:
        """How many candidates one forward holds."""
        if room.tokens == 0:
            return 1
        rows = self._most
        if self._rows != "auto":
            rows = min(rows, self._rows)
        elif self._row_bytes is None:
            rows = min(rows, self._tokens // max(1, room.tokens))
        of_candidate = self.point_bytes + room.most * room.nbytes
        memory = self.memory if self._row_bytes is not None else STACKS * self.memory
        return int(min(rows / room.most, memory / of_candidate))

    @property
    def _tokens(self) -> int:
        if self.tokens is not None:
            return self.tokens
        device = next(iter(self._view.tensors.values())).device.type
        return TOKENS["cpu" if device == "cpu" else "cuda"]


class _Room(NamedTuple):
    """What the batches of a group need: fewest and most rows, tokens and bytes of a row."""

    source: Any
    fewest: int
    most: int
    tokens: int
    nbytes: int = 0

    def with_(self, other: "_Room") -> "_Room | None":
        """Of both together; None where too much would be repeated."""
        fewest, most = min(self.fewest, other.fewest), max(self.most, other.most)
        unlike = self.source is not other.source or most - fewest > max(1, most // 4)
        if unlike or 0 in (self.tokens, other.tokens):
            return None
        tokens, nbytes = max(self.tokens, other.tokens), max(self.nbytes, other.nbytes)
        return _Room(self.source, fewest, most, tokens, nbytes)


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
        self.sizes: Groups | None = None
        """How many go together; None where none may."""
        self.most, self.why_not = 1, None if objective.independent_rows else ROWS_DEPEND
        if options.joint_rows == "off" or view.is_sharded:
            self.why_not = WHY_SHARDED if view.is_sharded else "it is switched off"
            return
        rows = "auto" if options.joint_rows == "measured" else options.joint_rows
        self.sizes = Groups(view, rows, options.micro_batch_size, batch_size, objective.row_bytes)

    def groups(self, probes: Sequence[Probe]) -> list[list[int]]:
        """Indices of the probes that go together, at least two each; none where none may."""
        if self.why_not is None and self._candidates is None and len(probes) > 1:
            self._candidates = self._along.candidates or Candidates(self._view)
            self.why_not = self._candidates.why_not
        if self._candidates is None or self.sizes is None or self.why_not is not None:
            return []
        self.sizes.point_bytes = self._candidates.nbytes
        return self.sizes.of(probes)

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
