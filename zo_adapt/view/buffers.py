"""A model's buffers before a forward, to find which ones it changes and to put them back."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from zo_adapt.errors import ChangingBufferError
from zo_adapt.interrupt import gradients_off


class Buffers:
    """Copies of a model's buffers: running statistics, tables, caches.

    Args:
        model: Any torch module.
        most: Bytes of a buffer that is copied; None: of any size.

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

    def __init__(self, model: nn.Module, most: int | None = None) -> None:
        self.model = model
        self._owners = {
            f"{path}.{attribute}" if path else attribute: (module, attribute)
            for path, module in model.named_modules()
            for attribute, buffer in module._buffers.items()
            if type(buffer) is Tensor and not buffer.is_meta and buffer.layout == torch.strided
        }
        self._copies = {
            name: (b, b.clone())
            for name in self._owners
            if (b := self._now(name)) is not None and (most is None or b.nbytes <= most)
        }

    def counts(self) -> dict[str, tuple[int, int]]:
        """Which tensor each buffer is, and how often torch has changed it."""
        found = {name: self._now(name) for name in self._owners}
        return {
            name: (id(b), 0 if b.is_inference() else b._version)
            for name, b in found.items()
            if b is not None
        }

    def leave_out(self, names: Iterable[str]) -> None:
        """Look at some buffers no more."""
        for name in names:
            self._owners.pop(name, None)
            self._copies.pop(name, None)

    def changed(self) -> list[str]:
        """Names of the buffers that hold other bits now."""
        return [
            name
            for name, (_, copy) in self._copies.items()
            if (now := self._now(name)) is None or not same_bits(now, copy)
        ]

    def restore(self) -> None:
        """Put back what has changed, and the tensors that were replaced."""
        for name in self.changed():
            (module, attribute), (buffer, copy) = self._owners[name], self._copies[name]
            module._buffers[attribute] = buffer
            with gradients_off():
                buffer.copy_(copy)

    def _now(self, name: str) -> Tensor | None:
        module, attribute = self._owners[name]
        found: Tensor | None = module._buffers.get(attribute)
        return found


COPIED_BYTES = 1 << 20
"""Larger buffers (tables, packed weights) are told from changed ones by torch's own count alone."""


class WatchedBuffers:
    """Finds buffers that evaluations change although the first one did not: on larger batches, say.

    After every evaluation torch's count of the changes of each buffer is compared, which costs
    nothing; some kernels (batch norm's) do not count, so that after the first, second, fourth,
    eighth ... evaluation their bits are compared, too.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._buffers = None if model is None else Buffers(model, COPIED_BYTES)
        self._counts = {} if self._buffers is None else self._buffers.counts()
        self._evaluations = 0

    def check(self, evaluate: Callable[[], object]) -> None:
        """Look after an evaluation.

        Args:
            evaluate: Makes the same one again. A table that the examples decide (of positions, of
                so many as there are tokens) is then the same, and is left out from here on;
                statistics are others.

        Raises:
            ChangingBufferError: Evaluations change a buffer. It is as at the start again.
        """
        if self._buffers is None or not self._counts:
            return
        self._evaluations += 1
        is_time = self._evaluations & (self._evaluations - 1) == 0
        now = self._buffers.counts()
        if now == self._counts and not (is_time and self._buffers.changed()):
            return
        then = Buffers(self._buffers.model)
        evaluate()
        drifting = then.changed()
        if drifting:
            self._buffers.restore()
            raise ChangingBufferError(
                f"evaluation {self._evaluations} changed {drifting[0]!r} ({len(drifting)} buffers "
                "in all), which earlier ones did not; what was small enough to be kept is as at "
                "the start again. No two points would see the same model: call model.eval(), or "
                "keep the module from changing it"
            )
        tables = [name for name, count in self._counts.items() if now.get(name) != count]
        self._buffers.leave_out({*tables, *self._buffers.changed()})
        self._counts = self._buffers.counts()


def check_max_norm(model: nn.Module) -> None:
    """Refuse embeddings that every forward shortens in place, also where they are frozen."""
    for path, module in model.named_modules():
        if getattr(module, "max_norm", None) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ChangingBufferError(
                f"every evaluation rewrites the weights of {path!r}, an embedding with max_norm="
                f"{module.max_norm}; set max_norm=None on it, after shortening its rows once"
            )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, where NaN is equal to itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))
