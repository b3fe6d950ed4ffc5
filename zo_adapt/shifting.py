"""Two ways to let a model compute at ``decay * theta + sum c z(s)``, both exact afterwards.

``copied``: a copy of the view is kept, the live tensors are overwritten, the copy is written back.
Costs the view's bytes. For adapters and plain tensors.

``layerwise``: the live tensors are never written. Right before a module runs, perturbed copies of
its parameters are made, which it reads instead, and afterwards dropped. Costs the bytes of the
largest module. For views that are as large as the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from zo_adapt.selection import owners

Tensors = Mapping[str, Tensor]
Write = Callable[[Tensors, Tensors], None]
"""``write(outs, sources)`` puts the shifted values of the named sources into the outputs."""

# These keep their parameters in a list of their own.
_BYPASSING = (nn.RNNBase,)


@contextmanager
def copied(tensors: Tensors, write: Write) -> Iterator[None]:
    """Overwrite the tensors by shifted values and restore every bit, whatever happens inside."""
    with torch.no_grad():
        kept = {
            name: tensor.detach().clone(memory_format=torch.preserve_format)
            for name, tensor in tensors.items()
        }
    try:
        write(tensors, tensors)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])


class Layerwise:
    """Shifts the parameters of each module just in time.

    Whatever reads a parameter through its module gets the shifted one: the module's own forward,
    another module's, ``model.parameters()``. Code that holds a parameter itself does not. Values
    made for a module's own forward live as long as it runs; those that other code reads are kept to
    the end of the evaluation.

    Args:
        model: The model that owns the view's tensors.
        tensors: The view.
    """

    def __init__(self, model: nn.Module, tensors: Tensors) -> None:
        self._tensors = tensors
        self._modules, self._rest = _plan(model, tensors)

    @contextmanager
    def shifted(self, write: Write) -> Iterator[None]:
        """Inside, each module computes with the parameters that ``write`` makes."""
        before = {module: module._parameters for module in self._modules}
        kept: dict[str, Tensor] = {}
        handles = []
        try:
            for module, names in self._modules.items():
                parameters = _Shifted(before[module], names, write, kept)
                module.__dict__["_parameters"] = parameters
                handles.append(module.register_forward_pre_hook(parameters.enter))
                handles.append(module.register_forward_hook(parameters.leave, always_call=True))
            with copied({name: self._tensors[name] for name in self._rest}, write):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module, live in before.items():
                module.__dict__["_parameters"] = live


class _Shifted(dict[str, Tensor | None]):
    """Stands in for ``module._parameters``; the live dictionary and its tensors are only read."""

    def __init__(
        self,
        live: Mapping[str, Tensor | None],
        names: Mapping[str, str],
        write: Write,
        kept: dict[str, Tensor],
    ) -> None:
        super().__init__(live)
        self._live, self._names, self._write = live, names, write
        self._kept = kept  # By the view's names and shared, so that tied ones stay one object.
        self._running: dict[str, Tensor] = {}

    def __getitem__(self, attribute: str) -> Tensor | None:
        if attribute in self._running:
            return self._running[attribute]
        name = self._names.get(attribute)
        if name is None:
            return self._live[attribute]
        if name not in self._kept:
            self._kept[name] = self._made([attribute])[attribute]
        return self._kept[name]

    def values(self) -> Iterator[Tensor | None]:  # type: ignore[override]
        return (self[attribute] for attribute in self)

    def items(self) -> Iterator[tuple[str, Tensor | None]]:  # type: ignore[override]
        return ((attribute, self[attribute]) for attribute in self)

    def enter(self, *_: object) -> None:
        """The module's forward begins."""
        missing = [a for a, name in self._names.items() if name not in self._kept]
        self._running = self._made(missing)

    def leave(self, *_: object) -> None:
        """The module's forward ends."""
        self._running = {}

    def _made(self, attributes: Iterable[str]) -> dict[str, Tensor]:
        sources = {self._names[a]: cast(Tensor, self._live[a]) for a in attributes}
        outs = {name: torch.empty_like(t, requires_grad=False) for name, t in sources.items()}
        self._write(outs, sources)
        return {attribute: outs[self._names[attribute]] for attribute in attributes}


def _plan(model: nn.Module, tensors: Tensors) -> tuple[dict[nn.Module, dict[str, str]], list[str]]:
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
