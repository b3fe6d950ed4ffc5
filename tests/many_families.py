"""Small models of many families, and what it means that a view of one can be tuned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from problems import bits
from torch import Tensor, nn

from objectives import CausalLMLoss, ClassificationLoss, Seq2SeqLoss
from zo_adapt import MeZO, ParameterView, Term, minimize, replay
from zo_adapt.loops.result import StopReason

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""Of most configurations; the others follow."""
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
TASKS: dict[str, tuple[type[Any], str]] = {
    "classes": (hf.AutoModelForSequenceClassification, "SEQ_CLS"),
    "next": (hf.AutoModelForCausalLM, "CAUSAL_LM"),
    "pairs": (hf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "images": (hf.AutoModelForImageClassification, "FEATURE_EXTRACTION"),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("classes", SIZES),
    "roberta": ("classes", SIZES),
    "xlm-roberta": ("classes", SIZES),
    "camembert": ("classes", SIZES),
    "distilbert": (
        "classes",
        {"vocab_size": 32, "dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32},
    ),
    "electra": ("classes", SIZES | {"embedding_size": 8}),
    "albert": ("classes", SIZES | {"embedding_size": 8}),
    "deberta-v2": ("classes", SIZES),
    "mpnet": ("classes", SIZES),
    "modernbert": ("classes", SIZES | {"cls_token_id": 0, "sep_token_id": 2}),
    "gpt2": (
        "next",
        {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32},
    ),
    "opt": ("next", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 8}),
    "gpt_neox": ("next", SIZES),
    "bloom": ("next", {"vocab_size": 32, "hidden_size": 16, "n_head": 2, "n_layer": 2}),
    "llama": ("next", SIZES | GROUPED),
    "mistral": ("next", SIZES | GROUPED),
    "qwen2": ("next", SIZES | GROUPED),
    "gemma": ("next", SIZES | GROUPED),
    "phi": ("next", SIZES),
    "mixtral": ("next", SIZES | GROUPED | {"num_local_experts": 2}),
    "t5": (
        "pairs",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
    "bart": ("pairs", SEQ2SEQ),
    "vit": ("images", {**SIZES, "image_size": 8, "patch_size": 4}),
}


def model_of(family: str) -> Any:
    """With weights large enough for the value to depend on them in earnest."""
    task, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = TASKS[task][0].from_config(hf.AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.use_cache = False  # a mixture of adapters asks for that
    return model.eval()


def adapted(family: str, config: Any) -> Any:
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(model_of(family), config)
    return model.eval()


def images_loss(model: Any) -> Callable[[Any], Tensor]:
    def loss(batch: Any) -> Tensor:
        pixels, labels = batch
        logits = model(pixel_values=pixels).logits
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return loss


def task_of(task: str, model: Any) -> tuple[Any, Any]:
    """An objective and eight examples."""
    words = [[3 + (5 * i + j) % 28 for j in range(3 + i % 3)] for i in range(8)]
    if task == "classes":
        rows = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(words)]
        return ClassificationLoss(model), rows
    if task == "next":
        return CausalLMLoss(model), [{"input_ids": ids} for ids in words]
    if task == "next of two tasks":
        rows = [{"input_ids": ids, "task_ids": i % 2} for i, ids in enumerate(words)]
        return CausalLMLoss(model), rows
    if task == "pairs":
        return Seq2SeqLoss(model), [{"input_ids": ids, "labels": ids[::-1]} for ids in words]
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(8, 3, 8, 8, generator=generator)
    return images_loss(model), (pixels, torch.arange(8) % 2)


def bits_of(model: nn.Module) -> dict[str, Any]:
    return {name: bits(p).contiguous().numpy().tobytes() for name, p in model.named_parameters()}


def moving(view: ParameterView) -> set[str]:
    """Tensors that a step moves: those that are read and whose group does not rest."""
    return {
        name
        for name in view.tensors
        if name not in view.at_rest and view.group_of(name).perturbation_scale > 0
    }


def check(make: Callable[[], ParameterView], task: str, folder: Path) -> None:
    """What ``OK`` means."""
    view = make()
    model: Any = view.model
    before = bits_of(model)
    with torch.no_grad(), view.shifted([Term(5, 0.1)]):
        pass
    assert bits_of(model) == before
    objective, data = task_of(task, model)
    result = minimize(
        objective,
        view,
        data,
        MeZO(num_directions=2),
        batch_size=4,
        max_steps=3,
        progress=False,
        trajectory=folder / "run.zot",
    )
    assert result.stop_reason is StopReason.MAX_STEPS, result.message
    assert len({step.value for step in result.history}) > 1
    after = bits_of(model)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == moving(view)
    assert moved
    again = make()
    replay(again, folder / "run.zot")
    assert bits_of(again.model) == after  # type: ignore[arg-type]
