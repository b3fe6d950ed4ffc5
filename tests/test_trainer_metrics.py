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
from zo_adapt import (
    ZOPAGE,
    ZOSAGA,
    ZOSPIDER,
    ZOSTORM,
    ZOSVRG,
    Metrics,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Result,
    TrackVariance,
    ZOTrainer,
    minimize,
)
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


OPTIMIZERS = {
    "mezo": MeZO,
    "mezo-svrg": svrg,
    # Its large batch is no larger than a minibatch.
    "mezo-svrg, small": lambda: MeZOSVRG(displacement=0.25, snapshot_size="batch"),
    "zo-svrg": lambda: ZOSVRG(displacement=0.25, snapshot_interval=3),
    "zo-spider": lambda: ZOSPIDER(displacement=0.25),
    "zo-page": lambda: ZOPAGE(displacement=0.25, restart_probability=0.4),
    "zo-storm": lambda: ZOSTORM(displacement=0.25),
    "zo-saga": lambda: ZOSAGA(displacement=0.25),
}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}


class Topics(ClassificationLoss):
    """Classes that are made of the examples: those have no field by such a name."""

    def collate(self, examples: list[dict[str, Any]]) -> Any:
        return super().collate(
            [{"input_ids": one["input_ids"], "labels": len(one["topic"])} for one in examples]
        )


def without_classes() -> list[dict[str, Any]]:
    return [{"input_ids": one["input_ids"], "topic": "x" * one["labels"]} for one in news()]


def trainer_of(folder: Path, metrics: Any = None, **options: Any) -> ZOTrainer:
    model = lora_model(num_labels=3)
    own = ("callbacks", "zo_optimizer")
    to_trainer = {name: options.pop(name) for name in own if name in options}
    data = options.pop("data", None)
    objective = ClassificationLoss if data is None else Topics
    return ZOTrainer(
        model,
        arguments(folder, **{"max_steps": STEPS, "seed": 7, "logging_steps": 3} | options),
        train_dataset=data or news(),
        objective=objective(model),
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


def minimized(optimizer: Any, data: Any = None) -> tuple[Result, ParameterView]:
    """What minimize makes of the run of ``trainer_of``."""
    model = lora_model(num_labels=3)
    view = ParameterView.trainable(model)
    objective = ClassificationLoss if data is None else Topics
    result = minimize(
        objective(model), view, data or news(), optimizer, batch_size=16, max_steps=STEPS, seed=7,
        progress=False, metrics={"noise": WATCHED},
    )  # fmt: skip
    return result, view


def noise_of(result: Result) -> dict[int, dict[str, float]]:
    """By step, as ``noise_in``."""
    return {step.step: step.metrics for step in result.history if step.metrics}


def test_noise_is_logged_at_its_own_steps_as_minimize_measures_it(tmp_path: Path) -> None:
    """The same figures to the bit, the same steps, the same count of queries."""
    trainer = trainer_of(tmp_path, {"noise": WATCHED}, zo_optimizer=MeZO())
    trainer.train()
    result, view = minimized(MeZO())
    assert list(noise_of(result)) == [2, 4, 6]
    assert noise_in(trainer) == noise_of(result)
    assert trainer.view.hash() == view.hash()
    assert trainer.queries == result.queries
    # minimize measures after its last step as well.
    assert trainer.metric_queries * 4 == result.metric_queries * 3 > 0


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_training_that_was_resumed_logs_the_figures_of_minimize(
    tmp_path: Path, name: str
) -> None:
    make = OPTIMIZERS[name]
    result, view = minimized(make())
    figures = {"noise_direction_noise", "noise_data_noise", "noise_data_share", "noise_cosine"}
    if name not in ("mezo", "zo-saga"):
        figures |= {"noise_explained", "noise_distance"}
    assert {step: found.keys() for step, found in noise_of(result).items()} == dict.fromkeys(
        (2, 4, 6), figures
    )
    watched = {"metrics": {"noise": WATCHED}, **SAVING}
    trainer_of(tmp_path, zo_optimizer=make(), callbacks=[StopAt(4)], **watched).train()
    again = trainer_of(tmp_path, zo_optimizer=make(), **watched)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert noise_in(again) == noise_of(result)
    assert again.view.hash() == view.hash()
    assert again.queries == result.queries


@pytest.mark.parametrize("name", ["mezo", "mezo-svrg", "zo-saga"])
def test_so_does_one_on_data_without_classes(tmp_path: Path, name: str) -> None:
    make = OPTIMIZERS[name]
    result, view = minimized(make(), without_classes())
    options = {"zo_optimizer": make(), "data": without_classes()}
    trainer = trainer_of(tmp_path, {"noise": WATCHED}, **options)
    trainer.train()
    assert noise_in(trainer) == noise_of(result) != {}
    assert trainer.view.hash() == view.hash()


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
