"""What a view can hold: dense floating-point tensors, each once, and numpy arrays as tensors."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_adapt.errors import ArgumentTypeError, ViewError
from zo_adapt.interrupt import gradients_off
from zo_adapt.view.inspection import Addresses, have_same_elements, overlaps_itself
from zo_adapt.view.shards import Shards, is_sharded, local, part_of
from zo_adapt.view.usage import check_mode

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ADVICE = (
    "Leave integer and quantised weights frozen and tune an adapter: ParameterView.trainable(model)"
)

PART = 1 << 20
"""Elements looked at together: a test or a sum makes temporary tensors of that size."""


def norm(tensor: Tensor) -> float:
    """Euclidean norm, summed in fp64 part by part."""
    parts = tensor.detach().flatten().split(PART)
    return math.hypot(*(float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in parts))


def norms(tensors: Mapping[str, Tensor], shards: Shards) -> dict[str, float]:
    """The norm of every tensor; of one in parts, of the whole."""
    rows = shards.gathered([norm(local(tensor)) for tensor in tensors.values()])
    return {
        name: math.hypot(*own) if name in shards.parts else own[0]
        for name, *own in zip(tensors, *rows, strict=True)
    }


def check_finite(tensors: Mapping[str, Tensor], found: Mapping[str, float], shards: Shards) -> None:
    """Refuse NaN and infinity.

    Raises:
        ViewError: Names the first tensor that holds one of these.
    """
    # Squares of finite fp64 numbers may overflow: only then are the numbers looked at themselves.
    suspect = [name for name, length in found.items() if not math.isfinite(length)]
    flags = shards.agreed([not _is_finite(local(tensors[name])) for name in suspect])
    for name, flag in zip(suspect, flags, strict=True):
        if flag:
            raise ViewError(f"{name!r} holds NaN or infinity; load finite weights first")


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.detach().flatten().split(PART))


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
    for name in tensors:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"the tensors' names are texts, and one is {name!r:.80}")
    given = {name: _shared(name, value) for name, value in tensors.items()}
    for name, tensor in given.items():
        check_tensor(name, tensor)
    distinct = _distinct({name: tensor for name, tensor in given.items() if tensor.numel()})
    if not distinct:
        raise ViewError(
            "the view holds no tensors; give the model an adapter (peft.get_peft_model), set "
            "requires_grad on the parameters to tune, or use ParameterView.full(model)"
        )
    return distinct


def _distinct(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under the first of its names; another view of all its elements is a name, too.

    Raises:
        ViewError: Two tensors share some of their memory.
    """
    addresses, distinct = Addresses(tensors), dict[str, Tensor]()
    for name, tensor in tensors.items():
        shared = [other for other in addresses.meeting(tensor) if other in distinct]
        if not shared:
            distinct[name] = tensor
        elif len(shared) > 1 or not have_same_elements(local(tensor), local(distinct[shared[0]])):
            raise ViewError(
                f"{name!r} shares part of its memory with {shared[0]!r}: each step would move that "
                "part twice; leave one of the two out"
            )
    return distinct


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse what cannot be shifted or, worse, can be shifted and not restored."""
    if not isinstance(tensor, Tensor):
        raise ViewError(f"{name!r} is a {type(tensor).__name__}, not a torch.Tensor")
    if is_sharded(tensor):
        part_of(name, tensor)
        tensor = local(tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ViewError(
            f"{name!r} is a tensor of torch.func (vmap, grad), which stands for others; make the "
            "view of a model or of plain tensors, outside of it"
        )
    if tensor.is_nested:
        raise ViewError(f"{name!r} is a nested tensor; give the view the tensors that it holds")
    if nn.parameter.is_lazy(tensor):
        raise ViewError(f"{name!r} has no shape yet; call the model once on an example first")
    if tensor.is_meta:
        raise ViewError(
            f"{name!r} is on the meta device: it has no values (not loaded, or offloaded to the "
            "CPU or a disk, from where they come for a forward alone); load the weights, or tune a "
            "LoRA or a head on modules that are not offloaded: ParameterView.trainable(model)"
        )
    if tensor.dtype not in DTYPES or tensor.is_quantized or tensor.layout != torch.strided:
        raise ViewError(
            f"{name!r} has dtype {tensor.dtype} ({tensor.layout}); a view tunes dense float32, "
            f"float16, bfloat16 or float64. {ADVICE}"
        )
    if type(tensor) not in (Tensor, nn.Parameter):
        # It may say that it is float32 and hold int8 and scales: what is written to it is lost.
        raise ViewError(
            f"{name!r} is a {type(tensor).__name__}, a class of its own (of quantised weights, for "
            f"one); a view tunes plain tensors and parameters. {ADVICE}"
        )
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise ViewError(f"{name!r} has no memory now (sharded or offloaded); gather it first")
    check_mode({name: tensor})
    if tensor.is_neg() or tensor.is_conj():
        raise ViewError(f"{name!r} is a negated view (.imag of a conjugate); give the view a copy")
    if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ViewError(f"{name!r} is an expanded tensor (stride 0); give view its own .clone()")
    if overlaps_itself(tensor):
        raise ViewError(f"{name!r} has elements that share memory; give the view its own .clone()")
    _check_writable(name, tensor)


def _check_writable(name: str, tensor: Tensor) -> None:
    """Write no element: what torch has against writing there, it says now and not later."""
    try:
        with gradients_off():
            nothing = tensor.as_strided((0,), (1,))
            torch._foreach_copy_([nothing], [torch.empty_like(nothing)])
    except RuntimeError as error:
        raise ViewError(f"{name!r} cannot be written to: {error}") from error


def check_whole(name: str, array: np.ndarray) -> None:
    """Refuse masked elements, which torch would take for numbers."""
    if np.ma.is_masked(array):
        raise ViewError(f"{name!r} has masked elements; give it .compressed() or .filled(number)")


def _shared(name: str, value: Any) -> Any:
    """A writable numpy array as a tensor that shares its memory; anything else as it is.

    Raises:
        ViewError: An array that torch cannot share.
    """
    if not isinstance(value, np.ndarray):
        return value
    check_whole(name, value)
    if not value.flags.writeable:
        raise ViewError(f"{name!r} is read-only; give the view its own .copy()")
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError) as error:
        raise ViewError(f"{name!r} cannot be shared with torch ({error}); copy it first") from error
