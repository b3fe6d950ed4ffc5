"""Which probes share a forward, and the check that they may.

Probes of one batch, K directions and any base point, stay together; further batches of nearly
the same number of rows join them as long as there is room. Where the numbers differ, the last row
of the shorter one is repeated and what comes of it is dropped. The plan depends on the sizes of
probes and batches alone, never on a measured time: same seed, same run, also after resuming.

The first time, the values of a joint forward are compared with those of single ones
(``check``): a few forwards on one batch, which are not counted as queries.
"""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

from zo_adapt.data.batches import Batch
from zo_adapt.data.rows import NoRowsError
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.joint.batch import JointBatch
from zo_adapt.evaluation.joint.candidates import Candidates, NotJoint
from zo_adapt.evaluation.joint.check import Check
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.view.parameters import ParameterView

JointRows = int | Literal["auto"] | None

TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens up to which "auto" joins: beyond, one more candidate costs its own forward."""
STACK_BYTES = 256 * 2**20
"""Largest stack of perturbed tensors."""

logger = logging.getLogger(__name__)


class Joint:
    """Evaluates probes several at a time, where that is possible, exact and worth it.

    Args:
        view: Where the probes shift.
        call: What the objective makes of one part.
        score: Makes a value of predictions; None for an objective without them.
        captured: Whether a call of a part would only replay a graph that was captured in a way of
            computing.
        joint_rows: As for ``minimize``.
        most_rows: Never more rows in one call; None is no limit.
        usual_rows: Probes on more rows are left alone, being cut anyway; None is no limit.
        allowed: Whether the objective's values do not depend on the other rows.

    Attributes:
        obstacle: Why probes are evaluated one at a time; None: they are not, or not known yet.

    Raises:
        OptionError: ``joint_rows`` is none of its values.
    """

    def __init__(
        self,
        view: ParameterView,
        call: Callable[[Batch], Any],
        score: Callable[[list[Any]], Any] | None,
        *,
        captured: Callable[[Batch, Hashable], bool],
        joint_rows: JointRows,
        most_rows: int | None,
        usual_rows: int | None,
        allowed: bool,
    ) -> None:
        if joint_rows not in (None, "auto") and not (
            isinstance(joint_rows, int) and joint_rows >= 1
        ):
            raise OptionError(
                f"joint_rows={joint_rows!r}; choose an integer >= 1, 'auto', or None for never"
            )
        self.view, self._call, self._score, self._captured = view, call, score, captured
        self._rows, self._most = joint_rows, math.inf if most_rows is None else most_rows
        self._usual = math.inf if usual_rows is None else usual_rows
        self.obstacle = None if joint_rows is not None and allowed else "it is not asked for"
        self._candidates: Candidates | None = None
        self._is_sound = False

    def answers(self, probes: Sequence[Probe]) -> dict[int, Any]:
        """What the objective returned for some of the probes, by their index, the rest alone."""
        found: dict[int, Any] = {}
        if self.obstacle is None and self._candidates is None and len(probes) > 1:
            self._candidates = Candidates(self.view)
            self.obstacle = self._candidates.obstacle
        if self._candidates is None or self.obstacle is not None:
            return found
        for group in self._groups(probes):
            batch = JointBatch([probes[index].batch for index in group])
            points = [probes[index].at for index in group]
            try:
                if not self._sound(probes[group[0]].batch, probes[group[-1]].batch):
                    break
                captured = partial(self._captured, batch)
                with self._candidates.at(points, batch.leads, captured):
                    returned = self._call(batch)
                # A score is of predictions themselves.
                pieces = batch.told(returned) if self._score is None else batch.cut(returned)
            except torch.OutOfMemoryError as error:
                error.add_note(f"{len(batch)} rows were evaluated together; lower joint_rows")
                raise
            except (NotJoint, NoRowsError) as reason:
                logger.debug("evaluated one at a time: %s", reason)
                continue
            found.update(zip(group, pieces, strict=True))
        return found

    def _groups(self, probes: Sequence[Probe]) -> list[list[int]]:
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
        if self._rows == "auto":
            small = 2 * len(batch) <= min(self._most, self._tokens)
            tokens = batch.width if small else 0
        return _Room(batch.source, len(batch), len(batch), tokens)

    def _fits(self, room: "_Room") -> int:
        """How many candidates one forward holds."""
        rows = self._tokens // max(1, room.tokens) if self._rows == "auto" else int(self._rows or 0)
        if room.tokens == 0:
            return 1
        return int(min(min(rows, self._most) // room.most, STACK_BYTES // self.view.nbytes))

    @property
    def _tokens(self) -> int:
        device = next(iter(self.view.tensors.values())).device.type
        return TOKENS["cpu" if device == "cpu" else "cuda"]

    def _sound(self, first: Batch, last: Batch) -> bool:
        """Whether joint values may be trusted; found out once."""
        if self._candidates is not None and not self._is_sound:
            check = Check(self._candidates, self._call, self._score)
            self.obstacle = check.failure(first, last)
            self._is_sound = self.obstacle is None
        return self._is_sound


class _Room(NamedTuple):
    """What the batches of a group need: fewest and most rows, and tokens of a row."""

    source: Any
    fewest: int
    most: int
    tokens: int

    def with_(self, other: "_Room") -> "_Room | None":
        """Of both together; None where too much would be repeated."""
        fewest, most = min(self.fewest, other.fewest), max(self.most, other.most)
        unlike = self.source is not other.source or most - fewest > max(1, most // 4)
        if unlike or 0 in (self.tokens, other.tokens):
            return None
        return _Room(self.source, fewest, most, max(self.tokens, other.tokens))
