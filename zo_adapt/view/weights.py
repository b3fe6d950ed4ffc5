"""A model's weights and its modules' attributes before a forward, to find which it changes."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from zo_adapt.interrupt import gradients_off
from zo_adapt.view.buffers import same_bits
from zo_adapt.view.identity import bits
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import is_sharded


class Attributes:
    """What the modules hold beside parameters and buffers: numbers, texts, plain tensors.

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


class Weights:
    """What a model's weights were: copies of a view that is small, of others 1,024 numbers each.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> view = ParameterView.matching(model, "weight")
        >>> before = Weights(view, model)
        >>> _ = model.weight.data.clamp_(max=0.0), model.bias.data.add_(1.0)
        >>> before.tuned_changed(), before.frozen_changed()
        (['weight'], ['bias'])
        >>> before.restore()
        >>> before.tuned_changed()
        []
    """

    def __init__(self, view: ParameterView, model: nn.Module) -> None:
        holds = view.inspection.holding()
        # Of a model in parts, what is here may be put together and taken apart by every forward.
        seen = {} if view.shards.is_gathered else dict(model.named_parameters())
        self._tuned = {} if view.shards.is_gathered else _as_a_whole(view.tensors)
        self._frozen = {name: p for name, p in _as_a_whole(seen).items() if not holds(p)}
        self._copies = {} if view.is_large or view.is_sharded else view.snapshot()
        self._bits = _bits(self._frozen) | ({} if self._copies else _bits(self._tuned))

    def tuned_changed(self) -> list[str]:
        """Names of the view's tensors that hold other numbers now."""
        if not self._copies:
            return self._others(self._tuned)
        return [name for name, t in self._tuned.items() if not same_bits(t, self._copies[name])]

    def frozen_changed(self) -> list[str]:
        """Names of the weights beside the view that hold other numbers now."""
        return self._others(self._frozen)

    def restore(self) -> None:
        """Put the view's numbers back, where they were copied."""
        with gradients_off():
            for name in self.tuned_changed() if self._copies else ():
                self._tuned[name].copy_(self._copies[name])

    def _others(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [name for name, now in _bits(tensors).items() if now != self._bits[name]]


def _as_a_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that every process has: all of them find the same."""
    return {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}


def _bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors.items()}
