"""A problem that another process reads without importing transformers."""

import time
from typing import Any

import torch
from torch import Tensor

from zo_adapt import MeZO, ParameterView, Result, minimize


class Least:
    """Least squares, whose weights a case can look at while they are evaluated."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.w = torch.zeros(5, dtype=torch.float64)
        self.rows = torch.randn(24, 5, generator=generator, dtype=torch.float64)
        self.view = ParameterView({"w": self.w})

    def __call__(self, batch: Tensor) -> Tensor:
        return (batch @ self.w - 1).square()

    def run(self, objective: Any = None, **options: Any) -> Result:
        settings: dict[str, Any] = {"batch_size": 6, "max_steps": 12, "progress": False}
        return minimize(
            objective or self, self.view, self.rows, MeZO(lr=1e-2), **{**settings, **options}
        )


class SlowToLoad(Least):
    """Read by another process in seconds, as imports are."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        time.sleep(4.5)
        self.__dict__.update(state)
