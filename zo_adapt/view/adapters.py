"""Integration with peft: which parameters are an adapter's, and whether it reaches the output."""

import sys
from collections.abc import Iterator
from typing import cast

from torch import nn

from zo_adapt.errors import AdapterError


def check_adapters(model: nn.Module) -> None:
    """Refuse a model whose peft adapter is merged or disabled.

    With such an adapter the loss does not depend on it: every projected gradient is exactly zero.

    Raises:
        AdapterError: Names the module and the call that mends it.
    """
    for name, module in _adapted(model):
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


def tuner_names(model: nn.Module) -> set[str]:
    """Names of the parameters that adapters brought, ``modules_to_save`` included."""
    return {
        f"{path}.{name}"
        for path, module in _adapted(model)
        for name, _ in module.named_parameters()
        if name.startswith(tuple(f"{layer}." for layer in _layers(module)))
    }


def lora_a_names(model: nn.Module) -> set[str]:
    """Names of LoRA's A factors: the random projection that B, zero at first, multiplies."""
    return {
        name for name in tuner_names(model) if {"lora_A", "lora_embedding_A"} & set(name.split("."))
    }


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
