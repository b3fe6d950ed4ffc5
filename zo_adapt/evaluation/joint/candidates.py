"""Several candidates in one forward: block i of a batch's rows is computed at point i.

A module whose weight is tuned multiplies each block by the weight of its own point; everything
else, all frozen layers, sees one large batch. With n points and b rows each,

    y_i = x_i W_i^T + c_i,   i = 1..n,   x of shape (n b, ...), W of shape (n, out, in)

so that n small forwards cost little more than one where a forward is bound by launches or by
reading the frozen weights. The live tensors are never written.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_adapt.evaluation.joint.row_blocks import Blocks, calling_in, fits
from zo_adapt.evaluation.model_state import replaced_forwards
from zo_adapt.evaluation.trunk.call import RefusedError, cut
from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.selection import owners

Stacks = Mapping[str, Tensor]
"""By attribute ("weight", "bias") the values at all points, (n, *shape)."""
Forward = Callable[[nn.Module, Tensor, Stacks, int], Tensor]


class NotJoint(Exception):
    """This cannot be computed for several candidates at once; they are evaluated one by one."""


class Candidates:
    """Runs a view's model at several points at once.

    Args:
        view: Its tensors must all belong to linear layers, layer norms and embeddings, each to one.

    Attributes:
        why_not: Why that cannot be done with this view; None if it can.
    """

    def __init__(self, view: ParameterView) -> None:
        self.view = view
        self._modules: dict[nn.Module, dict[str, str]] = {}
        self.why_not = self._why_not()
        self._frozen = frozen_layers(view) if self.why_not is None else ()

    def _why_not(self) -> str | None:
        if self.view.model is None:
            return "the view has no model"
        if self.view.by_layer:
            return "the view is shifted layer by layer"
        if any(is_compiled(module) for module in self.view.model.modules()):
            return "the model is compiled"  # and would be again, for every forward put on a module
        name_of = {id(tensor): name for name, tensor in self.view.tensors.items()}
        found: list[str] = []
        for path, module, attribute, parameter in owners(self.view.model):
            name = name_of.get(id(parameter))
            if name is None:
                continue
            if not _is_plain(module):
                return f"{path!r} is a {type(module).__name__}"
            self._modules.setdefault(module, {})[attribute] = name
            found.append(name)
        head = _output_embedding(self.view.model)
        if head in self._modules:
            return "the output embedding is tuned"  # whose logits objectives compute in fp32
        # Tied as one parameter or as two views of one storage: the other would not be shifted.
        if sorted(found) != sorted(self.view.tensors) or self.view.inspection.shared:
            return "a tensor belongs to several modules, or to none"
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that a point takes: a copy of the view."""
        return self.view.nbytes

    def at(self, points: Sequence[Shift], leads: Collection[int]) -> "ManyPoints":
        """The place where block i of a batch's rows is computed at ``points[i]``.

        Args:
            points: n of them; a batch's rows are n blocks of equal size.
            leads: Sizes of a module's first dimension that are rows in blocks; any other is
                refused.
        """
        return ManyPoints(self.view, self._modules, points, leads, self._frozen)


class ManyPoints:
    """Several points, each for its own block of a batch's rows.

    Made by ``Candidates.at``, and written over by the next one: the stacks are the same.

    Args:
        view: Whose tensors move.
        modules: That hold them, with their names by attribute.
        points, leads: As for ``Candidates.at``.
        frozen: The layers that compute the same at every point.

    Attributes:
        used: Names of the tensors that were used; filled as the model runs.
    """

    def __init__(
        self,
        view: ParameterView,
        modules: Mapping[nn.Module, Mapping[str, str]],
        points: Sequence[Shift],
        leads: Collection[int],
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        self._blocks = Blocks(len(points), frozen)
        self._usage, self._modules, self._stacks = view.usage, modules, view.stack(points)
        self._count, self._leads = len(points), frozenset(leads)
        self.used: set[str] = set()

    @cached_property
    def key(self) -> Hashable:
        """How many points, and where the stacks lie: a graph reads them there."""
        addresses = tuple((name, stack.data_ptr()) for name, stack in self._stacks.items())
        return "candidates", self._count, self._leads, addresses

    @contextmanager
    def entered(self, replaying: bool = False) -> Iterator[None]:
        """Inside, the model computes at the points.

        Raises:
            NotJoint: (inside) A module is called with rows that are not in blocks.
            ViewInUseError: Another thread uses the view.
        """
        forwards = {} if replaying else self._forwards()
        with (
            self._usage.shifting(),
            replaced_forwards(forwards),
            calling_in(self._blocks),
            self._usage.watching(),
        ):
            yield

    def _forwards(self) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        found = {}
        for module, names in self._modules.items():
            own = {a: self._stacks[name] for a, name in names.items() if name in self._stacks}
            if own:
                found[module] = self._forward(module, own, names)
        return found

    def _forward(
        self, module: nn.Module, stacks: Stacks, names: Mapping[str, str]
    ) -> Callable[[Tensor], Tensor]:
        compute, count, here = _FORWARDS[type(module)], self._count, self._blocks

        def forward(input: Tensor) -> Tensor:
            if input.dim() < 2 or not fits(input.shape[0], here, self._leads):
                raise NotJoint(
                    f"a {type(module).__name__} was called with the shape {tuple(input.shape)}, "
                    f"whose first size is none of {sorted(self._leads)}"
                )
            self.used.update(names.values())
            if here.narrowed is None:
                return compute(module, input, stacks, count)
            padded, own = here.narrowed
            return compute(module, input[padded], stacks, count)[own]

        return forward


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is known by its weights alone; accelerate replaces forwards."""
    if "forward" in module.__dict__ or type(module) not in _FORWARDS:
        return False
    # An embedding with a largest norm writes its weight.
    return not isinstance(module, nn.Embedding) or module.max_norm is None


def frozen_layers(view: ParameterView) -> Sequence[nn.Module]:
    """The model's layers before the first that holds weights of the view; none where unknown."""
    with suppress(RefusedError):
        return cut(view).frozen
    return ()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module would be compiled again for every forward put on it."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _output_embedding(model: nn.Module) -> object:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _linear(module: nn.Module, x: Tensor, stacks: Stacks, count: int) -> Tensor:
    rows = x.reshape(count, -1, x.shape[-1])
    weight, bias = stacks.get("weight"), _affine(module, "bias", stacks)
    if weight is None:
        out = F.linear(rows, module.weight)  # type: ignore[arg-type]
        out = out if bias is None else out + bias
    elif bias is None:
        out = torch.bmm(rows, weight.mT)
    else:
        out = torch.baddbmm(bias.to(rows.dtype), rows, weight.mT)
    return out.view(*x.shape[:-1], -1)


def _layer_norm(module: nn.Module, x: Tensor, stacks: Stacks, count: int) -> Tensor:
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    # In fp32 up to the end, as the fused operation is: one rounding.
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(count, -1, *shape)
    out = F.layer_norm(wide, shape, eps=module.eps)  # type: ignore[arg-type]
    weight, bias = (_affine(module, attribute, stacks) for attribute in ("weight", "bias"))
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    keeps = torch.is_autocast_enabled(x.device.type)  # there a norm returns fp32
    return out.view(x.shape) if keeps else out.view(x.shape).to(x.dtype)


def _embedding(module: nn.Module, ids: Tensor, stacks: Stacks, count: int) -> Tensor:
    # A table at a time: an id outside it must not read the next one.
    parts = zip(ids.reshape(count, -1), stacks["weight"], strict=True)
    return torch.cat([F.embedding(part, table) for part, table in parts]).view(*ids.shape, -1)


def _affine(module: nn.Module, attribute: str, stacks: Stacks) -> Tensor | None:
    """What every row of block i is scaled or moved by: (n, 1, ...), or the live parameter."""
    if attribute in stacks:
        return stacks[attribute][:, None]
    live: Tensor | None = getattr(module, attribute)
    return live


_FORWARDS: dict[type, Forward] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
