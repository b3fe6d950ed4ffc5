"""A layer's shifted values: made when its forward begins, in a place of its own or a shared one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from zo_adapt.noise.accumulate import Accumulation
from zo_adapt.noise.gathered import Gathered
from zo_adapt.noise.sums import Sums

Tensors = Mapping[str, Tensor]
Plan = Callable[[Tensors, Tensors], Accumulation]
"""``plan(outs, sources)``: what puts the shifted values of the named sources into the outputs."""
Rows = Callable[[str, Tensor], Gathered]
"""``rows(name, table)``: what makes shifted rows of a tensor of the view."""
ALIGNMENT = 256
"""Bytes; every scratch tensor begins at a multiple of it."""


class Shifted(dict[str, Tensor | None]):
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
        """What reading each attribute gives."""
        return (self[attribute] for attribute in self)

    def items(self) -> Iterator[tuple[str, Tensor | None]]:  # type: ignore[override]
        """Attributes with what reading them gives."""
        return ((attribute, self[attribute]) for attribute in self)


class Layer:
    """A layer whose values are made when it begins and dropped when it ends."""

    is_first = False
    """Whether the other hooks of its module come after it, and see what it returns."""

    def __init__(self, parts: list[Shifted], plan: Plan) -> None:
        self.parts, self.plan = parts, plan
        self.sources: dict[str, Tensor] = {}
        self._names: list[tuple[Shifted, str, str]] = []

    def enter(self, sums: Sums, kept: Tensors, inputs: Any) -> None:
        """The forward begins."""
        self.find_tensors()
        outs = {name: torch.empty_like(t, requires_grad=False) for name, t in self.sources.items()}
        self.run(sums, list(outs.values()))
        self.show({name: kept.get(name, out) for name, out in outs.items()} if kept else outs)

    def leave(self, _module: nn.Module | None, _inputs: Any, output: Any) -> Any:
        """The forward ends."""
        self.show({})
        return output

    def find_tensors(self) -> None:
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


class Table(Layer):
    """An embedding: what it looks up in the live table is replaced by shifted rows."""

    is_first = True

    def __init__(self, parts: list[Shifted], plan: Plan, rows: Rows) -> None:
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
        # Where a model is spread over devices, accelerate moves both behind the hooks.
        ids = inputs[0].to(self._gathered.weight.device)
        return self._gathered(ids, sums).to(output.device)


def looks_up(module: nn.Module) -> bool:
    """Whether a module only takes rows of its weight."""
    return type(module) is nn.Embedding and module.max_norm is None


class Scratch:
    """Memory for the layer that runs."""

    def __init__(self) -> None:
        self.owner: Sharing | None = None
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


class Sharing(Layer):
    """A layer whose values lie in the scratch, as no other such layer runs within it."""

    def __init__(self, parts: list[Shifted], plan: Plan, scratch: Scratch) -> None:
        super().__init__(parts, plan)
        self._scratch = scratch
        self._laid_out: dict[str, Tensor] | None = None

    def enter(self, sums: Sums, kept: Tensors, inputs: Any) -> None:
        """The forward begins."""
        self.find_tensors()
        if self._scratch.owner is not None or not self.sources.keys().isdisjoint(kept):
            super().enter(sums, kept, inputs)
            return
        self._scratch.owner = self
        if self._laid_out is not self.sources:
            outs = self._scratch.laid_out(self.sources)
            self._outs = list(outs.values())
            self._storages = {out.untyped_storage().data_ptr() for out in self._outs}
            self._shown = [(p, {a: outs[n] for a, n in p.names.items()}) for p in self.parts]
            self._laid_out = self.sources  # last: an interrupt in between leaves no half of it
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


def bytes_of(parts: Iterable[Shifted]) -> int:
    """Of the live parameters."""
    return sum(t.numel() * t.element_size() for part in parts for t in part.live().values())


def _apart(output: Any, storages: set[int]) -> Any:
    """An output, copied where it is a view of the scratch."""
    if type(output) is tuple:
        return tuple(_apart(each, storages) for each in output)
    if isinstance(output, Tensor) and output.untyped_storage().data_ptr() in storages:
        return output.clone()
    return output
