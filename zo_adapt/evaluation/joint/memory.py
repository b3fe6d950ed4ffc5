"""How much of a device's memory the rows of one call may take.

A function of the device and the model alone, never of what is free at the moment: the same rows go
together in every run, also in one that is resumed.
"""

import os

import torch

from zo_adapt.view.parameters import ParameterView

SHARE = {"cuda": 0.7, "cpu": 0.25}
"""Of the memory beside the model: other processes, and the allocator's own loss, need some."""


def bytes_for_rows(view: ParameterView) -> int:
    """Bytes beside the weights on the device of a view's tensors."""
    device = next(iter(view.tensors.values())).device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = () if view.model is None else view.model.parameters()
    occupied = sum(w.nbytes for w in weights if w.device == device)
    return int(SHARE["cuda" if device.type == "cuda" else "cpu"] * max(0, total - occupied))
