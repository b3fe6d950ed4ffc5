"""What is kept of a run, so that it can go on: its state, and the file that one process writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import CorruptTrajectoryError, OptionError, TrajectoryError, ZOError
from zo_adapt.evaluation.protocol import Evaluator, Measuring
from zo_adapt.loops.resume import (
    LEAST_SHARES,
    LIMITS,
    check_budget,
    check_settings,
    check_state,
    schedule_as_begun,
    share_as_begun,
    steps_until,
)
from zo_adapt.optimizers.first_order import FirstOrder
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.ranks.group import Ranks
from zo_adapt.ranks.launched import is_restarted
from zo_adapt.term import Step
from zo_adapt.trajectory.file import Position, Reader, TrajectoryFile
from zo_adapt.trajectory.header import check_header, check_origin, header_of
from zo_adapt.trajectory.owned_file import OwnedFile
from zo_adapt.trajectory.safe_file import read_state, remove_scratch, write_state
from zo_adapt.trajectory.writer import Writer, check_terms_fit


class KeptRun:
    """How far a run is, and its trajectory.

    That is its steps and queries, its place in the data, its optimizer's state.

    Where several processes share the run, rank 0 alone reads and writes files; the others are given
    what they need to go on, so that they need no disk in common.

    Args:
        optimizer, evaluator, samples, budget, seed: As for ``Run``.
        ranks: Who shares the run; None: this process is alone.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        evaluator: Evaluator,
        samples: Samples,
        budget: Budget,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.optimizer, self.evaluator, self.samples = optimizer, evaluator, samples
        view = evaluator.view
        samples.least_share = LEAST_SHARES[view.is_large and not view.has_factors]
        self.steps = 0
        self.budget, self.seed, self.ranks = budget, seed, ranks
        self.last: Step | None = None
        self.logged: list[Step] = []
        """Steps of the run that were made before this process; filled by resuming."""
        self.is_logged = False
        """Whether there is a trajectory, whoever writes it."""
        self._writer: Writer | None = None
        self._state_is_ahead = False
        """Whether the state was written for a step that was then not taken."""
        self._file: TrajectoryFile | None = None
        """Where the state lies as well; None for loops that keep the state themselves."""

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes and logs."""
        return self.ranks is None or self.ranks.is_first

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
            view.follow_noise(reader.header["noise"])
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
        tokens = getattr(self.evaluator, "joint_tokens", None)
        return {
            "steps": self.steps,
            "queries": self.evaluator.queries,
            "positions": list(self.samples.positions.items()),
            "optimizer": self.optimizer.state_dict(),
            **({} if tokens is None else {"joint_tokens": tokens}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the weights are restored apart."""
        self.steps = state["steps"]
        if isinstance(self.evaluator, Measuring):
            self.evaluator.joint_tokens = state.get("joint_tokens")
        self._go_back({**state, "positions": dict(state["positions"])})

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

    def _begin_or_resume(self, settings: Mapping[str, Any], resume: bool) -> None:
        file = self._file
        if file is None:
            return
        path = file.place
        if not path.exists():
            self._begin(settings)
            return
        if not resume and not is_restarted():
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

    def _as_begun(self, reader: Reader) -> Mapping[str, Any]:
        """Evaluate as the run that is gone on with; the settings that follow from the file."""
        view, begun = self.evaluator.view, reader.header["settings"]
        check_header(view, reader.header, reader.path)
        view.leave_at_rest(reader.header.get("at_rest", ()))
        self.evaluator.memory = begun.get("memory")  # whatever there is here: the same bits
        shares = share_as_begun(self.samples, begun)
        return {**shares, **schedule_as_begun(self.optimizer, begun)}

    def _resume(self, owned: OwnedFile, settings: Mapping[str, Any]) -> None:
        path, reader = owned.path, Reader(owned.path)
        begun, as_begun = reader.header["settings"], self._as_begun(reader)
        check_settings(path, begun, {**settings, **as_begun})
        state = read_state(self._file.state)  # type: ignore[union-attr]
        budget = state.get("budget", {name: begun[name] for name in LIMITS if name in begun})
        try:
            check_budget(path, budget, self.budget)
            at = Position(*state["position"])
            self.logged = steps_until(reader, at)
            check_state(path, state["run"], self.logged)
            self.load_state_dict(state["run"])
            updates = [step.update for step in self.logged]
            self.optimizer.load_brief_state(state["run"]["optimizer"], updates)  # type: ignore[attr-defined]
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, ZOError):
                raise
            raise CorruptTrajectoryError(
                f"the state beside {path} is none of this run ({error!r})"
            ) from error
        self._writer = Writer(path, reader.header, at, file=owned)

    def _save_state(self) -> None:
        file, writer, optimizer = self._file, self._writer, self.optimizer
        if file is not None and writer is not None and isinstance(optimizer, ZerothOrder):
            state = {
                "position": writer.position,
                "budget": self.budget._asdict(),
                # What the records say as well is left out: it would grow from step to step.
                "run": self.state_dict() | {"optimizer": optimizer.brief_state()},
            }
            write_state(file.state, state, fsync=file.fsync)
