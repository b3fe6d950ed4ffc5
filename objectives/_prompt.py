"""Prompts and label words: from the text of an example to tokens."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from objectives._encoded import without_end
from zo_adapt.errors import DataError, OptionError


class Prompt:
    """Fills a template with the fields of an example and tokenises it, within a length.

    Args:
        tokenizer: Of the model.
        template: Text with fields in braces; ``{mask}`` stands for the mask token.
        max_length: Longest prompt in tokens; None is the tokenizer's own limit.
        is_continued: The model is to go on with the text: the tokenizer's end token is left out.

    Raises:
        OptionError: No tokenizer, a field without a name, no mask token, a length below 1.
    """

    def __init__(
        self, tokenizer: Any, template: str, max_length: int | None, *, is_continued: bool = False
    ) -> None:
        if tokenizer is None:
            raise OptionError(f"the template {template!r} needs tokenizer=...")
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if "" in names or not names - {"mask"}:
            raise OptionError(f"the template {template!r} has no named field; write {{text}}")
        if "mask" in names and tokenizer.mask_token_id is None:
            raise OptionError(f"{{mask}} in {template!r}: this tokenizer has no mask token")
        self.is_continued = is_continued
        self.tokenizer, self.template, self.fields = tokenizer, template, names - {"mask"}
        self.mask_token_id = tokenizer.mask_token_id if "mask" in names else None
        self.max_length = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
        if self.max_length < 1:
            raise OptionError(f"max_length={self.max_length}; choose a number >= 1")

    def encoded(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with its prompt as ``input_ids`` in place of the fields.

        Raises:
            DataError: A field is missing, or the template alone is longer than ``max_length``.
        """
        missing = self.fields - example.keys()
        if missing:
            raise DataError(
                f"the template needs {sorted(missing)}, the example has {sorted(example)}"
            )
        texts = {name: _text(name, example[name]) for name in self.fields}
        ids = self._tokens(texts)
        while len(ids) > self.max_length:
            texts = self._shortened(texts, len(ids))
            ids = self._tokens(texts)
        rest = {name: value for name, value in example.items() if name not in self.fields}
        return rest | {"input_ids": ids}

    def _tokens(self, texts: Mapping[str, str]) -> list[int]:
        text = self.template.format_map({**texts, "mask": self.tokenizer.mask_token})
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return without_end(self.tokenizer, text, ids) if self.is_continued else ids

    def _shortened(self, texts: dict[str, str], length: int) -> dict[str, str]:
        """The longest field without its last characters, about as many as tokens are too many."""
        name = max(texts, key=lambda field: len(texts[field]))
        text = texts[name]
        if not text:
            raise DataError(
                f"max_length={self.max_length} is too short for the template, which takes {length} "
                "tokens without any text"
            )
        excess = -(-len(text) * (length - self.max_length) // length)
        return texts | {name: text[: len(text) - excess]}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise DataError(f"the field {name!r} of an example is {value!r:.80}; give a text")
    return str(value)


def label_word_ids(tokenizer: Any, words: Sequence[str] | Sequence[int]) -> list[int]:
    """The token id of each label word.

    Raises:
        OptionError: Fewer than two words, a word that is not one token, two words with one token.
    """
    if isinstance(words, str) or len(words) < 2:
        raise OptionError(f"label_words={words!r}; give a word for each of at least two classes")
    ids = [word if isinstance(word, int) else _word_id(tokenizer, word) for word in words]
    if len(set(ids)) < len(ids):
        raise OptionError(f"label_words={list(words)!r} have the ids {ids}; each needs its own")
    return ids


def _word_id(tokenizer: Any, word: str) -> int:
    if tokenizer is None:
        raise OptionError(f"the label word {word!r} needs tokenizer=...; or give token ids")
    ids: list[int] = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise OptionError(
            f"the label word {word!r} is tokenised as {tokenizer.convert_ids_to_tokens(ids)}; "
            "choose a word that is one token (with or without a space before it), or give token ids"
        )
    return ids[0]
