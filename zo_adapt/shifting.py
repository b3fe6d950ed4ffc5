"""Two ways to let a model compute at ``decay * theta + sum c z(s)``, both exact afterwards.

``copied``: a copy of the view is kept, the live tensors are overwritten, the copy is written back.
Costs the view's bytes. For adapters and plain tensors.

``layerwise``: the live tensors are never written. Right before a module runs, the parameters it
reads are replaced by perturbed ones and afterwards put back. Costs the bytes of the largest module.
For views that are as large as the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from zo_adapt.selection import owners

Tensors = Mapping[str, Tensor]
Write = Callable[[Tensors, Tensors], None]
"""``write(outs, sources)`` puts the shifted values of the named sources into the outputs."""

# These read their children's parameters without calling the children.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


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
    """Shifts the parameters of each module just in time, by forward hooks.

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
        idle = set(self._modules)
        handles = []
        rest = {name: self._tensors[name] for name in self._rest}
        for module, names in self._modules.items():
            before = partial(_swap_in, names=names, tensors=self._tensors, write=write, idle=idle)
            after = partial(_swap_out, names=names, tensors=self._tensors)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, always_call=True))
        try:
            with copied(rest, write):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module, names in self._modules.items():
                _swap_out(module, names=names, tensors=self._tensors)
            self._promote(idle)

    def _promote(self, idle: set[nn.Module]) -> None:
        # A module that did not run although others did may be read by another module's forward:
        # from now on its parameters are copied, which is right either way.
        if len(idle) < len(self._modules):
            for module in idle:
                self._rest += [n for n in self._modules.pop(module).values() if n not in self._rest]


def _swap_in(
    module: nn.Module,
    args: object,
    names: Mapping[str, str],
    tensors: Tensors,
    write: Write,
    idle: set[nn.Module],
) -> None:
    idle.discard(module)
    sources = {name: tensors[name] for name in names.values()}
    outs = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in sources.items()}
    write(outs, sources)
    for attribute, name in names.items():
        module._parameters[attribute] = outs[name]  # type: ignore[assignment]


def _swap_out(module: nn.Module, *_: object, names: Mapping[str, str], tensors: Tensors) -> None:
    for attribute, name in names.items():
        module._parameters[attribute] = tensors[name]  # type: ignore[assignment]


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
