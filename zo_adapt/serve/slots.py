"""Places for LoRA adapters in a module tree; each row of a batch is read under one of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zo_adapt.errors import NotServableError, ServerReplyError
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.start_checks import randomness_kept
from zo_adapt.serve.adapter import LORA, saved_name
from zo_adapt.serve.forwards import unwrapped

_SLOT, _BASE = "zo_slot_{}", "__base__"


class Slots:
    """peft adapters of one configuration that are written over again and again.

    Args:
        model: Whose layers are wrapped where the first adapter comes; it is changed in place.

    Attributes:
        model: The same, wrapped.
        evaluating: A context in which it is in evaluation mode.
        rows: The candidate of every row of the forward that is about to be made, "" for the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.rows: Sequence[str] = []
        self.evaluating = EvaluationMode(model)
        self._held: dict[str, str] = {}
        self._free: dict[str, list[str]] = {}
        self._made: dict[str, str] = {}
        self._hooked: set[nn.Module] = set()

    def names(self) -> list[str]:
        """The candidates that are held."""
        return list(self._held)

    def write(
        self, name: str, tensors: Mapping[str, Tensor], lora_config: Mapping[str, Any]
    ) -> None:
        """Hold a candidate.

        Raises:
            ServerReplyError: The tensors are not those of the layers that the configuration names.
        """
        # Of another configuration the same tensors would be scaled in another way.
        kind = json.dumps(lora_config, sort_keys=True, default=str)
        free = self._free.setdefault(kind, [])
        if not free:
            free.append(self._new(lora_config))
            self._made[free[-1]] = kind
        self._fill(free[-1], tensors)
        self._held[name] = free.pop()

    def free(self, names: Sequence[str]) -> None:
        """Let the slots of candidates be written again."""
        for name in names:
            if slot := self._held.pop(name, None):
                self._free[self._made[slot]].append(slot)

    def hook_layers(self) -> None:
        """Tell every adapted layer, once, whose rows it is given.

        peft's own way refuses layers that see rows and positions flattened (OPT's fc1), and beams.
        """
        from peft.tuners.lora import LoraLayer

        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            if layer not in self._hooked:
                self._hooked.add(layer)
                layer.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _tell(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        times, rest = divmod(len(inputs[0]), len(self.rows))
        if rest:
            raise NotServableError(
                f"a {type(module).__name__} is given {len(inputs[0])} rows for a batch of "
                f"{len(self.rows)}: whose they are is not known; choose other target_modules"
            )
        slots = [self._held.get(name, _BASE) for name in self.rows for _ in range(times)]
        return inputs, keywords | {"adapter_names": slots}

    def _new(self, lora_config: Mapping[str, Any]) -> str:
        import peft

        known = {f.name for f in peft.LoraConfig.__dataclass_fields__.values() if f.init}
        given = {n: v for n, v in lora_config.items() if n in known}
        config = peft.LoraConfig(**given | {"inference_mode": True, "lora_dropout": 0.0})
        slot = _SLOT.format(len(self._made))
        # What the slot begins with is written over at once.
        config.init_lora_weights = False
        flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        with randomness_kept(self.model):
            if isinstance(self.model, peft.PeftModel):
                self.model.add_adapter(slot, config)
            else:
                self.model = peft.get_peft_model(self.model, config, adapter_name=slot)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flags.get(name, flags.get(unwrapped(name), False)))
        self.evaluating = EvaluationMode(self.model)
        self.hook_layers()
        return slot

    def _fill(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        own = {
            saved_name(name, slot): parameter
            for name, parameter in self.model.named_parameters()
            if slot in name.split(".") and any(f".{kind}." in name for kind in LORA)
        }
        if own.keys() != tensors.keys():
            missing = sorted(own.keys() ^ tensors.keys())
            raise ServerReplyError(
                f"the adapter's tensors are not those of its configuration: {missing[0]!r} "
                f"({len(missing)} differ)"
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ServerReplyError(
                    f"{name!r} has the shape {tuple(tensors[name].shape)}, by the configuration "
                    f"it is {tuple(parameter.shape)}"
                )
            parameter.data = tensors[name].to(parameter.device, copy=True)
