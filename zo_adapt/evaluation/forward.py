"""The one place where a module's forward is replaced."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from zo_adapt.interrupt import Guard

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside, calling these modules calls these functions; afterwards each has its own back.

    A forward that was put on the instance before (accelerate does so) is put back as well. Written
    into ``__dict__``, as ``nn.Module.__setattr__`` would do after a search: this is done at every
    evaluation.

    Args:
        forwards: What each module computes inside.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> with replaced_forwards({layer: lambda x: x}):
        ...     layer(torch.ones(1, 2))
        tensor([[1., 1.]])
        >>> "forward" in layer.__dict__
        False
    """
    before = [(module, module.__dict__.get("forward")) for module in forwards]

    def undo() -> None:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own

    with Guard(undo) as guard:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        guard.open()
        yield
