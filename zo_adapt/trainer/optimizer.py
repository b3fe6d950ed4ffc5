"""What stands in ZOTrainer where Trainer wants a torch optimizer."""

from typing import Any

import torch


class AlreadyApplied(torch.optim.Optimizer):
    """Holds the parameters and the rate: no state, and no step of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the training step has moved the weights."""
