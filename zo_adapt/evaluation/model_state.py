"""What is changed about a model while it is evaluated: its modes and its forwards, nowhere else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from zo_adapt.errors import DropoutError
from zo_adapt.interrupt import Guard


class EvaluationMode:
    """Called, a context in which every module of a model is in evaluation mode.

    Afterwards each module has its own mode back. It is entered at every step: the model is walked
    over anew only where a module's children have changed.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> evaluating = EvaluationMode(layer)
        >>> with evaluating():
        ...     layer.training
        False
        >>> layer.training
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._childless: list[dict[str, nn.Module | None]] = []
        self._families: list[dict[str, nn.Module | None]] = []
        self._children: list[tuple[nn.Module | None, ...]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context."""
        if not self._modules or any(self._childless) or self._children != self._now():
            self._modules = list(self._model.modules())
            families = [module._modules for module in self._modules]
            self._childless = [family for family in families if not family]
            self._families = [family for family in families if family]
            self._children = self._now()
        training = [module for module in self._modules if module.training]

        def undo() -> None:
            for module in training:
                module.training = True

        with Guard(undo) as guard:
            for module in training:
                module.training = False
            guard.open()
            yield

    def _now(self) -> list[tuple[nn.Module | None, ...]]:
        """The children of the modules that have any."""
        return list(map(tuple, map(dict.values, self._families)))


def check_dropout(model: nn.Module) -> None:
    """Refuse a model that would draw a dropout mask.

    Raises:
        DropoutError: A module in training mode has dropout with p > 0.
    """
    for name, module in model.named_modules():
        rate = _dropout_rate(module) if module.training else 0.0
        if rate > 0:
            raise DropoutError(
                f"dropout of {name!r} (p={rate}) is on; call model.eval() before tuning"
            )


def _dropout_rate(module: nn.Module) -> float:
    """The largest rate of a dropout module, or of one that calls the function (OPT, LSTM do)."""
    if isinstance(module, _DropoutNd):
        return float(module.p)
    rates = [rate for name, rate in vars(module).items() if "drop" in name]
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside, calling these modules calls these functions; afterwards each has its own back.

    A forward that was put on the instance before (accelerate does so) is put back as well. Written
    into ``__dict__``, as ``nn.Module.__setattr__`` would do after a search: this is done at every
    evaluation.

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
