"""Whether the ranks hold the same: weights, frozen weights, settings.

Weights are compared by checksums that are made where the tensors lie, in integer arithmetic, so
that a large view need not be copied to the host.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import ReplicaError
from zo_adapt.ranks.group import COMPARED, Ranks
from zo_adapt.trajectory.safe_file import as_json
from zo_adapt.view.parameters import ParameterView

CHUNK = 1 << 22
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAME_START = (
    "load the same checkpoint on every rank, and draw what is new (an adapter, a head) from the "
    "same seed: torch.manual_seed(...) before it is made"
)


def checksum(tensor: Tensor) -> Tensor:
    """A number of 64 bits that changes with any bit of a tensor, on the tensor's device.

    sum_i (2 i + 1) bits_i modulo 2^64: the same on every device.
    """
    bits = tensor.detach().contiguous().view(-1)
    bits = bits.view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (2 * place + 1)).sum()
    return total


def checksums(view: ParameterView) -> np.ndarray:
    """One for every tensor of a view, in their order; of one that ranks hold parts of 0."""
    found = [0 if name in view.shards.parts else checksum(t) for name, t in view.held.items()]
    return np.array([int(one) for one in found], np.int64)


def short_hash(data: bytes) -> int:
    """64 bits of a sha256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)


def check_views(ranks: Ranks, view: ParameterView) -> None:
    """Refuse ranks whose views, or whose frozen weights, are not the same.

    Raises:
        ReplicaError: Names the first tensor that differs.
    """
    identity = [short_hash(view.fingerprint().encode()), short_hash(str(view.base_hash()).encode())]
    messages = ranks.exchange(COMPARED, np.array(identity, np.int64))
    what = "views (other tensors, groups or noise)", "frozen weights"
    for place, name in enumerate(what):
        if other := _other([message.payload[place : place + 1] for message in messages]):
            raise ReplicaError(f"rank {other} has other {name} than rank 0; {SAME_START}")
    check_weights(ranks, view)


def check_weights(ranks: Ranks, view: ParameterView) -> None:
    """Refuse ranks whose tuned weights are not the same.

    Raises:
        ReplicaError: Names the first tensor that differs.
    """
    found = [message.payload for message in ranks.exchange(COMPARED, checksums(view))]
    if other := _other(found):
        names = list(view.tensors)
        first = names[int(np.flatnonzero(found[0] != found[other])[0])]
        count = int((found[0] != found[other]).sum())
        raise ReplicaError(
            f"the weights of rank {other} are not those of rank 0: {first!r} is the first of "
            f"{count} tensors that differ. Nothing but the run may change them; {SAME_START}"
        )


def check_settings_agree(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with other settings or on other data.

    Raises:
        ReplicaError: Names the first setting that differs.
    """
    text = as_json(settings)
    padded = text + bytes(-len(text) % 8)
    payload = np.concatenate([[len(text)], np.frombuffer(padded, np.int64)])
    found = [
        json.loads(message.payload[1:].tobytes()[: int(message.payload[0])])
        for message in ranks.exchange(COMPARED, payload)
    ]
    for rank, theirs in enumerate(found):
        for name in {**found[0], **theirs}:
            if found[0].get(name) != theirs.get(name):
                raise ReplicaError(
                    f"rank {rank} has {name}={theirs.get(name)!r:.200}, rank 0 has "
                    f"{found[0].get(name)!r:.200}; start all ranks with the same"
                )


def _other(found: Sequence[np.ndarray]) -> int:
    """The first rank that has something else than rank 0; 0 if none has."""
    return next((r for r, own in enumerate(found) if not np.array_equal(own, found[0])), 0)
