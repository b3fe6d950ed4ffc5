"""Batches from lists of examples: pad what varies in length, stack the rest, leave out the text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zo_adapt.errors import DataError

IGNORED = -100
"""Label of a token that no loss counts, as everywhere in transformers."""
LABEL_NAMES = {"label": "labels", "label_ids": "labels"}
LABELS = {"labels", *LABEL_NAMES}


def pair(batch: Any) -> tuple[Any, Any] | None:
    """The (x, y) that an example or a batch consists of; None for anything else.

    A batch made by torch's default is a list of two tensors.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        return None
    of_columns = all(isinstance(part, Tensor | np.ndarray) for part in batch)
    is_example = isinstance(batch, tuple) and not any(isinstance(p, tuple) for p in batch)
    if not (of_columns or is_example) or isinstance(batch[1], Mapping):
        return None
    return batch[0], batch[1]


def named(x: Any, y: Any, name: str) -> dict[str, Any]:
    """An (x, y) by names: ``x`` as the model's first argument, unless it has names already."""
    return {**(x if isinstance(x, Mapping) else {name: x}), "labels": y}


def collate(
    examples: Sequence[Any], pad_token_id: int | None, length: Callable[[int], int] = int
) -> dict[str, Tensor]:
    """Pad on the right and stack; ``attention_mask`` is made where it is missing.

    Args:
        examples: Mappings with the same fields: numbers, or lists or tensors of them. Text and None
            are left out. ``label`` and ``label_ids`` become ``labels``.
        pad_token_id: Of ``input_ids``; None refuses examples of unequal length.
        length: How far texts are padded whose longest has so many tokens.

    Raises:
        DataError: No examples, not mappings, unequal fields, shapes that do not fit.
    """
    fields = _fields(examples)
    rows = {name: [_tensor(name, example[name]) for example in examples] for name in fields}
    if "input_ids" in rows:
        _check_tokens(rows["input_ids"], pad_token_id)
        rows.setdefault("attention_mask", [torch.ones_like(ids) for ids in rows["input_ids"]])
    fill = pad_token_id or 0
    padding = {"input_ids": fill, "decoder_input_ids": fill, "labels": IGNORED}
    named = _renamed(rows)
    batch = {name: _stack(name, column, padding.get(name, 0)) for name, column in named.items()}
    if "input_ids" not in batch or pad_token_id is None:
        return batch
    tokens = batch["input_ids"].shape[1]
    beyond = (0, length(tokens) - tokens)
    for name, tensor in batch.items():
        # One entry a token; labels in floats are those of several classes.
        if tensor.shape[1:] == (tokens,) and not (name == "labels" and tensor.is_floating_point()):
            batch[name] = F.pad(tensor, beyond, value=padding.get(name, 0))
    return batch


def tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A ready batch: its tensors and arrays, under the names that models know."""
    found = {
        name: torch.as_tensor(value)
        for name, value in batch.items()
        if is_numeric(value) and (isinstance(value, Tensor | np.ndarray) or _is_label(name, value))
    }
    for name in sorted(LABELS & batch.keys() - found.keys()):
        column = batch[name]
        if isinstance(column, list | tuple | np.ndarray) and not LABELS & found.keys():
            _refuse_labels(name, list(column))
    return _renamed(found)


def _is_label(name: str, value: Any) -> bool:
    """Whether it is a plain list of one label an example."""
    return name in LABELS and isinstance(value, list) and all(map(is_numeric, value))


def _renamed(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the labels under one name.

    Raises:
        DataError: There are labels under two names, and they differ.
    """
    named: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, column in columns.items():
        new = LABEL_NAMES.get(name, name)
        if new in named and not _equal(named[new], column):
            raise DataError(
                f"the examples have labels under {origin[new]!r} and others under {name!r}; leave "
                "one of them out"
            )
        named[new], origin[new] = column, name
    return named


def _equal(one: Any, other: Any) -> bool:
    pairs = [(one, other)] if isinstance(one, Tensor) else zip(one, other, strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def _fields(examples: Sequence[Any]) -> list[str]:
    """The names of the numeric fields, after a check that all examples have the same ones."""
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise DataError(
                f"example {index} is a {type(example).__name__}; give mappings such as "
                "{'input_ids': [...], 'labels': 1}"
            )
        if example.keys() != examples[0].keys():
            raise DataError(
                f"example {index} has the fields {sorted(example)}, example 0 has "
                f"{sorted(examples[0])}; give all the same"
            )
    if len(examples) == 0:
        raise DataError("a batch of no examples; give at least one")
    numeric = [name for name in examples[0] if all(is_numeric(e[name]) for e in examples)]
    if not LABELS & set(numeric):
        for name in sorted(LABELS & examples[0].keys()):
            _refuse_labels(name, [example[name] for example in examples])
    return numeric


def _refuse_labels(name: str, column: list[Any]) -> None:
    """Say what is wrong with labels that are no numbers; None for all is as good as no labels."""
    bad = next((index for index, label in enumerate(column) if not is_numeric(label)), None)
    if bad is None or all(label is None for label in column):
        return
    hint = "map the names to integers 0..C-1" if isinstance(column[bad], str) else "leave it out"
    raise DataError(f"{name!r} of example {bad} of the batch is {column[bad]!r:.80}; {hint}")


def is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(is_numeric(item) for item in value[:1])
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, Tensor | int | float | np.number | np.bool_)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"the field {name!r} holds {value!r:.80}, not numbers: {error}") from error
    # Embeddings and cross-entropy want int64 whatever the data set is stored in.
    integral = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.long() if integral else tensor


def _check_tokens(column: list[Tensor], pad_token_id: int | None) -> None:
    lengths = [len(ids) for ids in column]
    if 0 in lengths:
        raise DataError(f"example {lengths.index(0)} of the batch has no tokens; leave it out")
    if pad_token_id is None and len(set(lengths)) > 1:
        raise DataError(
            f"the examples have {min(lengths)} to {max(lengths)} tokens and the model has no "
            "padding token; set model.config.pad_token_id (tokenizer.pad_token_id)"
        )


def _stack(name: str, column: list[Tensor], padding: int) -> Tensor:
    if all(tensor.dim() == 1 for tensor in column):
        return pad_sequence(column, batch_first=True, padding_value=padding)
    shapes = {tuple(tensor.shape) for tensor in column}
    if len(shapes) > 1:
        raise DataError(
            f"the field {name!r} has the shapes {sorted(shapes)}; only lists are padded, anything "
            "else must have one shape"
        )
    return torch.stack(column)
