"""How many steps a budget of queries is enough for: what Trainer's bar and schedules count by."""

import copy
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle, islice
from typing import Any

import torch
from transformers.trainer_utils import SchedulerType, has_length

from zo_adapt.data.samples import Samples
from zo_adapt.errors import ZOError
from zo_adapt.evaluation.objective import rows_needed
from zo_adapt.optimizers.first_order import FirstOrder
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.schedule import Schedule
from zo_adapt.trainer.order import Unread
from zo_adapt.view.parameters import ParameterView

MOST_COUNTED = 100_000
"""Steps that are counted one by one."""


class PlannedSteps:
    """For Trainer: where a budget of queries ends the run, its steps are those it is enough for."""

    args: Any
    state: Any
    lr_scheduler: Any
    _given: tuple[Any, Any, Any]
    _limit: int | None = None
    """Steps that were asked for; None: as many as there are queries for."""
    _planned: int | None = None
    """Steps that the budget of queries is enough for, where it ends the run."""

    def set_initial_training_values(
        self, args: Any, dataloader: Any, *total_batch_size: int
    ) -> tuple[Any, ...]:
        """Trainer's; where a budget of queries ends the run, the steps that it is enough for.

        The size of a batch on all processes is given by transformers 5.0, and not by later ones.
        """
        found: tuple[Any, ...] = super().set_initial_training_values(  # type: ignore[misc]
            args, dataloader, *total_batch_size
        )
        limited = args.max_steps > 0 or self.args.has_epochs
        self._limit = found[-1] if limited or self.args.max_queries is None else None
        self._planned = self._planned_steps(dataloader)
        if self._planned is None or (self._limit is not None and self._limit <= self._planned):
            self._limit, self._planned = found[-1], None
            return found
        args = copy.copy(args)
        args.max_steps = self._planned
        return super().set_initial_training_values(  # type: ignore[misc,no-any-return]
            args, dataloader, *total_batch_size
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's; the rates of ``warmup_stable_decay`` fall in the last eighth, unless said."""
        given, steps = self.args.lr_scheduler_kwargs, num_training_steps
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            falling = min(math.ceil(steps / 8), steps - self.args.get_warmup_steps(steps))
            usual = {"num_decay_steps": max(falling, 0), "decay_type": "linear"}
            self.args.lr_scheduler_kwargs = usual | (given or {})
        try:
            return super().create_scheduler(steps, optimizer)  # type: ignore[misc]
        finally:
            self.args.lr_scheduler_kwargs = given

    @property
    def schedule_in_force(self) -> str | Schedule:
        """That of the run: the usual one is that of ``minimize``, to the bit."""
        args = self.args
        is_usual = args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY
        warm = args.get_warmup_steps(self.state.max_steps)
        return self._schedule if warm or args.lr_scheduler_kwargs or not is_usual else "cooldown"

    def _schedule(self, progress: float) -> float:
        """Trainer's schedule, warm-up included, at a share of the budget instead of at a step."""
        factor: Schedule = self.lr_scheduler.lr_lambdas[0]
        return factor(progress * self.state.max_steps)

    def _planned_steps(self, dataloader: Any) -> int | None:
        """Steps that the budget of queries is enough for, where that can be known."""
        if self.args.max_queries is None or not has_length(dataloader):
            return None
        _, objective, optimizer = self._given
        size = self.args.train_batch_size
        rows = self.num_examples(dataloader)  # type: ignore[attr-defined]
        epoch = [size] * (rows // size)
        if rows % size and not self.args.dataloader_drop_last:
            epoch.append(rows % size)
        return steps_within(
            self.args.max_queries,
            optimizer or self.args.build_optimizer(),
            rows,
            epoch,
            1 if objective is None else rows_needed(objective),
            self.args.seed,
        )


def steps_within(
    max_queries: int, optimizer: Any, rows: int, batches: Sequence[int], min_rows: int, seed: int
) -> int | None:
    """Steps that fit into a budget; None where the optimizer does not say what a step costs.

    Args:
        max_queries: The budget.
        optimizer: Asked for its probes, on nothing.
        rows: Of the training set.
        batches: Rows of every batch of an epoch.
        min_rows: Of a part of a batch; see ``objective.rows_needed``.
        seed: Of the run, by which some choose what a step is made of.

    Example:
        >>> from zo_adapt import MeZO
        >>> steps_within(400, MeZO(), 10, [4, 4, 2], 1, 0)  # 32 + 32 + 16 an epoch
        15
    """
    try:
        spent, costs = 0, list[int]()
        for cost in islice(_costs(optimizer, rows, batches, min_rows, seed), MOST_COUNTED):
            if spent + cost > max_queries:
                return len(costs)
            spent += cost
            costs.append(cost)
    except ZOError:  # which says itself again, where it counts
        return None
    if not spent:
        return None
    # A longer run goes on as it was so far.
    whole, rest = divmod(max_queries, spent)
    return whole * len(costs) + bisect_right(list(accumulate(costs)), rest)


def _costs(
    optimizer: Any, rows: int, batches: Sequence[int], min_rows: int, seed: int
) -> Iterator[int]:
    """Queries of one step after the other."""
    if not isinstance(optimizer, ZerothOrder | FirstOrder):
        return
    asked = copy.copy(optimizer)  # its run is replaced, that of the original stays
    asked.start(ParameterView({"x": torch.ones(1)}), seed)
    known: dict[tuple[bool, int], int] = {}
    for step, size in enumerate(cycle(batches)):
        if not isinstance(asked, ZerothOrder):
            yield size
            continue
        key = asked.begins_at(step), size
        if key not in known:
            asked.state.steps = step
            samples = Samples(Unread(rows), size, 0, None, min_rows)
            known[key] = sum(len(probe.batch) for probe in asked.propose(samples))
        yield known[key]
