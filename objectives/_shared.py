"""What the parts of a sum share, and what they return.

One forward will do for all that ask the same model about the same batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from zo_adapt.errors import DataError, ObjectiveError

_Kept = dict[tuple[int, ...], tuple[Sequence[Tensor], Any]]
_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def shared_forwards() -> Iterator[None]:
    """Inside, where no weight may change, a forward is not made twice."""
    with _setting({}):
        yield


@contextmanager
def apart() -> Iterator[None]:
    """Inside, every forward is made: the model is changed for one caller."""
    with _setting(None):
        yield


def once(model: nn.Module, tensors: Sequence[Tensor], run: Callable[[], Any]) -> Any:
    """What ``run`` returns for these very tensors, computed the first time only."""
    kept = _kept.get()
    if kept is None:
        return run()
    key = (id(model), *map(id, tensors))
    if key not in kept:
        kept[key] = tensors, run()  # the tensors are kept too, so that no other gets their id
    return kept[key][1]


@contextmanager
def _setting(kept: _Kept | None) -> Iterator[None]:
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def values_of(returned: Any) -> Tensor:
    """What a part returned, float64 on the CPU; what is not a number is left for the loop to say.

    Raises:
        ObjectiveError: It is not a number, or numbers.
    """
    try:
        return torch.as_tensor(returned).to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObjectiveError(
            f"a part of the sum returned {type(returned).__name__}; it must return a float or one "
            "per example"
        ) from error


def joined(column: Sequence[tuple[Tensor, Any]]) -> Tensor:
    """The values of all micro-batches, or their mean by rows where they are means already."""
    values = [value for value, _ in column]
    if all(value.dim() == 1 for value in values):
        return torch.cat(values)
    if len(values) == 1:
        return values[0].mean()
    rows = torch.tensor([_rows(batch) for _, batch in column], dtype=torch.float64)
    return (torch.stack([value.mean() for value in values]) * rows).sum() / rows.sum()


def _rows(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return _rows(next(iter(batch.values()), None))
    # A batch of a class of its own (queries with their documents) knows its rows.
    if type(batch) is tuple:
        return _rows(batch[0])
    if not hasattr(batch, "__len__"):
        raise DataError(
            f"a part of the sum gives one number for a whole {type(batch).__name__}, whose rows "
            "cannot be counted to weight it; return one value per example"
        )
    return len(batch)
