"""What is found out about a view and its model before the first write, once, for all that ask."""

from collections.abc import Callable, Mapping
from functools import cached_property

from torch import Tensor, nn

from zo_adapt.view.addresses import Addresses, tensors_held


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
