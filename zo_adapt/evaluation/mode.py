"""A model whose values can be compared: in evaluation mode, or at least without dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from zo_adapt.errors import DropoutError
from zo_adapt.interrupt import Guard


class EvaluationMode:
    """Called, a context in which every module of a model is in evaluation mode.

    Afterwards each module has its own mode back. It is entered at every step: the model is walked
    over anew only where a module's children have changed.

    Args:
        model: Any torch module.

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
