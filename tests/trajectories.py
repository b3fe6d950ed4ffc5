"""Short runs that leave a trajectory: shared by its tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from objectives import CallableObjective
from zo_adapt import (
    ZOPAGE,
    ZOSAGA,
    ZOSPIDER,
    ZOSTORM,
    ZOSVRG,
    Annealing,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Result,
    minimize,
)
from zo_adapt.optimizers.optimizer import Optimizer

STEPS = 12
OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "mezo": MeZO,
    "mezo plain": lambda: MeZO(1e-3, weight_decay=0.1, schedule="cosine"),
    "mezo one-sided": lambda: MeZO(num_directions=3, one_sided=True),
    "svrg": MeZOSVRG,
    "svrg inner": lambda: MeZOSVRG(
        1e-3, snapshot_interval=3, snapshot_size=16, one_sided=False, num_directions=4
    ),
    "svrg with kept values": lambda: MeZOSVRG(1e-3, snapshot_interval=20, weight_decay=0.1),
    "svrg decayed": lambda: MeZOSVRG(1e-3, snapshot_interval=5, weight_decay=0.1),
    "svrg annealed": lambda: MeZOSVRG(snapshot_interval=2, annealing=Annealing(window=2)),
    "zo-svrg": lambda: ZOSVRG(1e-3, snapshot_interval=4),
    "zo-svrg by coordinates": lambda: ZOSVRG(1e-3, snapshot_interval=4, coordinates=True),
    "spider": lambda: ZOSPIDER(snapshot_interval=3),
    "page": lambda: ZOPAGE(1e-3, restart_probability=0.3, num_directions=2),
    "storm": lambda: ZOSTORM(1e-3, momentum=0.9, weight_decay=0.1),
    "saga": lambda: ZOSAGA(1e-3),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(6, 5, generator=generator).to(dtype),
        "b": torch.randn(5, generator=generator).to(dtype).view(5, 1).T,
    }


def run(
    live: dict[str, torch.Tensor],
    path: Path,
    optimizer: Optimizer,
    stop: int | None = None,
    **options: Any,
) -> Result:
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (batch @ live["w"].double() + live["b"].double() - 1).square().mean(1)

    def stopping(record: Any) -> None:
        if record.step == stop:
            raise StopIteration

    options = {
        "callback": stopping,
        "max_steps": STEPS,
        "batch_size": 8,
        "seed": 3,
        "progress": False,
    } | options
    noise = noise_of(optimizer)
    groups = options.pop("groups", "auto")
    view = options.pop("view", None) or ParameterView(live, noise=noise, groups=groups)
    objective = CallableObjective(loss, maximize=options.pop("maximize", False))
    return minimize(objective, view, data, optimizer, trajectory=path, **options)


def copies(live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in live.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def noise_of(optimizer: Any) -> str:
    """What an optimizer's directions are of."""
    return "coordinates" if getattr(optimizer, "coordinates", False) else "gaussian"
