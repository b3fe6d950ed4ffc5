"""What ZOTrainer adds to Trainer's checkpoints, and the trajectory in its output folder."""

import json
import shutil
import warnings
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save

from zo_adapt.errors import CorruptTrajectoryError, TrajectoryError
from zo_adapt.loops.resume import check_settings
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.first_order import FirstOrder
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.trajectory.file import Position
from zo_adapt.trajectory.owned_file import OwnedFile
from zo_adapt.trajectory.safe_file import read_state, replace_file, write_state
from zo_adapt.view.group import Group, Groups
from zo_adapt.view.parameters import ParameterView

STATE = "zo_state.json"
MOMENTS = "zo_moments.safetensors"
TRAJECTORY = "trajectory.zot"
INITIAL = "initial_adapter"
"""The adapter as the trajectory begins, where it was set on training examples."""


class Checkpoint(NamedTuple):
    """A checkpoint of Trainer's that has a state of ours."""

    folder: Path
    state: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Checkpoint":
        """The checkpoint in a folder.

        Raises:
            TrajectoryError: It was not written by ZOTrainer.
            CorruptTrajectoryError: It is damaged.
        """
        folder = Path(folder)
        try:
            found = cls(folder, read_state(folder / STATE))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TrajectoryError(
                f"{folder} has no {STATE}: it was not saved by ZOTrainer, or with save_only_model, "
                "or with an optimizer of another origin; resume from another, or start from its "
                "weights"
            ) from error
        if not _is_whole(folder):
            raise CorruptTrajectoryError(
                f"{folder} was not written to its end: its trainer_state.json is missing or "
                "damaged; resume from another checkpoint"
            )
        return found

    @property
    def groups(self) -> Groups:
        """The groups of the view that was tuned. Defaults are made of weights that have moved."""
        kept = self.state.get("view")
        return "auto" if kept is None else [Group(*group) for group in kept["groups"][:-1]]

    def fit(self, view: ParameterView) -> None:
        """Give a view what the one that was tuned began with, if it is the same otherwise.

        Raises:
            TrajectoryError: It is another view, or on another base model.
        """
        kept = self.state.get("view")
        if kept is None:  # of a version before
            return
        if kept["fingerprint"] != view.fingerprint():
            view.follow_noise("gaussian")  # what was usual before
        if kept["fingerprint"] != view.fingerprint():
            raise TrajectoryError(
                f"{self.folder} belongs to another view: {_said(kept)}, here "
                f"{_said(_described(view))}; resume with the same view, or start from the "
                "checkpoint's weights"
            )
        if kept["base"] is not None and not view.has_base(kept["base"]):
            raise TrajectoryError(
                f"{self.folder} was made on another base model, or with adapters that are scaled "
                "otherwise (lora_alpha); load what it was made on"
            )
        view.displacement = kept["displacement"]
        view.resolved_at_start = kept.get("resolved")

    def tensors(self) -> dict[str, Any]:
        """Those of the optimizer: moments of a first-order one, values that a snapshot had.

        Raises:
            CorruptTrajectoryError: They are damaged.
        """
        path = self.folder / MOMENTS
        if not path.exists() or zlib.crc32(path.read_bytes()) != self.state["moments"]:
            raise CorruptTrajectoryError(f"{path} is damaged; resume from another checkpoint")
        return load_file(path)


def save_state(run: Run, checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Write the run's state beside the weights that Trainer saves."""
    optimizer, view = run.optimizer, run.evaluator.view
    if not isinstance(optimizer, ZerothOrder | FirstOrder):
        return
    state: dict[str, Any] = {
        "position": run.position,
        "run": run.state_dict(),
        "settings": dict(settings),
        "view": {
            "fingerprint": view.fingerprint(),
            **_described(view),
            "displacement": view.displacement,
            "resolved": optimizer.state.resolved if isinstance(optimizer, ZerothOrder) else None,
            "base": view.base_hash(),
            "at_rest": sorted(view.at_rest),
        },
    }
    if isinstance(optimizer, FirstOrder) or optimizer.tensors():
        tensors = {name: t.detach().cpu().contiguous() for name, t in optimizer.tensors().items()}
        data = save(tensors)
        replace_file(checkpoint / MOMENTS, data)
        state["moments"] = zlib.crc32(data)
    write_state(checkpoint / STATE, state)


def _described(view: ParameterView) -> dict[str, Any]:
    return {
        "tensors": len(view.tensors),
        "scalars": view.numel,
        "groups": [group.as_list() for group in view.groups],
        "dtypes": sorted({str(tensor.dtype) for tensor in view.tensors.values()}),
        "noise": view.noise.name,
        "first": next(iter(view.tensors)),
    }


def _said(view: Mapping[str, Any]) -> str:
    """A view in a line; what versions before did not keep is left out."""
    size = f"{view['tensors']} tensors with {view['scalars']:,} scalars in groups {view['groups']}"
    more = [f"{name} {view[name]}" for name in ("dtypes", "noise", "first") if name in view]
    return ", ".join([size, *more])


def begin_log(
    run: Run, folder: Path, settings: Mapping[str, Any], checkpoint: Checkpoint | None
) -> None:
    """Begin the trajectory, or go on from a checkpoint whose weights Trainer has restored.

    A trajectory that lies there and is not gone on with is kept, under a numbered name.

    Raises:
        TrajectoryError: The checkpoint was made with other settings.
        TrajectoryInUseError: Another run is writing the trajectory that lies there.
    """
    at = None if checkpoint is None else _restore(run, checkpoint, settings)
    if not isinstance(run.optimizer, ZerothOrder):
        return
    run.is_logged = True
    with nullcontext() if run.ranks is None else run.ranks.agreeing():
        if run.is_first_rank:
            _log(run, folder, settings, checkpoint, at)


def _log(
    run: Run,
    folder: Path,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    at: Position | None,
) -> None:
    path = folder / TRAJECTORY
    if at is not None and checkpoint is not None and _found(path, checkpoint.folder):
        run.log_to(path, _lasting(settings), at)
        return
    if path.exists():
        OwnedFile(path).close()  # it is nobody's
    if (kept := set_aside(path)) is not None and (folder / INITIAL).exists():
        # A trajectory and the adapter that it begins at keep the same number.
        number = kept.stem.removeprefix(path.stem)
        set_aside(folder / f"{INITIAL}{number}")
        (folder / INITIAL).rename(folder / f"{INITIAL}{number}")
    run.log_to(path, settings)


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without Trainer's own schedule, which may go on for longer than was planned."""
    return {name: value for name, value in settings.items() if name != "schedule"}


def _restore(run: Run, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Position | None:
    state = checkpoint.state
    check_settings(checkpoint.folder, state.get("settings", {}), _lasting(settings))
    try:
        run.load_state_dict(state["run"])
        position = state["position"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptTrajectoryError(
            f"the state in {checkpoint.folder} is none of this run ({error!r})"
        ) from error
    run.evaluator.view.leave_at_rest(state.get("view", {}).get("at_rest", ()))
    if isinstance(run.optimizer, FirstOrder | ZerothOrder) and "moments" in state:
        run.optimizer.load_tensors(checkpoint.tensors())
    return None if position is None else Position(*position)


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


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest of Trainer's checkpoints that is whole.

    Trainer writes its state last; a kill before that leaves a folder that cannot be resumed from,
    but that Trainer would choose.
    """
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-[0-9]*")}
    for _, checkpoint in sorted(found.items(), reverse=True):
        if _is_whole(checkpoint):
            return str(checkpoint)
        warnings.warn(f"{checkpoint} was not written to its end: left aside", stacklevel=2)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether Trainer's own state, which it writes last, is there and can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


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
