"""A model computes at shifted weights that are made layer by layer; the live ones are not written.

Right before a layer runs, perturbed copies of its parameters are made, which it reads instead; of
an embedding, just the rows that are looked up. Costs the bytes of the largest repeated block, and
of the largest module outside the blocks while it runs. For views that are as large as the model.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zo_adapt.interrupt import Guard
from zo_adapt.noise.sums import Sums
from zo_adapt.view.copied import Copied
from zo_adapt.view.layers import (
    Layer,
    Plan,
    Rows,
    Scratch,
    Sharing,
    Shifted,
    Table,
    Tensors,
    bytes_of,
    looks_up,
)
from zo_adapt.view.selection import owners

# These keep their parameters in a list of their own.
_BYPASSING = (nn.RNNBase,)
SMALL = 4 * 2**20
"""Bytes of the modules outside the blocks whose values are made at once, for all of a forward."""


class Layerwise:
    """Shifts the parameters of each layer just in time.

    Whatever reads a parameter through its module gets the shifted one: the module's own forward,
    another module's, ``model.parameters()``. Code that holds a parameter itself does not. Values
    made for a layer's own forward live as long as it runs; those that other code reads are kept to
    the end of the evaluation.

    A layer is one of the model's repeated blocks, whose parameters are made at once and in one
    scratch that the blocks share, or a module outside of them. A few small ones of these, norms and
    heads, are made together before the forward; a large embedding is never made as a whole.

    Args:
        model: The model that owns the view's tensors.
        tensors: The view.
        plan: Makes accumulations.
        rows: Makes shifted rows.
        shared: Names of tensors that other tensors of the model share memory with: these are
            shifted by way of a copy, for all that read the memory to see it.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        plan: Plan,
        rows: Rows,
        shared: Collection[str] = (),
    ) -> None:
        modules, rest = _owners(model, tensors, shared)
        self._plan = plan
        self._rest = Copied({name: tensors[name] for name in rest}, plan) if rest else None
        self._kept: dict[str, Tensor] = {}  # By the view's names: tied ones stay one object.
        self._parameters = {
            module: Shifted(module._parameters, names, self._value)
            for module, names in modules.items()
        }
        self._sums = Sums(())
        self._scratch = Scratch()
        self._layers: list[tuple[nn.Module, Layer]] = []
        small: list[Shifted] = []
        for layer, members, is_block in _layers(model, list(modules)):
            parts = [self._parameters[member] for member in members]
            if is_block:
                self._layers.append((layer, Sharing(parts, plan, self._scratch)))
            elif bytes_of(parts) > SMALL and looks_up(layer):
                self._layers.append((layer, Table(parts, plan, rows)))
            elif bytes_of(parts) > SMALL:
                self._layers.append((layer, Layer(parts, plan)))
            elif bytes_of(small) + bytes_of(parts) <= SMALL:
                small += parts
            else:
                kind = Layer if any(layer.children()) else partial(Sharing, scratch=self._scratch)
                self._layers.append((layer, kind(parts, plan)))
        self._small = Sharing(small, plan, Scratch())  # always in one place, for graphs

    @contextmanager
    def shifted(self, sums: Sums) -> Iterator[None]:
        """Inside, each module computes with shifted parameters."""
        self._sums = sums
        handles: list[RemovableHandle] = []
        before = {module: module._parameters for module in self._parameters}

        def undo() -> None:
            for module, live in before.items():
                module.__dict__["_parameters"] = live
            for handle in handles:
                handle.remove()
            self._forget()

        with Guard(undo) as guard, self._rest_shifted(sums):
            for module, parameters in self._parameters.items():
                parameters.refer_to(before[module])
                module.__dict__["_parameters"] = parameters
            for module, layer in self._layers:
                handles.append(module.register_forward_pre_hook(self._entering(layer)))
                leaving = module.register_forward_hook
                handles.append(leaving(layer.leave, prepend=layer.is_first, always_call=True))
            self._small.enter(sums, {}, ())
            guard.open()
            yield

    @contextmanager
    def loaded(self, sums: Sums) -> Iterator[None]:
        """Inside, a graph that was captured inside ``shifted`` computes with shifted parameters."""
        with Guard(self._forget) as guard, self._rest_shifted(sums):
            self._small.enter(sums, {}, ())
            guard.open()
            yield

    def _forget(self) -> None:
        """Drop every value that was made, also of a layer that was cut short."""
        for _, layer in self._layers:
            layer.show({})
        self._kept.clear()
        self._small.leave(None, None, None)
        self._scratch.owner = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a graph is captured: values that are kept from before are not read by it."""
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def _rest_shifted(self, sums: Sums) -> AbstractContextManager[None]:
        """Inside, parameters that no module reads through its own are shifted by way of a copy."""
        return nullcontext() if self._rest is None else self._rest.shifted(sums)

    def _entering(self, layer: "Layer") -> Callable[..., None]:
        return lambda _, inputs: layer.enter(self._sums, self._kept, inputs)

    def _value(self, name: str, live: Tensor) -> Tensor:
        """A parameter that is read while its layer does not run."""
        if name not in self._kept:
            out = torch.empty_like(live, requires_grad=False)
            self._plan({name: out}, {name: live})(self._sums)
            self._kept[name] = out
        return self._kept[name]


def _owners(
    model: nn.Module, tensors: Tensors, shared: Collection[str]
) -> tuple[dict[nn.Module, dict[str, str]], list[str]]:
    """Modules with the view's parameters they register, and the names that must be copied."""
    name_of = {id(tensor): name for name, tensor in tensors.items() if name not in shared}
    bypassed = [path for path, module in model.named_modules() if isinstance(module, _BYPASSING)]
    modules: dict[nn.Module, dict[str, str]] = {}
    rest: list[str] = []
    for path, module, attribute, parameter in owners(model):
        name = name_of.get(id(parameter))
        if name is None:
            continue
        if any(path == other or path.startswith(f"{other}.") for other in bypassed):
            rest.append(name)
        else:
            modules.setdefault(module, {})[attribute] = name
    found = {*rest, *(n for names in modules.values() for n in names.values())}
    rest += [name for name in tensors if name not in found]
    for module in list(modules):
        modules[module] = {a: n for a, n in modules[module].items() if n not in rest}
    return {module: names for module, names in modules.items() if names}, rest


def _layers(
    model: nn.Module, owning: Iterable[nn.Module]
) -> Iterator[tuple[nn.Module, list[nn.Module], bool]]:
    """Layers with their members that own parameters, and whether they are repeated blocks.

    A list of blocks within a block belongs to it.
    """
    left = dict.fromkeys(owning)
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        for block in module:
            members = [member for member in block.modules() if member in left]
            if members:
                yield block, members, True
            for member in members:
                del left[member]
    for module in left:
        yield module, [module], False
