"""From the host to a device without being waited for."""

import numpy as np
import torch
from torch import Tensor


def sendable(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of these numbers from which a device can copy without being waited for.

    For a GPU it is made in pinned memory, which torch gives out again once it is copied. (Pinning a
    tensor that is there asks the driver about it first, which takes longer than the copy; without
    it the copy waits for the work before it.)
    """
    if device.type != "cuda":
        return torch.from_numpy(numbers.copy())
    dtype = torch.from_numpy(numbers[:0].copy()).dtype
    tensor = torch.empty(numbers.shape, dtype=dtype, pin_memory=True)
    tensor.numpy()[...] = numbers
    return tensor
