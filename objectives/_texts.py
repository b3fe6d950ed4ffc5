"""Examples of text as TRL's data sets hold them: tokens, and which of them are labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from objectives._collate import IGNORED, LABELS
from objectives._encoded import is_chat, without_end
from objectives._fit import shortest, tokens_of
from zo_adapt.errors import DataError, OptionError
from zo_adapt.options import at_least_one

FIELDS = ("messages", "prompt", "completion", "text")


class TextEncoder:
    """Encodes ``text``, ``prompt`` and ``completion``, or ``messages``; tokens pass as they are.

    The arguments are those of ``CausalLMLoss``.

    Raises:
        OptionError: ``max_length`` below 1.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None,
        longest: int | None,
        completion_only: bool,
        assistant_only: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self._tokenizer = tokenizer
        own = None if max_length is None else at_least_one("max_length", max_length)
        self._limit = shortest(own, longest, tokens_of(tokenizer))
        self._completion_only, self._assistant_only = completion_only, assistant_only
        self._options = dict(chat_template_kwargs or {})

    def encoded(self, example: Any) -> Any:
        """The example with ``input_ids`` and ``labels`` in place of its text.

        Raises:
            OptionError: Text without a tokenizer, messages without a chat template.
            DataError: A field is of another type.
        """
        given = [name for name in FIELDS if isinstance(example, Mapping) and name in example]
        if not given or "input_ids" in example:
            return example
        if self._tokenizer is None:
            raise OptionError(f"the examples have {given[0]!r}, which needs tokenizer=...")
        if "messages" in given:
            ids, counted = self._of_messages(example["messages"])
        elif "prompt" in given and "completion" in given:
            ids, counted = self._of_pair(example["prompt"], example["completion"])
        elif "text" in given:
            ids = self._whole(example["text"], "text")
            counted = [True] * len(ids)
        else:
            raise DataError(f"an example has {given}; give 'prompt' and 'completion' together")
        labels = [token if yes else IGNORED for token, yes in zip(ids, counted, strict=True)]
        rest = {n: v for n, v in example.items() if n not in LABELS | set(FIELDS)}
        return rest | {"input_ids": ids[: self._limit], "labels": labels[: self._limit]}

    def _of_pair(self, prompt: Any, completion: Any) -> tuple[list[int], list[bool]]:
        if is_chat(prompt) and is_chat(completion):
            begun = self._template(prompt, add_generation_prompt=True)["input_ids"]
            whole = self._template([*prompt, *completion])
            ids, said = list(whole["input_ids"]), whole.get("assistant_masks")
        else:
            begun = self._begun(prompt, "prompt")
            both = prompt + _text(completion, "completion")
            ids, said = self._whole(both, "completion"), None
        # Where the tokenizer joins the two in one token, that token is a part of the answer.
        shared = _shared(begun, ids) if self._completion_only else 0
        counted = [index >= shared for index in range(len(ids))]
        if self._assistant_only and said is not None:
            counted = [a and bool(b) for a, b in zip(counted, said, strict=True)]
        return ids, counted

    def _of_messages(self, messages: Any) -> tuple[list[int], list[bool]]:
        if not is_chat(messages):
            raise DataError(
                f"'messages' of an example is {messages!r:.80}; give a list of messages such as "
                "{'role': 'user', 'content': '...'}"
            )
        encoded = self._template(messages)
        ids = list(encoded["input_ids"])
        if not self._assistant_only:
            return ids, [True] * len(ids)
        return ids, [bool(said) for said in encoded["assistant_masks"]]

    def _template(self, messages: Sequence[Any], **more: Any) -> Any:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise OptionError(
                "the examples are messages and the tokenizer has no chat_template; set one, or "
                "give 'text'"
            )
        marks = self._assistant_only and not more
        encoded = self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marks,
            **more | self._options,
        )
        if marks and not any(encoded["assistant_masks"]):
            raise OptionError(
                "assistant_only=True, and the tokenizer's chat_template marks nothing as said by "
                "the assistant; it needs {% generation %} ... {% endgeneration %}"
            )
        return encoded

    def _tokens(self, text: Any, field: str) -> list[int]:
        ids: list[int] = self._tokenizer(_text(text, field), verbose=False)["input_ids"]
        return list(ids)

    def _begun(self, text: Any, field: str) -> list[int]:
        """The tokens of a text that goes on."""
        return without_end(self._tokenizer, text, self._tokens(text, field))

    def _whole(self, text: Any, field: str) -> list[int]:
        """The tokens of a text, which ends once, whoever has put the end there."""
        ids, end = self._tokens(text, field), self._tokenizer.eos_token_id
        own = without_end(self._tokenizer, text, ids)
        if end is None or own[-1:] == [end]:
            return ids if end is None else own
        return [*(own if end in ids[len(own) :] else ids), end]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field!r} of an example is {value!r:.80}; give a text")
    return value
