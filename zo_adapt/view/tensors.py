"""What a view can hold: dense floating-point tensors, each once, and numpy arrays as tensors."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import ArgumentTypeError, ViewError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


PART = 1 << 20
"""Elements looked at together: a test or a sum makes temporary tensors of that size."""


def norm(tensor: Tensor) -> float:
    """Euclidean norm, summed in fp64 part by part."""
    parts = tensor.detach().flatten().split(PART)
    return math.hypot(*(float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in parts))


def finite_norm(name: str, tensor: Tensor) -> float:
    """The norm of a tensor without NaN and infinity.

    Raises:
        ViewError: It holds one of these.
    """
    found = norm(tensor)
    # Squares of finite fp64 numbers may overflow: only then are the numbers looked at themselves.
    parts = tensor.detach().flatten().split(PART)
    if not math.isfinite(found) and not all(bool(part.isfinite().all()) for part in parts):
        raise ViewError(f"{name!r} holds NaN or infinity; load finite weights first")
    return found


def tunable(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    """The live tensors without repetitions, after checking that each can be tuned.

    Raises:
        ViewError: No tensors, or one that cannot be tuned.
        ArgumentTypeError: Not a mapping.
    """
    if not isinstance(tensors, Mapping):
        is_model = isinstance(tensors, torch.nn.Module)
        raise ArgumentTypeError(
            f"tensors is a {type(tensors).__name__}; give names and tensors"
            + (", or ParameterView.trainable(model), .full(model)" if is_model else "")
        )
    distinct: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, given in tensors.items():
        tensor = _shared(name, given)
        _check_tensor(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place not in seen:
            seen.add(place)
            distinct[name] = tensor
    if not distinct:
        raise ViewError(
            "the view holds no tensors; give the model an adapter (peft.get_peft_model), set "
            "requires_grad on the parameters to tune, or use ParameterView.full(model)"
        )
    return distinct


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ViewError(f"{name!r} is a {type(tensor).__name__}, not a torch.Tensor")
    if tensor.is_meta:
        raise ViewError(f"{name!r} is on the meta device: it has no values; load the weights first")
    if tensor.dtype not in DTYPES or tensor.is_quantized or tensor.layout != torch.strided:
        raise ViewError(
            f"{name!r} has dtype {tensor.dtype} ({tensor.layout}); a view tunes dense float32, "
            "float16, bfloat16 or float64. Leave integer and quantised weights frozen and tune an "
            "adapter: ParameterView.trainable(model)"
        )
    if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ViewError(f"{name!r} is an expanded tensor (stride 0); give view its own .clone()")


def _shared(name: str, value: Any) -> Any:
    """A writable numpy array as a tensor that shares its memory; anything else as it is.

    Raises:
        ViewError: An array that torch cannot share.
    """
    if not isinstance(value, np.ndarray):
        return value
    if not value.flags.writeable:
        raise ViewError(f"{name!r} is read-only; give the view its own .copy()")
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError) as error:
        raise ViewError(f"{name!r} cannot be shared with torch ({error}); copy it first") from error
