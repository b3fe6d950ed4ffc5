"""Plain attributes of a model's modules, to find which ones a forward changes."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from zo_adapt.view.identity import bits


class Attributes:
    """What the modules hold beside parameters and buffers: numbers, texts, plain tensors.

    Args:
        model: Any torch module.

    Example:
        >>> class Counted(nn.Linear):
        ...     calls = 0
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return super().forward(x)
        >>> import torch
        >>> model = Counted(2, 2)
        >>> before = Attributes(model)
        >>> _ = model(torch.ones(1, 2))
        >>> [name.rpartition(".")[2] for name in before.changed()]
        ['calls']
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, dict(_values(model))

    def changed(self) -> list[str]:
        """Names of those that are others now, by class."""
        now = dict(_values(self._model))
        places = [p for p in now if self._before.get(p, _NONE) != now[p]]
        return sorted({name for _, name in places})


_NONE = object()


def _values(model: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for path, module in model.named_modules():
        kind = type(module)
        for name, value in vars(module).items():
            known = _known(value)
            if known is not _NONE:
                yield (path, f"{kind.__module__}.{kind.__qualname__}.{name}"), known


def _known(value: Any) -> Any:
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, bool | int | float | str | bytes | type(None)):
        return repr(value)  # NaN is itself
    return _NONE
