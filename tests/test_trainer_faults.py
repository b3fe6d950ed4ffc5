"""ZOTrainer keeps Trainer's conventions: a setting works, is refused, or is said once."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from test_trainer import accuracy, arguments, lora_model, pad, toy_rows, trainer_of
from test_trainer_resume import SAVING, STEPS, StopAt
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from objectives import Accuracy, ClassificationLoss
from zo_adapt import SGD, Adam, MeZO, ParameterView, StopReason, ZOConfig, ZOTrainer, replay
from zo_adapt.data.examples import class_labels, labels_to_check
from zo_adapt.errors import (
    CorruptTrajectoryError,
    DataError,
    OptionError,
    TrajectoryError,
    UnreadTensorWarning,
    ViewError,
)
from zo_adapt.trainer.state import MOMENTS, STATE, TRAJECTORY

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def resumed_equals_whole(folder: Path, make: Any, **options: Any) -> ZOTrainer:
    """A run stopped at step 7 of 12 and resumed, against one that was never stopped."""
    options = SAVING | options
    whole = make(folder / "whole", **options)
    whole.train()
    make(folder / "parts", callbacks=[StopAt(7)], **options).train()
    again = make(folder / "parts", **options)
    again.train(resume_from_checkpoint=True)
    assert again.view.hash() == whole.view.hash()
    assert again.queries == whole.queries
    return again


# Resuming


@pytest.mark.parametrize("optimizer", [Adam(1e-2), SGD(1e-1)], ids=["adam", "sgd"])
def test_a_first_order_run_is_resumed_bit_for_bit(tmp_path: Path, optimizer: Any) -> None:
    def make(folder: Path, **options: Any) -> ZOTrainer:
        model = lora_model()
        objective = ClassificationLoss(model)
        return trainer_of(folder, model, zo_optimizer=optimizer, objective=objective, **options)

    trainer = resumed_equals_whole(tmp_path, make)
    assert trainer.queries == STEPS * 16
    moments = tmp_path / "parts" / "checkpoint-12" / MOMENTS
    assert moments.exists()
    moments.write_bytes(moments.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptTrajectoryError, match=MOMENTS):
        make(tmp_path / "parts", **SAVING).train(resume_from_checkpoint=True)


def test_a_step_that_no_dtype_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """Adam's eps is 0 in float16; a huge rate leaves the range of any dtype."""
    model = tiny_model("bert", dtype=torch.float16)
    trainer = trainer_of(
        tmp_path, model, zo_optimizer=Adam(1e-2), objective=ClassificationLoss(model), max_steps=1
    )
    with pytest.raises(ViewError, match=r"is float16.*eps of 1e-8 is 0"):
        trainer.train()
    for optimizer in (SGD(1e38), Adam(1e38)):
        model = lora_model()
        trainer = trainer_of(
            tmp_path, model, zo_optimizer=optimizer, objective=ClassificationLoss(model),
            max_steps=1,
        )  # fmt: skip
        trainer.train()
        assert trainer.stop_reason is StopReason.STEP_TOO_LARGE
        assert trainer.view.hash() == ParameterView.trainable(lora_model()).hash()


MODELS = {
    "full": lambda: tiny_model("bert"),
    # the perturbation that bf16 resolves is one of the weights as the run began
    "full in bf16": lambda: tiny_model("distilbert", dtype=torch.bfloat16),
    "frozen but for the last layer": lambda: ends_of(tiny_model("bert")),
}


def ends_of(model: nn.Module) -> nn.Module:
    tuned = ParameterView.last_layers(model, 1).tensors
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tuned)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_view_of_pretrained_weights_is_resumed(tmp_path: Path, name: str) -> None:
    def make(folder: Path, **options: Any) -> ZOTrainer:
        return trainer_of(folder, MODELS[name](), optimizer="mezo", **options)

    again = resumed_equals_whole(tmp_path, make)
    displacement = again.view.displacement
    assert displacement == ParameterView.trainable(MODELS[name]()).displacement
    view = ParameterView.trainable(MODELS[name]())
    assert replay(view, tmp_path / "parts" / TRAJECTORY) == STEPS
    assert view.hash() == again.view.hash()
    # and without the trajectory, by the checkpoint alone
    (tmp_path / "parts" / TRAJECTORY).unlink()
    alone = make(tmp_path / "parts", **SAVING)
    with pytest.warns(UserWarning, match="from the checkpoint's weights"):
        alone.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    assert alone.view.hash() == again.view.hash()


def bf16_lora() -> nn.Module:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    torch.manual_seed(1)
    model = tiny_model("bert", dtype=torch.bfloat16)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def test_a_bf16_adapter_is_resumed_as_bf16(tmp_path: Path) -> None:
    def make(folder: Path, **options: Any) -> ZOTrainer:
        return trainer_of(folder, bf16_lora(), zo_optimizer=MeZO(), **options)

    again = resumed_equals_whole(tmp_path, make)
    assert {t.dtype for t in again.view.tensors.values()} == {torch.bfloat16}


def bf16_vera() -> nn.Module:
    config = peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    torch.manual_seed(1)
    model = tiny_model("bert", dtype=torch.bfloat16)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("is_given", [False, True], ids=["usual view", "given view"])
def test_frozen_factors_of_an_adapter_keep_their_dtype(tmp_path: Path, is_given: bool) -> None:
    def make(folder: Path, **options: Any) -> ZOTrainer:
        model = bf16_vera()
        if is_given:
            options["view"] = ParameterView.trainable(model)
        return trainer_of(folder, model, zo_optimizer=MeZO(displacement=0.1), **options)

    again = resumed_equals_whole(tmp_path, make)
    assert {b.dtype for n, b in again.model.named_buffers() if "vera" in n} == {torch.bfloat16}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training that was never stopped: its folder, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, **SAVING)
    trainer.train()
    return folder, trainer.view.hash()


@pytest.mark.xdist_group("whole training")
@pytest.mark.parametrize("left", ["nothing", "an empty folder", "half a checkpoint"])
def test_a_kill_before_the_first_checkpoint_is_whole_begins_afresh(
    whole: tuple[Path, str], tmp_path: Path, left: str
) -> None:
    folder, expected = whole
    parts = tmp_path / "parts"
    parts.mkdir()
    if left != "nothing":
        shutil.copytree(folder / "checkpoint-3", parts / "checkpoint-3")
        (parts / "checkpoint-3" / "trainer_state.json").unlink()
    if left == "an empty folder":
        for path in (parts / "checkpoint-3").iterdir():
            path.unlink()
    again = trainer_of(parts, **SAVING)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=True)
    assert any("no whole checkpoint to resume from" in str(one.message) for one in said)
    assert again.view.hash() == expected


def test_the_checkpoint_of_a_plain_trainer_is_named(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(tiny_model("bert"), args, train_dataset=toy_rows(16), data_collator=pad).train()
    with pytest.raises(TrajectoryError, match="not saved by ZOTrainer"):
        trainer_of(tmp_path, tiny_model("bert"), max_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_another_view_is_named(tmp_path: Path) -> None:
    trainer_of(tmp_path, tiny_model("bert"), **SAVING).train()
    checkpoint = str(tmp_path / "checkpoint-6")
    for pattern in ("classifier", r"layer\.1\."):
        model = tiny_model("bert")
        view = ParameterView.matching(model, pattern)
        with pytest.raises(TrajectoryError, match="belongs to another view"):
            trainer_of(tmp_path, model, view=view, **SAVING).train(
                resume_from_checkpoint=checkpoint
            )


def adapted(config: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_model("bert"), config)


def lora(**options: Any) -> nn.Module:
    usual = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    return adapted(peft.LoraConfig(**usual | options))


OTHERS: dict[str, tuple[Any, Any, str]] = {
    "another rank": (lora, lambda: lora(r=8), "does not take"),
    "another scale": (lora, lambda: lora(lora_alpha=32), "lora_alpha"),
    "scaled by the root": (lora, lambda: lora(use_rslora=True), "lora_alpha"),
    "no adapter": (lora, lambda: tiny_model("bert"), "does not take"),
    "another adapter": (
        lora,
        lambda: adapted(
            peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
        ),
        "another view, whose groups are not here",
    ),
    "another dtype": (
        lambda: tiny_model("distilbert"),
        lambda: tiny_model("distilbert", dtype=torch.bfloat16),
        "belongs to another view: .*float32.*, here .*bfloat16",
    ),
    "prompts": (
        lambda: adapted(peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
        lora,
        "does not take|belongs to another view",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_model_or_adapter_is_named(tmp_path: Path, case: str) -> None:
    make, other, words = OTHERS[case]
    options = SAVING | {"max_steps": 2, "save_steps": 2, "zo_optimizer": MeZO(displacement=0.1)}
    trainer_of(tmp_path, make(), **options).train()
    with pytest.raises(TrajectoryError, match=words):
        trainer_of(tmp_path, other(), **options | {"max_steps": 4}).train(
            resume_from_checkpoint=True
        )


def emptied(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


def without_its_end(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"), [(emptied, "does not take"), (without_its_end, "trainer_state.json")]
)
def test_a_checkpoint_that_is_not_whole_is_named(tmp_path: Path, damage: Any, words: str) -> None:
    trainer_of(tmp_path, tiny_model("bert"), **SAVING | {"max_steps": 3}).train()
    damage(tmp_path / "checkpoint-3")
    with pytest.raises(TrajectoryError, match=words):
        trainer_of(tmp_path, tiny_model("bert"), **SAVING).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_other_data_are_named(tmp_path: Path) -> None:
    trainer_of(tmp_path, **SAVING).train()
    for name, options in {
        "data=": {"train_dataset": Dataset.from_list(toy_rows(64, seed=1))},
        "rows=64": {"rows": 32},
        "classes=": {"stratify": False},
        "batch_size=16": {"per_device_train_batch_size": 8},
    }.items():
        with pytest.raises(TrajectoryError, match=name):
            trainer_of(tmp_path, **SAVING, **options).train(resume_from_checkpoint=True)


# A step that failed


class Faulty(ClassificationLoss):
    """NaN from a moment on."""

    is_broken = False

    def __call__(self, batch: Any) -> Any:
        values = super().__call__(batch)
        return values * math.nan if self.is_broken else values


class BreakAt(TrainerCallback):
    """The objective breaks after this step."""

    def __init__(self, objective: Faulty, step: int | None) -> None:
        self.objective, self.step = objective, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.objective.is_broken = state.global_step == self.step


def test_a_nan_leaves_the_checkpoint_before_it_as_it_was(tmp_path: Path) -> None:
    def make(folder: Path, step: int | None = None) -> ZOTrainer:
        model = lora_model()
        objective = Faulty(model)
        options = SAVING | {"save_steps": 4, "callbacks": [BreakAt(objective, step)]}
        return trainer_of(folder, model, objective=objective, zo_optimizer=MeZO(), **options)

    whole = make(tmp_path / "whole")
    whole.train()
    broken = make(tmp_path / "parts", 4)
    broken.train()
    assert (broken.stop_reason, broken.state.global_step) == (StopReason.NON_FINITE, 4)
    files = [tmp_path / run / "checkpoint-4" / STATE for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = make(tmp_path / "parts")
    again.train(resume_from_checkpoint=True)
    assert again.view.hash() == whole.view.hash()
    assert again.queries == whole.queries


# Logs, settings, budgets


FORMS = {
    "table": pandas.DataFrame,
    "columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_makes_the_same_training(tmp_path: Path, form: str) -> None:
    hashes = []
    for index, data in enumerate((toy_rows(16), FORMS[form](toy_rows(16)))):
        model = lora_model()
        args = arguments(tmp_path / str(index), max_steps=2)
        trainer = ZOTrainer(model, args, train_dataset=data, objective=ClassificationLoss(model))
        trainer.train()
        hashes.append(trainer.view.hash())
    assert hashes[0] == hashes[1]


def test_pairs_train_and_what_is_no_single_set_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    objective = Accuracy(net)
    x, y = torch.randn(16, 4), np.arange(16) % 3
    args = arguments(tmp_path, max_steps=2)
    ZOTrainer(net, args, train_dataset=(x, y), objective=objective).train()
    rows = Dataset.from_list(toy_rows(16))
    for data, words in (
        (DatasetDict(train=rows), r"data\['train'\]"),
        (DataLoader(rows), "loader.dataset"),
    ):
        with pytest.raises(DataError, match=words):
            ZOTrainer(net, args, train_dataset=data, objective=objective)


def test_a_stream_is_looked_at_with_its_first_batch(tmp_path: Path) -> None:
    def model_with_more() -> nn.Module:
        model = tiny_model("bert")
        torch.manual_seed(1)
        model.more = nn.Linear(2, 2)
        return model

    model = model_with_more()
    trainer = ZOTrainer(
        model,
        arguments(tmp_path, max_steps=4, save_steps=2, save_strategy="steps", optimizer="mezo"),
        train_dataset=Dataset.from_list(toy_rows(64)).to_iterable_dataset(),
        data_collator=pad,
        view=ParameterView.full(model),
    )
    with pytest.warns(UnreadTensorWarning, match="'more.weight'"):
        trainer.train()
    assert trainer.view.at_rest == {"more.weight", "more.bias"}
    again = ParameterView.full(model_with_more())
    assert replay(again, tmp_path / TRAJECTORY) == 4
    assert again.hash() == trainer.view.hash()


def test_evaluate_returns_its_own_figures_alone(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watching(ZOTrainer):
        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            found = super().evaluate(*args, **options)
            seen.append(set(found))
            return found

    trainer = Watching(
        lora_model(),
        arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=toy_rows(32),
        eval_dataset=toy_rows(16),
        data_collator=pad,
    )
    output = trainer.train()
    assert len(seen) == 2
    assert not any("queries" in found for found in seen)
    assert output.metrics["queries"] == trainer.queries
    assert any("queries" in entry and "loss" in entry for entry in trainer.state.log_history) is (
        trainer.args.logging_steps <= 4
    )


NEWER = "activation_checkpointing"
CHECKPOINTING = NEWER if hasattr(ZOConfig, NEWER) else "gradient_checkpointing"


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "sgd"},
        {"adam_beta1": 0.5},
        {"adam_epsilon": 1e-6},
        {"max_grad_norm": 0.5},
        {CHECKPOINTING: True},
        {"neftune_noise_alpha": 5.0},
        {"fp16": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_setting_without_effect_is_said_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=next(iter(options))) as said:
        trainer_of(tmp_path, **options)
    assert len([one for one in said if "no effect" in str(one.message)]) == 1


def test_what_the_objective_replaces_is_said(tmp_path: Path) -> None:
    model = lora_model()
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match=r"label_smoothing_factor .*, compute_loss_func"):
        ZOTrainer(
            model, args, train_dataset=toy_rows(16), data_collator=pad,
            objective=ClassificationLoss(model), compute_loss_func=lambda *_, **__: 0.0,
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZOTrainer(model, args, train_dataset=toy_rows(16), data_collator=pad)


@pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning")
def test_a_compiled_model_that_the_objective_does_not_call_is_said(tmp_path: Path) -> None:
    model = lora_model()
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.warns(UserWarning, match="torch_compile .the objective calls the model"):
        ZOTrainer(
            model, args, train_dataset=toy_rows(16), data_collator=pad,
            objective=ClassificationLoss(model),
        )  # fmt: skip


def test_trainers_loss_is_computed_along_factors(tmp_path: Path) -> None:
    """What it predicts is no number: the score is, and that is compared."""
    trainer = trainer_of(
        tmp_path, tiny_model("bert"), max_steps=1, zo_optimizer=MeZO(displacement=0.1),
        noise="lowrank",
    )  # fmt: skip
    trainer.train()
    assert "factors" not in trainer.evaluation.why_not


@pytest.mark.parametrize("name", ["polynomial", "cosine_with_min_lr"])
def test_schedules_that_need_a_rate_work_without_one(tmp_path: Path, name: str) -> None:
    extra = {"min_lr_rate": 0.25} if name == "cosine_with_min_lr" else {"power": 2.0}
    rates = []
    for lr in (None, 1e-3):
        trainer = trainer_of(
            tmp_path / str(lr), max_steps=4, logging_steps=1, lr_scheduler_type=name,
            lr_scheduler_kwargs=extra, learning_rate=lr, optimizer="mezo",
        )  # fmt: skip
        trainer.train()
        log = [e["learning_rate"] for e in trainer.state.log_history if "projected_gradient" in e]
        rates.append([rate / log[0] for rate in log])
    expected = {
        "polynomial": [(1 - step / 4) ** 2 for step in range(4)],
        "cosine_with_min_lr": [
            0.25 + 0.75 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)
        ],
    }[name]
    for found in rates:
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_decay_leaves_norms_and_biases_out(tmp_path: Path, frozen: bool) -> None:
    model = tiny_model("bert")
    view = ParameterView.full(model)
    if frozen:
        model.requires_grad_(False)
    before = view.snapshot()
    # One step along differences that are all but nothing: what is left is the decay.
    trainer = trainer_of(
        tmp_path, model, view=view if frozen else None, max_steps=1, optimizer="mezo",
        learning_rate=1e-6, weight_decay=1e5,
    )  # fmt: skip
    trainer.train()
    for name, tensor in view.tensors.items():
        shrunk = float(tensor.detach().norm()) < 0.95 * float(before[name].norm())
        exempt = "bias" in name or "LayerNorm" in name
        assert shrunk != exempt or not before[name].any(), name
    fresh = ParameterView.full(tiny_model("bert"))
    again = trainer_of(tmp_path / "other", fresh.model, view=fresh, max_steps=1, weight_decay=0.1)
    again.train()
    assert [group.decays for group in again.view.groups].count(False) >= 1


def test_a_snapshot_is_found_again_where_parts_do_not_decay() -> None:
    from zo_adapt import Group, MeZOSVRG
    from zo_adapt.data.samples import Samples
    from zo_adapt.data.sources import TensorRows
    from zo_adapt.evaluation.local import LocalEvaluator
    from zo_adapt.loops.run import Run
    from zo_adapt.optimizers.schedule import Budget

    live = {"w": torch.ones(4, dtype=torch.float64), "bias": torch.ones(4, dtype=torch.float64)}
    view = ParameterView(live, groups=[Group("bias", decays=False)])
    rows = torch.randn(16, 4, dtype=torch.float64)

    def loss(batch: Tensor) -> Tensor:
        return (batch * live["w"] + live["bias"]).square().sum(1)

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    optimizer = MeZOSVRG(1e-2, snapshot_interval=5, weight_decay=1.0, one_sided=False)
    evaluator = LocalEvaluator(loss, view, batch_size=4)
    run = Run(optimizer, evaluator, Samples(TensorRows(rows), 4, 0), Budget(10), 0)
    start = view.snapshot()
    for _ in range(4):
        run.step()
        back = optimizer.snapshot.since.inverse()
        with view.shifted(back.terms, back.decay):
            for name, tensor in live.items():
                assert torch.allclose(tensor, start[name], rtol=1e-12, atol=0)


def test_a_transform_is_not_run_for_the_labels(tmp_path: Path) -> None:
    made = []

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made.extend(rows["input_ids"])
        return {"input_ids": rows["input_ids"], "labels": rows["labels"]}

    data = Dataset.from_list(toy_rows(64))
    data.set_transform(transform)
    assert class_labels(data) == [i % 2 for i in range(64)]
    assert not made
    stars = Dataset.from_list([{"input_ids": [5], "labels": 1 + i % 2} for i in range(8)])
    stars.set_transform(lambda rows: rows | {"labels": [stars - 1 for stars in rows["labels"]]})
    assert labels_to_check(Subset(stars, range(4))) is None  # what is stored is no class
    dropping = Dataset.from_list([{"x": i, "label": i % 2} for i in range(8)])
    dropping.set_transform(lambda rows: {"x": rows["x"]})
    assert class_labels(dropping) == [i % 2 for i in range(8)]
    trainer = trainer_of(
        tmp_path, train_dataset=data, max_steps=1, displacement=0.25,
        per_device_train_batch_size=8, remove_unused_columns=False,
    )  # fmt: skip
    trainer.train()
    assert len(made) <= 24  # the loader reads ahead by a batch or two, not the whole set


@pytest.mark.parametrize("budget", [330, 352])
def test_a_budget_of_queries_ends_a_run_as_its_last_step_does(tmp_path: Path, budget: int) -> None:
    trainer = trainer_of(
        tmp_path, num_directions=1, displacement=0.25, max_queries=budget,
        eval_dataset=toy_rows(16), compute_metrics=accuracy, eval_strategy="steps",
        eval_steps=4, save_strategy="steps",
        save_steps=4, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    steps = budget // 32  # beyond three epochs of four steps
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert trainer.stop_reason is StopReason.MAX_QUERIES
    evaluated = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated == sorted({4, 8, steps})
    assert (tmp_path / f"checkpoint-{steps}").exists()


def test_epochs_that_are_asked_for_end_a_run_all_the_same(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, optimizer="mezo", max_queries=10_000, num_train_epochs=1)
    trainer.train()
    assert (trainer.state.global_step, trainer.stop_reason) == (4, None)
    trainer = trainer_of(tmp_path, optimizer="mezo")
    assert trainer.args.num_train_epochs == 3
    assert not json.loads(ZOConfig(str(tmp_path), report_to="none").to_json_string())["max_queries"]


@pytest.mark.parametrize("optimizer", ["mezo", "mezo-svrg", "zo-svrg"])
@pytest.mark.parametrize("rows", [64, 57])
def test_the_steps_of_a_budget_are_those_that_are_made(
    tmp_path: Path, optimizer: str, rows: int
) -> None:
    options: dict[str, Any] = {} if optimizer == "mezo" else {"snapshot_interval": 3}
    if optimizer == "mezo-svrg":
        options["snapshot_size"] = 32
    trainer = trainer_of(tmp_path, rows=rows, optimizer=optimizer, max_queries=700, **options)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert trainer.stop_reason is StopReason.MAX_QUERIES
    assert 0 < trainer.queries <= 700
    last = [entry for entry in trainer.state.log_history if "queries" in entry][-1]["queries"]
    assert last == trainer.queries


def test_wrong_numbers_are_named(tmp_path: Path) -> None:
    for value in (0, 1.5, math.inf):
        with pytest.raises(OptionError, match="max_queries"):
            arguments(tmp_path, max_queries=value)
