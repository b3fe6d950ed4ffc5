"""What ZOTrainer measures beside the loss: where it is logged, and what it counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_trainer import arguments, lora_model, toy_rows
from test_trainer_order import news
from test_trainer_resume import StopAt
from torch.utils.data import IterableDataset

from objectives import Accuracy, ClassificationLoss
from zo_adapt import Metrics, MeZO, MeZOSVRG, ParameterView, TrackVariance, ZOTrainer, minimize
from zo_adapt.errors import OptionError

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Trainer's DataLoader asks for pinned memory where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
WATCHED = TrackVariance(2, num_directions=4, batch_size=4, gradient=True)
STEPS = 7


def svrg() -> MeZOSVRG:
    return MeZOSVRG(displacement=0.25, snapshot_interval=3, snapshot_size=32)


def trainer_of(folder: Path, metrics: Any = None, **options: Any) -> ZOTrainer:
    model = lora_model(num_labels=3)
    own = ("callbacks", "zo_optimizer")
    to_trainer = {name: options.pop(name) for name in own if name in options}
    return ZOTrainer(
        model,
        arguments(folder, **{"max_steps": STEPS, "seed": 7, "logging_steps": 3} | options),
        train_dataset=news(),
        objective=ClassificationLoss(model),
        metrics=metrics,
        **{"zo_optimizer": svrg()} | to_trainer,
    )


def noise_in(trainer: ZOTrainer) -> dict[int, dict[str, float]]:
    """What TrackVariance has logged, by step."""
    found: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        own = {name: value for name, value in entry.items() if name.startswith("noise_")}
        if own:
            assert entry["step"] not in found, "logged twice"
            found[entry["step"]] = own
    return found


def test_noise_is_logged_at_its_own_steps_as_minimize_measures_it(tmp_path: Path) -> None:
    """The same figures to the bit, the same steps, the same count of queries."""
    trainer = trainer_of(tmp_path, {"noise": WATCHED}, zo_optimizer=MeZO())
    trainer.train()
    model = lora_model(num_labels=3)
    view = ParameterView.trainable(model)
    result = minimize(
        ClassificationLoss(model), view, news(), MeZO(), batch_size=16, max_steps=STEPS, seed=7,
        progress=False, metrics={"noise": WATCHED},
    )  # fmt: skip
    expected = {step.step: step.metrics for step in result.history if step.metrics}
    assert list(expected) == [2, 4, 6]
    assert noise_in(trainer) == expected
    assert trainer.view.hash() == view.hash()
    assert trainer.queries == result.queries
    # minimize measures after its last step as well.
    assert trainer.metric_queries * 4 == result.metric_queries * 3 > 0


def test_a_training_is_the_same_when_it_is_watched(tmp_path: Path) -> None:
    watched, alone = trainer_of(tmp_path / "watched", {"noise": WATCHED}), trainer_of(tmp_path)
    watched.train()
    alone.train()
    assert watched.view.hash() == alone.view.hash()
    assert watched.queries == alone.queries
    assert watched.metric_queries > 0 == alone.metric_queries
    losses = [
        [entry["loss"] for entry in one.state.log_history if "loss" in entry]
        for one in (watched, alone)
    ]
    assert losses[0] == losses[1] != []


def test_objectives_are_measured_where_trainer_logs(tmp_path: Path) -> None:
    """Beside the loss, at steps 3 and 6; there is one entry where both are due."""
    model = lora_model(num_labels=3)
    trainer = trainer_of(tmp_path, Metrics({"accuracy": Accuracy(model), "noise": WATCHED}, news()))
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "accuracy" in entry] == [3, 6]
    both = [entry for entry in history if entry["step"] == 6 and "noise_data_noise" in entry]
    assert len(both) == 1
    assert {"loss", "accuracy", "queries"} <= both[0].keys()


def test_noise_is_logged_where_trainer_logs_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"noise": WATCHED}, logging_strategy="no")
    trainer.train()
    assert list(noise_in(trainer)) == [2, 4, 6]
    assert not any("loss" in entry for entry in trainer.state.log_history)


def test_a_resumed_training_logs_the_noise_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", {"noise": WATCHED}, **saving)
    whole.train()
    trainer_of(tmp_path / "parts", {"noise": WATCHED}, callbacks=[StopAt(4)], **saving).train()
    again = trainer_of(tmp_path / "parts", {"noise": WATCHED}, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert noise_in(again) == noise_in(whole)
    assert {"noise_explained", "noise_distance", "noise_cosine"} <= noise_in(whole)[4].keys()
    assert again.view.hash() == whole.view.hash()


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from toy_rows(64)


def test_the_noise_along_a_stream_is_refused_before_any_step(tmp_path: Path) -> None:
    model = lora_model()
    trainer = ZOTrainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=Stream(),
        objective=ClassificationLoss(model),
        metrics={"noise": WATCHED},
    )
    with pytest.raises(OptionError, match=r"'noise' watches.*no length"):
        trainer.train()
    assert trainer.queries == 0
