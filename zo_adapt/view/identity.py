"""What tells a view, and its weights, from others: by hashes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from zo_adapt.noise.distributions import Noise
from zo_adapt.view.group import Group
from zo_adapt.view.inspection import Inspection
from zo_adapt.view.shards import Shards, gathering_modules, whole

SAMPLED = 1024
"""Elements of a large tensor that are looked at, evenly spaced."""
WHOLE_BYTES = 1 << 26
"""Frozen weights of up to so many bytes are looked at whole: a tenth of a second."""


def fingerprint_of(
    tensors: Mapping[str, Tensor],
    noise: str,
    groups: Sequence[Group],
    group_of: Mapping[str, int],
) -> str:
    """sha256 of names, shapes, dtypes, noise and groups."""
    rows = [
        (name, list(tensor.shape), str(tensor.dtype), group_of[name])
        for name, tensor in tensors.items()
    ]
    text = json.dumps([noise, [group.as_list() for group in groups], rows])
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the names and of the bits in row-major order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        flat = whole(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def hash_of_frozen(
    model: nn.Module | None, inspection: Inspection, *, scaled: bool = True
) -> str | None:
    """sha256 over the weights of a view's model that are not tuned; None where there are none.

    Names, shapes, dtypes and the elements of every parameter and saved buffer outside the view:
    all elements where these are ``WHOLE_BYTES`` at most; of a larger model ``SAMPLED`` evenly
    spaced ones of every tensor, which tell one checkpoint from another and may miss a change of
    single numbers. The factors that adapters are scaled by belong to it, but in files of former
    versions (``scaled=False``).
    """
    if model is None:
        return None
    gathering_modules(model)
    is_tuned = inspection.holding()
    frozen = [(name, tensor) for name, tensor in _saved_tensors(model) if not is_tuned(tensor)]
    is_small = sum(t.numel() * t.element_size() for _, t in frozen) <= WHOLE_BYTES
    digest = hashlib.sha256()
    for name, tensor in frozen:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bits(whole(tensor), None if is_small else SAMPLED))
    for text in _scalings(model) if scaled else ():
        digest.update(text.encode())
    return digest.hexdigest() if frozen else None


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _scalings(model: nn.Module) -> Iterator[str]:
    """What adapters are multiplied by (alpha / r), which no tensor says."""
    for path, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping):
            yield from (f"{path} {name} {factor}" for name, factor in sorted(scaling.items()))


def bits(tensor: Tensor, most: int | None = SAMPLED) -> bytes:
    """The bits of a tensor's elements, of so many of them if it has more.

    Nothing of one that is not there or not dense.
    """
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor).__module__ not in _DENSE:
        return b""
    if not tensor.numel():
        return b""
    picked = tensor.detach()
    if most is not None and tensor.numel() > most:
        places = np.linspace(0, tensor.numel() - 1, most).astype(np.int64)
        axes = np.unravel_index(places, tuple(tensor.shape))
        picked = picked[tuple(torch.from_numpy(axis).to(tensor.device) for axis in axes)]
    return picked.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


_DENSE = ("torch", "torch.nn.parameter")
"""Modules of the classes whose elements are what they seem; not those of quantised subclasses."""


class Identified:
    """Base of a view: its hashes.

    Of a model in parts they are the work of all processes, each of which must ask.
    """

    tensors: dict[str, Tensor]
    model: nn.Module | None
    groups: Sequence[Group]
    noise: Noise
    inspection: Inspection
    shards: Shards
    _group_of: Mapping[str, int]
    _known: tuple[str, str | None] | None = None
    """Hashes of the weights and of the base, while they are kept."""

    def fingerprint(self) -> str:
        """sha256 of names, shapes, dtypes, noise and groups: which view this is."""
        return fingerprint_of(self.tensors, self.noise.name, self.groups, self._group_of)

    def hash(self) -> str:
        """sha256 of the tensors' bits in row-major order: which weights these are."""
        return hash_of(self.tensors) if self._known is None else self._known[0]

    def base_hash(self) -> str | None:
        """sha256 of the model's frozen weights: which base this is. None where there are none."""
        if self._known is not None:
            return self._known[1]
        return hash_of_frozen(self.model, self.inspection)

    @contextmanager
    def hashes_kept(self) -> Iterator[None]:
        """Inside, where no weight changes, one process may ask for the hashes alone.

        Of a sharded model they are made on the way in, by all processes that hold parts.
        """
        self._known = (self.hash(), self.base_hash()) if self.shards.is_any else None
        try:
            yield
        finally:
            self._known = None

    def has_base(self, begun: str) -> bool:
        """Whether the hash in a file is of this base; True where no weights are frozen."""
        here = self.base_hash()
        if here is None or begun == here or self._known is not None:
            return here is None or begun == here
        return begun == hash_of_frozen(self.model, self.inspection, scaled=False)
