"""What ZOTrainer adds to Trainer's checkpoints, and the trajectory in its output folder."""

import json
from pathlib import Path
from typing import Any

from zo_adapt.errors import TrajectoryError
from zo_adapt.optimizer import ZerothOrder
from zo_adapt.run import Run
from zo_adapt.trajectory import Position

STATE = "zo_state.json"
TRAJECTORY = "trajectory.zot"


def save_state(run: Run, checkpoint: Path) -> None:
    """Write the run's state beside the weights that Trainer saves."""
    if isinstance(run.optimizer, ZerothOrder):
        state = {"position": run.position, "run": run.state_dict()}
        (checkpoint / STATE).write_text(json.dumps(state))


def begin_log(run: Run, folder: Path, seed: int, checkpoint: Path | None) -> None:
    """Begin the trajectory, or go on from a checkpoint whose weights Trainer has restored.

    Raises:
        TrajectoryError: The checkpoint was not written by ZOTrainer, or by other settings.
    """
    if not isinstance(run.optimizer, ZerothOrder):
        return
    settings: dict[str, Any] = {**run.optimizer.settings(), "seed": seed}
    at = None
    if checkpoint is not None:
        at = _restore(run, checkpoint)
    run.log_to(folder / TRAJECTORY, settings, at)


def _restore(run: Run, checkpoint: Path) -> Position | None:
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except FileNotFoundError as error:
        raise TrajectoryError(
            f"{checkpoint} has no {STATE}: it was not saved by ZOTrainer, or with save_only_model; "
            "resume from another, or start from its weights"
        ) from error
    run.load_state_dict(state["run"])
    return None if state["position"] is None else Position(*state["position"])
