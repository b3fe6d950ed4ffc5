"""Tests of the paper's theory on smooth non-convex functions, for benchmarks/evidence.py."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_adapt import MeZO, MeZOSVRG, ParameterView, Rate, TwoSided, minimize
from zo_adapt.optimizers.optimizer import Optimizer

Figures = dict[str, Any]
ROWS, SMOOTHNESS, RHO = 256, 2.0, 0.1
"""n and L of ``finite_sum``, and rho of Theorem 5.3."""


def smooth(dimensions: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A smooth non-convex function: a quadratic with waves, L about 2; and where to begin."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(dimensions, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(dimensions, generator=generator, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (0.5 * scales * x.square() + torch.cos(x + phases)).sum(-1)

    return f, 2 * torch.randn(dimensions, generator=generator, dtype=torch.float64)


def bound(dimensions: int) -> float:
    """T times the most that the mean of |grad f|^2 can be in ``gradient_floor``, over seeds 0 to 2.

    A step lowers E f by eta (1 - L eta (d + 2) / 2) |grad f|^2, all by f(x0) - min f <= f(x0) + d.
    """
    drops = []
    for seed in range(3):
        f, start = smooth(dimensions, seed)
        drops.append(float(f(start)) + dimensions)
    return sum(drops) / 3 * 4 * (dimensions + 2) / (1 - SMOOTHNESS / 8)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of f at x."""
    x = x.detach().requires_grad_(True)
    (found,) = torch.autograd.grad(f(x), x)
    return found


def moments(dimensions: int, seed: int, draws: int = 20_000) -> Figures:
    """First and second moment of the estimate: unbiased, and E|g|^2 = (d + 2) |grad f|^2.

    The second holds for Gaussian directions and a small mu (Lemma 5.2 bounds it by O(d)).
    """
    mu = 1e-4
    f, x = smooth(dimensions, seed)
    true = gradient(f, x)
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
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randn(ROWS, dimensions, generator=generator, dtype=torch.float64)
    rows -= rows.mean(0)

    def of_rows(x: Tensor, batch: Tensor) -> Tensor:
        return f(x) + batch @ x  # gradients of unlike rows differ by them, and by 0 on average

    rate = RHO / SMOOTHNESS / (1 if method == "eta = rho / L" else dimensions + 2)
    size = int(method.split()[-1]) if method.startswith("large batch") else "all"
    optimizer = MeZOSVRG(
        estimate=TwoSided(1, perturbation_scale=1 / math.sqrt(dimensions * steps)),
        apply=Rate(rate, schedule="constant"),
        snapshot_interval=math.ceil(dimensions / (31 * RHO)),
        snapshot_size=size,
        coupling="shared",
    )
    return _run(of_rows, f, start, optimizer, rows, steps, seed)


def _run(
    of_rows: Callable[[Tensor, Any], Tensor],
    f: Callable[[Tensor], Tensor],
    start: Tensor,
    optimizer: Optimizer,
    data: Any,
    steps: int,
    seed: int,
) -> Figures:
    x = start.clone()
    squares = []
    minimize(
        lambda batch: of_rows(x, batch) if data is not None else float(of_rows(x, batch)),
        ParameterView({"x": x}),
        data,
        optimizer,
        batch_size=None if data is None else 16,
        max_steps=steps,
        seed=seed,
        callback=lambda step: squares.append(float(gradient(f, x).square().sum())),
        progress=False,
    )
    half = squares[len(squares) // 2 :]
    return {
        "mean squared gradient": sum(squares) / len(squares),
        "of the second half": sum(half) / len(half),
    }
