"""One run: what both loops do at every step, and what is kept so that a run survives a kill."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import OptionError, TrajectoryError, TrajectoryWriteError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.interrupt import uninterrupted
from zo_adapt.optimizers.budget import Budget
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.step import Step
from zo_adapt.trajectory.file import Position, Reader, Writer
from zo_adapt.trajectory.playback import apply_all, check_header, header_of
from zo_adapt.trajectory.safe_file import read_state, write_state

logger = logging.getLogger(__name__)


class Run:
    """An optimizer at work on a view.

    A step is evaluated, then its record and the state after it are written, then it is applied. The
    weights of a resumed run are made from the file, so that a kill at any moment leaves a state to
    go on from: the one before the step, or the one after.

    Args:
        optimizer: Started by this class.
        evaluator: Owns the objective, the view and the count of queries.
        samples: Where batches come from.
        budget: Limits.
        seed: Of directions and data order.
        trajectory: File to write, or None. Beside it lies FILE.state, replaced every step.
        resume: Go on from the file if it is there.

    Raises:
        TrajectoryError: The file is there and ``resume`` is False, or it does not fit this run.
        OptionError: A trajectory of a first-order optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        evaluator: LocalEvaluator,
        samples: Samples,
        budget: Budget,
        seed: int,
        trajectory: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        self.optimizer, self.evaluator = optimizer, evaluator
        self.samples, self.budget, self.seed = samples, budget, seed
        self.steps = 0
        self.last: Step | None = None
        self.logged: list[Step] = []
        """Steps of the run that were made before this process; filled by resuming."""
        optimizer.start(evaluator.view, seed, step_like=evaluator.objective.step_like)
        self._writer: Writer | None = None
        self._state_path: Path | None = None
        if trajectory is not None:
            self._open(Path(trajectory), resume)

    def step(self) -> Step:
        """One step.

        Raises:
            BudgetExhausted, NonFiniteObjectiveError, StepTooLargeError, TrajectoryWriteError: The
                weights and the file are those after the step before.
        """
        view, before = self.evaluator.view, self.evaluator.queries
        with view.updates.fixed_addresses():
            step = self.optimizer.step(self.evaluator, self.samples, self.budget)
            applied = step.update._replace(terms=view.checked(step.update))
            step = step._replace(
                step=self.steps + 1,
                queries=self.evaluator.queries,
                value=self.evaluator.sign * step.value,
                update=applied,
            )
            with uninterrupted():  # the file and the weights are those of one step
                self.steps += 1
                try:
                    self._write(step)
                except TrajectoryWriteError:
                    self.steps -= 1
                    raise
                view.apply_in_order(applied.terms, applied.decay)
                is_first, self.last = self.last is None, step
        if is_first:
            asked = self.optimizer
            measured = asked.measuring_queries if isinstance(asked, ZerothOrder) else 0
            cost = self.budget.planned(self.evaluator.queries - before - measured)
            logger.info("%s", "; ".join(filter(None, (str(self.evaluator.plan), cost))))
        return step

    def _write(self, step: Step) -> None:
        """Record and state, both or neither."""
        if self._writer is None or not isinstance(self.optimizer, ZerothOrder):
            return
        before = self._writer.position
        self._writer.append(step, self.optimizer.drawn)
        if self._state_path is not None:
            try:
                self._save_state(self._writer, self._state_path)
            except TrajectoryWriteError:
                self._writer.go_back(before)
                raise

    def log_to(self, path: Path, settings: Mapping[str, Any], at: Position | None = None) -> None:
        """Append every further step to a file, begun anew or from a place on.

        For loops that keep weights and state by themselves, as Trainer does in its checkpoints.

        Raises:
            TrajectoryError: The file belongs to another view, was begun with other settings, or has
                no such place.
        """
        if at is None:
            self._writer = Writer(path, self._header(settings))
            return
        reader = Reader(path)
        if reader.header["fingerprint"] != self.evaluator.view.fingerprint():
            raise TrajectoryError(f"{path} belongs to another view; choose another folder")
        check_settings(reader, settings)
        steps_until(reader, at)
        self.evaluator.view.leave_at_rest(reader.header.get("at_rest", ()))
        self._writer = Writer(path, reader.header, at)

    def _header(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return header_of(self.evaluator.view, self.seed, settings=dict(settings))

    @property
    def position(self) -> Position | None:
        """Where the trajectory ends, if there is one."""
        return None if self._writer is None else self._writer.position

    def state_dict(self) -> dict[str, Any]:
        """All that a run changes beside the weights."""
        if not isinstance(self.optimizer, ZerothOrder):
            raise OptionError("only zeroth-order runs can be kept; use torch's own checkpoints")
        return {
            "steps": self.steps,
            "queries": self.evaluator.queries,
            "positions": list(self.samples.positions.items()),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the weights are restored apart."""
        if not isinstance(self.optimizer, ZerothOrder):
            raise OptionError("only zeroth-order runs can be resumed; use torch's own checkpoints")
        self.steps = state["steps"]
        self.evaluator.queries = state["queries"]
        self.samples.positions = dict(state["positions"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _open(self, path: Path, resume: bool) -> None:
        if not isinstance(self.optimizer, ZerothOrder):
            raise OptionError("a trajectory holds directions; a first-order run has none")
        self._state_path = path.with_name(path.name + ".state")
        settings = {
            **self.optimizer.settings(),
            "seed": self.seed,
            "batch_size": self.samples.batch_size,
            "micro_batch_size": self.evaluator.micro_batch_size,
            "share": self.samples.share,
            "sign": self.evaluator.sign,
            "rows": len(self.samples.source),
            "max_steps": self.budget.max_steps,
            "max_queries": self.budget.max_queries,
        }
        if path.exists() and not resume:
            raise TrajectoryError(
                f"{path} is there already; pass resume=True to go on with it, or another name"
            )
        if path.exists() and self._state_path.exists():
            self._resume(path, self._state_path, settings)
            return
        # Without a state nothing can be gone on from, unless a kill came before the first step.
        if path.exists() and next(Reader(path).steps(), None) is not None:
            raise TrajectoryError(
                f"{path} has steps but no {self._state_path.name} beside it, so it can be replayed "
                "but not resumed; put that file back, or begin another trajectory"
            )
        self._writer = Writer(path, self._header(settings))
        self._save_state(self._writer, self._state_path)

    def _resume(self, path: Path, state_path: Path, settings: Mapping[str, Any]) -> None:
        reader = Reader(path)
        check_header(self.evaluator.view, reader.header, path)
        self.evaluator.view.leave_at_rest(reader.header.get("at_rest", ()))
        check_settings(reader, settings)
        state = read_state(state_path)
        at = Position(*state["position"])
        self.logged = steps_until(reader, at)
        apply_all(self.evaluator.view, [step.update for step in self.logged])
        self.load_state_dict(state["run"])
        self._writer = Writer(path, reader.header, at)

    def _save_state(self, writer: Writer, path: Path) -> None:
        write_state(path, {"position": writer.position, "run": self.state_dict()})


def check_settings(reader: Reader, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a trajectory was begun with.

    Raises:
        TrajectoryError: Names the first that differs.
    """
    begun = reader.header["settings"]
    for name, value in settings.items():
        if begun.get(name) != value:
            raise TrajectoryError(
                f"{reader.path} was begun with {name}={begun.get(name)!r}, not {value!r}; resume "
                "with the same settings, or begin another file"
            )


def steps_until(reader: Reader, at: Position) -> list[Step]:
    """The records before a place; what comes after is not read.

    Raises:
        TrajectoryError: No record ends there.
        CorruptTrajectoryError: A damaged record before it.
    """
    position, steps, found = reader.start, [], reader.steps()
    while position.offset < at.offset and (entry := next(found, None)) is not None:
        step, position = entry
        steps.append(step)
    if position != at:
        raise TrajectoryError(
            f"{reader.path} has no record that ends at byte {at.offset}: the state to resume from "
            "belongs to another file, or the file was shortened; put the two together that belong"
        )
    return steps
