"""What a text takes of a device's memory while a model writes it."""

from typing import Any

from torch import nn

_SCORES = 5
"""Copies of the next token's scores in fp32: the model's own, transformers', what is left out."""
_STATES = 12
"""Of a layer's states beside each other, in hidden sizes: attention's and a feed-forward's."""


def bytes_of_text(model: nn.Module, prompt: int, longest: int) -> int:
    """Keys and values of all layers, scores of one token, states of one layer: an upper bound.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2, bos_token_id=0,
        ...                     eos_token_id=1)
        >>> model = GPT2LMHeadModel(config)
        >>> bytes_of_text(model, 16, 16) - bytes_of_text(model, 16, 8)  # 2 layers and a copy
        1536
    """
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", lambda: config)()

    def said(*names: str) -> int:
        found = (getattr(of_text, name, None) for name in names)
        return next((int(each) for each in found if isinstance(each, int) and each > 0), 1)

    # The first is an embedding, of the dtype that is computed in.
    size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    hidden = said("hidden_size")
    heads = said("num_attention_heads")
    of_head = said("head_dim", "d_kv") if _has(of_text, "head_dim", "d_kv") else hidden // heads
    kept = 2 * said("num_key_value_heads", "num_attention_heads") * max(1, of_head) * size
    layers = said("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    crossed = 2 if getattr(config, "is_encoder_decoder", False) else 1
    states = _STATES * hidden * size + 2 * heads * prompt * 4
    scores = _SCORES * said("vocab_size") * 4
    # A cache grows into a new place, one layer at a time.
    return (layers * crossed + 1) * kept * (prompt + longest) + states * prompt + scores


def _has(config: Any, *names: str) -> bool:
    return any(isinstance(getattr(config, name, None), int) for name in names)
