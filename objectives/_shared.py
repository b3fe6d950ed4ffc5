"""One forward for all parts of a sum that ask the same model about the same batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

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
