"""Two ways to let a model compute at ``decay * theta + sum c z(s)``, both exact afterwards.

``Copied``: a copy of the view is kept, the live tensors are overwritten, the copy is written back.
Costs the view's bytes. For adapters and plain tensors.

``Layerwise``: the live tensors are never written. Right before a layer runs, perturbed copies of
its parameters are made, which it reads instead; of an embedding, just the rows that are looked up.
Costs the bytes of the largest repeated block, and of the largest module outside the blocks while it
runs. For views that are as large as the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from zo_adapt.interrupt import uninterrupted
from zo_adapt.noise.accumulate import Accumulation
from zo_adapt.noise.gathered import Gathered
from zo_adapt.noise.sums import Sums
from zo_adapt.view.selection import owners

Tensors = Mapping[str, Tensor]
Plan = Callable[[Tensors, Tensors], Accumulation]
"""``plan(outs, sources)``: what puts the shifted values of the named sources into the outputs."""
Rows = Callable[[str, Tensor], Gathered]
"""``rows(name, table)``: what makes shifted rows of a tensor of the view."""

# These keep their parameters in a list of their own.
_BYPASSING = (nn.RNNBase,)
ALIGNMENT = 256
"""Bytes; every scratch tensor begins at a multiple of it."""
SMALL = 4 * 2**20
"""Bytes of the modules outside the blocks whose values are made at once, for all of a forward."""


class Copied:
    """Overwrites the tensors by shifted values and restores every bit, whatever happens inside."""

    def __init__(self, tensors: Tensors, plan: Plan) -> None:
        self._tensors, self._run = list(tensors.values()), plan(tensors, tensors)

    @contextmanager
    def shifted(self, sums: Sums) -> Iterator[None]:
        """Inside, the live tensors hold the shifted values."""
        with torch.no_grad():
            kept = [
                tensor.detach().clone(memory_format=torch.preserve_format)
                for tensor in self._tensors
            ]
        try:
            self._run(sums)
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                torch._foreach_copy_(self._tensors, kept)

    @contextmanager
    def loaded(self, sums: Sums) -> Iterator[None]:
        """As ``shifted``: a graph reads the live tensors."""
        with self.shifted(sums):
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a graph is captured."""
        yield


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
    """

    def __init__(self, model: nn.Module, tensors: Tensors, plan: Plan, rows: Rows) -> None:
        modules, rest = _owners(model, tensors)
        self._plan = plan
        self._rest = Copied({name: tensors[name] for name in rest}, plan) if rest else None
        self._kept: dict[str, Tensor] = {}  # By the view's names: tied ones stay one object.
        self._parameters = {
            module: _Shifted(module._parameters, names, self._value)
            for module, names in modules.items()
        }
        self._sums = Sums(())
        self._scratch = _Scratch()
        self._layers: list[tuple[nn.Module, _Layer]] = []
        small: list[_Shifted] = []
        for layer, members, is_block in _layers(model, list(modules)):
            parts = [self._parameters[member] for member in members]
            if is_block:
                self._layers.append((layer, _Sharing(parts, plan, self._scratch)))
            elif _bytes(parts) > SMALL and _looks_up(layer):
                self._layers.append((layer, _Table(parts, plan, rows)))
            elif _bytes(parts) > SMALL:
                self._layers.append((layer, _Layer(parts, plan)))
            elif _bytes(small) + _bytes(parts) <= SMALL:
                small += parts
            else:
                kind = _Layer if any(layer.children()) else partial(_Sharing, scratch=self._scratch)
                self._layers.append((layer, kind(parts, plan)))
        self._small = _Sharing(small, plan, _Scratch())  # always in one place, for graphs

    @contextmanager
    def shifted(self, sums: Sums) -> Iterator[None]:
        """Inside, each module computes with shifted parameters."""
        self._sums = sums
        handles = []
        before = {module: module._parameters for module in self._parameters}
        try:
            for module, parameters in self._parameters.items():
                parameters.refer_to(before[module])
                module.__dict__["_parameters"] = parameters
            for module, layer in self._layers:
                handles.append(module.register_forward_pre_hook(self._entering(layer)))
                leaving = module.register_forward_hook
                handles.append(leaving(layer.leave, prepend=layer.is_first, always_call=True))
            self._small.enter(sums, {}, ())
            if self._rest is None:
                yield
            else:
                with self._rest.shifted(sums):
                    yield
        finally:
            for handle in handles:
                handle.remove()
            for module, live in before.items():
                module.__dict__["_parameters"] = live
            self._kept.clear()
            self._small.leave(None, None, None)
            self._scratch.owner = None

    @contextmanager
    def loaded(self, sums: Sums) -> Iterator[None]:
        """Inside, a graph that was captured inside ``shifted`` computes with shifted parameters."""
        self._small.enter(sums, {}, ())
        try:
            if self._rest is None:
                yield
            else:
                with self._rest.shifted(sums):
                    yield
        finally:
            self._small.leave(None, None, None)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a graph is captured: values that are kept from before are not read by it."""
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def _entering(self, layer: "_Layer") -> Callable[..., None]:
        return lambda _, inputs: layer.enter(self._sums, self._kept, inputs)

    def _value(self, name: str, live: Tensor) -> Tensor:
        """A parameter that is read while its layer does not run."""
        if name not in self._kept:
            out = torch.empty_like(live, requires_grad=False)
            self._plan({name: out}, {name: live})(self._sums)
            self._kept[name] = out
        return self._kept[name]


class _Shifted(dict[str, Tensor | None]):
    """Stands in for ``module._parameters``; the live dictionary and its tensors are only read."""

    def __init__(
        self,
        live: Mapping[str, Tensor | None],
        names: Mapping[str, str],
        value: Callable[[str, Tensor], Tensor],
    ) -> None:
        super().__init__(live)
        self.names = names
        self._live, self._value = live, value
        self.running: dict[str, Tensor] = {}

    def refer_to(self, live: Mapping[str, Tensor | None]) -> None:
        """The module's own parameters, as they are now."""
        if live.keys() != self.keys():
            self.clear()
            self.update(live)
        self._live, self.running = live, {}

    def holds(self, attribute: str, tensor: Tensor) -> bool:
        """Whether a parameter is still this tensor."""
        return self._live[attribute] is tensor

    def live(self) -> dict[str, Tensor]:
        """The tuned parameters by the view's names."""
        return {name: cast(Tensor, self._live[a]) for a, name in self.names.items()}

    def __getitem__(self, attribute: str) -> Tensor | None:
        if attribute in self.running:
            return self.running[attribute]
        name = self.names.get(attribute)
        live = self._live[attribute]
        return live if name is None or live is None else self._value(name, live)

    def values(self) -> Iterator[Tensor | None]:  # type: ignore[override]
        return (self[attribute] for attribute in self)

    def items(self) -> Iterator[tuple[str, Tensor | None]]:  # type: ignore[override]
        return ((attribute, self[attribute]) for attribute in self)


class _Layer:
    """A layer whose values are made when it begins and dropped when it ends."""

    is_first = False
    """Whether the other hooks of its module come after it, and see what it returns."""

    def __init__(self, parts: list[_Shifted], plan: Plan) -> None:
        self.parts, self.plan = parts, plan
        self.sources: dict[str, Tensor] = {}
        self._names: list[tuple[_Shifted, str, str]] = []

    def enter(self, sums: Sums, kept: Tensors, inputs: Any) -> None:
        """The forward begins."""
        self.locate()
        outs = {name: torch.empty_like(t, requires_grad=False) for name, t in self.sources.items()}
        self.run(sums, list(outs.values()))
        self.show({name: kept.get(name, out) for name, out in outs.items()} if kept else outs)

    def leave(self, _module: nn.Module | None, _inputs: Any, output: Any) -> Any:
        """The forward ends."""
        self.show({})
        return output

    def locate(self) -> None:
        """Find the live tensors, if they are not those of the last time."""
        if self.sources and all(part.holds(a, self.sources[n]) for part, a, n in self._names):
            return
        self._names = [(part, a, name) for part in self.parts for a, name in part.names.items()]
        self.sources = {name: t for part in self.parts for name, t in part.live().items()}
        self.run = self.plan(self.sources, self.sources)

    def show(self, outs: Tensors) -> None:
        """Let the modules see these values for the parameters of these names."""
        for part in self.parts:
            part.running = {a: outs[name] for a, name in part.names.items()} if outs else {}


class _Table(_Layer):
    """An embedding: what it looks up in the live table is replaced by shifted rows."""

    is_first = True

    def __init__(self, parts: list[_Shifted], plan: Plan, rows: Rows) -> None:
        super().__init__(parts, plan)
        self._rows = rows
        self._gathered: Gathered | None = None
        self._sums: Sums | None = None

    def enter(self, sums: Sums, kept: Tensors, inputs: Any) -> None:
        """The forward begins."""
        ((name, live),) = self.parts[0].live().items()
        if name in kept or not inputs:  # there is a whole one, or no telling what is looked up
            super().enter(sums, kept, inputs)
            return
        if self._gathered is None or self._gathered.weight is not live:
            self._gathered = self._rows(name, live)
        self._sums = sums
        self.show({name: live})

    def leave(self, module: nn.Module | None, inputs: Any, output: Any) -> Any:
        """The forward ends."""
        sums, self._sums = self._sums, None
        super().leave(module, inputs, output)
        if sums is None or output is None or self._gathered is None:
            return output
        return self._gathered(inputs[0], sums)


def _looks_up(module: nn.Module) -> bool:
    """Whether a module only takes rows of its weight."""
    return type(module) is nn.Embedding and module.max_norm is None


class _Scratch:
    """Memory for the layer that runs."""

    def __init__(self) -> None:
        self.owner: _Sharing | None = None
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def laid_out(self, tensors: Tensors) -> dict[str, Tensor]:
        """Room for tensors like these, one after the other."""
        starts: dict[str, int] = {}
        used: dict[tuple[torch.device, torch.dtype], int] = {}
        for name, tensor in tensors.items():
            kind, step = (tensor.device, tensor.dtype), ALIGNMENT // tensor.element_size()
            starts[name] = used.get(kind, 0)
            used[kind] = starts[name] + -(-tensor.numel() // step) * step
        for kind, wanted in used.items():
            if kind not in self._buffers or len(self._buffers[kind]) < wanted:
                self._buffers[kind] = torch.empty(wanted, device=kind[0], dtype=kind[1])
        return {
            name: self._buffers[t.device, t.dtype][starts[name] :][: t.numel()].view(t.shape)
            for name, t in tensors.items()
        }


class _Sharing(_Layer):
    """A layer whose values lie in the scratch, as no other such layer runs within it."""

    def __init__(self, parts: list[_Shifted], plan: Plan, scratch: _Scratch) -> None:
        super().__init__(parts, plan)
        self._scratch = scratch
        self._laid_out: dict[str, Tensor] | None = None

    def enter(self, sums: Sums, kept: Tensors, inputs: Any) -> None:
        """The forward begins."""
        self.locate()
        if self._scratch.owner is not None or not self.sources.keys().isdisjoint(kept):
            super().enter(sums, kept, inputs)
            return
        self._scratch.owner = self
        if self._laid_out is not self.sources:
            self._laid_out, outs = self.sources, self._scratch.laid_out(self.sources)
            self._outs = list(outs.values())
            self._storages = {out.untyped_storage().data_ptr() for out in self._outs}
            self._shown = [(p, {a: outs[n] for a, n in p.names.items()}) for p in self.parts]
        self.run(sums, self._outs)
        for part, values in self._shown:
            part.running = values

    def leave(self, _module: nn.Module | None, _inputs: Any, output: Any) -> Any:
        """The forward ends; what it returns outlives the scratch."""
        for part in self.parts:
            part.running = {}
        if self._scratch.owner is not self:
            return output
        self._scratch.owner = None
        return _apart(output, self._storages)


def _bytes(parts: Iterable[_Shifted]) -> int:
    return sum(t.numel() * t.element_size() for part in parts for t in part.live().values())


def _apart(output: Any, storages: set[int]) -> Any:
    """An output, copied where it is a view of the scratch."""
    if type(output) is tuple:
        return tuple(_apart(each, storages) for each in output)
    if isinstance(output, Tensor) and output.untyped_storage().data_ptr() in storages:
        return output.clone()
    return output


def _owners(
    model: nn.Module, tensors: Tensors
) -> tuple[dict[nn.Module, dict[str, str]], list[str]]:
    """Modules with the view's parameters they register, and the names that must be copied."""
    name_of = {id(tensor): name for name, tensor in tensors.items()}
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
