"""What benchmarks/evidence.py tunes, least squares and a perceptron, and tests of the theory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives import ClassificationLoss
from zo_adapt import MeZO, ParameterView, Rate, TwoSided, minimize

Figures = dict[str, Any]


class Problem(NamedTuple):
    """Something to tune, and its figures at the present weights."""

    objective: Any
    view: ParameterView
    data: Any
    measure: Callable[[], Figures]


def least_squares(seed: int) -> Problem:
    """Appendix B.2: d = 100, n = 1000, y = X w + 0.1 noise, from zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1000, 100, generator=generator, dtype=torch.float64)
    truth = torch.randn(100, generator=generator, dtype=torch.float64)
    right = rows @ truth + 0.1 * torch.randn(1000, generator=generator, dtype=torch.float64)
    data = torch.cat([rows, right[:, None]], dim=1)
    x = torch.zeros(100, dtype=torch.float64)

    def objective(batch: Tensor) -> Tensor:
        return (batch[:, :-1] @ x - batch[:, -1]).square()

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    return Problem(
        objective,
        ParameterView({"x": x}),
        data,
        lambda: {"training loss": float(objective(data).mean())},
    )


def perceptron(seed: int) -> Problem:
    """Table 5: MNIST by a 784-32-16-10 perceptron from scratch, 20,000 and 5,000 images."""
    from mnist import digits

    found = digits(None)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    train, test = found.train.float() / 255, found.test.float() / 255
    data = {"input": train, "labels": found.train_labels}

    @torch.no_grad()
    def measure() -> Figures:
        of_train, of_test = model(train), model(test)
        return {
            "training loss": float(F.cross_entropy(of_train, found.train_labels)),
            "accuracy": float((of_test.argmax(-1) == found.test_labels).float().mean()),
        }

    return Problem(ClassificationLoss(model), ParameterView.full(model), data, measure)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "least squares": least_squares,
    "MNIST perceptron": perceptron,
}


def smooth(dimensions: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A smooth non-convex function: a quadratic with waves, L about 2; and where to begin."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(dimensions, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(dimensions, generator=generator, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (0.5 * scales * x.square() + torch.cos(x + phases)).sum(-1)

    return f, 2 * torch.randn(dimensions, generator=generator, dtype=torch.float64)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of f at x."""
    x = x.detach().requires_grad_(True)
    (found,) = torch.autograd.grad(f(x), x)
    return found


def moments(problem: str, seed: int, draws: int = 20_000) -> Figures:
    """First and second moment of the estimate: unbiased, and E|g|^2 = (d + 2) |grad f|^2.

    The second holds for Gaussian directions and a small mu (Lemma 5.2 bounds it by O(d)).
    """
    dimensions, mu = int(problem.split()[-1]), 1e-4
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
    x = start.clone()
    squares: list[float] = []
    optimizer = MeZO(
        estimate=TwoSided(1, perturbation_scale=1 / math.sqrt(dimensions * steps)),
        apply=Rate(1 / (4 * (dimensions + 2)), schedule="constant"),
    )
    minimize(
        lambda batch: float(f(x)),
        ParameterView({"x": x}),
        None,
        optimizer,
        max_steps=steps,
        seed=seed,
        callback=lambda step: squares.append(float(gradient(f, x).square().sum())),
        progress=False,
    )
    return {"mean squared gradient": sum(squares) / len(squares), "queries": 2 * steps}
