"""Layers at several points that differ from the live weights by a few columns each.

    y = x W^T + sum over the points i of a row's own P_i a_i^T,    P = x b

Rows belong to points in equal blocks, or as a mask says.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_adapt.evaluation.joint.rows import Rows
from zo_adapt.noise.low_rank import Matrices


class Pair(NamedTuple):
    """Factors of a matrix at n points, (n, terms, rank, height) and (n, terms, rank, width)."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, entries: Tensor, matrices: Matrices, points: int) -> "Pair":
        """Views of drawn entries, (terms, points * numel), of one matrix."""
        rank, height, width = matrices.rank, matrices.height, matrices.width
        each = entries.unflatten(1, (points, matrices.numel)).transpose(0, 1)
        a, b = each[..., : rank * height], each[..., rank * height :]
        return cls(a.unflatten(-1, (rank, height)), b.unflatten(-1, (rank, width)))


Forward = Callable[[nn.Module, Tensor, Mapping[str, Pair], Mapping[str, Tensor], Rows], Tensor]


def linear(
    module: nn.Module,
    x: Tensor,
    pairs: Mapping[str, Pair],
    stacks: Mapping[str, Tensor],
    rows_of: Rows,
) -> Tensor:
    """``nn.Linear``, and GPT-2's Conv1D, whose weight is transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    turned = not isinstance(module, nn.Linear)
    rows = x.reshape(-1, x.shape[-1])
    own, columns, onto = rows_of.mask(len(rows), x), list[Tensor](), list[Tensor]()
    if "bias" in stacks:
        of_points = rows_of.of(stacks["bias"])
        bias = of_points[0] if own is None else None
        if own is not None:
            columns.append(own)
            onto.append(of_points)
    if "weight" in pairs:
        a, b = (rows_of.of(factor) for factor in pairs["weight"])
        columns.append(_projected(rows, a if turned else b, own))
        onto.append((b if turned else a).reshape(-1, (b if turned else a).shape[-1]))
    if columns and "weight" not in stacks and not torch.is_autocast_enabled(x.device.type):
        # The thin product first: the large one adds to it as it writes, with one rounding.
        thin = _thin(columns, onto, rows.dtype)
        out = torch.mm(*thin) if bias is None else torch.addmm(bias, *thin)
        out.addmm_(rows, weight if turned else weight.T)
        return out.view(*x.shape[:-1], -1)
    if "weight" in stacks:
        out = _each(rows, rows_of.of(stacks["weight"]), own, turned)
        out = out if bias is None else out + bias
    else:
        out = F.linear(rows, weight.T if turned else weight, bias)
    if columns:
        out.addmm_(*_thin(columns, onto, out.dtype))
    return out.view(*x.shape[:-1], -1)


def _thin(columns: list[Tensor], onto: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is multiplied for the points' own: (rows, k) and (k, out)."""
    return _joined(columns, 1).to(dtype), _joined(onto, 0).to(dtype)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0]) for part in parts], axis)


def _projected(rows: Tensor, factors: Tensor, own: Tensor | None) -> Tensor:
    """The products x b of every row; zero at the points that are not the row's."""
    columns = rows @ factors.reshape(-1, factors.shape[-1]).to(rows.dtype).T
    if own is None:
        return columns
    return (columns.view(len(rows), len(factors), -1) * own[..., None]).view(len(rows), -1)


def _each(rows: Tensor, weights: Tensor, own: Tensor | None, turned: bool) -> Tensor:
    """Rows times the weight of their own point, which has a side of very few elements."""
    weights = weights.mT if turned else weights
    every = (rows @ weights.reshape(-1, weights.shape[-1]).T).view(len(rows), len(weights), -1)
    return every[:, 0] if own is None else (every * own[..., None]).sum(1)


def embedding(
    module: nn.Module,
    ids: Tensor,
    pairs: Mapping[str, Pair],
    stacks: Mapping[str, Tensor],
    rows_of: Rows,
) -> Tensor:
    """``nn.Embedding``; one that all rows share is looked up for every point."""
    count, weight = rows_of.count, module.weight
    shared = count > 1 and len(ids) == 1
    wanted = ids.expand(count, *ids.shape[1:]) if shared else ids
    flat = wanted.reshape(-1)
    own = rows_of.mask(len(flat), weight)  # type: ignore[arg-type]
    if "weight" in stacks:
        point = 0 if own is None else own.argmax(1)
        out = rows_of.of(stacks["weight"])[point, flat]
    else:
        out = F.embedding(flat, weight)  # type: ignore[arg-type]
        a, b = (rows_of.of(factor) for factor in pairs["weight"])
        columns = a.flatten(1, 2)[:, :, flat].permute(2, 0, 1)
        columns = columns if own is None else columns * own[..., None]
        out.addmm_(columns.reshape(len(flat), -1), b.reshape(-1, b.shape[-1]))
    out = out.view(*wanted.shape, -1)
    if not shared:
        return out
    each = rows_of.total // count
    return out[:, None].expand(-1, each, *out.shape[1:]).reshape(count * each, *out.shape[1:])


def layer_norm(
    module: nn.Module,
    x: Tensor,
    pairs: Mapping[str, Pair],
    stacks: Mapping[str, Tensor],
    rows_of: Rows,
) -> Tensor:
    """``nn.LayerNorm``, in fp32 up to the end as the fused operation is: one rounding."""
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(rows_of.count, -1, *shape)
    out = F.layer_norm(wide, shape, eps=module.eps)  # type: ignore[arg-type]
    weight, bias = (
        rows_of.of(stacks[name])[:, None] if name in stacks else getattr(module, name)
        for name in ("weight", "bias")
    )
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    keeps = torch.is_autocast_enabled(x.device.type)  # there a norm returns fp32
    return out.view(x.shape) if keeps else out.view(x.shape).to(x.dtype)


def scaled(module: nn.Module, x: Tensor, stacks: Mapping[str, Tensor], count: int) -> Tensor:
    """The module's own forward, its vectors of every point laid beside the rows of that point.

    That is how a norm of any kind is computed, which multiplies what it has normalised by a vector.
    """
    rows = x.unflatten(0, (count, -1))
    wide = (1,) * (rows.dim() - 2)
    values = {name: stack.view(count, *wide, -1) for name, stack in stacks.items()}
    live = module._parameters
    try:
        module.__dict__["_parameters"] = {**live, **values}
        return type(module).forward(module, rows).flatten(0, 1)  # type: ignore[no-any-return]
    finally:
        module.__dict__["_parameters"] = live


def scales(
    module: nn.Module, x: Tensor, stacks: Mapping[str, Tensor], count: int, expected: Any
) -> bool:
    """Whether ``scaled`` gives what one point after the other does, on these rows."""
    try:
        found = scaled(module, x, stacks, count)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    near = 8 * torch.finfo(found.dtype).eps * float(expected.abs().max())
    return found.dtype == expected.dtype and bool((found - expected).abs().max() <= near)


def forward_of(module: nn.Module, pairs: Mapping[str, Pair]) -> Forward | None:
    """How a module is computed by factors; None where nothing is known of it."""
    kind = type(module)
    if kind is nn.Linear or _is_conv1d(module):
        return linear
    if kind is nn.Embedding and module.max_norm is None:  # which would write its weight
        return embedding
    return layer_norm if kind is nn.LayerNorm and not pairs else None


def takes_factors(module: nn.Module) -> bool:
    """Whether a module's weight may stay as it is while it is computed along factors."""
    return forward_of(module, {}) in (linear, embedding)


def _is_conv1d(module: nn.Module) -> bool:
    """A linear layer whose weight is (in, out), by the class of transformers."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
