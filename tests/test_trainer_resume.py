"""A ZOTrainer run goes on from Trainer's checkpoints, bit for bit, and leaves its trajectory."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_trainer import lora_model, trainer_of
from tiny_models import tiny_model
from transformers import TrainerCallback

from zo_adapt import MeZO, MeZOSVRG, ParameterView, replay
from zo_adapt.errors import TrajectoryError
from zo_adapt.trainer_state import STATE, TRAJECTORY
from zo_adapt.trajectory_tools import main

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
