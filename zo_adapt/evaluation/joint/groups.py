"""Which probes share a forward.

Probes of one batch, K directions and any base point, stay together; further batches of nearly
the same number of rows join them as long as there is room. Where the numbers differ, the last row
of the shorter one is repeated and what comes of it is dropped. The plan depends on the sizes of
probes and batches alone, and where that is asked for on a number that was measured before the first
step and is kept with the run: same seed, same run, also after resuming.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.joint.memory import bytes_for_rows
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.view.parameters import ParameterView

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
