"""One run: what both loops do at every step, and what is kept so that a run survives a kill."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import CorruptTrajectoryError, OptionError, TrajectoryError
from zo_adapt.evaluation.protocol import Evaluator
from zo_adapt.interrupt import uninterrupted
from zo_adapt.loops.resume import LIMITS, check_budget, check_settings, run_settings, steps_until
from zo_adapt.optimizers.budget import Budget
from zo_adapt.optimizers.first_order import FirstOrder
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.step import Step
from zo_adapt.trajectory.file import Position, Reader, TrajectoryFile
from zo_adapt.trajectory.owned_file import OwnedFile
from zo_adapt.trajectory.playback import apply_checked, check_header, check_origin, header_of
from zo_adapt.trajectory.safe_file import read_state, remove_scratch, write_state
from zo_adapt.trajectory.writer import Writer, check_terms_fit

logger = logging.getLogger(__name__)


class Run:
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

    Raises:
        TrajectoryError: The file is there and ``resume`` is False, or it does not fit this run.
        TrajectoryWriteError: It cannot be written, or not with so many directions a step.
        OptionError: A trajectory of a first-order optimizer.
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
    ) -> None:
        self.optimizer, self.evaluator = optimizer, evaluator
        self.samples, self.budget, self.seed = samples, budget, seed
        self.steps = 0
        self.last: Step | None = None
        self.logged: list[Step] = []
        """Steps of the run that were made before this process; filled by resuming."""
        optimizer.start(evaluator.view, seed, step_like=evaluator.objective.step_like)
        self._writer: Writer | None = None
        self._state_is_ahead = False
        """Whether the state was written for a step that was then not taken."""
        self._file: TrajectoryFile | None = None
        """Where the state lies as well; None for loops that keep the state themselves."""
        if trajectory is not None:
            is_file = isinstance(trajectory, TrajectoryFile)
            self._open(trajectory if is_file else TrajectoryFile(trajectory), resume)  # type: ignore[arg-type]

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
                step = self.optimizer.step(self.evaluator, self.samples, self.budget)
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
        if is_first:
            asked = self.optimizer
            measured = asked.measuring_queries if isinstance(asked, ZerothOrder) else 0
            spent = self.evaluator.queries - before["queries"] - measured
            cost = self.budget.planned(spent)
            logger.info("%s", "; ".join(filter(None, (str(self.evaluator.plan), cost))))
        return step

    def _take(self, step: Step) -> None:
        """Write a step down and apply it, both or neither."""
        before = self.position
        self.steps += 1
        try:
            if self._writer is not None and isinstance(self.optimizer, ZerothOrder):
                self._writer.append(step, self.optimizer.drawn)
                self._save_state()
                self._state_is_ahead = True
            self.evaluator.view.apply_in_order(step.update.terms, step.update.decay)
        except BaseException:
            self.steps -= 1
            if self._writer is not None and before is not None and self.position != before:
                self._writer.go_back(before)
            raise
        self._state_is_ahead = False
        self.last = step

    def _progress(self) -> dict[str, Any]:
        """All that a step changes before it is taken."""
        own = isinstance(self.optimizer, ZerothOrder | FirstOrder)
        return {
            "queries": self.evaluator.queries,
            "positions": dict(self.samples.positions),
            "optimizer": self.optimizer.state_dict() if own else None,  # type: ignore[attr-defined]
        }

    def _go_back(self, before: Mapping[str, Any]) -> None:
        self.evaluator.queries = before["queries"]
        self.samples.positions = before["positions"]
        if before["optimizer"] is not None:
            self.optimizer.load_state_dict(before["optimizer"])  # type: ignore[attr-defined]

    def _check_record(self) -> None:
        """Refuse, before anything is evaluated, a step that no record can hold."""
        if not isinstance(self.optimizer, ZerothOrder):
            return
        before = self._progress()
        self.optimizer.propose(self.samples)
        directions = len(self.optimizer.asked.seeds)
        self._go_back(before)
        moving = [group for group in self.evaluator.view.groups if group.perturbation_scale > 0]
        check_terms_fit(directions * max(1, len(moving)))

    def log_to(self, path: Path, settings: Mapping[str, Any], at: Position | None = None) -> None:
        """Append every further step to a file, begun anew or from a place on.

        For loops that keep weights and state by themselves, as Trainer does in its checkpoints.

        Raises:
            TrajectoryError: The file belongs to another view, was begun with other settings, or has
                no such place.
        """
        view = self.evaluator.view
        if at is None:
            self._writer = Writer(path, header_of(view, self.seed, settings=dict(settings)))
            return
        file = OwnedFile(path)  # before it is read, so that it stays what was read
        try:
            reader = Reader(path)
            if reader.header["fingerprint"] != view.fingerprint():
                raise TrajectoryError(f"{path} belongs to another view; choose another folder")
            check_origin(view, reader.header, path)
            check_settings(path, reader.header["settings"], settings)
            steps_until(reader, at)
            view.leave_at_rest(reader.header.get("at_rest", ()))
            self._writer = Writer(path, reader.header, at, file=file)
        except BaseException:
            file.close()
            raise

    @property
    def position(self) -> Position | None:
        """Where the trajectory ends, if there is one."""
        return None if self._writer is None else self._writer.position

    def close(self) -> None:
        """Give up the trajectory's file; the run makes no more steps."""
        if self._writer is not None:
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """All that a run changes beside the weights, and the tensors of a first-order optimizer.

        Raises:
            OptionError: An optimizer of another origin, which cannot be kept.
        """
        if not isinstance(self.optimizer, ZerothOrder | FirstOrder):
            raise OptionError(
                f"a run of {type(self.optimizer).__name__} cannot be kept: it is no optimizer of "
                "this package"
            )
        return {
            "steps": self.steps,
            "queries": self.evaluator.queries,
            "positions": list(self.samples.positions.items()),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the weights are restored apart."""
        self.steps = state["steps"]
        self._go_back({**state, "positions": dict(state["positions"])})

    def _open(self, file: TrajectoryFile, resume: bool) -> None:
        if not isinstance(self.optimizer, ZerothOrder):
            raise OptionError("a trajectory holds directions; a first-order run has none")
        self._file, path = file, file.place
        settings = {
            **self.optimizer.settings(),
            "seed": self.seed,
            **run_settings(self.evaluator, self.samples),
        }
        if not path.exists():
            self._begin(settings)
            return
        if not resume:
            raise TrajectoryError(
                f"{path} is there already; pass resume=True to go on with it, or another name"
            )
        owned = OwnedFile(path, fsync=file.fsync)  # before it is read, so that it stays as read
        try:
            remove_scratch(path)
            remove_scratch(file.state)
            if file.state.exists():
                self._resume(owned, settings)
                return
            # Without a state nothing can be gone on from, unless a kill came before the first step.
            if next(Reader(path).steps(), None) is not None:
                raise TrajectoryError(
                    f"{path} has steps but no {file.state.name} beside it, so it can be replayed "
                    "but not resumed; put that file back, or begin another trajectory"
                )
            self._begin(settings, owned)
        except BaseException:
            owned.close()
            raise

    def _begin(self, settings: Mapping[str, Any], owned: OwnedFile | None = None) -> None:
        """Begin a file, in the place of one without steps if there is one."""
        file = self._file
        if file is None:
            return
        if owned is None and file.state.exists():
            raise TrajectoryError(
                f"there is a {file.state} but no {file.place.name}: the trajectory that the state "
                "belongs to was moved or deleted; put it back, or remove the state, or choose "
                "another name"
            )
        self._check_record()
        settings = {**settings, **self.budget._asdict(), "memory": self.evaluator.memory}
        header = header_of(self.evaluator.view, self.seed, settings=settings)
        self._writer = Writer(
            file.place, header, file=owned, replace=owned is not None, fsync=file.fsync
        )
        self._save_state()

    def _resume(self, owned: OwnedFile, settings: Mapping[str, Any]) -> None:
        view, path = self.evaluator.view, owned.path
        reader = Reader(path)
        check_header(view, reader.header, path)
        view.leave_at_rest(reader.header.get("at_rest", ()))
        begun = reader.header["settings"]
        check_settings(path, begun, settings)
        self.evaluator.memory = begun.get("memory")  # whatever there is here: the same bits
        state = read_state(self._file.state)  # type: ignore[union-attr]
        budget = state.get("budget", {name: begun[name] for name in LIMITS if name in begun})
        check_budget(path, budget, self.budget)
        try:
            at = Position(*state["position"])
            self.logged = steps_until(reader, at)
            self.load_state_dict(state["run"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptTrajectoryError(
                f"the state beside {path} is none of this run ({error!r})"
            ) from error
        apply_checked(view, [step.update for step in self.logged], path)
        self._writer = Writer(path, reader.header, at, file=owned)

    def _save_state(self) -> None:
        file, writer = self._file, self._writer
        if file is not None and writer is not None:
            state = {
                "position": writer.position,
                "budget": self.budget._asdict(),
                "run": self.state_dict(),
            }
            write_state(file.state, state, fsync=file.fsync)
