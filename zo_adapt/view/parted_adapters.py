"""Which of peft's adapters compute what they do on the whole model where its layers are cut.

Under FSDP2 all do, since weights are put together before a forward. Under tensor parallelism a
layer gives or takes a share of the features, and peft (from 0.21.1 on) cuts the factors of a plain
LoRA alone. Others fail in their forward, or, where a layer says that its share is its size, tune
one number for all shares without a word.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from zo_adapt.errors import AdapterError
from zo_adapt.view.adapters import adapted_modules
from zo_adapt.view.shards import cut_along, version_of

BEYOND_LAYERS = ("ADAPTION_PROMPT", "CARTRIDGE", "PREFIX_TUNING")
"""What reaches into attention, where a process has some of the heads."""


def check_parted(model: nn.Module) -> None:
    """Refuse a tensor-parallel model with an adapter that was not cut with its layers.

    Raises:
        AdapterError: Names the module, peft's version and the way out.
    """
    for name, module in adapted_modules(model):
        axes = {axis for p in _adapted(module) if (axis := cut_along(p)) is not None}
        if not all(_is_cut(module, axis) for axis in axes):
            own = type(module)
            raise _refusal(f"the {own.__module__}.{own.__qualname__} at {name!r}")
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for adapter in _active(model) if configs else ():
        kind = str(getattr(getattr(configs.get(adapter), "peft_type", ""), "value", ""))
        if kind in BEYOND_LAYERS and any(cut_along(p) is not None for p in model.parameters()):
            raise _refusal(f"the {kind} of adapter {adapter!r}")


def _refusal(what: str) -> AdapterError:
    return AdapterError(
        f"{what} is not cut as the tensor-parallel layer is that it adapts (peft "
        f"{version_of('peft')}, transformers {version_of('transformers')}), so that it would not "
        "compute what it does on the whole model. A plain LoRA is cut by peft 0.21.1 or later on a "
        "model that transformers 5.17 or later has loaded by tp_plan; for every other adapter, "
        "shard the model by FSDP2 (torch.distributed.fsdp.fully_shard) or load it whole"
    )


def _adapted(module: Any) -> Iterator[Tensor]:
    """The weights that a wrapper adapts: of a layer its own, of a copy all that was copied."""
    copied: nn.Module | None = getattr(module, "original_module", None)
    if copied is not None:
        return copied.parameters()
    base: nn.Module = module.get_base_layer()
    return base.parameters(recurse=False)


def _active(module: Any) -> list[str]:
    found = getattr(module, "active_adapters", ())
    found = found() if callable(found) else found  # a method of transformers' own models
    return [found] if isinstance(found, str) else list(found)


def _is_cut(module: Any, axis: int) -> bool:
    """Whether a LoRA's factor beside the cut is cut, too, and nothing else is computed."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or type(module) not in (lora.Linear, lora.Embedding):
        return False
    held = [name for name in _active(module) if name in module.scaling]
    others = {**getattr(module, "lora_variant", {}), **_doras(module)}
    return all(
        name not in others and any(cut_along(f) is not None for f in _beside(module, name, axis))
        for name in held
    )


def _doras(module: Any) -> dict[str, bool]:
    """Of former versions of peft."""
    return {name: True for name, is_one in getattr(module, "use_dora", {}).items() if is_one}


def _beside(module: Any, adapter: str, axis: int) -> Iterator[Tensor]:
    """The factor that has the features of the axis: a linear layer's weight is (out, in)."""
    if adapter in module.lora_A:
        yield (module.lora_B if axis == 0 else module.lora_A)[adapter].weight
    elif adapter in module.lora_embedding_A:  # and an embedding's (tokens, features)
        yield (module.lora_embedding_A if axis == 0 else module.lora_embedding_B)[adapter]
