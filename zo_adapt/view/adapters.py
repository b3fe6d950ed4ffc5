"""Integration with peft: which parameters are an adapter's, and whether it reaches the output."""

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from zo_adapt.errors import AdapterError
from zo_adapt.view.shards import whole

FACTOR = re.compile(r"\.X[du]$|(_([ABab]|down|up|[wt]\d))+$")
"""What tells the factors of one product apart: lora_A and lora_B, hada_w1_a, ..., glora_A.Xd."""
COPIES = {"modules_to_save": "original_module", "ln_tuning_layers": "base_layer"}
"""Where copies of the model's own parameters lie, and where these do."""
ZERO = re.compile(
    r"lora_embedding_A|(?<!lora_embedding)(?<!glora)_B\b|\.Xd$|hada_w2_b|lokr_w1|shadow_up"
)
"""The factors that peft makes zero, so that an adapter begins as no change."""


def check_adapters(model: nn.Module, holds: Callable[[Tensor], bool]) -> None:
    """Refuse a model whose peft adapter is merged or disabled, or a view of an inactive one.

    With such an adapter the loss does not depend on it: every projected gradient is exactly zero.

    Raises:
        AdapterError: Names the module and the call that mends it.
    """
    for name, module in adapted_modules(model):
        if getattr(module, "merged", False):
            raise AdapterError(
                f"the adapter of {name!r} is merged into its base weights; "
                "call model.unmerge_adapter() before tuning"
            )
        if module.disable_adapters:
            raise AdapterError(
                f"the adapter of {name!r} is disabled; "
                "call model.enable_adapter_layers() (or leave disable_adapter()) before tuning"
            )
        active = set(cast(list[str], module.active_adapters))
        for parameter, tensor in _own(name, module):
            _, adapter, *_ = _parts(name, parameter)
            if adapter in _adapters_of(module) and adapter not in active and holds(tensor):
                raise AdapterError(
                    f"{parameter!r} belongs to adapter {adapter!r}, but {sorted(active)} is active "
                    f"and the model does not read the other; call model.set_adapter({adapter!r}), "
                    "or make a view without it"
                )


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that a peft model has."""
    return list(getattr(model, "peft_config", None) or {})


def tuner_names(model: nn.Module) -> set[str]:
    """Names of the parameters that adapters brought, ``modules_to_save`` included."""
    return {name for path, module in adapted_modules(model) for name, _ in _own(path, module)}


def originals(model: nn.Module) -> dict[str, str]:
    """Parameters that begin as copies of the model's own: their names, and the originals'."""
    return {
        name: ".".join([path, original, *more])
        for path, module in adapted_modules(model)
        for name, _ in _own(path, module)
        for kind, _, *more in [_parts(path, name)]
        if (original := COPIES.get(kind))
    }


def is_soft_prompt(model: nn.Module | None, names: Collection[str]) -> bool:
    """Whether tensors are virtual tokens before every text: peft's prompt tuning, or so named."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    kinds = {str(getattr(config.peft_type, "value", "")) for config in configs.values()}
    return kinds == {"PROMPT_TUNING"} or set(names) in ({"prompt_embeddings"}, {"soft_prompt"})


def resting_factors(model: nn.Module) -> set[str]:
    """Names of the factors that had better rest: those that one which is zero as yet multiplies.

    In B A with B = 0 the output depends on A only through B: a shift of A alone changes nothing,
    and later all that it does is noise. Where none is zero any more, the one that peft makes zero
    at first moves and the others rest. Of what is no product of matrices nothing rests.
    """
    products: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for path, module in adapted_modules(model):
        for name, parameter in _own(path, module):
            kind, adapter, *more = _parts(path, name)
            factor = ".".join([kind, *(part for part in more if part in ("Xd", "Xu"))])
            stem = FACTOR.sub("", factor)
            if stem != factor and parameter.dim() > 1:
                index = next((part for part in more if part.isdigit()), "")  # a list of pairs
                products.setdefault((path, adapter, stem, index), {})[name] = parameter
    return {name for factors in products.values() for name in _resting(factors)}


def _resting(factors: dict[str, Tensor]) -> set[str]:
    zero = {name for name, factor in factors.items() if not whole(factor).detach().any()}
    moving = zero or {name for name in factors if ZERO.search(name)}
    return set(factors) - moving if moving else set()


def _parts(path: str, name: str) -> list[str]:
    """Kind, adapter and the rest of a parameter's name within its module."""
    parts = name.removeprefix(f"{path}.").split(".")
    return parts if len(parts) > 1 else [*parts, ""]


def _own(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapted module's parameters that the adapters brought."""
    prefixes = tuple(f"{layer}." for layer in _layers(module))
    for name, parameter in module.named_parameters():
        if name.startswith(prefixes):
            yield f"{path}.{name}" if path else name, parameter


def _adapters_of(module: Any) -> set[str]:
    held: Any = (getattr(module, layer, {}) for layer in _layers(module))
    return {name for layer in held if hasattr(layer, "keys") for name in list(layer)}


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold adapter weights; none unless peft has been imported."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, cast(nn.Module, module)


def _layers(module: nn.Module) -> tuple[str, ...]:
    names = tuple(getattr(module, "adapter_layer_names", ()))
    return (*names, "modules_to_save", "token_adapter")
