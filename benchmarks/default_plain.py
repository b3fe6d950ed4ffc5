"""Cells of benchmarks/defaults.py without texts: small networks on digits, and plain variables."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mnist import digits
from torch import Tensor, nn

from objectives import Accuracy, ClassificationLoss
from zo_adapt import ParameterView

Measured = dict[str, float]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Problem(NamedTuple):
    """One thing to tune.

    Args:
        objective, view, data: As ``minimize`` takes them.
        batch_size: Rows of a minibatch; None without data.
        budget: ``max_queries`` or ``max_steps``.
        centre: The displacement that the middle of a sweep has.
        measure: Figures at the present weights, on so many rows (None: all) of data that is held
            out where there is any.
    """

    objective: Any
    view: ParameterView
    data: Any
    batch_size: int | None
    budget: dict[str, int]
    centre: float
    measure: Callable[[int | None], Measured]


class Convolutional(nn.Module):
    """Two convolutions that stay random and two linear layers that are tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten()
        )
        self.last = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of images of 784 numbers."""
        return self.last(self.features(pixels.view(-1, 1, 28, 28)))


class Perceptron(nn.Module):
    """784-32-16-10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of images of 784 numbers."""
        return self.layers(pixels)


def digit_problem(view: str, name: str, seed: int, assets: str | None) -> Problem:
    """A small network from scratch on MNIST."""
    found = digits(assets)
    torch.manual_seed(seed)
    model = (Perceptron() if view == "perceptron" else Convolutional()).to(DEVICE)
    data = {
        "pixels": found.train.to(DEVICE).float() / 255,
        "labels": found.train_labels.to(DEVICE),
    }
    test = {"pixels": found.test.to(DEVICE).float() / 255, "labels": found.test_labels.to(DEVICE)}
    if view == "perceptron":
        chosen, queries = ParameterView.full(model), 200_000
        objective: Any = ClassificationLoss(model)
    else:
        chosen, queries = ParameterView.matching(model, "last"), 40_000
        objective = Accuracy(model, softness=1.0)

    @torch.no_grad()
    def measure(most: int | None) -> Measured:
        logits = model(test["pixels"])
        right = float((logits.argmax(-1) == test["labels"]).float().mean())
        return {"accuracy": right, "loss": float(F.cross_entropy(logits, test["labels"]))}

    budget, centre = {"max_queries": queries}, 8 * chosen.displacement
    return Problem(objective, chosen, data, 16, budget, centre, measure)


def unit_of(name: str) -> float:
    """The unit that the name of a problem ends in."""
    found = re.search(r"unit (\S+)$", name)
    return float(found[1]) if found else 1.0


def least_squares(view: str, name: str, seed: int, assets: str | None) -> Problem:
    """100 unknowns, 1,000 rows, noise of a tenth; the unknowns written in a unit."""
    unit, generator = unit_of(name), torch.Generator().manual_seed(seed)
    rows = torch.randn(1000, 100, generator=generator, dtype=torch.float64)
    truth = torch.randn(100, generator=generator, dtype=torch.float64)
    right = rows @ truth + 0.1 * torch.randn(1000, generator=generator, dtype=torch.float64)
    data = torch.cat([rows, right[:, None]], dim=1)
    x = torch.zeros(100, dtype=torch.float64)

    def objective(batch: Tensor) -> Tensor:
        return (batch[:, :-1] @ (x / unit) - batch[:, -1]).square()

    best = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
    optimum = float((rows @ best - right).square().mean())

    def measure(most: int | None) -> Measured:
        loss = float(objective(data).mean())
        return {"loss": loss, "excess": loss - optimum}

    budget = {"max_queries": 100_000}
    return Problem(objective, ParameterView({"x": x}), data, 16, budget, 2.0 * unit, measure)


def variables(view: str, name: str, seed: int, assets: str | None) -> Problem:
    """20 variables 0.2 units from where they should be, or 3 a hundred units from it; no data."""
    unit, few = unit_of(name), view.startswith("3")
    x = torch.zeros(3 if few else 20, dtype=torch.float64)
    target = 100.0 if few else 0.2

    def objective(batch: None) -> float:
        return float((x / unit - target).square().sum())

    def measure(most: int | None) -> Measured:
        return {"loss": objective(None), "excess": objective(None)}

    view_ = ParameterView({"x": x})
    return Problem(objective, view_, None, None, {"max_steps": 1000}, 0.25 * unit, measure)
