"""What memory a view's tensors take, and who else in the model has it: parameters may share one."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_adapt.view.shards import local


class Span(NamedTuple):
    """From the first byte of a tensor's elements to the one after the last."""

    start: int
    stop: int


class Addresses:
    """Finds the tensors that share memory with another one.

    Args:
        tensors: Dense tensors by name.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> found = Addresses({"first row": weight[0], "second row": weight[1]})
        >>> found.meeting(weight.T), found.meeting(weight[1, 1:]), found.meeting(torch.ones(1))
        (['first row', 'second row'], ['second row'], [])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors = {name: local(tensor) for name, tensor in tensors.items()}
        spans: dict[torch.device, list[tuple[Span, str]]] = {}
        for name, tensor in tensors.items():
            if (span := span_of(tensor)) is not None:
                spans.setdefault(tensor.device, []).append((span, name))
        self._spans = {device: sorted(found) for device, found in spans.items()}
        self._starts = {d: [span.start for span, _ in found] for d, found in self._spans.items()}
        # The farthest end so far: where it lies before a tensor, none further back can reach it.
        self._ends = {
            d: list(accumulate((span.stop for span, _ in found), max))
            for d, found in self._spans.items()
        }

    def meeting(self, tensor: Tensor) -> list[str]:
        """Names of the tensors that have an element in common with this one, by address."""
        tensor = local(tensor)
        span = span_of(tensor)
        if span is None or tensor.device not in self._spans:
            return []
        spans, ends = self._spans[tensor.device], self._ends[tensor.device]
        found: list[str] = []
        index = bisect_left(self._starts[tensor.device], span.stop) - 1
        while index >= 0 and ends[index] > span.start:
            other, name = spans[index]
            if other.stop > span.start and _have_common_elements(tensor, self._tensors[name]):
                found.append(name)
            index -= 1
        return found[::-1]


def span_of(tensor: Tensor) -> Span | None:
    """Where a tensor's elements lie; None where it has no memory of its own kind."""
    try:
        start = tensor.data_ptr()
        if not start or not tensor.numel():
            return None
        return Span(start, start + extent(tensor) * tensor.element_size())
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, or of a wrapping class
        return None


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor lie in one place."""
    reach = 0
    for step, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1:
            if step <= reach:
                return len(_offsets(tensor).unique()) < tensor.numel()
            reach += step * (count - 1)
    return False


def have_same_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that meet are the same numbers, in whatever order."""
    if one.dtype != other.dtype or span_of(one) != span_of(other):
        return False
    full = one.numel() == extent(one) and other.numel() == extent(other)
    return full or torch.equal(_offsets(one).sort().values, _offsets(other).sort().values)


def _have_common_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans meet do so in an element: columns of a matrix may not."""
    if one.numel() == extent(one) or other.numel() == extent(other):
        return True
    apart, rest = divmod(other.data_ptr() - one.data_ptr(), one.element_size())
    if rest or one.element_size() != other.element_size():
        return True
    return bool(torch.isin(_offsets(one), _offsets(other) + apart).any())


def _offsets(tensor: Tensor) -> Tensor:
    """Where each element lies, counted in elements from the first."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for count, step in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(count) * step).flatten()
    return offsets


def tensors_held(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module of the model holds: parameter, buffer or plain attribute."""
    for module in model.modules():
        for value in (
            *module._parameters.values(),
            *module._buffers.values(),
            *vars(module).values(),
        ):
            yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (item for item in value if isinstance(item, Tensor))


class Inspection:
    """Which memory a view's tensors take, and who else in the model has it.

    Args:
        tensors: The view.
        model: The model that owns them; None for plain tensors.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.transposed = nn.Parameter(layer.weight.data.T)
        >>> found = Inspection({"weight": layer.weight}, layer)
        >>> found.holding()(layer.transposed), sorted(found.shared)
        (True, ['weight'])
    """

    def __init__(self, tensors: Mapping[str, Tensor], model: nn.Module | None) -> None:
        self._tensors, self._model = tensors, model

    def holding(self) -> Callable[[Tensor], bool]:
        """Tells whether a tensor has numbers of the view, as itself or by way of the same memory.

        It knows where the view lies now: a model may have been moved or converted since. Of a
        tensor in parts a process may hold nothing, which lies nowhere.
        """
        addresses, own = Addresses(self._tensors), set(map(id, self._tensors.values()))
        return lambda tensor: id(tensor) in own or bool(addresses.meeting(tensor))

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names of tensors whose memory another tensor of the model reads, too."""
        addresses = Addresses(self._tensors)
        held = {} if self._model is None else {id(t): t for t in tensors_held(self._model)}
        return frozenset(
            name
            for tensor in held.values()
            for name in addresses.meeting(tensor)
            if tensor is not self._tensors[name]
        )
