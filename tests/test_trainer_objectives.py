"""ZOTrainer with objectives that make their own batches: prompts, queries, mixtures, templates."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from tiny_models import VOCABULARY, tiny_model, token_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from objectives import (
    NDCG,
    CallableObjective,
    CausalLMLoss,
    ClassificationLoss,
    GenerationReward,
    VerbalizerLoss,
)
from zo_adapt import MeZO, MeZOSVRG, ParameterView, ZOConfig, ZOTrainer
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, Examples
from zo_adapt.errors import DataError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.trainer.data import InputRows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # Trainer's DataLoader asks for pinned memory where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def a_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: "w7" is 7."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", mask_token="w3"
    )


def text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def prompts(rows: int = 16) -> list[dict[str, Any]]:
    """Prompts of several lengths, each with a column of text and one of numbers."""
    return [
        {"prompt": text(row), "answer": f"w{row[0]}", "limit": VOCABULARY // 2}
        for row in token_rows(rows)
    ]


def low(
    completion_ids: list[list[int]], answer: list[str], limit: list[int], **_: Any
) -> list[float]:
    """The share of small ids; it reads both columns."""
    assert all(isinstance(one, str) for one in answer)
    pairs = zip(completion_ids, limit, strict=True)
    return [sum(i < most for i in ids) / len(ids) for ids, most in pairs]


def lora() -> nn.Module:
    config = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["down_proj"], layers_to_transform=[1]
    )
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_model("llama", "causal"), config)


def a_reward(model: nn.Module, **options: Any) -> GenerationReward:
    return GenerationReward(model, a_tokenizer(), low, **{"max_new_tokens": 4} | options)


def arguments(folder: Path, **options: Any) -> ZOConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ZOConfig(str(folder), **settings | options)


def moved(trainer: ZOTrainer) -> str:
    """A hash of what the trainer tuned, after a run."""
    trainer.train()
    return trainer.view.hash()


# --- generated text -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
@pytest.mark.parametrize("collator", ["none", "positional", "named"])
def test_a_reward_of_generated_text_trains(tmp_path: Path, kind: str, collator: str) -> None:
    model = lora()
    reward = a_reward(model)
    rows: Any = prompts()
    if kind != "list":
        rows = Dataset.from_list(rows)
    if kind == "stream":
        rows = rows.to_iterable_dataset()
    given = {"named": {"data_collator": reward.collate}}.get(collator, {})
    positional = [reward.collate] if collator == "positional" else []
    args = arguments(
        tmp_path, max_steps=3, num_directions=1, displacement=0.25, perturbation_scale=0.2
    )
    trainer = ZOTrainer(model, args, *positional, train_dataset=rows, objective=reward, **given)
    start = ParameterView.trainable(model).hash()
    output = trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.queries == output.metrics["queries"] == 3 * 2 * 8
    assert ParameterView.trainable(model).hash() != start
    assert args.remove_unused_columns, "the arguments are as they were"


def test_the_reward_rises_and_is_logged_as_a_reward(tmp_path: Path) -> None:
    model = lora()
    reward = a_reward(model)
    before = reward(prompts()).mean()
    args = arguments(
        tmp_path, max_steps=40, num_directions=1, displacement=1.0, perturbation_scale=0.2,
        per_device_train_batch_size=16, logging_steps=1,
    )  # fmt: skip
    trainer = ZOTrainer(model, args, train_dataset=prompts(), objective=reward)
    trainer.train()
    after = reward(prompts()).mean()
    assert after > before + 0.1, (before, after)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(0.0 <= value <= 1.0 for value in logged), "a reward, not its negative"
    assert trainer.queries == 40 * 2 * 16


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_step_is_the_optimizers_own_on_the_examples_that_trainer_draws(
    tmp_path: Path, do_sample: bool
) -> None:
    """A loop of a few lines, without Trainer, on the examples it drew: the same bits."""
    seen: list[list[Any]] = []

    class Recording(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            seen.append(inputs["examples"])
            return super().training_step(model, inputs, num_items_in_batch)

    def optimizer() -> MeZO:
        return MeZO(displacement=0.25, num_directions=2, perturbation_scale=0.2)

    model = lora()
    Recording(
        model,
        arguments(tmp_path, max_steps=4, seed=11, micro_batch_size=3),
        train_dataset=Dataset.from_list(prompts()),
        objective=a_reward(model, do_sample=do_sample),
        zo_optimizer=optimizer(),
    ).train()

    twin = lora()
    view, alone, reward = (
        ParameterView.trainable(twin), optimizer(), a_reward(twin, do_sample=do_sample)
    )  # fmt: skip
    evaluator = LocalEvaluator(reward, view, EvaluationOptions(micro_batch_size=3))
    alone.start(view, 11)
    for examples in seen:
        samples = Samples(Examples(examples, reward.collate), 8, 0)
        samples.minibatch = lambda rows=samples.source: Batch(rows, range(8))
        view.apply(alone.step(evaluator, samples, Budget(max_steps=4)).update)
    tuned = ParameterView.trainable(model)
    assert tuned.hash() == view.hash()
    assert tuned.hash() != ParameterView.trainable(lora()).hash()


@pytest.mark.parametrize("optimizer", [None, MeZOSVRG(snapshot_size=16, snapshot_interval=2)])
def test_same_seed_same_run_and_another_seed_another(tmp_path: Path, optimizer: Any) -> None:
    def run(seed: int) -> str:
        model = lora()
        args = arguments(tmp_path, max_steps=3, seed=seed)
        reward = a_reward(model, do_sample=True)
        return moved(
            ZOTrainer(
                model, args, train_dataset=prompts(), objective=reward, zo_optimizer=optimizer
            )
        )

    assert run(5) == run(5) != run(6)


def test_messages_pass_through_untouched(tmp_path: Path) -> None:
    seen: list[Any] = []

    def keep(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(prompts)

    model = lora()
    tokenizer = a_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w6 {% endfor %}"
    chats = [[{"role": "user", "content": one["prompt"]}] for one in prompts(8)]
    reward = GenerationReward(model, tokenizer, keep, max_new_tokens=2)
    args = arguments(tmp_path, max_steps=1, num_directions=1, learning_rate=1e-3)
    rows = Dataset.from_list([{"prompt": chat} for chat in chats])
    ZOTrainer(model, args, train_dataset=rows, objective=reward).train()
    assert len(seen) == 2 * 2 + 2 * 8  # two rows are looked at before the first step, twice
    assert all(chat in chats for chat in seen)


def test_a_column_that_a_reward_needs_is_named(tmp_path: Path) -> None:
    model = lora()
    rows = Dataset.from_list([{"prompt": one["prompt"]} for one in prompts()])
    start = ParameterView.trainable(model).hash()
    args = arguments(tmp_path, max_steps=1, optimizer="mezo")
    with pytest.raises(DataError, match="answer"):
        ZOTrainer(model, args, train_dataset=rows, objective=a_reward(model)).train()
    assert ParameterView.trainable(model).hash() == start


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_on_a_gpu_the_loader_pins_and_the_objective_collates(tmp_path: Path, workers: int) -> None:
    model = lora()
    args = arguments(
        tmp_path,
        max_steps=2,
        use_cpu=False,
        num_directions=1,
        displacement=0.25,
        dataloader_num_workers=workers,
    )
    trainer = ZOTrainer(model, args, train_dataset=prompts(), objective=a_reward(model))
    trainer.train()
    assert trainer.queries == 2 * 2 * 8


# --- other objectives ---------------------------------------------------------------------------


def a_mixture(model: nn.Module) -> tuple[Any, list[dict[str, Any]]]:
    rows = [one | {"input_ids": ids} for one, ids in zip(prompts(), token_rows(16), strict=True)]
    return CausalLMLoss(model) - 0.1 * a_reward(model), rows


def a_template(model: nn.Module) -> tuple[Any, list[dict[str, Any]]]:
    words = {"tokenizer": a_tokenizer(), "template": "w9 {answer} w8"}
    rows = [{"answer": one["answer"], "label": i % 2} for i, one in enumerate(prompts())]
    return VerbalizerLoss(model, [7, 30], **words), rows


@pytest.mark.parametrize("make", [a_mixture, a_template])
def test_any_objective_that_makes_its_own_batches_trains(
    tmp_path: Path, make: Callable[[nn.Module], tuple[Any, list[dict[str, Any]]]]
) -> None:
    model = lora()
    objective, rows = make(model)
    start = ParameterView.trainable(model).hash()
    args = arguments(tmp_path, max_steps=2, micro_batch_size=3)
    dataset = Dataset.from_list(rows)
    assert moved(ZOTrainer(model, args, train_dataset=dataset, objective=objective)) != start


def test_queries_with_documents_train(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(16):
        features = torch.randn(3 + n % 4, 4, generator=generator)
        rows.append({"features": features, "relevance": (features[:, 0] > 0).int().tolist()})
        rows[-1]["relevance"][0] = 1
    model = nn.Linear(4, 1)
    objective = NDCG(model)
    before = objective(rows).mean()
    args = arguments(
        tmp_path, max_steps=30, displacement=1.0, perturbation_scale=0.2, logging_strategy="no"
    )
    ZOTrainer(model, args, train_dataset=rows, objective=objective).train()
    assert objective(rows).mean() > before + 0.05


def test_every_point_sees_the_same_draw_of_the_objectives_own_collator(tmp_path: Path) -> None:
    model = tiny_model("bert")
    loss = ClassificationLoss(model)
    seen: list[Tensor] = []

    def drawing(examples: list[Any]) -> dict[str, Tensor]:
        batch = loss.collate(examples)
        batch["input_ids"] = torch.randint(5, VOCABULARY, batch["input_ids"].shape)
        return batch

    def kept(batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch["input_ids"])
        return loss(batch)

    objective = CallableObjective(kept, model=model, collate=drawing, mean_over_rows=True)
    rows = [{"input_ids": [5, 6 + i % 3, 7], "labels": i % 2} for i in range(16)]
    args = arguments(tmp_path, max_steps=2, num_directions=1, displacement=0.25, micro_batch_size=4)
    ZOTrainer(model, args, train_dataset=rows, objective=objective).train()
    del seen[:2]  # the look at the view before the first step
    assert len(seen) == 2 * 2 * 2
    for step in (seen[:4], seen[4:]):
        assert torch.equal(step[0], step[2])
        assert torch.equal(step[1], step[3])
    assert not torch.equal(seen[0], seen[4])


def test_parts_of_a_batch_of_examples_are_fair_to_every_class(tmp_path: Path) -> None:
    model = tiny_model("bert")
    loss = ClassificationLoss(model)
    shares: list[float] = []

    def kept(batch: dict[str, Tensor]) -> Tensor:
        shares.append(float(batch["labels"].float().mean()))
        return loss(batch)

    objective = CallableObjective(kept, model=model, collate=loss.collate, mean_over_rows=True)
    rows = [{"input_ids": [5, 6, 7], "labels": int(i >= 4)} for i in range(8)]
    args = arguments(tmp_path, max_steps=2, num_directions=1, displacement=0.25, micro_batch_size=4)
    ZOTrainer(model, args, train_dataset=rows, objective=objective).train()
    assert set(shares[2:]) == {0.5}  # after the look at the view, on two rows


def test_another_collator_is_respected(tmp_path: Path) -> None:
    model = tiny_model("bert")
    loss, calls = ClassificationLoss(model), []

    def mine(examples: list[Any]) -> dict[str, Tensor]:
        calls.append(len(examples))
        return loss.collate(examples)

    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(token_rows(16))]
    args = arguments(tmp_path, max_steps=1, displacement=0.25, num_directions=1)
    ZOTrainer(model, args, train_dataset=rows, objective=loss, data_collator=mine).train()
    assert set(calls[1:]) == {8}  # after the look at the view, on two rows


def test_evaluation_stays_trainers(tmp_path: Path) -> None:
    model = tiny_model("bert")
    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(token_rows(16, 3))]
    dataset = Dataset.from_list([row | {"note": "text"} for row in rows])
    args = arguments(tmp_path, max_steps=2, optimizer="mezo")
    objective = ClassificationLoss(model)
    trainer = ZOTrainer(model, args, train_dataset=dataset, eval_dataset=dataset,
                        objective=objective)  # fmt: skip
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(float(objective(rows).mean().detach()), rel=1e-4)


# --- columns of a collated batch ----------------------------------------------------------------


def test_the_rows_of_a_collated_batch_are_those_of_tensors_arrays_and_lists() -> None:
    inputs = {
        "text": ["a", "b", "c"],
        "ids": torch.tensor([[1], [2], [3]]),
        "weight": np.array([0.1, 0.2, 0.3]),
        "scale": torch.tensor(2.0),
        "names": ["no", "yes"],
        "name": "abc",
    }
    rows = InputRows(inputs)
    assert len(rows) == 3
    taken = rows.take([2, 0])
    assert taken["text"] == ["c", "a"]
    assert taken["ids"].tolist() == [[3], [1]]
    assert taken["weight"].tolist() == [0.3, 0.1]
    assert taken["scale"] == 2.0
    assert taken["names"] == ["no", "yes"], "not one for every row"
    assert taken["name"] == "abc"
    assert len(InputRows({"text": ["a", "b"]})) == 2
    with pytest.raises(DataError, match=r"no tensors or lists with rows, only \['n'\]"):
        InputRows({"n": 3})


def test_a_collator_may_hand_on_text_beside_tensors(tmp_path: Path) -> None:
    model = lora()
    seen: list[tuple[int, int]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [row["answer"] for row in rows]
        return {"answer": answers, "first": torch.tensor([int(a[1:]) for a in answers])}

    def objective(batch: dict[str, Any]) -> Tensor:
        seen.append((len(batch["answer"]), len(batch["first"])))
        assert [int(answer[1:]) for answer in batch["answer"]] == batch["first"].tolist()
        return batch["first"].float()

    objective.mean_over_rows = True  # type: ignore[attr-defined]  # else it is called to find out
    pair = MeZO(displacement=0.25, num_directions=1, one_sided=False)
    args = arguments(tmp_path, max_steps=1, micro_batch_size=3, remove_unused_columns=False)
    model.eval()
    ZOTrainer(
        model,
        args,
        train_dataset=prompts(),
        objective=objective,
        data_collator=collate,
        zo_optimizer=pair,
    ).train()
    looks, step = seen[:-6], seen[-6:]
    assert set(looks) == {(2, 2)}, "before the first step, on two rows"
    assert sorted(step) == [(2, 2), (2, 2), (3, 3), (3, 3), (3, 3), (3, 3)]
