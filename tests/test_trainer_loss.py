"""The loss of a batch that is computed in parts, by Trainer's own loss function."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_trainer import arguments
from tiny_models import PAD, tiny_config, tiny_model, token_rows
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertLMHeadModel,
)
from transformers.trainer_pt_utils import LabelSmoother

from zo_adapt import ZOTrainer
from zo_adapt.errors import OptionError
from zo_adapt.trainer.loss import TrainerLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "max_position_embeddings": 40, "pad_token_id": PAD, "init_std": 0.3,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def causal_rows() -> list[dict[str, Any]]:
    rows = token_rows(16, 12)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def causal_pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(row["input_ids"]) for row in rows], batch_first=True, padding_value=PAD
    )
    mask = ids != PAD
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def some_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every row the first label and a few others; one row has none at all."""
    labels = batch["labels"].clone()
    labels[:, 2::3], labels[1] = -100, -100
    return batch | {"labels": labels}


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """Twelve rows of different lengths with the labels that a model takes."""
    batch = causal_pad(causal_rows()[:12])
    kind = type(model).__name__
    ids, rows = batch["input_ids"], torch.arange(12)
    if "SequenceClassification" in kind:
        many = model.config.problem_type == "multi_label_classification"  # type: ignore[union-attr]
        return batch | {"labels": (rows[:, None] + torch.arange(3)) % 2 * 1.0 if many else rows % 3}
    if "QuestionAnswering" in kind:
        del batch["labels"]
        return batch | {"start_positions": rows % 3, "end_positions": rows % 3 + 1}
    return some_labels(batch | {"labels": ids % 3} if "Token" in kind else batch)


SUMS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_model("llama", "causal"),
    "bf16": lambda: tiny_model("llama", "causal").bfloat16(),
    # Trainer takes this one's labels for unshifted, and BartForCausalLM's for shifted.
    "gpt2": lambda: tiny_model("gpt2", "causal"),
    "bart": lambda: BartForCausalLM(BartConfig(**SEQ2SEQ, is_decoder=True)),
    "bert that writes": lambda: BertLMHeadModel(tiny_config("bert", is_decoder=True)),
    "masked": lambda: tiny_model("roberta", "masked"),
    "source and target": lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)),
    "tokens": lambda: AutoModelForTokenClassification.from_config(
        tiny_config("bert", num_labels=3)
    ),
    "classes": lambda: tiny_model("bert", num_labels=3),
    "several classes": lambda: tiny_model(
        "distilbert", num_labels=3, problem_type="multi_label_classification"
    ),
    "positions": lambda: BertForQuestionAnswering(tiny_config("bert")),
}


class Fixed:
    """What ``TrainerLoss`` asks of a trainer."""

    _loss_shifts_labels = False

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        self.label_smoother = LabelSmoother(smoothing) if smoothing else None
        self.model, self.accelerator = model, Accelerator(cpu=True)
        self.compute_loss_context_manager = nullcontext

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.label_smoother is None:
            loss: Tensor = model(**inputs).loss
            return loss
        labels = inputs.pop("labels")
        shifted = type(model).__name__ == "GPT2LMHeadModel"
        return self.label_smoother(model(**inputs), labels, shift_labels=shifted)


@torch.no_grad()
def assert_parts_are_the_whole(model: nn.Module, smoothing: float = 0.0) -> None:
    model.eval()
    batch, trainer = batch_of(model), Fixed(model, smoothing)
    halves = next(model.parameters()).dtype == torch.bfloat16
    for size in (1, 5):
        loss = TrainerLoss(trainer, model)
        whole = float(loss.score([loss.predict(batch)]))
        for _ in range(2):  # watched, then known
            parts = [{n: v[i : i + size] for n, v in batch.items()} for i in range(0, 12, size)]
            found = float(loss.score([loss.predict(part) for part in parts]))
            assert found == pytest.approx(whole, rel=5e-3 if halves else 1e-5)


@pytest.mark.parametrize("name", SUMS)
def test_the_loss_of_parts_is_that_of_the_whole(name: str) -> None:
    torch.manual_seed(0)
    assert_parts_are_the_whole(SUMS[name]())


@pytest.mark.parametrize("name", ["gpt2", "masked", "tokens"])
def test_a_smoothed_loss_of_parts_is_that_of_the_whole(name: str) -> None:
    torch.manual_seed(0)
    assert_parts_are_the_whole(SUMS[name](), smoothing=0.1)


def test_a_loss_of_several_means_is_not_put_together_from_parts() -> None:
    model = BertForPreTraining(tiny_config("bert")).eval()
    loss = TrainerLoss(Fixed(model), model)
    batch = some_labels(causal_pad(causal_rows()[:4])) | {
        "next_sentence_label": torch.ones(4).long()
    }
    assert loss.score([loss.predict(batch)]).isfinite()
    halves = [{name: value[rows] for name, value in batch.items()} for rows in ([0, 1], [2, 3])]
    with pytest.raises(OptionError, match="leave out micro_batch_size"):
        loss.score([loss.predict(half) for half in halves])


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mean_over_tokens_does_not_depend_on_micro_batches(
    tmp_path: Path, micro: int, family: str
) -> None:
    losses = []
    for size in (None, micro):
        trainer = ZOTrainer(
            tiny_model(family, "causal"),
            arguments(tmp_path, max_steps=1, logging_steps=1, micro_batch_size=size,
                      optimizer="mezo"),
            train_dataset=causal_rows(),
            data_collator=causal_pad,
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("compares", [True, False], ids=["in-batch negatives", "a mean"])
def test_a_loss_that_compares_the_rows_of_a_batch_sees_all_of_them(
    tmp_path: Path, compares: bool
) -> None:
    seen: list[int] = []

    class Own(ZOTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **_: Any) -> Tensor:
            seen.append(len(inputs["labels"]))
            if not compares:
                return model(**inputs).loss  # type: ignore[no-any-return]
            del inputs["labels"]
            texts = model(**inputs).logits.mean(1)
            return nn.functional.cross_entropy(texts @ texts.T, torch.arange(len(texts)))

    def trainer(name: str, micro_batch_size: int | None) -> Own:
        return Own(
            tiny_model("llama", "causal"),
            arguments(
                tmp_path / name, max_steps=1, per_device_train_batch_size=8, displacement=0.1,
                micro_batch_size=micro_batch_size,
            ),
            train_dataset=causal_rows(),
            data_collator=causal_pad,
        )  # fmt: skip

    trainer("whole", None).train()
    assert (seen[-1] == 8) is compares
    if compares:
        with pytest.raises(OptionError, match="one number for a batch"):
            trainer("parts", 4).train()
    else:
        trainer("parts", 4).train()
