"""The order of ZOTrainer's minibatches: that of minimize, unless Trainer is told how to draw."""

import json
from collections import Counter
from itertools import chain
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
from zo_adapt import (
    ZOPAGE,
    ZOSAGA,
    ZOSPIDER,
    ZOSTORM,
    ZOSVRG,
    Data,
    MeZO,
    MeZOSVRG,
    ParameterView,
    ZOTrainer,
    minimize,
)
from zo_adapt.errors import OptionError, TrajectoryError
from zo_adapt.trainer.order import ORDER
from zo_adapt.trainer.planned import steps_within
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


class RowsSeen(ZOTrainer):
    """Keeps the rows of every batch: of its examples, which say their number."""

    seen: list[list[int]]

    @classmethod
    def of(cls, folder: Path, **options: Any) -> list[list[int]]:
        model = lora_model(num_labels=3)
        rows = [row | {"input_ids": [6 + i]} for i, row in enumerate(news())]
        options = {"displacement": 0.25, "per_device_train_batch_size": 8} | options
        data = Dataset.from_list(rows)
        trainer = cls(model, arguments(folder, **options), train_dataset=data, data_collator=pad)
        trainer.seen = []
        trainer.train()
        return trainer.seen

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.seen.append([ids[0] - 6 for ids in inputs["input_ids"].tolist()])
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


def test_without_it_rows_are_drawn_as_trainer_does(tmp_path: Path) -> None:
    def first_batches(trainer: Trainer) -> list[Any]:
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    texts = Dataset.from_list(news())
    plain = Trainer(lora_model(), arguments(tmp_path), train_dataset=texts, data_collator=pad)
    torch.manual_seed(3)
    expected = first_batches(plain)
    args = arguments(tmp_path, stratify=False)
    trainer = ZOTrainer(lora_model(), args, train_dataset=texts, data_collator=pad)
    torch.manual_seed(3)
    assert first_batches(trainer) == expected


def test_no_row_of_a_pass_is_left_out_for_the_batch_of_a_snapshot_step(tmp_path: Path) -> None:
    """Two epochs of six batches, every second step from a snapshot: the others are one pass."""
    optimizer = {"optimizer": "mezo-svrg", "snapshot_size": 8, "max_steps": 12}
    rows = RowsSeen.of(tmp_path / "all", **optimizer)
    assert sorted(chain(*rows[1::2])) == list(range(48))
    assert sorted(chain(*rows[::2])) == list(range(48)), "and so are the large batches"
    assert rows[1::2] == RowsSeen.of(tmp_path / "plain", max_steps=6), "as without snapshots"


@pytest.mark.parametrize(
    "options", [{"stratify": False}, {"train_sampling_strategy": "sequential"}]
)
def test_saga_refuses_batches_of_unknown_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, max_steps=2, zo_optimizer=ZOSAGA(), **options)
    with pytest.raises(OptionError, match=r"do not say which examples.*stratify=True"):
        trainer.train()
    assert trainer.queries == 0


QUADRATIC = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [MeZO, MeZOSVRG, ZOSVRG, ZOSPIDER, ZOPAGE, ZOSTORM, ZOSAGA],
    ids=lambda kind: kind.__name__,
)
def test_as_many_steps_are_planned_as_the_budget_is_enough_for(make: Any) -> None:
    x = torch.zeros(5)
    result = minimize(
        lambda rows: (rows - x).square().sum(1), ParameterView({"x": x}), QUADRATIC,
        make(displacement=0.25), batch_size=16, max_queries=3_000, seed=7, progress=False,
    )  # fmt: skip
    asked = make(displacement=0.25)
    assert steps_within(3_000, asked, len(QUADRATIC), [16] * 3, 1, 7) == result.steps > 10


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
