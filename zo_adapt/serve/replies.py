"""What vLLM is sent and what it answers, as this package has it."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import NotServableError, ServedModelError, ServerReplyError
from zo_adapt.serve.protocol import Scores, Writing

OF_VLLM = {
    "repetition_penalty": "repetition_penalty",
    "min_p": "min_p",
    "min_new_tokens": "min_tokens",
}
"""Options of what is written that it knows, by transformers' names."""
_USUAL = {"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "use_cache": True}


def options_of(writing: Writing, known: Mapping[str, str]) -> dict[str, Any]:
    """More options of what is written, by the server's names.

    Raises:
        NotServableError: One that the server does not know: it would ignore it without a word.
    """
    given = {n: v for n, v in writing.more.items() if v is not None and v != _USUAL.get(n)}
    if unknown := sorted(given.keys() - known.keys()):
        raise NotServableError(
            f"this server knows no {unknown[0]} ({given[unknown[0]]!r:.40}); "
            + (f"it knows {', '.join(sorted(known))}: " if known else "")
            + "leave it out, or serve the model by PeftServer"
        )
    return {known[name]: value for name, value in given.items()}


@contextmanager
def understood() -> Iterator[None]:
    """Inside, an answer is read; what is not made as it should be has a name.

    Raises:
        ServerReplyError: Another type, or something missing, at some place of the answer.
    """
    try:
        yield
    except ServedModelError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ServerReplyError(
            f"the server's answer cannot be read ({error!r:.120}); it is not the OpenAI interface "
            "of vLLM, or something between changes what it says"
        ) from error


def in_base64(tensor: Tensor) -> str:
    """A tensor in the format that the server reads."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def scores_of(choice: Mapping[str, Any], text: Sequence[int], others: bool) -> Scores:
    """What vLLM says of a prompt: for each token but the first, a few log-probabilities by id.

    Raises:
        ServerReplyError: It does not say it of these tokens.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(text):
        raise ServerReplyError(
            f"the server gave no prompt_logprobs for the {len(text)} tokens of a text: "
            f"{entries!r:.120}; is it vLLM, and without prompt embeddings?"
        )
    own, other = np.full(len(text), np.nan), np.full(len(text), np.nan)
    for place, (token, entry) in enumerate(zip(text, entries, strict=True)):
        if place == 0:
            continue
        known = {int(key): _number(value) for key, value in (entry or {}).items()}
        if token not in known:
            raise ServerReplyError(
                f"the server scored other tokens than it was asked about: {sorted(known)[:4]} at "
                f"place {place}, not {token}"
            )
        own[place] = known.pop(token)
        other[place] = max(known.values(), default=-math.inf)
    return Scores(own, other if others else None)


def next_of(choice: Mapping[str, Any], choices: Sequence[int]) -> list[float] | None:
    """Log-probabilities of some tokens as the next one; None where they are not all given."""
    tops = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    known: Mapping[str, Any] = tops[0] or {}
    keys = [f"token_id:{token}" for token in choices]
    return [float(known[key]) for key in keys] if all(key in known for key in keys) else None


def _number(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, dict) else value)


def token_ids_of(choice: Mapping[str, Any]) -> list[int]:
    """The tokens that were written."""
    ids = choice.get("token_ids")
    if not isinstance(ids, list):
        raise ServerReplyError(
            "the server returned text without token_ids; give it a version that knows "
            "return_token_ids (vLLM 0.11 or newer)"
        )
    return [int(token) for token in ids]
