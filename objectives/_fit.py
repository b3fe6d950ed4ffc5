"""Which models an objective fits, what they take, and how far they read."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from zo_adapt.errors import DataError, OptionError

UNLIMITED = 10**9
TASK_IDS = "task_ids"
"""Which task every row is of, for peft's Poly and multitask prompt tuning."""


class Reads(NamedTuple):
    """What a language model's outputs mean.

    Args:
        is_causal: Logits of a token depend on the tokens before it alone, and predict the next.
        is_masked: They depend on all tokens, and are meant for masked ones.
        is_encoder_decoder: One text is read, another is written.
    """

    is_causal: bool
    is_masked: bool
    is_encoder_decoder: bool


def reads(model: nn.Module) -> Reads:
    """What a model's own configuration and class say; a class of the user's own may be anything."""
    from transformers.models.auto import modeling_auto as known

    config, name = getattr(model, "config", None), type(base_model(model)).__name__
    both = is_encoder_decoder(model)
    masked = set(known.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    causal = set(known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    # An encoder's causal class (BertLMHeadModel) looks ahead unless its configuration says not to.
    looks_ahead = (
        getattr(config, "model_type", None) in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", True)
        and not getattr(config, "causal", False)
    )
    is_masked = not both and (name in masked - causal or (name in causal and looks_ahead))
    return Reads(not (both or is_masked), is_masked, both)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether one text is read and another is written."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_head(model: nn.Module, objective: str) -> None:
    """Refuse a model whose head is for classes or spans where the tokens of a text are predicted.

    Raises:
        OptionError: Names the class to load it with.
    """
    from transformers.models.auto import modeling_auto as known

    name = type(base_model(model)).__name__
    others = (
        known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        known.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        known.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    )
    if any(name in mapping.values() for mapping in others):
        kind = getattr(getattr(model, "config", None), "model_type", None)
        masked = kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and objective == "VerbalizerLoss"
        right = "Seq2SeqLM" if is_encoder_decoder(model) else "MaskedLM" if masked else "CausalLM"
        raise OptionError(
            f"{objective} is of predicted tokens, and the head of {name} gives none; load the "
            f"model with AutoModelFor{right}"
        )


def check_one_row_a_text(model: nn.Module, objective: str) -> None:
    """Refuse a model that chooses among several texts of an example."""
    from transformers.models.auto import modeling_auto as known

    name = type(base_model(model)).__name__
    if name in known.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        raise OptionError(
            f"{objective} is of models that give logits for a text, and {name} gives one for each "
            "of the choices of an example; write a function of a batch that calls the model and "
            "returns a loss for every example"
        )


def check_causal(model: nn.Module, objective: str) -> None:
    """Refuse a model whose logits do not predict the next token.

    Raises:
        OptionError: Names the objective that fits it.
    """
    check_head(model, objective)
    found, name = reads(model), type(base_model(model)).__name__
    if found.is_encoder_decoder:
        raise OptionError(
            f"{objective} is of causal language models, and {name} is an encoder-decoder; choose "
            "Seq2SeqLoss"
        )
    if found.is_masked:
        raise OptionError(
            f"{objective} is of causal language models, and in {name} every token sees those after "
            "it, so that it would be shown what it has to predict; load a causal model (an "
            "encoder with config.is_decoder=True), or choose VerbalizerLoss with {mask}"
        )


def check_encoder_decoder(model: nn.Module, objective: str) -> None:
    """Refuse a model that is no encoder-decoder.

    Raises:
        OptionError: Names the objective that fits it.
    """
    if not reads(model).is_encoder_decoder:
        raise OptionError(
            f"{objective} is of encoder-decoder models (T5, BART), and "
            f"{type(base_model(model)).__name__} is none; choose CausalLMLoss"
        )
    check_head(model, objective)


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, peft seen through."""
    unwrap = getattr(model, "get_base_model", None)
    base: nn.Module = model if unwrap is None else unwrap()
    return base


def accepted_arguments(model: nn.Module) -> frozenset[str] | None:
    """Names of the arguments of the model's forward, peft seen through; None when it takes any."""
    named = _named(type(base_model(model)).forward)
    if not named:
        return None
    # A tuner may take more than its base does: Poly and multitask prompts the task of every row.
    around = (model, getattr(model, "base_model", None))
    takes_tasks = any(TASK_IDS in _named(type(one).forward) for one in around if one is not None)
    return frozenset(named | {TASK_IDS} if takes_tasks else named)


def first_argument(model: nn.Module) -> str:
    """The name under which a model takes x, of (x, y).

    Raises:
        DataError: Its forward names none.
    """
    names = _arguments(type(base_model(model)).forward)
    if not names:
        raise DataError(
            f"the forward of {type(model).__name__} names no argument to take x of (x, y); give "
            "mappings, as {'input': x, 'labels': y}"
        )
    return names[0]


def _named(function: Any) -> set[str]:
    return set(_arguments(function))


def _arguments(function: Any) -> list[str]:
    """Of a method as its class has it: the first is the object, under whatever name."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for index, p in enumerate(parameters) if index and p.kind not in kinds]


def virtual_tokens(model: nn.Module) -> int:
    """How many tokens peft's prompt, prefix or p-tuning puts before every text."""
    config = getattr(model, "active_peft_config", None)
    is_prompt = bool(getattr(config, "is_prompt_learning", False))
    return int(config.num_virtual_tokens) if config is not None and is_prompt else 0


def takes_the_last_position(model: nn.Module) -> bool:
    """Whether a classifier takes the last position of a batch for the end of every text in it.

    Decoders do where they are given embeddings and no tokens: behind peft's prompts, but for
    prefixes, which are keys and values.
    """
    from transformers.models.auto import modeling_auto as known

    if not virtual_tokens(model):
        return False
    config: Any = model.active_peft_config
    kind = getattr(getattr(model, "config", None), "model_type", None)
    writes = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return (
        writes
        and kind not in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not str(getattr(config.peft_type, "value", config.peft_type)).startswith("PREFIX")
    )


def positions(model: nn.Module, *, are_written: bool = False) -> int | None:
    """The longest text in tokens that the model is made for; None where nothing says so.

    Args:
        model: Whose configuration says it.
        are_written: Of an encoder-decoder, what the decoder writes, not what the encoder reads.
    """
    limit = _configured_positions(model, are_written)
    if limit is None:
        return None
    # RoBERTa and its kin count positions from the padding token's id on.
    offset = max(map(_offset, _position_tables(model)), default=0)
    return limit - offset - virtual_tokens(model)


def _configured_positions(model: nn.Module, are_written: bool) -> int | None:
    config, side = getattr(model, "config", None), "decoder" if are_written else "encoder"
    names = ["max_position_embeddings", f"max_{side}_position_embeddings", "max_seq_len"]
    names += ["max_target_positions"] * are_written
    # Some are made of two models, each with a configuration of its own.
    owners = (getattr(config, side, None), config)
    said = (getattr(owner, name, None) for owner in owners for name in names)
    return next((int(limit) for limit in said if limit is not None and limit > 0), None)


def check_prompt_length(model: nn.Module, width: int, longest: int) -> None:
    """Refuse prompts that leave no room for completions."""
    limit = positions(model)
    used = width if is_encoder_decoder(model) else width + longest - 1
    if limit is not None and used > limit:
        raise DataError(
            f"a prompt has {width} tokens, and with max_new_tokens={longest} that takes {used} "
            f"positions of the model's {limit}; shorten the prompts or the completions"
        )


def check_completion_length(model: nn.Module, longest: int) -> None:
    """Refuse completions that the decoder of an encoder-decoder has no positions for."""
    limit = positions(model, are_written=True)
    if is_encoder_decoder(model) and limit is not None and longest > limit:
        raise OptionError(
            f"max_new_tokens={longest}, and the model's decoder has {limit} positions; choose "
            f"1..{limit}"
        )


def shortest(*limits: int | None) -> int | None:
    """The smallest limit on a text's length that is one; a tokenizer without one says 10^30."""
    return min((one for one in limits if one is not None and one < UNLIMITED), default=None)


def tokens_of(tokenizer: Any) -> int | None:
    """The longest text that a tokenizer says is meant."""
    return None if tokenizer is None else int(tokenizer.model_max_length)


def has_position_table(model: nn.Module) -> bool:
    """Whether a longer text than ``positions`` is an error, not only untrained."""
    # Sines, too, may be a table of so many rows (GPT-J, CTRL).
    limits = [_configured_positions(model, are_written) for are_written in (False, True)]
    if getattr(getattr(getattr(model, "config", None), "attn_config", None), "alibi", False):
        return True  # MPT makes a table of its biases, of so many positions
    sines = (len(b) for name, b in model.named_buffers() if b.dim() == 2 and _is_absolute(name))
    return any(True for _ in _position_tables(model)) or any(rows in limits for rows in sines)


def _position_tables(model: nn.Module) -> Iterator[nn.Module]:
    """Embeddings of positions; those that make their sines as they need them have no weight."""
    for name, module in model.named_modules():
        # peft's wrappers compute a weight that is asked for: only of positions is it.
        if _is_absolute(name) and hasattr(module, "weight") and hasattr(module, "padding_idx"):
            yield module


def _is_absolute(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return ("position" in leaf and "relative" not in leaf) or leaf in ("wpe", "pos_encoding")


def _offset(table: Any) -> int:
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1
