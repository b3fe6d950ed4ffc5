"""Integration with peft: an adapter that does not reach the output must not be tuned in silence."""

import sys

from torch import nn

from zo_adapt.errors import AdapterError


def check_adapters(model: nn.Module) -> None:
    """Refuse a model whose peft adapter is merged or disabled.

    With such an adapter the loss does not depend on it: every projected gradient is exactly zero.

    Raises:
        AdapterError: Names the module and the call that mends it.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise AdapterError(
                f"the adapter of {name!r} is merged into its base weights; "
                "call model.unmerge_adapter() before tuning"
            )
        switchable = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if switchable and module.disable_adapters:
            raise AdapterError(
                f"the adapter of {name!r} is disabled; "
                "call model.enable_adapter_layers() (or leave disable_adapter()) before tuning"
            )
