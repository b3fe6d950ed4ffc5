"""Tests of the paper's theory on smooth non-convex functions, for benchmarks/evidence.py."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zo_adapt import MeZO, MeZOSVRG, ParameterView, Rate, TwoSided, minimize
from zo_adapt.optimizers.optimizer import Optimizer

Figures = dict[str, Any]
ROWS, SMOOTHNESS, RHO = 256, 2.0, 0.1
"""n and L of ``finite_sum``, and rho of Theorem 5.3."""


class Smooth(NamedTuple):
    """A smooth non-convex function, a quadratic with waves: L about 2."""

    scales: Tensor
    phases: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The value at x, or at each row of it."""
        return (0.5 * self.scales * x.square() + torch.cos(x + self.phases)).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient at x."""
        return self.scales * x - torch.sin(x + self.phases)


def smooth(dimensions: int, seed: int) -> tuple[Smooth, Tensor]:
    """A function, and where to begin."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(dimensions, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(dimensions, generator=generator, dtype=torch.float64)
    start = 2 * torch.randn(dimensions, generator=generator, dtype=torch.float64)
    return Smooth(scales, phases), start


def rows_of(dimensions: int, seed: int) -> Tensor:
    """What row i adds to the gradient of ``smooth``, 0 on average."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randn(ROWS, dimensions, generator=generator, dtype=torch.float64)
    return rows - rows.mean(0)


def bound(dimensions: int) -> float:
    """T times the most that the mean of |grad f|^2 can be in ``gradient_floor``, over seeds 0 to 2.

    A step lowers E f by eta (1 - L eta (d + 2) / 2) |grad f|^2, all by f(x0) - min f <= f(x0) + d.
    """
    drops = []
    for seed in range(3):
        f, start = smooth(dimensions, seed)
        drops.append(float(f(start)) + dimensions)
    return sum(drops) / 3 * 4 * (dimensions + 2) / (1 - SMOOTHNESS / 8)


def moments(dimensions: int, seed: int, draws: int = 20_000) -> Figures:
    """First and second moment of the estimate: unbiased, and E|g|^2 = (d + 2) |grad f|^2.

    The second holds for Gaussian directions and a small mu (Lemma 5.2 bounds it by O(d)).
    """
    mu = 1e-4
    f, x = smooth(dimensions, seed)
    true = f.gradient(x)
    z = torch.randn(
        draws, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    p = (f(x + mu * z) - f(x - mu * z)) / (2 * mu)
    squares = (p.square() * z.square().sum(1)) / true.square().sum()
    along = (p * (z @ true)) / true.square().sum()
    root = math.sqrt(draws)
    return {
        "mean along the gradient": float(along.mean()),
        "its error": float(along.std()) / root,
        "second moment": float(squares.mean()),
        "its standard error": float(squares.std()) / root,
        "expected": dimensions + 2,
    }


def gradient_floor(dimensions: int, steps: int, seed: int) -> Figures:
    """Mean |grad f|^2 over a run of SPSA at mu = 1 / sqrt(d T), lr = 1 / (4 (d + 2))."""
    f, start = smooth(dimensions, seed)
    optimizer = MeZO(
        estimate=TwoSided(1, perturbation_scale=1 / math.sqrt(dimensions * steps)),
        apply=Rate(1 / (4 * (dimensions + 2)), schedule="constant"),
    )
    return _run(lambda x, batch: f(x), f, start, optimizer, None, steps, seed)


def theorem(method: str, dimensions: int, steps: int, seed: int) -> Figures:
    """Theorem 5.3's setting on a sum of such functions: mu = 1 / sqrt(d T), q = d / 31 rho.

    ``method``: "eta = rho / L" or "eta = rho / L (d + 2)", from a snapshot of all rows, or
    "large batch b" at the second rate.
    """
    f, start = smooth(dimensions, seed)
    rows = rows_of(dimensions, seed)

    def of_rows(x: Tensor, batch: Tensor) -> Tensor:
        return f(x) + batch @ x  # gradients of unlike rows differ by them, and by 0 on average

    optimizer = MeZOSVRG(
        estimate=TwoSided(1, perturbation_scale=1 / math.sqrt(dimensions * steps)),
        apply=Rate(_rate_of(method, dimensions), schedule="constant"),
        snapshot_interval=math.ceil(dimensions / (31 * RHO)),
        snapshot_size=_large_batch_of(method),
        coupling="shared",
    )
    return _run(of_rows, f, start, optimizer, rows, steps, seed)


def _rate_of(method: str, dimensions: int) -> float:
    return RHO / SMOOTHNESS / (1 if method == "eta = rho / L" else dimensions + 2)


def _large_batch_of(method: str) -> int | Literal["all"]:
    return int(method.split()[-1]) if method.startswith("large batch") else "all"


def by_hand(
    dimensions: int, steps: int, seed: int, draw: Callable[[], Tensor] | None = None
) -> tuple[Figures, Tensor]:
    """``gradient_floor`` in plain tensors, for many steps; and where it ends.

    ``draw``: gives the next direction; None: standard normal ones of the seed.
    """
    f, x = smooth(dimensions, seed)
    draw = draw or _gaussian(dimensions, seed)
    mu, rate = 1 / math.sqrt(dimensions * steps), 1 / (4 * (dimensions + 2))
    squares = []
    for _ in range(steps):
        z = draw()
        x = x - rate * _slope(f, x, mu * z, mu) * z
        squares.append(_square(f, x))
    return _figures(squares), x


def theorem_by_hand(
    method: str, dimensions: int, steps: int, seed: int, draw: Callable[[], Tensor] | None = None
) -> tuple[Figures, Tensor]:
    """``theorem`` in plain tensors, for many steps; and where it ends.

    The rows' parts are linear, so those of a minibatch cancel along a shared direction: no
    minibatch is drawn.
    """
    f, x = smooth(dimensions, seed)
    draw, rows = draw or _gaussian(dimensions, seed), rows_of(dimensions, seed)
    generator = torch.Generator().manual_seed(seed)
    mu, rate = 1 / math.sqrt(dimensions * steps), _rate_of(method, dimensions)
    interval, size = math.ceil(dimensions / (31 * RHO)), _large_batch_of(method)
    squares, snapshot, g = [], x, x
    for step in range(steps):
        z = draw()
        p = _slope(f, x, mu * z, mu)
        if step % interval == 0:
            chosen = torch.randperm(ROWS, generator=generator)[: ROWS if size == "all" else size]
            snapshot, g = x, (p + rows[chosen].mean(0) @ z) * z
            x = x - rate * g
        else:
            x = x - rate * ((p - _slope(f, snapshot, mu * z, mu)) * z + g)
        squares.append(_square(f, x))
    return _figures(squares), x


def _gaussian(dimensions: int, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed + 2)
    return lambda: torch.randn(dimensions, generator=generator, dtype=torch.float64)


def _slope(f: Smooth, x: Tensor, step: Tensor, mu: float) -> Tensor:
    return (f(x + step) - f(x - step)) / (2 * mu)


def _square(f: Smooth, x: Tensor) -> float:
    return float(f.gradient(x).square().sum())


def _run(
    of_rows: Callable[[Tensor, Any], Tensor],
    f: Smooth,
    start: Tensor,
    optimizer: Optimizer,
    data: Any,
    steps: int,
    seed: int,
) -> Figures:
    x = start.clone()
    squares: list[float] = []
    minimize(
        lambda batch: of_rows(x, batch) if data is not None else float(of_rows(x, batch)),
        ParameterView({"x": x}),
        data,
        optimizer,
        batch_size=None if data is None else 16,
        max_steps=steps,
        seed=seed,
        callback=lambda step: squares.append(_square(f, x)),
        progress=False,
    )
    return _figures(squares)


def _figures(squares: list[float]) -> Figures:
    half = squares[len(squares) // 2 :]
    return {
        "mean squared gradient": sum(squares) / len(squares),
        "of the second half": sum(half) / len(half),
    }
