"""Prompts as a language model is to continue them: encoded once, padded to one length."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from objectives._reward_calls import GIVEN
from zo_adapt.errors import DataError, OptionError

Side = Literal["left", "right"]
_NOT_COLUMNS = ("completion", "completion_ids")
"""Fields that TRL's data sets may have and that rewards do not see."""


@dataclass(frozen=True)
class PromptBatch:
    """Encoded prompts and what else the examples hold.

    Args:
        prompts: As the examples give them.
        tokens: Of every prompt, without padding.
        columns: The other fields, each a list of b values.
        pad_token_id: What is put before shorter prompts.
        device: Of the tensors.
        side: Of the padding: left of a text that is continued, right of one that an encoder reads,
            whose positions count from its left edge.
    """

    prompts: list[Any]
    tokens: list[list[int]]
    columns: dict[str, list[Any]]
    pad_token_id: int
    device: torch.device
    side: Side = "left"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))

    @property
    def input_ids(self) -> Tensor:
        """(b, t)."""
        return self._padded[0]

    @property
    def attention_mask(self) -> Tensor:
        """(b, t)."""
        return self._padded[1]

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        ids, mask = padded(self.tokens, self.pad_token_id, self.side)
        return ids.to(self.device), mask.to(self.device)

    def select_rows(self, rows: Sequence[int]) -> Self:
        """The same of some rows, no wider than the longest of them."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            tokens=[self.tokens[row] for row in rows],
            columns={name: [of[row] for row in rows] for name, of in self.columns.items()},
        )


class PromptEncoder:
    """Token ids of prompts, kept, so that every prompt is encoded once in a run.

    Args:
        tokenizer: Of the model.
        chat_template_kwargs: More for its chat template (``enable_thinking=False``, ``tools=...``).
        is_continued: The model goes on with the text, so that the end token which a tokenizer may
            put after it is left out; an encoder-decoder reads it.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template_kwargs: Mapping[str, Any] | None,
        *,
        is_continued: bool = True,
    ) -> None:
        self._tokenizer, self._is_continued = tokenizer, is_continued
        self._options = dict(chat_template_kwargs or {})
        self._known: dict[str, list[int]] = {}

    def __call__(self, prompt: Any) -> list[int]:
        """The ids of a text, or of a list of messages through the chat template.

        Raises:
            DataError: Neither a text nor messages, or no tokens.
            OptionError: Messages, and a tokenizer without a chat template.
        """
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise DataError(
                f"a prompt is {prompt!r:.80}; give a text, or a list of messages such as "
                "{'role': 'user', 'content': '...'}"
            )
        # A text begins with no bracket in JSON, so that it is never taken for messages.
        key = json.dumps(prompt, default=repr)
        if key not in self._known:
            encode = self._text if isinstance(prompt, str) else self._chat
            ids = list(encode(prompt))
            if not ids:
                raise DataError(f"the prompt {prompt!r:.80} has no tokens; leave it out")
            self._known[key] = ids
        return self._known[key]

    def _text(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return without_end(self._tokenizer, prompt, ids) if self._is_continued else ids

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise OptionError(
                "the prompts are messages and the tokenizer has no chat_template; set one, or give "
                "the prompts as texts"
            )
        # As in TRL: an answer that is begun is continued.
        begun = messages[-1]["role"] == "assistant"
        encoded = self._tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=not begun,
            continue_final_message=begun,
            tokenize=True,
            return_dict=True,
            **self._options,
        )
        ids: list[int] = encoded["input_ids"]
        return ids


def without_end(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """The ids of a text without the end tokens that the tokenizer itself has put after it."""
    names = ("eos_token_id", "sep_token_id", "cls_token_id")  # XLNet's ends with both of the latter
    ends = {getattr(tokenizer, name, None) for name in names} - {None}
    rest = list(ids)
    if not (rest and rest[-1] in ends):
        return rest
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    # An end that stands in the text itself is the user's, who may mean it.
    while rest and rest[-1] in ends and not (bare and rest[-len(bare) :] == bare):
        rest.pop()
    is_appended = not bare or rest[-len(bare) :] == bare
    return rest if is_appended else list(ids)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def padded(
    rows: Sequence[Sequence[int]], pad_token_id: int, side: Side = "left"
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (b, t); "left": the last token of every row is at the end."""
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id, padding_side=side)
    ones = [torch.ones_like(row) for row in tensors]
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)


def columns_of(examples: Sequence[Any], prompt_field: str) -> dict[str, list[Any]]:
    """The fields of all examples, each a list."""
    if len(examples) == 0:
        raise DataError("a batch of no examples; give at least one")
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise DataError(
                f"example {index} is a {type(example).__name__}; give mappings such as "
                f"{{{prompt_field!r}: '...'}}"
            )
        if prompt_field not in example:
            raise DataError(
                f"example {index} has no prompt under {prompt_field!r}, only {sorted(example)}; "
                "name the field with prompt_field=..."
            )
        if example.keys() != examples[0].keys():
            raise DataError(
                f"example {index} has the fields {sorted(example)}, example 0 has "
                f"{sorted(examples[0])}; give all the same"
            )
    names = [name for name in examples[0] if name not in _NOT_COLUMNS]
    taken = sorted(set(names) & set(GIVEN) - {prompt_field})
    if taken:
        raise DataError(f"the field {taken[0]!r} is an argument of every reward; rename it")
    return {name: [example[name] for example in examples] for name in names}
