"""The order of ZOTrainer's minibatches: that of minimize, unless Trainer is told how to draw."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trainer import arguments, lora_model, pad, trainer_of
from test_trainer_resume import SAVING, StopAt
from torch.utils.data import SequentialSampler
from transformers import Trainer

from objectives import ClassificationLoss
from zo_adapt import Data, MeZO, ParameterView, ZOTrainer, minimize
from zo_adapt.errors import TrajectoryError
from zo_adapt.trainer.order import ORDER
from zo_adapt.trainer.state import STATE
from zo_adapt.trajectory.safe_file import read_state, write_state

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Trainer's DataLoader asks for pinned memory where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def news(rows: int = 48) -> list[dict[str, Any]]:
    """Texts of three classes, of which the first has half; all of a class one after the other."""
    labels = sorted((0, 0, 1, 2)[i % 4] for i in range(rows))
    return [
        {"input_ids": [6 + 10 * label, *range(7 + i % 5, 12)], "labels": label}
        for i, label in enumerate(labels)
    ]


class Batches(ZOTrainer):
    """Keeps the labels of every batch."""

    def __init__(self, *positional: Any, **options: Any) -> None:
        self.seen: list[list[int]] = []
        super().__init__(*positional, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.seen.append(torch.as_tensor(inputs["labels"]).tolist())
        return super().training_step(model, inputs, num_items_in_batch)


class InOrder(ZOTrainer):
    """Draws by a sampler of the user's own."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset)


def seen_by(kind: type[Batches], folder: Path, **options: Any) -> list[list[int]]:
    model = lora_model(num_labels=3)
    steps = {"max_steps": 9, "displacement": 0.25, "per_device_train_batch_size": 8}
    args = arguments(folder, **steps | options)
    trainer = kind(model, args, train_dataset=Dataset.from_list(news()), data_collator=pad)
    trainer.train()
    return trainer.seen


def test_the_same_seed_gives_the_run_of_minimize(tmp_path: Path) -> None:
    """Rows, directions, looks around and rates of several epochs: the same bits."""
    models = [lora_model(num_labels=3) for _ in range(2)]
    views = [ParameterView.trainable(model) for model in models]
    budget = 16 * 8 * 12
    ZOTrainer(
        models[0],
        arguments(tmp_path, max_queries=budget, seed=7),
        view=views[0],
        train_dataset=news(),
        objective=ClassificationLoss(models[0]),
    ).train()
    minimize(
        ClassificationLoss(models[1]),
        views[1],
        news(),
        MeZO(),
        batch_size=16,
        seed=7,
        max_queries=budget,
        progress=False,
    )
    assert views[0].hash() == views[1].hash()
    other = lora_model(num_labels=3)
    minimize(
        ClassificationLoss(other),
        ParameterView.trainable(other),
        Data(news(), stratify=False),
        MeZO(),
        batch_size=16,
        seed=7,
        max_queries=budget,
        progress=False,
    )
    assert ParameterView.trainable(other).hash() != views[0].hash()


def test_every_batch_has_its_part_of_every_class(tmp_path: Path) -> None:
    seen = seen_by(Batches, tmp_path)
    assert [Counter(labels) for labels in seen] == [{0: 4, 1: 2, 2: 2}] * 9
    assert seen[:3] != seen[6:], "the second epoch is drawn anew"
    assert seen_by(Batches, tmp_path) == seen
    assert seen_by(Batches, tmp_path, seed=1) != seen
    assert seen_by(Batches, tmp_path, data_seed=1) != seen


def test_without_it_and_without_classes_rows_are_drawn_as_trainer_does(tmp_path: Path) -> None:
    def first_batches(trainer: Trainer) -> list[Any]:
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    texts = Dataset.from_list(news())
    scores = texts.map(lambda row: {"labels": row["labels"] / 2})
    plain = Trainer(lora_model(), arguments(tmp_path), train_dataset=texts, data_collator=pad)
    torch.manual_seed(3)
    expected = first_batches(plain)
    for data, stratify in ((texts, False), (scores, True)):
        args = arguments(tmp_path, stratify=stratify)
        trainer = ZOTrainer(lora_model(), args, train_dataset=data, data_collator=pad)
        torch.manual_seed(3)
        assert first_batches(trainer) == expected


def test_a_sampler_of_the_users_own_is_respected(tmp_path: Path) -> None:
    class Watched(Batches, InOrder):
        pass

    assert [labels[0] for labels in seen_by(Watched, tmp_path)][:6] == [0, 0, 0, 1, 1, 2]


def test_a_run_of_a_former_version_goes_on_in_its_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(ZOTrainer, "_goes_on_as_drawn", True)
        whole = trainer_of(tmp_path / "whole", **SAVING)
        whole.train()
        trainer_of(tmp_path / "parts", callbacks=[StopAt(4)], **SAVING).train()
    for name in ("checkpoint-3", "checkpoint-4"):
        path = tmp_path / "parts" / name / STATE
        if path.exists():
            state = read_state(path)
            del state["settings"][ORDER]
            write_state(path, state)
    # Gone on with twice: what is saved meanwhile says which order it is.
    trainer_of(tmp_path / "parts", callbacks=[StopAt(8)], **SAVING).train(True)
    again = trainer_of(tmp_path / "parts", **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.view.hash() == whole.view.hash()
    new = trainer_of(tmp_path / "new", **SAVING)
    new.train()
    assert new.view.hash() != whole.view.hash()


def test_another_order_than_a_run_was_begun_with_is_named(tmp_path: Path) -> None:
    trainer_of(tmp_path, callbacks=[StopAt(4)], **SAVING).train()
    model = lora_model()
    args = arguments(tmp_path, **SAVING)
    data = json.loads(json.dumps(trainer_of(tmp_path).train_dataset.to_list()))
    other = InOrder(model, args, train_dataset=Dataset.from_list(data), data_collator=pad)
    with pytest.raises(TrajectoryError, match="begun with order of batches='classes spread"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="order of batches"):
        trainer_of(tmp_path, data_seed=5, **SAVING).train(resume_from_checkpoint=True)
