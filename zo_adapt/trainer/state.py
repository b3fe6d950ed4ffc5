"""What ZOTrainer adds to Trainer's checkpoints, and the trajectory in its output folder."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from zo_adapt.errors import TrajectoryError
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.trajectory.file import Position
from zo_adapt.trajectory.safe_file import read_state, write_state

STATE = "zo_state.json"
TRAJECTORY = "trajectory.zot"


def save_state(run: Run, checkpoint: Path) -> None:
    """Write the run's state beside the weights that Trainer saves."""
    if isinstance(run.optimizer, ZerothOrder):
        write_state(checkpoint / STATE, {"position": run.position, "run": run.state_dict()})


def begin_log(run: Run, folder: Path, seed: int, checkpoint: Path | None) -> None:
    """Begin the trajectory, or go on from a checkpoint whose weights Trainer has restored.

    A trajectory that lies there and is not gone on with is kept, under a numbered name.

    Raises:
        TrajectoryError: The checkpoint was not written by ZOTrainer, or by other settings.
    """
    if not isinstance(run.optimizer, ZerothOrder):
        return
    path, at = folder / TRAJECTORY, None
    settings: dict[str, Any] = {**run.optimizer.settings(), "seed": seed}
    if checkpoint is not None:
        at = _restore(run, checkpoint)
    if at is not None and checkpoint is not None and _found(path, checkpoint):
        del settings["schedule"]  # Trainer's own, which may go on for longer than was planned
        run.log_to(path, settings, at)
        return
    set_aside(path)
    run.log_to(path, settings)


def set_aside(path: Path) -> Path | None:
    """Rename a file to the first free of ``name.1.suffix``, ``name.2.suffix``, ...

    Returns:
        The new name; None if there was no such file.
    """
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(kept)


class WholeCheckpoints:
    """For Trainer: ``resume_from_checkpoint=True`` means the newest checkpoint that is whole."""

    args: Any

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **options: Any
    ) -> Any:
        """Trainer's own."""
        if resume_from_checkpoint is True:
            folder = Path(self.args.output_dir or ".")
            resume_from_checkpoint = last_whole_checkpoint(folder) or True
        return super().train(resume_from_checkpoint, *positional, **options)  # type: ignore[misc]


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest of Trainer's checkpoints that is whole.

    Trainer writes its state last; a kill before that leaves a folder that cannot be resumed from,
    but that Trainer would choose.

    Args:
        folder: Trainer's output folder.
    """
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-[0-9]*")}
    for _, checkpoint in sorted(found.items(), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            warnings.warn(f"{checkpoint} was not written to its end: left aside", stacklevel=2)
        else:
            return str(checkpoint)
    return None


def _restore(run: Run, checkpoint: Path) -> Position | None:
    try:
        state = read_state(checkpoint / STATE)
    except FileNotFoundError as error:
        raise TrajectoryError(
            f"{checkpoint} has no {STATE}: it was not saved by ZOTrainer, or with save_only_model; "
            "resume from another, or start from its weights"
        ) from error
    run.load_state_dict(state["run"])
    return None if state["position"] is None else Position(*state["position"])


def _found(path: Path, checkpoint: Path) -> bool:
    """Whether the trajectory that leads to a checkpoint is there; brought along if need be."""
    original = checkpoint.parent / TRAJECTORY
    if path.exists():
        return True
    if original.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, path)
        return True
    warnings.warn(
        f"there is no {TRAJECTORY} in {path.parent} nor beside {checkpoint}: a new one begins, "
        "from the checkpoint's weights",
        stacklevel=2,
    )
    return False
