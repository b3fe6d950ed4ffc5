"""What tells a view, and its weights, from others."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zo_adapt.view.group import Group


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
        bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(bits.numpy().data)
    return digest.hexdigest()
