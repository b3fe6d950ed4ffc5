"""Models of several families from tiny configurations: no hub, a few thousand weights each."""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
)

VOCABULARY = 64
PAD = 1
MASK = 3

# Weights large enough for the outputs to depend on them in earnest.
_SCALE = {"initializer_range": 0.2, "pad_token_id": PAD, "vocab_size": VOCABULARY}
_BERT = _SCALE | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "bert": (BertConfig, _BERT),
    "roberta": (RobertaConfig, _BERT),
    "distilbert": (
        DistilBertConfig,
        _SCALE
        | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40},
    ),
    "gpt2": (GPT2Config, _SCALE | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}),
    "opt": (
        OPTConfig,
        _SCALE
        | {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 40,
            "init_std": 0.2,
            # the projections that OPT-350M has before its output embedding
            "word_embed_proj_dim": 8,
        },
    ),
    "llama": (LlamaConfig, _BERT | {"num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, _BERT | {"num_key_value_heads": 1}),
}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("gpt2", "opt", "llama")
FAMILIES = ENCODERS + DECODERS
_HEADS = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
}


def tiny_config(family: str, **options: Any) -> PretrainedConfig:
    """The configuration of a family, with more options on top."""
    kind, settings = _CONFIGS[family]
    return kind(**settings | {"bos_token_id": 0, "eos_token_id": 2} | options)


def tiny_model(
    family: str, head: str = "classification", *, seed: int = 0, **options: Any
) -> nn.Module:
    """A model in evaluation mode with seeded random weights.

    Args:
        family: One of ``FAMILIES``.
        head: "classification", "causal" or "masked".
        seed: Of the weights.
        options: Of the configuration (num_labels, problem_type, dtype, ...).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _HEADS[head].from_config(tiny_config(family, **options)).eval()


def token_rows(rows: int, length: int = 7, *, seed: int = 0) -> list[list[int]]:
    """Random tokens, 3..length of them a row, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + i % (length - 2) for i in range(rows)]
    return [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
