"""One run: what both loops do at every step, and what is kept so that a run survives a kill."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_adapt.data import Samples
from zo_adapt.errors import OptionError, TrajectoryError
from zo_adapt.objective import Evaluator
from zo_adapt.optimizer import Optimizer, StepInfo, ZerothOrder
from zo_adapt.replay import apply_all, check_header, header_of
from zo_adapt.rule import Budget
from zo_adapt.trajectory import Position, Reader, Step, Writer


class Run:
    """An optimizer at work on a view.

    A step is evaluated, then written to the trajectory, then applied, then the state is saved. A
    kill at any moment leaves a file whose last complete state can be gone on from.

    Args:
        optimizer: Started by this class.
        evaluator: Owns the objective, the view and the count of queries.
        samples: Where batches come from.
        budget: Limits.
        seed: Of directions and data order.
        trajectory: File to write, or None. Beside it lies FILE.state, rewritten every step.
        resume: Go on from the file if it is there.

    Raises:
        TrajectoryError: The file is there and ``resume`` is False, or it does not fit this run.
        OptionError: A trajectory of a first-order optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        evaluator: Evaluator,
        samples: Samples,
        budget: Budget,
        seed: int,
        trajectory: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        self.optimizer, self.evaluator = optimizer, evaluator
        self.samples, self.budget = samples, budget
        self.steps = 0
        self.last: StepInfo | None = None
        self.logged: list[Step] = []
        """Steps of the run that were made before this process; filled by resuming."""
        optimizer.start(evaluator.view, seed)
        self._writer: Writer | None = None
        self._state_path: Path | None = None
        if trajectory is not None:
            self._open(Path(trajectory), seed, resume)

    def step(self) -> StepInfo:
        """One step.

        Raises:
            BudgetExhausted, NonFiniteObjectiveError, StepTooLargeError, TrajectoryWriteError: The
                weights and the file are those after the step before.
        """
        info = self.optimizer.step(self.evaluator, self.samples, self.budget)
        view = self.evaluator.view
        terms = view.checked(info.update)
        number = self.steps + 1
        if self._writer is not None:
            applied = info.update._replace(terms=terms)
            value = self.evaluator.sign * info.value
            self._writer.append(
                Step(
                    number,
                    self.evaluator.queries,
                    value,
                    info.lr,
                    info.projected_gradient,
                    applied,
                    info.kind,
                )
            )
        view.apply_in_order(terms, info.update.decay)
        self.steps, self.last = number, info
        if self._writer is not None and self._state_path is not None:
            self._save_state(self._writer, self._state_path)
        return info

    def log_to(self, path: Path, settings: Mapping[str, Any], at: Position | None = None) -> None:
        """Append every further step to a file, begun anew or from a place on.

        For loops that keep weights and state by themselves, as Trainer does in its checkpoints.
        """
        if at is None:
            self._writer = Writer(path, header_of(self.evaluator.view, settings=dict(settings)))
            return
        header = Reader(path).header
        if header["fingerprint"] != self.evaluator.view.fingerprint():
            raise TrajectoryError(f"{path} belongs to another view; choose another folder")
        self._writer = Writer(path, {}, at)

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

    def _open(self, path: Path, seed: int, resume: bool) -> None:
        if not isinstance(self.optimizer, ZerothOrder):
            raise OptionError("a trajectory holds directions; a first-order run has none")
        self._state_path = path.with_name(path.name + ".state")
        settings = {
            **self.optimizer.settings(),
            "seed": seed,
            "batch_size": self.samples.batch_size,
            "rows": len(self.samples.source),
            "max_steps": self.budget.max_steps,
            "max_queries": self.budget.max_queries,
        }
        state_path = self._state_path
        begun = path.exists() and state_path.exists()
        if path.exists() and not resume:
            raise TrajectoryError(
                f"{path} is there already; pass resume=True to go on with it, or another name"
            )
        if not begun:
            self._writer = Writer(path, header_of(self.evaluator.view, settings=settings))
            self._save_state(self._writer, state_path)
            return
        self._resume(path, state_path, settings)

    def _resume(self, path: Path, state_path: Path, settings: Mapping[str, Any]) -> None:
        reader = Reader(path)
        check_header(self.evaluator.view, reader.header, path)
        for name, value in settings.items():
            if reader.header["settings"].get(name) != value:
                raise TrajectoryError(
                    f"{path} was begun with {name}={reader.header['settings'].get(name)!r}, not "
                    f"{value!r}; resume with the same settings, or begin another file"
                )
        state = json.loads(state_path.read_text())
        at = Position(*state["position"])
        position = reader.start
        if position != at:
            for step, position in reader.steps():
                self.logged.append(step)
                if position.offset >= at.offset:
                    break
        if position != at:
            raise TrajectoryError(f"{state_path} does not belong to {path}")
        apply_all(self.evaluator.view, [step.update for step in self.logged])
        self.load_state_dict(state["run"])
        self._writer = Writer(path, {}, at)

    def _save_state(self, writer: Writer, path: Path) -> None:
        state = {"position": writer.position, "run": self.state_dict()}
        scratch = path.with_name(path.name + ".new")
        scratch.write_text(json.dumps(state))
        # Renaming is atomic: a kill leaves the old state or the new one, never a half.
        os.replace(scratch, path)
