"""What a forward of a language model is given, and what is read off it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_adapt.errors import NotServableError
from zo_adapt.serve.protocol import Texts, Writing


def sharing_weights(model: nn.Module) -> nn.Module:
    """The same modules once more around the same parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise NotServableError(
            f"{type(model).__name__} cannot be copied ({error!r:.120}); give the model without "
            "what was put around it"
        ) from error


def unwrapped(name: str) -> str:
    """The name that a parameter had before peft wrapped its model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def padded(texts: Texts, device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask, (b, t), of texts of any length."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        where = slice(longest - len(text), None) if left else slice(0, len(text))
        ids[row, where], mask[row, where] = torch.tensor(text), True
    return ids.to(device), mask.to(device)


@contextmanager
def narrowing(model: Any, chosen: Tensor) -> Iterator[list[None]]:
    """Inside, the output layer sees the chosen positions alone; it says whether it was called."""
    head, calls = model.get_output_embeddings(), list[None]()
    if not isinstance(head, nn.Linear | nn.Embedding):  # adapted: it counts the rows
        yield calls
        return

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(None)
        return (inputs[0][chosen.to(inputs[0].device)][None], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield calls
    finally:
        handle.remove()


def log_probs(
    logits: Tensor, targets: Tensor, others: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Of the targets, and of the likeliest other token at each, (n,)."""
    whole = logits.logsumexp(-1)
    own = logits.gather(1, targets[:, None])[:, 0] - whole
    if not others:
        return own.cpu().numpy(), None
    top = logits.topk(2)
    is_own = top.indices[:, 0] == targets
    other = torch.where(is_own, top.values[:, 1], top.values[:, 0]) - whole
    return own.cpu().numpy(), other.cpu().numpy()


def placed_from(places: range, length: int, values: np.ndarray) -> np.ndarray:
    """Values put behind their places, NaN elsewhere, (length,)."""
    found = np.full(length, np.nan, values.dtype)
    found[places.start + 1 : places.stop + 1] = values
    return found


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and with the first end."""
    place = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if place is None else ids[: place + 1]


def portions_of(token_ids: Texts, most: int, more: int = 0) -> list[list[int]]:
    """Rows of about one length together, at most so many tokens; padded to the longest.

    Args:
        token_ids: The texts.
        most: Tokens of a portion, padding included.
        more: What will be written after each.
    """
    order = sorted(range(len(token_ids)), key=lambda row: -len(token_ids[row]))
    portions: list[list[int]] = []
    for row in order:
        longest = len(token_ids[portions[-1][0]]) + more if portions else 0
        if not portions or (len(portions[-1]) + 1) * longest > most:
            portions.append([])
        portions[-1].append(row)
    return portions


def configuration_of(writing: Writing) -> Any:
    """The same as transformers' ``GenerationConfig``; stop strings are left to the objective.

    Only a tokenizer can find them: texts go on, and the objective cuts them.
    """
    from transformers import GenerationConfig

    draws = writing.temperature > 0
    sampling = {
        "temperature": writing.temperature,
        "top_p": writing.top_p,
        "top_k": writing.top_k,
    }
    return GenerationConfig(
        max_new_tokens=writing.max_new_tokens,
        do_sample=draws,
        eos_token_id=list(writing.ends) or None,
        pad_token_id=writing.ends[0] if writing.ends else 0,
        **(sampling if draws else {}),
        **writing.more,
    )
