"""The data that a run is begun with, as a hash, and the model's configuration."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from zo_adapt.data.forms import Columns
from zo_adapt.data.sources import Source
from zo_adapt.view.identity import bits

MOST_ROWS = 1 << 17
"""Of more rows than so many, as many evenly spaced ones are looked at."""
MOST_BYTES = 1 << 28
"""And so many bytes of arrays and tables: a third of a second."""
PLAIN = (str, bytes, int, float, bool, type(None), np.generic)
_AT_ONCE = 1000
"""Rows of a table that are read together."""
Update = Callable[[bytes], None]


def contents_hash(source: Source) -> str | None:
    """sha256 over the data's rows; None where they cannot be read without side effects.

    Read are tensors and arrays, lists of examples, and ``datasets`` tables, of which the stored
    values, not what a transform makes of them, and torch's subsets of these: all of them, up to
    ``MOST_ROWS`` rows and ``MOST_BYTES`` bytes. Of a tensor with more than 1,024 elements in a list
    of examples so many are read, of an object of another kind (an image) its class alone.
    """
    with suppress(TypeError):  # it has no weak references
        if source in _known:
            return _known[source]
    found = _hash_of(getattr(source, "examples", None))
    with suppress(TypeError):
        _known[source] = found
    return found


_known: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
"""Of sources that were read before: a checkpoint asks again."""


def _hash_of(examples: Any) -> str | None:
    digest = hashlib.sha256()
    if isinstance(examples, Subset):
        found = _hash_of(examples.dataset)
        rows = np.asarray(examples.indices, np.int64).tobytes()
        return found and hashlib.sha256(found.encode() + rows).hexdigest()
    examples = examples.tensors if isinstance(examples, TensorDataset) else examples
    examples = examples.columns if isinstance(examples, Columns) else examples
    if isinstance(examples, Mapping):
        for name, column in examples.items():
            digest.update(str(name).encode())
            _feed_column(digest.update, column)
    elif hasattr(examples, "with_format") and hasattr(examples, "column_names"):
        _feed_table(digest.update, examples.with_format("arrow"))
    elif isinstance(examples, tuple) and all(isinstance(e, Tensor | np.ndarray) for e in examples):
        for column in examples:
            _feed_column(digest.update, column)
    elif isinstance(examples, Tensor | np.ndarray | list | tuple):
        _feed_column(digest.update, examples)
    else:
        return None
    return digest.hexdigest()


def _rows(count: int, most: int) -> Iterator[int]:
    """All rows, or evenly spaced ones."""
    if count <= most:
        return iter(range(count))
    return map(int, np.unique(np.linspace(0, count - 1, most).astype(np.int64)))


def _feed_column(update: Update, column: Any) -> None:
    is_array = isinstance(column, np.ndarray) and column.dtype != object
    if not (is_array or (isinstance(column, Tensor) and column.ndim)):
        for row in _rows(len(column), MOST_ROWS):
            feed(update, column[row], _whole)
        return
    update(f"{tuple(column.shape)} {column.dtype}".encode())
    if column.nbytes > MOST_BYTES:
        fits = max(1, MOST_BYTES // (column.nbytes // len(column)))
        column = column[list(_rows(len(column), fits))]
    update(np.ascontiguousarray(column).tobytes() if is_array else bits(column, None))


def feed(update: Update, value: Any, leaf: Callable[[Any], bytes | None], depth: int = 6) -> None:
    """A value's content; of what is neither plain nor made of plain things, the kind alone.

    Args:
        update: Takes the bytes.
        value: Anything.
        leaf: The bytes of what is not looked into; None: it has none.
        depth: How many containers deep.
    """
    update(type(value).__name__.encode() + b"\0")
    if (data := leaf(value)) is not None:
        update(data)
    elif depth and isinstance(value, Mapping):
        for key, entry in value.items():
            feed(update, key, leaf, depth - 1)
            feed(update, entry, leaf, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for entry in value:
            feed(update, entry, leaf, depth - 1)


def _whole(value: Any) -> bytes | None:
    if isinstance(value, list | tuple) and value and type(value[0]) in (int, float):
        for code in "qd":
            with suppress(TypeError, OverflowError):  # at a hundredth of the time of each by itself
                return code.encode() + array(code, value).tobytes() + b"\0"
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}".encode() + bits(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.shape} {value.dtype}".encode() + value.tobytes()
    return repr(value).encode() + b"\0" if isinstance(value, PLAIN) else None


def _feed_table(update: Update, stored: Any) -> None:
    """A ``datasets`` table, column by column of so many rows: rows made one by one take longer."""
    size = getattr(getattr(stored, "data", None), "nbytes", 0) // max(1, len(stored.data))
    most = min(MOST_ROWS, max(1, MOST_BYTES // max(1, size)))
    if len(stored) > most:
        stored = stored.select(list(_rows(len(stored), most)))
    update(repr(list(stored.column_names)).encode())
    for part in stored.iter(batch_size=_AT_ONCE):
        for column in part.columns:
            _feed_arrow(update, column.combine_chunks())


def _feed_arrow(update: Update, column: Any) -> None:
    import pyarrow as arrow

    update(f"{column.type} {len(column)}".encode())
    kind = arrow.types
    if column.null_count:
        update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if kind.is_list(column.type) or kind.is_large_list(column.type):
        update(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).tobytes())
        _feed_arrow(update, column.flatten())
    elif kind.is_integer(column.type) or kind.is_floating(column.type):
        update(column.fill_null(0).to_numpy(zero_copy_only=False).tobytes())
    else:
        update(repr(column.to_pylist()).encode())


_NOT_OF_A_FORWARD = (
    "architectures", "dtype", "torch_dtype", "id2label", "label2id", "name_or_path", "use_cache",
    "output_", "return_dict", "dropout", "drop_path", "_pdrop", "initializer", "init_",
    "transformers_version",
    "bos_token_id", "eos_token_id", "tokenizer", "gradient_checkpointing", "problem_type", "task_",
    "quantization", "finetuning", "chunk_size", "loss", "forced_", "torchscript",
)  # fmt: skip
"""Parts of names of a configuration's entries that no value of a model in evaluation mode depends
on, or that another part of a header says."""


def configured(model: nn.Module | None) -> dict[str, Any]:
    """The plain entries of a model's configuration that a forward may depend on, by name.

    Those that no tensor's shape says: ``layer_norm_eps``, ``rope_theta``, ``hidden_act``.
    """
    config: Any = getattr(model, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else config
    return dict(_entries(said, "")) if isinstance(said, Mapping) else {}


def _entries(said: Mapping[Any, Any], before: str) -> Iterator[tuple[str, Any]]:
    for name, value in said.items():
        if str(name).startswith("_") or any(part in str(name) for part in _NOT_OF_A_FORWARD):
            continue
        if isinstance(value, Mapping):
            yield from _entries(value, f"{before}{name}.")
        elif isinstance(value, str | int | float) and value == value:
            yield f"{before}{name}", value


def set_in_modules(model: nn.Module | None, changing: Collection[str] = ()) -> dict[str, Any]:
    """What modules were made with that no tensor and no configuration says, by class.

    What torch's own classes name as their constants (``eps``, ``stride``, ``negative_slope``), and
    floats of any class: each value with the number of modules that have it.

    Args:
        model: Any torch module.
        changing: Names, as here, that a forward changes.
    """
    counts: dict[str, Counter[str]] = {}
    for module in () if model is None else model.modules():
        kind = type(module)
        named = getattr(kind, "__constants__", ()) if kind.__module__.startswith("torch.nn") else ()
        for name, value in vars(module).items():
            if not (name in named or isinstance(value, float)) or not isinstance(value, _SETTING):
                continue
            full = f"{kind.__module__}.{kind.__qualname__}.{name}"
            if name.startswith("_") or full in changing or any(p in full for p in _OF_TRAINING):
                continue
            counts.setdefault(full, Counter())[repr(value)] += 1
    return {name: sorted(found.items()) for name, found in sorted(counts.items())}


_SETTING = (bool, int, float, str, tuple)
_OF_TRAINING = (
    "Dropout",
    "dropout",
    "DropPath",
    "drop_path",
    "_drop",
    "drop_",
    "pdrop",
    "momentum",
)
