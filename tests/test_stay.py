"""A short trial by the defaults does not harm a model that is at its best already."""

from typing import Any

import peft
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import ElectraConfig, ElectraForSequenceClassification

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import ParameterView, minimize

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
RISE = 0.15
TUNERS: dict[str, Any] = {
    "q,v": lambda **o: peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **o),
    "all-linear": lambda **o: peft.LoraConfig(r=8, target_modules="all-linear", **o),
    "head": lambda **o: peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], **o
    ),
    "loha": lambda **o: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], **o),
    "lokr": lambda **o: peft.LoKrConfig(r=4, target_modules=["q_proj", "v_proj"], **o),
    "ia3": lambda **o: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **o
    ),
}


def own_texts(model: nn.Module, rows: int = 64, length: int = 12) -> list[dict[str, Any]]:
    """Texts that the model itself writes: no weights fit them better."""
    ids = torch.arange(rows)[:, None] % (VOCABULARY - 4) + 4
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(length - 1):
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def mean_loss(objective: Any, data: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        values: Tensor = objective(objective.collate(data))
    return float(values.mean())


@pytest.mark.parametrize("steps", [2, 6, 16])
@pytest.mark.parametrize("tuner", sorted(TUNERS))
def test_a_causal_language_model_keeps_its_own_distribution(tuner: str, steps: int) -> None:
    base = tiny_model("llama", "causal")
    data = own_texts(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, TUNERS[tuner](task_type="CAUSAL_LM")).eval()
    loss = CausalLMLoss(model)
    before = mean_loss(loss, data)
    minimize(
        loss, ParameterView.trainable(model), data, batch_size=16, max_steps=steps, progress=False
    )
    assert mean_loss(loss, data) < before + RISE


@pytest.mark.parametrize("view", ["trainable", "full"])
@pytest.mark.parametrize("steps", [2, 6, 16])
def test_an_electra_is_not_harmed(steps: int, view: str) -> None:
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    model: Any = ElectraForSequenceClassification(config).eval()
    data = [{"input_ids": [5 + i % 2, 7 + i % 11, 9], "labels": i % 2} for i in range(64)]
    if view == "trainable":
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=8)).eval()
    loss = ClassificationLoss(model)
    before = mean_loss(loss, data)
    minimize(
        loss, getattr(ParameterView, view)(model), data, batch_size=16, max_steps=steps,
        progress=False,
    )  # fmt: skip
    assert mean_loss(loss, data) < before + RISE
