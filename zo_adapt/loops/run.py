"""One run: what both loops do at every step, and what is kept so that a run survives a kill."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import NonFiniteObjectiveError, OptionError
from zo_adapt.evaluation.failures import MOST_SKIPPED, NoValueError, tried
from zo_adapt.evaluation.protocol import Evaluator, Measuring
from zo_adapt.interrupt import uninterrupted
from zo_adapt.loops.kept_run import KeptRun
from zo_adapt.loops.resume import AROUND, BOUND, MADE_WITH, run_settings, steps_until
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.ranks.group import Ranks
from zo_adapt.ranks.replicas import check_settings_agree, check_views
from zo_adapt.term import Shift, Step
from zo_adapt.trajectory.file import Position, Reader, TrajectoryFile
from zo_adapt.trajectory.playback import apply_checked
from zo_adapt.trajectory.safe_file import as_json

logger = logging.getLogger(__name__)


class Run(KeptRun):
    """An optimizer at work on a view.

    A step is evaluated, then its record and the state after it are written, then it is applied. The
    weights of a resumed run are made from the file, so that a kill at any moment leaves a state to
    go on from: the one before the step, or the one after. A step that fails leaves no trace: seeds,
    rows, counters and the optimizer are as before it.

    Args:
        optimizer: Started by this class.
        evaluator: Owns the objective, the view and the count of queries.
        samples: Where batches come from.
        budget: Limits.
        seed: Of directions and data order.
        trajectory: File to write, or None. Beside it lies FILE.state, replaced every step.
        resume: Go on from the file if it is there.
        ranks: The processes that share the run, each with such an object; None: this one alone.

    Raises:
        TrajectoryError: The file is there and ``resume`` is False, or it does not fit this run.
        TrajectoryWriteError: It cannot be written, or not with so many directions a step.
        OptionError: A trajectory of a first-order optimizer.
        ReplicaError: The ranks were not started with the same.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        evaluator: Evaluator,
        samples: Samples,
        budget: Budget,
        seed: int,
        trajectory: str | Path | TrajectoryFile | None = None,
        resume: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(optimizer, evaluator, samples, budget, seed, ranks)
        optimizer.start(evaluator.view, seed, step_like=evaluator.objective.step_like)
        evaluator.on_nonfinite = evaluator.objective.on_nonfinite
        if ranks is not None:
            check_views(ranks, evaluator.view)
            settings: dict[str, Any] = getattr(optimizer, "settings", dict)()
            check_settings_agree(ranks, {**settings, "seed": seed, **budget._asdict()})
        if trajectory is not None:
            is_file = isinstance(trajectory, TrajectoryFile)
            self._open(trajectory if is_file else TrajectoryFile(trajectory), resume)  # type: ignore[arg-type]

    def _open(self, file: TrajectoryFile, resume: bool) -> None:
        if not isinstance(self.optimizer, ZerothOrder):
            raise OptionError("a trajectory holds directions; a first-order run has none")
        self._file = file
        settings = {
            **self.optimizer.settings(),
            "seed": self.seed,
            **run_settings(self.evaluator, self.samples),
        }
        self.is_logged = True
        if self.ranks is None:
            self._begin_or_resume(settings, resume)
        else:
            self._open_together(self.ranks, settings, resume)
        if self.logged:
            self._apply([step.update for step in self.logged], file.place)

    def _apply(self, updates: Sequence[Shift], path: Path) -> None:
        """Go from the start to where the file ends; the ranks do so together."""
        optimizer, pause = self.optimizer, None
        if isinstance(optimizer, ZerothOrder) and optimizer.steps_since_kept is not None:
            pause = len(updates) - optimizer.steps_since_kept, optimizer.keep_values
        try:
            apply_checked(self.evaluator.view, updates, path, pause)
        except BaseException:
            self.close()
            raise

    def _open_together(self, ranks: Ranks, settings: Mapping[str, Any], resume: bool) -> None:
        """Rank 0 opens the file; the others are given what they need to go on."""
        # Those may differ: a function or an object may know its own rank.
        alike = {
            name: value
            for name, value in settings.items()
            if name not in (AROUND, BOUND, MADE_WITH)
        }
        check_settings_agree(ranks, alike)
        with self.evaluator.view.hashes_kept():
            data = ranks.from_first(lambda: self._opened(settings, resume))
            if data and not ranks.is_first:
                self._follow(data)

    def _opened(self, settings: Mapping[str, Any], resume: bool) -> bytes:
        """Open the file; what another rank needs to go on, which is nothing at the start."""
        self._begin_or_resume(settings, resume)
        position, file = self.position, self._file
        if not self.logged or position is None or file is None:
            return b""
        state = as_json({"position": position, "run": self.state_dict()})
        return state + b"\n" + file.place.read_bytes()[: position.offset]

    def _follow(self, data: bytes) -> None:
        """Go on from what rank 0 has read."""
        text, _, content = data.partition(b"\n")
        state = json.loads(text)
        with tempfile.TemporaryDirectory(prefix="zo_adapt-") as folder:
            path = Path(folder) / "trajectory.zot"
            path.write_bytes(content)
            reader = Reader(path)
            self._as_begun(reader)
            self.logged = steps_until(reader, Position(*state["position"]))
        self.load_state_dict(state["run"])

    def measure(self) -> None:
        """Find what is to be measured before the first step; a run that goes on has it."""
        evaluator, optimizer = self.evaluator, self.optimizer
        if self.steps or not isinstance(optimizer, ZerothOrder):
            return
        if isinstance(evaluator, Measuring) and evaluator.measures:
            before = self._progress()
            probes = optimizer.propose(self.samples)
            self._go_back(before)
            evaluator.measure(probes)

    def outlook(self) -> str:
        """What is about to happen and what it will cost, in one line; nothing is evaluated."""
        view, optimizer = self.evaluator.view, self.optimizer
        line = (
            f"{type(optimizer).__name__} on {view.numel:,} scalars in {len(view.tensors)} tensors"
        )
        if view.has_factors:
            line += f", matrices along {view.noise.name}"
        if self.steps:
            line += f", from step {self.steps:,} on"
        if not isinstance(optimizer, ZerothOrder):
            return line
        before = self._progress()
        queries = sum(len(probe.batch) for probe in optimizer.propose(self.samples))
        self._go_back(before)
        line += f"; a step makes {queries:,} queries (forwards of one sample)"
        return "; ".join(filter(None, (line, self.budget.planned(queries))))

    def step(self) -> Step:
        """One step.

        Raises:
            BudgetExhausted, NonFiniteObjectiveError, StepTooLargeError, TrajectoryWriteError: The
                weights, the file and the run's state are those after the step before.
        """
        view, before, is_first = self.evaluator.view, self._progress(), self.last is None
        steps = self.steps
        try:
            if is_first and self._writer is not None:
                self._check_record()
            with view.updates.fixed_addresses():
                step = self._evaluated(before)
                applied = step.update._replace(terms=view.checked(step.update))
                step = step._replace(
                    step=self.steps + 1,
                    queries=self.evaluator.queries,
                    value=self.evaluator.sign * step.value,
                    update=applied,
                )
                with uninterrupted():  # the file and the weights are those of one step
                    self._take(step)
        except BaseException:
            if self.steps == steps:  # and not a signal that has waited for the step to be whole
                self._go_back(before)
                if self._state_is_ahead:
                    self._save_state()
                    self._state_is_ahead = False
            raise
        if is_first and self.is_first_rank:
            asked = self.optimizer
            measured = asked.measuring_queries if isinstance(asked, ZerothOrder) else 0
            spent = self.evaluator.queries - before["queries"] - measured
            cost = self.budget.planned(spent)
            logger.info("%s", "; ".join(filter(None, (str(self.evaluator.plan), cost))))
        return step

    def _evaluated(self, before: dict[str, Any]) -> Step:
        """The next step whose points have values.

        Where the objective says so, a step without them is given up and other points are asked
        about. Its queries stay counted: ``before``, what to go back to, is moved on.
        """
        way = self.evaluator.objective.on_nonfinite
        try:
            for skipped in range(MOST_SKIPPED):
                self.evaluator.on_nonfinite = tried(way, skipped)
                try:
                    return self.optimizer.step(self.evaluator, self.samples, self.budget)
                except NonFiniteObjectiveError as error:
                    self._check_skips(error)
                    before.update(self._progress())
        finally:
            self.evaluator.on_nonfinite = way
        raise NonFiniteObjectiveError(
            f"{MOST_SKIPPED} steps in a row had no value; begin nearer to where the objective has "
            "values"
        )

    def _check_skips(self, error: NonFiniteObjectiveError) -> None:
        """Raise what ends the run: an error where none may be passed over, or all points raise."""
        if self.evaluator.objective.on_nonfinite == "stop":
            raise error
        failures = getattr(self.evaluator, "failures", None)
        if isinstance(error, NoValueError) and not self.steps and failures is not None:
            failures.raise_last()

    def _take(self, step: Step) -> None:
        """Write a step down and apply it, both or neither."""
        before = self.position
        self.steps += 1
        try:
            # No rank is a step ahead of the file: all of them hear whether it could be written.
            with self.ranks.agreeing() if self.ranks and self.is_logged else nullcontext():
                self._write(step)
            self.evaluator.view.apply_in_order(step.update.terms, step.update.decay)
        except BaseException:
            self.steps -= 1
            if self._writer is not None and before is not None and self.position != before:
                self._writer.go_back(before)
            raise
        self._state_is_ahead = False
        self.last = step

    def _write(self, step: Step) -> None:
        if self._writer is not None and isinstance(self.optimizer, ZerothOrder):
            self._writer.append(step, self.optimizer.drawn)
            self._save_state()
            self._state_is_ahead = True
