"""A ZOTrainer run goes on from Trainer's checkpoints, bit for bit, and leaves its trajectory."""

import os
import random
import shutil
import signal
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_trainer import lora_model, trainer_of
from tiny_models import tiny_model
from transformers import TrainerCallback

from zo_adapt import MeZO, MeZOSVRG, ParameterView, replay
from zo_adapt.errors import (
    CorruptTrajectoryError,
    TrajectoryError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.trainer.state import INITIAL, STATE, TRAJECTORY, last_whole_checkpoint, set_aside
from zo_adapt.trajectory.tools import main

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Trainer's DataLoader asks for pinned memory where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
STEPS = 12
SAVING: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3}
OPTIMIZERS = {
    "mezo": MeZO,
    "svrg": lambda: MeZOSVRG(snapshot_interval=2, snapshot_size=32, num_directions=4),
    "svrg with kept values": lambda: MeZOSVRG(snapshot_interval=20, num_directions=4),
}


class StopAt(TrainerCallback):
    """As if the process had been killed after this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_resumed_training_is_the_one_that_was_never_stopped(tmp_path: Path, name: str) -> None:
    whole = trainer_of(tmp_path / "whole", zo_optimizer=OPTIMIZERS[name](), **SAVING)
    whole.train()
    stopped = trainer_of(
        tmp_path / "parts",
        zo_optimizer=OPTIMIZERS[name](),
        callbacks=[StopAt(7)],
        save_total_limit=1,  # Trainer's rotation leaves the newest
        **SAVING,
    )
    stopped.train()
    again = trainer_of(tmp_path / "parts", zo_optimizer=OPTIMIZERS[name](), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.view.hash() == whole.view.hash() != stopped.view.hash()
    assert again.queries == whole.queries
    files = [(tmp_path / run / TRAJECTORY).read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_start_on_the_training_data_is_resumed_and_replayed(tmp_path: Path) -> None:
    options = SAVING | {"lora_start_rows": 24, "max_steps": 6}
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    trainer_of(tmp_path / "parts", callbacks=[StopAt(4)], **options).train()
    again = trainer_of(tmp_path / "parts", **options)
    again.train(resume_from_checkpoint=True)
    assert again.view.hash() == whole.view.hash()
    # Another run in the folder keeps the first one's start beside its trajectory.
    trainer_of(tmp_path / "parts", lora_start_rows=8, max_steps=2).train()
    for start, file in (("initial_adapter.1", "trajectory.1.zot"), (INITIAL, TRAJECTORY)):
        received = PeftModel.from_pretrained(
            tiny_model("bert"), tmp_path / "parts" / start, is_trainable=True
        )
        view = ParameterView.trainable(received)
        replay(view, tmp_path / "parts" / file)
        assert (view.hash() == whole.view.hash()) == (start != INITIAL)


def test_the_trajectory_of_a_training_rebuilds_its_adapter(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=5)
    trainer.train()
    view = ParameterView.trainable(lora_model())
    assert replay(view, tmp_path / TRAJECTORY) == 5
    assert view.hash() == trainer.view.hash()


def test_the_tool_writes_the_adapter_of_a_step(tmp_path: Path) -> None:
    trainer_of(tmp_path, max_steps=5).train()
    lora_model().save_pretrained(tmp_path / "start")
    file, start, out = (str(tmp_path / name) for name in (TRAJECTORY, "start", "out"))
    main(["export", file, "--start", start, "--output", out, "--until", "3"])
    expected = lora_model()
    replay(ParameterView.trainable(expected), tmp_path / TRAJECTORY, 3)
    loaded = PeftModel.from_pretrained(tiny_model("bert"), out).eval()
    inputs = {"input_ids": torch.tensor([[6, 7, 41, 42]])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected.eval()(**inputs).logits)
        assert not torch.equal(loaded(**inputs).logits, lora_model().eval()(**inputs).logits)


def test_a_checkpoint_without_its_state_is_named(tmp_path: Path) -> None:
    trainer_of(tmp_path, **SAVING).train()
    checkpoint = tmp_path / f"checkpoint-{STEPS - 3}"
    (checkpoint / STATE).unlink()
    with pytest.raises(TrajectoryError, match=STATE):
        trainer_of(tmp_path, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    shutil.rmtree(checkpoint)


def test_a_run_in_a_used_folder_keeps_the_trajectory_before(tmp_path: Path) -> None:
    hashes, files = [], []
    for number in range(3):
        trainer = trainer_of(tmp_path, max_steps=number + 2)
        trainer.train()
        hashes.append(trainer.view.hash())
    for number, name in enumerate(("trajectory.1.zot", "trajectory.2.zot", TRAJECTORY)):
        view = ParameterView.trainable(lora_model())
        assert replay(view, tmp_path / name) == number + 2
        assert view.hash() == hashes[number]
        files.append((tmp_path / name).read_bytes())
    assert len(set(files)) == 3


def test_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "a.zot") is None
    for number in (1, 2):
        (tmp_path / "a.zot").write_text(str(number))
        assert set_aside(tmp_path / "a.zot") == tmp_path / f"a.{number}.zot"
        assert (tmp_path / f"a.{number}.zot").read_text() == str(number)


def test_a_checkpoint_brings_its_trajectory_to_another_folder(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", **SAVING)
    whole.train()
    before = (tmp_path / "whole" / TRAJECTORY).read_bytes()
    moved = trainer_of(tmp_path / "moved", **SAVING)
    moved.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert moved.view.hash() == whole.view.hash()
    assert (tmp_path / "moved" / TRAJECTORY).read_bytes() == before
    assert (tmp_path / "whole" / TRAJECTORY).read_bytes() == before


def test_without_its_trajectory_a_new_one_begins_at_the_checkpoint(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path, **SAVING)
    whole.train()
    (tmp_path / TRAJECTORY).unlink()
    checkpoint = str(tmp_path / "checkpoint-6")
    again = trainer_of(tmp_path, **SAVING)
    with pytest.warns(UserWarning, match="from the checkpoint's weights"):
        again.train(resume_from_checkpoint=checkpoint)
    assert again.view.hash() == whole.view.hash()
    start = PeftModel.from_pretrained(tiny_model("bert"), checkpoint, is_trainable=True)
    view = ParameterView.trainable(start)
    assert replay(view, tmp_path / TRAJECTORY) == STEPS - 6
    assert view.hash() == whole.view.hash()


def test_resuming_with_other_settings_or_another_file_is_refused(tmp_path: Path) -> None:
    for name, options in {"one": {}, "two": {"seed": 5}}.items():
        trainer_of(tmp_path / name, zo_optimizer=MeZO(1e-3), **SAVING, **options).train()
    before = (tmp_path / "one" / TRAJECTORY).read_bytes()
    with pytest.raises(TrajectoryError, match=r"lr=0\.001, not 0\.01"):
        trainer_of(tmp_path / "one", zo_optimizer=MeZO(1e-2), **SAVING).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(TrajectoryError, match="seed=5"):
        trainer_of(tmp_path / "two", zo_optimizer=MeZO(1e-3), **SAVING).train(
            resume_from_checkpoint=True
        )
    (tmp_path / "one" / TRAJECTORY).write_bytes(before[:-100])
    with (
        pytest.warns(TruncatedTrajectoryWarning),
        pytest.raises(TrajectoryError, match="no record that ends"),
    ):
        trainer_of(tmp_path / "one", zo_optimizer=MeZO(1e-3), **SAVING).train(
            resume_from_checkpoint=True
        )
    (tmp_path / "one" / TRAJECTORY).write_bytes(before)
    assert (tmp_path / "one" / TRAJECTORY).read_bytes() == before
    state = tmp_path / "one" / "checkpoint-6" / STATE
    state.write_text(state.read_text().replace('"steps": 6', '"steps": 5'))
    with pytest.raises(CorruptTrajectoryError, match="damaged"):
        trainer_of(tmp_path / "one", zo_optimizer=MeZO(1e-3), **SAVING).train(
            resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6")
        )


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    trainer_of(tmp_path, **SAVING).train()
    newest = tmp_path / "checkpoint-12"
    assert last_whole_checkpoint(tmp_path) == str(newest)
    state = newest / "trainer_state.json"
    for half in (state.read_text()[:40], None):
        if half is None:
            state.unlink()
        else:
            state.write_text(half)
        with pytest.warns(UserWarning, match="checkpoint-12 was not written to its end"):
            assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def killed_life(folder: Path) -> None:
    """One life of a training that saves at every step: resumed where it can be."""
    warnings.simplefilter("ignore")
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(folder, zo_optimizer=MeZO(), save_total_limit=2, **options)
    begun = any(folder.glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=True if begun else None)
    (folder / "hash").write_text(trainer.view.hash())


def newest(folder: Path) -> int:
    """Number of the last checkpoint that was begun."""
    return max((int(path.name[11:]) for path in folder.glob("checkpoint-[0-9]*")), default=0)


def test_a_training_that_is_killed_again_and_again_ends_the_same(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", zo_optimizer=MeZO(), **SAVING)
    whole.train()
    moments, kills, parts = random.Random(0), 0, tmp_path / "parts"
    fork = get_context("fork")
    for life in range(100):
        child = fork.Process(target=killed_life, args=(parts,))
        before = newest(parts)
        child.start()
        while life < 6 and child.is_alive() and newest(parts) == before:
            time.sleep(1e-3)
        child.join(moments.uniform(0, 0.03) if life < 6 else None)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        elif (parts / "hash").exists():
            break
    assert kills >= 5
    assert (parts / "hash").read_text() == whole.view.hash()
    view = ParameterView.trainable(lora_model())
    assert replay(view, parts / TRAJECTORY) == STEPS
    assert view.hash() == whole.view.hash()


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path, zo_optimizer=MeZO(), **SAVING)
    whole.train()
    newest = tmp_path / f"checkpoint-{STEPS}"
    (newest / "trainer_state.json").unlink()
    (newest / STATE).unlink()
    again = trainer_of(tmp_path, zo_optimizer=MeZO(), **SAVING)
    with pytest.warns(UserWarning, match="not written to its end"):
        again.train(resume_from_checkpoint=True)
    assert again.view.hash() == whole.view.hash()
    assert (newest / STATE).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_view_that_was_made_before_is_resumed(tmp_path: Path, dtype: torch.dtype) -> None:
    def trained(folder: str, **options: Any) -> Any:
        model = lora_model().to(dtype)
        view = ParameterView.trainable(model)
        return trainer_of(tmp_path / folder, model, view=view, zo_optimizer=MeZO(), **options)

    whole = trained("whole", **SAVING)
    whole.train()
    trained("parts", callbacks=[StopAt(7)], **SAVING).train()
    again = trained("parts", **SAVING)
    again.train(resume_from_checkpoint=True)
    held = {id(tensor) for tensor in again.view.tensors.values()}
    assert held <= {id(parameter) for parameter in again.model.parameters()}
    assert again.view.hash() == whole.view.hash()
