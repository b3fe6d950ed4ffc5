"""Examples of a file of JSON lines, as tokens or as an objective reads them itself."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_adapt.errors import DataError

Example = dict[str, Any]


def read_lines(path: str | Path) -> list[Example]:
    """One example a line.

    Raises:
        DataError: A line that is no JSON object; names the line.
    """
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not isinstance(example, dict):
            raise DataError(f"{path}, line {number} is no JSON object: {line[:60]}")
        examples.append(example)
    if not examples:
        raise DataError(f"{path} has no examples")
    return examples


def held_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples to tune on and a random share of them to test with."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = max(1, round(share * len(examples)))
    if len(examples) - count < 1:
        raise DataError(f"{len(examples)} examples cannot be parted; give more, or a --test file")
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def class_names(examples: Sequence[Example]) -> list[str]:
    """The labels that occur, in order.

    Raises:
        DataError: An example without ``text`` or ``label``.
    """
    for number, example in enumerate(examples):
        if "label" not in example or "text" not in example:
            raise DataError(
                f"example {number} has the fields {sorted(example)}; a classifier needs 'text' "
                "(or 'text' and 'text_pair') and 'label'"
            )
    labels = {example["label"] for example in examples}
    return [str(label) for label in sorted(labels, key=lambda label: (str(type(label)), label))]


def tokenized(
    examples: Sequence[Example], tokenizer: Any, names: Sequence[str], max_length: int
) -> list[Example]:
    """Tokens and the number of the label, not padded.

    Raises:
        DataError: A label that is none of the names.
    """
    number = {name: index for index, name in enumerate(names)}
    found = []
    for example in examples:
        if str(example.get("label")) not in number:
            raise DataError(f"the label {example.get('label')!r} is none of {list(names)}")
        pair = (
            (example["text"], example["text_pair"])
            if "text_pair" in example
            else (example["text"],)
        )
        tokens = tokenizer(*pair, truncation=True, max_length=max_length)
        found.append({**tokens, "labels": number[str(example["label"])]})
    return found
