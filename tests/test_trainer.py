"""ZOTrainer: the loop is Trainer's in every respect, the weights move by this package alone."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny_models import PAD, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import zo_adapt
from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import ByDistance, MeZO, MeZOSVRG, ParameterView, Rate, ZOConfig, ZOTrainer, replay
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, TensorRows
from zo_adapt.errors import AdapterError, DataError, OptionError, ViewError, ZOError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.loops.result import StopReason
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.trainer.data import InputRows, TrainerSamples, TrainingRows

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Trainer's DataLoader asks for pinned memory where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def toy_rows(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of two classes, each with words of its own."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(rows):
        low, high = ((6, 9), (40, 43))[i % 2]
        length = int(torch.randint(4, 9, (1,), generator=generator))
        ids = torch.randint(low, high, (length,), generator=generator).tolist()
        texts.append({"input_ids": ids, "labels": i % 2})
    return texts


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a tokenizer's collator does."""
    lists = [torch.tensor(row["input_ids"]) for row in rows]
    ids = nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=PAD)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def lora_model(**options: Any) -> nn.Module:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"]
    )
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_model("bert", **options), config)


def arguments(folder: Path, **options: Any) -> ZOConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ZOConfig(str(folder), **settings | options)


def trainer_of(
    folder: Path, model: nn.Module | None = None, rows: int = 64, **options: Any
) -> ZOTrainer:
    """A trainer on the toy task; options that ZOTrainer does not have go to ZOConfig."""
    own = (
        *("view", "objective", "zo_optimizer", "callbacks", "eval_dataset"),
        *("compute_metrics", "metrics"),
    )
    to_trainer = {name: options.pop(name) for name in own if name in options}
    data = options.pop("train_dataset", None) or Dataset.from_list(toy_rows(rows))
    collator = options.pop("data_collator", pad)
    return ZOTrainer(
        model or lora_model(),
        arguments(folder, **options),
        train_dataset=data,
        data_collator=collator,
        **to_trainer,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Watch(TrainerCallback):
    """Looks at every step from outside: generators, gradients, weights."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.steps, self.untouched, self.gradients, self.evaluations = 0, [], [], 0
        self.in_step, self.rows = False, 0
        if model is not None:
            model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: nn.Module, args: Any, inputs: dict[str, Tensor]) -> None:
        self.rows += len(inputs["input_ids"]) if self.in_step else 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.in_step = True
        self.state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.in_step = False
        python = np.array_equal(self.state[1], np.random.get_state()[1])  # noqa: NPY002
        self.untouched.append(torch.equal(self.state[0], torch.get_rng_state()) and python)
        self.gradients.append(any(p.grad is not None for p in model.parameters()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.evaluations += 1


# --- the whole of it ----------------------------------------------------------------------------


def test_a_lora_model_learns_under_trainers_own_loop(tmp_path: Path) -> None:
    model = lora_model()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    watch = Watch(model)
    trainer = trainer_of(
        tmp_path,
        model,
        max_steps=60,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=15,
        save_strategy="steps",
        save_steps=30,
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
        eval_dataset=Dataset.from_list(toy_rows(64, seed=1)),
        compute_metrics=accuracy,
        callbacks=[watch],
    )
    before = trainer.evaluate()
    output = trainer.train()
    after = trainer.evaluate()

    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] >= 0.9
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert watch.steps == 60
    assert watch.evaluations == 1 + 4 + 1
    assert all(watch.untouched)
    assert not any(watch.gradients)

    # one query is one forward pass of one sample, counted where it happens
    assert trainer.queries == watch.rows > 0
    assert output.metrics["queries"] == trainer.queries
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 12
    assert logged[-1]["loss"] < 0.6 * logged[0]["loss"]
    assert all({"learning_rate", "projected_gradient", "queries"} <= set(e) for e in logged)
    assert not any("grad_norm" in entry for entry in logged)
    steps = [e["step"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert steps == [15, 30, 45, 60, 60]

    saved = tmp_path / "checkpoint-30"
    assert (saved / "adapter_model.safetensors").exists()
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 30
    assert not trainer.optimizer.state
    assert trainer.stop_reason is None


def test_a_tuned_adapter_is_saved_and_loaded_with_equal_outputs(tmp_path: Path) -> None:
    model = lora_model()
    batch = pad(toy_rows(8, seed=2))
    trainer = trainer_of(tmp_path, model, max_steps=6, optimizer="mezo", learning_rate=1e-2)
    with torch.no_grad():
        untuned = model.eval()(**batch).logits
    trainer.train()
    trainer.save_model(str(tmp_path / "by_trainer"))
    model.save_pretrained(tmp_path / "by_peft")
    with torch.no_grad():
        tuned = model(**batch).logits
        assert not torch.allclose(tuned, untuned)
        for name in ("by_trainer", "by_peft"):
            again = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / name).eval()
            assert torch.equal(again(**batch).logits, tuned)


def test_a_step_is_the_optimizers_own_on_the_batches_that_trainer_makes(tmp_path: Path) -> None:
    """A loop of a few lines, without Trainer, on the batches it made: the same bits."""
    seen: list[dict[str, Tensor]] = []

    class Recording(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            seen.append(inputs)
            return super().training_step(model, inputs, num_items_in_batch)

    def alternating(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return pad(rows) | {"labels": torch.arange(len(rows)) % 2}  # an order that is fair already

    def optimizer() -> MeZO:
        return MeZO(displacement=0.25, num_directions=3, perturbation_scale=1e-2)

    model = lora_model()
    Recording(
        model,
        arguments(tmp_path, max_steps=5, seed=11, micro_batch_size=4),
        train_dataset=toy_rows(48),
        data_collator=alternating,
        objective=ClassificationLoss(model),
        zo_optimizer=optimizer(),
    ).train()

    twin = lora_model()
    view, alone = ParameterView.trainable(twin), optimizer()
    evaluator = LocalEvaluator(
        ClassificationLoss(twin), view, EvaluationOptions(micro_batch_size=4)
    )
    alone.start(view, 11)
    for inputs in seen:
        samples = Samples(TensorRows(inputs), 16, 0)
        samples.minibatch = lambda rows=samples.source: Batch(rows, range(16))
        view.apply(alone.step(evaluator, samples, Budget(max_steps=5)).update)
    tuned = ParameterView.trainable(model)
    assert tuned.hash() == view.hash()
    assert tuned.hash() != ParameterView.trainable(lora_model()).hash()


def test_a_causal_language_model_learns_by_its_own_loss_and_by_an_objective(
    tmp_path: Path,
) -> None:
    rows = [{"input_ids": [5 + i % 3, 20, 21, 22, 23, 24]} for i in range(32)]

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids.clone()}

    losses = []
    for by_objective in (False, True):
        model = tiny_model("gpt2", "causal")
        trainer = trainer_of(
            tmp_path,
            model,
            max_steps=24,
            logging_steps=4,
            displacement=0.25,
            lr_scheduler_type="linear",  # what rounding differs by grows with the way that steps go
            objective=CausalLMLoss(model) if by_objective else None,
            train_dataset=rows,
            data_collator=collate,
        )
        trainer.train()
        logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert logged[-1] < 0.9 * logged[0]
        losses.append(logged)
    # rows of one length: the mean over tokens and the mean over texts are the same
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_the_default_loss_of_a_model_in_half_precision_is_in_single(
    tmp_path: Path, problem: str
) -> None:
    model = tiny_model("bert", problem_type=problem).bfloat16()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad(rows)
        if problem == "multi_label_classification":
            batch["labels"] = F.one_hot(batch["labels"], 2).bfloat16()
        return batch

    options = {"optimizer": "mezo", "perturbation_scale": 1e-2, "data_collator": collate}
    trainer = trainer_of(tmp_path, model, max_steps=1, **options)
    trainer.train()
    objective = trainer._run.evaluator.objective
    batch = collate(toy_rows(16))
    with torch.no_grad(), objective.evaluating():
        loss, logits = objective(batch), model(**batch).logits.float()
        coarse = model(**batch).loss
    by_hand = (
        F.cross_entropy(logits, batch["labels"])
        if problem == "single_label_classification"
        else F.binary_cross_entropy_with_logits(logits, batch["labels"].float())
    )
    assert coarse.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-6)
    assert float(loss) != float(coarse)


def test_dropout_is_off_in_a_step_and_the_models_mode_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.5)
    model.train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    # At rate zero nothing moves, so equal batches must give equal losses.
    rows = toy_rows(2) * 16
    trainer = trainer_of(
        tmp_path,
        model,
        max_steps=3,
        optimizer="mezo",
        num_directions=1,
        learning_rate=1e-30,
        perturbation_scale=1e-6,
        train_dataset=rows[::2],
        logging_steps=1,
    )
    trainer.train()
    assert [module.training for module in model.modules()] == before
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)


# --- large batches ------------------------------------------------------------------------------


def test_every_point_of_an_estimate_sees_the_same_draw_of_a_random_collator(
    tmp_path: Path,
) -> None:
    calls: list[int] = []

    def drawing(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        calls.append(len(rows))
        batch = pad(rows)
        batch["input_ids"] = torch.randint(5, VOCABULARY, batch["input_ids"].shape)
        return batch

    optimizer = MeZOSVRG(
        displacement=0.25, snapshot_interval=1, snapshot_size=40, num_directions=2, one_sided=False
    )
    trainer = trainer_of(
        tmp_path, max_steps=2, micro_batch_size=8, data_collator=drawing, zo_optimizer=optimizer
    )
    trainer.train()
    # Beside Trainer's own minibatches and a first look at two rows: a large batch of 40 is two of
    # 20, in parts of 6, 7 and 7.
    large = [size for size in calls if size < 16]
    assert large == [2] + [6, 7, 7, 6, 7, 7] * 2


def test_a_stream_can_be_trained_on_but_has_no_large_batches(tmp_path: Path) -> None:
    stream = Dataset.from_list(toy_rows(64)).to_iterable_dataset()
    for options in (
        {},
        {"optimizer": "mezo-svrg"},
        {"optimizer": "mezo-svrg", "snapshot_size": 16},
    ):
        trainer = trainer_of(tmp_path, max_steps=3, train_dataset=stream, **options)
        trainer.train()
        assert trainer.state.global_step == 3
    svrg = {"optimizer": "mezo-svrg"}
    with pytest.raises(DataError, match="optimizer='mezo'"):
        trainer_of(tmp_path, max_steps=3, train_dataset=stream, **svrg, snapshot_size=24).train()


def test_a_batch_is_shown_in_an_order_whose_parts_are_fair_to_every_class() -> None:
    rows = sorted(toy_rows(16), key=lambda row: row["labels"])
    samples = TrainerSamples(TrainingRows(rows, pad), 0)
    samples.receive(InputRows(pad(rows)))
    parts = samples.minibatch().split(4)
    assert [int(part.content["labels"].sum()) for part in parts] == [2, 2, 2, 2]
    assert sorted(row for part in parts for row in part.rows) == list(range(16))
    assert samples.large(16) is samples.minibatch()
    assert len(samples.large(12)) == 12


# --- rates, budgets, ends -----------------------------------------------------------------------


def test_trainers_schedule_is_applied_and_the_rate_logged_is_the_one_applied(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {
        "optimizer": "mezo",
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "logging_steps": 1,
    }
    trainer = trainer_of(tmp_path, max_steps=12, **options)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    warm = [2e-3 * step / 4 for step in range(4)]
    cold = [1e-3 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(warm + cold)
    assert trainer._run.last.lr == rates[-1]


def test_how_long_rates_fall_is_as_given(tmp_path: Path) -> None:
    given = {"num_decay_steps": 4, "decay_type": "linear"}
    for kind in ({"lr_scheduler_type": "warmup_stable_decay"}, {}):
        trainer = trainer_of(
            tmp_path,
            max_steps=8,
            warmup_steps=2,
            lr_scheduler_kwargs=given,
            logging_steps=1,
            **kind,
        )
        trainer.train()
        rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
        shape = [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        assert rates == pytest.approx([max(rates) * one for one in shape])
        assert trainer.args.lr_scheduler_kwargs == given


def test_without_a_rate_the_optimizers_own_rule_applies(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=16, optimizer="mezo", logging_steps=1)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    assert rates == pytest.approx([rates[0]] * 15 + [rates[0] / 2])
    assert isinstance(trainer.zo_optimizer.apply, ByDistance)
    plain = arguments(tmp_path, learning_rate=1e-4).build_optimizer().apply
    assert plain == Rate(1e-4)
    own = trainer_of(tmp_path, max_steps=4, logging_steps=1, zo_optimizer=MeZO(lr=3e-4))
    own.train()
    rates = [e["learning_rate"] for e in own.state.log_history if "loss" in e]
    assert rates == pytest.approx([3e-4] * 4)


@pytest.mark.parametrize(("budget", "steps"), [(200, 6), (192, 6)])
def test_a_budget_of_queries_is_never_exceeded_and_unmade_steps_are_not_counted(
    tmp_path: Path, budget: int, steps: int
) -> None:
    watch = Watch()
    trainer = trainer_of(
        tmp_path, max_steps=50, num_directions=1, displacement=0.25, max_queries=budget,
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    assert trainer.queries == steps * 2 * 16
    assert trainer.state.global_step == steps
    assert trainer.stop_reason is StopReason.MAX_QUERIES
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    assert (last["step"], last["queries"]) == (steps, 192)


def test_a_loss_that_is_not_finite_ends_training_with_the_last_good_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_model()
    view, good = ParameterView.trainable(model), []
    inner = ClassificationLoss(model)

    def objective(batch: Any) -> Tensor:
        return inner(batch) * (math.nan if len(good) == 3 else 1.0)  # in the third step

    class Keep(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            good.append(view.hash())

    monkeypatch.setattr("zo_adapt.trainer.zo_trainer.logger.error", good.append)
    trainer = trainer_of(
        tmp_path,
        model.eval(),
        max_steps=9,
        optimizer="mezo",
        objective=objective,
        callbacks=[Keep()],
    )
    trainer.train()
    *_, last, message = good
    assert view.hash() == last
    assert len(set(good[:-1])) == 3
    assert trainer.stop_reason is StopReason.NON_FINITE
    assert "last good step" in message
    assert "nan" in message
    assert trainer.state.global_step == 2


def test_a_run_can_be_repeated_and_starts_afresh(tmp_path: Path) -> None:
    hashes = []
    for seed in (5, 5, 6):
        model = lora_model()
        trainer = trainer_of(tmp_path, model, max_steps=4, seed=seed, displacement=0.25)
        trainer.train()
        hashes.append(ParameterView.trainable(model).hash())
    assert hashes[0] == hashes[1] != hashes[2]
    queries = trainer.queries
    trainer.train()
    assert trainer.queries == queries


def test_model_init_makes_a_model_and_a_view_for_every_run(tmp_path: Path) -> None:
    def new_model() -> nn.Module:  # Trainer counts the arguments of model_init
        return lora_model()

    trainer = ZOTrainer(
        None,
        arguments(tmp_path, max_steps=3, optimizer="mezo"),
        train_dataset=toy_rows(32),
        data_collator=pad,
        model_init=new_model,
    )
    hashes = []
    for _ in range(2):
        trainer.train()
        hashes.append(ParameterView.trainable(trainer.model).hash())
    assert hashes[0] == hashes[1] != ParameterView.trainable(lora_model()).hash()


def test_a_view_given_is_all_that_changes(tmp_path: Path) -> None:
    model = tiny_model("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    view = ParameterView.matching(model, "classifier")
    trainer_of(tmp_path, model, max_steps=3, optimizer="mezo", view=view).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"classifier.weight", "classifier.bias"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_on_a_gpu(tmp_path: Path, precision: str) -> None:
    trainer = trainer_of(
        tmp_path, max_steps=100, use_cpu=False, save_strategy="steps",
        save_steps=100, train_dataset=toy_rows(64), **{precision: True},
    )  # fmt: skip
    trainer.train()
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert logged[-1] < 0.8 * logged[0]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "per_device_train_batch_size"),
        ({"optimizer": "adam"}, "'mezo'"),
        ({"optimizer": "mezo", "snapshot_size": 8}, "mezo has no .*snapshot_size"),
        ({"optimizer": "zo-svrg", "num_directions": 8}, "zo-svrg has no .*num_directions"),
        ({"learning_rate": 0.0}, "lr=0"),
        ({"perturbation_scale": -1.0}, "perturbation_scale"),
        ({"noise": "cauchy"}, "cauchy"),
        ({"max_queries": 0}, "max_queries=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
    ],
)
def test_settings_that_cannot_work_are_named_before_there_is_a_trainer(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        arguments(tmp_path, **options)


def test_contradictions_are_named(tmp_path: Path) -> None:
    model = lora_model()
    view = ParameterView.trainable(model)
    for options, message in (
        ({"zo_optimizer": MeZOSVRG(), "num_directions": 2}, "num_directions"),
        ({"zo_optimizer": MeZOSVRG(), "learning_rate": 1e-3}, "learning_rate"),
        ({"view": view, "noise": "rademacher"}, "rademacher"),
    ):
        with pytest.raises(OptionError, match=message):
            trainer_of(tmp_path, model, **options)
    with pytest.raises(OptionError, match="ZOConfig"):
        ZOTrainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(OptionError, match="zo_optimizer"):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ZOTrainer(model, arguments(tmp_path), optimizers=(optimizer, None))
    with pytest.raises(OptionError, match="model_init"):
        ZOTrainer(None, arguments(tmp_path), model_init=lora_model, view=view)


def test_what_cannot_be_tuned_is_named_before_any_evaluation(tmp_path: Path) -> None:
    def refused(error: type[ZOError], message: str, **options: Any) -> None:
        options = {"max_steps": 1, "optimizer": "mezo"} | options
        with pytest.raises(error, match=message):
            trainer_of(tmp_path, **options).train()

    merged = lora_model()
    merged.merge_adapter()
    refused(AdapterError, "merged", model=merged)
    frozen = tiny_model("bert").requires_grad_(False)
    refused(ViewError, "no tensors", model=frozen)
    broken = lora_model()
    with torch.no_grad():
        next(p for p in broken.parameters() if p.requires_grad).fill_(math.nan)
    refused(ViewError, "NaN", model=broken)
    refused(OptionError, "lr_scheduler_type=", lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps", eval_steps=1, eval_dataset=toy_rows(4))  # fmt: skip
    refused(DataError, "snapshot_size=128", optimizer="mezo-svrg", snapshot_size=128)


def test_the_package_has_a_trainer_when_it_is_asked_for() -> None:
    assert issubclass(zo_adapt.ZOTrainer, Trainer)
    with pytest.raises(AttributeError, match="Nonsense"):
        zo_adapt.Nonsense  # noqa: B018


def test_only_what_must_be_is_overridden() -> None:
    ours = [one for one in ZOTrainer.__mro__ if one.__module__.startswith("zo_adapt.")]
    names = {name for one in ours for name in vars(one) if not name.startswith("__")}
    step = {"create_optimizer", "get_train_dataloader", "training_step", "log"}
    step |= {"_get_train_sampler"}  # batches to which every class contributes
    rates = {"create_scheduler"}  # the usual one needs to know how many steps there are
    state = {"_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_save_rng_state"}
    resuming = {"train", "_load_from_checkpoint", "_load_best_model"}
    counted = {"set_initial_training_values", "_get_num_items_in_batch", "_track_num_input_tokens"}
    served = {"_move_model_to_device"}  # a base that is elsewhere stays there
    overridden = {name for name in names if hasattr(Trainer, name)}
    wanted = step | rates | state | resuming | counted | served
    assert overridden == {name for name in wanted if hasattr(Trainer, name)}  # 5.0 has not all
    assert wanted <= names


def test_adapters_may_start_where_the_training_data_are(tmp_path: Path) -> None:
    """The trajectory replays from the adapter that was saved as it started."""
    model = lora_model()
    plain = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    trainer = trainer_of(tmp_path, model, max_steps=3, optimizer="mezo", lora_start_rows=24)
    trainer.train()
    assert trainer.lora_start_queries == 24
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert not torch.equal(p, plain[name])
    again = lora_model()
    again.load_adapter(tmp_path / "initial_adapter", "default")
    replay(ParameterView.trainable(again), tmp_path / "trajectory.zot")
    assert ParameterView.trainable(again).hash() == ParameterView.trainable(model).hash()
    stream = Dataset.from_list(toy_rows(64)).to_iterable_dataset()
    with pytest.raises(OptionError, match="lora_start_rows"):
        trainer_of(tmp_path, max_steps=3, train_dataset=stream, lora_start_rows=8).train()


@pytest.mark.parametrize("optimizer", ["mezo", "mezo-svrg"])
def test_what_a_run_will_cost_is_said_once_and_changes_nothing(
    optimizer: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_queries": 400, "displacement": 0.25, "optimizer": optimizer}
    said = trainer_of(tmp_path / "said", disable_tqdm=False, **options)
    said.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "queries planned" in line]
    assert len(lines) == 1
    assert re.search(
        r"MeZO(SVRG)? on [\d,]+ scalars in \d+ tensors; a step makes \d+ queries", lines[0]
    )
    monkeypatch.setattr(ZOTrainer, "_say_once", lambda *_: None)
    silent = trainer_of(tmp_path / "silent", **options)
    silent.train()
    assert silent.view.hash() == said.view.hash()
