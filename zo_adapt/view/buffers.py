"""A model's buffers before a forward, to find which ones it changes and to put them back."""

import torch
from torch import Tensor, nn

from zo_adapt.errors import ChangingBufferError


class Buffers:
    """Copies of a model's buffers: running statistics, tables, caches.

    Args:
        model: Any torch module.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> before = Buffers(norm)
        >>> _ = norm(torch.ones(4, 2))
        >>> before.changed()
        ['running_mean', 'running_var', 'num_batches_tracked']
        >>> before.restore()
        >>> before.changed()
        []
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owners = {
            f"{path}.{attribute}" if path else attribute: (module, attribute)
            for path, module in model.named_modules()
            for attribute, buffer in module._buffers.items()
            if type(buffer) is Tensor and not buffer.is_meta and buffer.layout == torch.strided
        }
        self._copies = {
            name: (b, b.clone()) for name in self._owners if (b := self._now(name)) is not None
        }

    def changed(self) -> list[str]:
        """Names of the buffers that hold other bits now."""
        return [
            name
            for name, (_, copy) in self._copies.items()
            if (now := self._now(name)) is None or not _equal(now, copy)
        ]

    def restore(self) -> None:
        """Put back what has changed, and the tensors that were replaced."""
        for name in self.changed():
            (module, attribute), (buffer, copy) = self._owners[name], self._copies[name]
            module._buffers[attribute] = buffer
            with torch.no_grad():
                buffer.copy_(copy)

    def _now(self, name: str) -> Tensor | None:
        module, attribute = self._owners[name]
        found: Tensor | None = module._buffers.get(attribute)
        return found


def check_max_norm(model: nn.Module) -> None:
    """Refuse embeddings that every forward shortens in place, also where they are frozen.

    Raises:
        ChangingBufferError: Names the first.
    """
    for path, module in model.named_modules():
        if getattr(module, "max_norm", None) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ChangingBufferError(
                f"every evaluation rewrites the weights of {path!r}, an embedding with max_norm="
                f"{module.max_norm}; set max_norm=None on it, after shortening its rows once"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: NaN is equal to itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))
