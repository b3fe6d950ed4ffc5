"""Budgets in queries: the table, the paper's least squares, and the variance claim."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from problems import (
    Rowwise,
    flat,
    labelled,
    logistic,
    problem,
    regression,
    squares,
    steps,
    vector,
)
from torch import Tensor

from zo_adapt import SGD, ZOSVRG, Adam, MeZO, MeZOSVRG, ParameterView, minimize
from zo_adapt.evaluation.options import EvaluationOptions

PAIR: dict[str, Any] = {"num_directions": 1, "one_sided": False}
PLAIN: dict[str, Any] = {"perturbation_scale": 1e-3, "normalize": False, "schedule": "constant"}
SCALED: dict[str, Any] = {
    "perturbation_scale": 1e-3,
    "normalize": True,
    "schedule": "linear",
    "scale_memory": 0.99,
}
SVRG: dict[str, Any] = {
    "snapshot_interval": 5,
    "snapshot_size": 32,
    "num_directions": 8,
    "one_sided": False,
}

PROBLEMS: dict[str, tuple[Rowwise, Tensor, float]] = {
    # Loss at the optimum, by BFGS.
    "squares": (squares, regression(64, 10, 0.1), 0.004),
    "logistic": (logistic, labelled(64, 10), 0.13),
}


class Row(NamedTuple):
    """How to make an optimizer from a rate; (rate, bound) on the squares and on the logistic loss.

    The bound is the share of the start's distance from the optimum that may be left.
    """

    make: Callable[[float], Any]
    squares: tuple[float, float]
    logistic: tuple[float, float]
    queries: int = 5000
    noise: str = "gaussian"


TABLE = {
    "mezo": Row(lambda lr: MeZO(lr, **PAIR, **PLAIN), (0.03, 0.005), (0.2, 0.3)),
    "mezo_k2": Row(
        lambda lr: MeZO(lr, num_directions=2, one_sided=False, **PLAIN), (0.05, 0.005), (0.3, 0.3)
    ),
    "mezo_one_sided": Row(lambda lr: MeZO(lr, num_directions=3, **PLAIN), (0.1, 0.005), (0.6, 0.3)),
    "mezo_normalised": Row(lambda lr: MeZO(lr, **PAIR, **SCALED), (0.1, 0.005), (0.1, 0.2)),
    "mezo_by_distance": Row(
        lambda rho: MeZO(displacement=rho, schedule="linear", perturbation_scale=1e-3, **PAIR),
        (2.0, 0.005),
        (2.0, 0.2),
    ),
    "svrg_shared": Row(
        lambda lr: MeZOSVRG(lr, coupling="shared", **SVRG, **PLAIN), (0.04, 0.2), (0.3, 0.5)
    ),
    "svrg_normalised": Row(
        lambda lr: MeZOSVRG(lr, coupling="shared", **SVRG, **SCALED), (0.1, 0.3), (0.1, 0.6)
    ),
    "svrg_independent": Row(
        lambda lr: MeZOSVRG(lr, snapshot_lr=5 * lr, coupling="independent", **SVRG, **PLAIN),
        (0.01, 0.1),
        (0.05, 0.6),
    ),
    "zo_svrg": Row(
        lambda lr: ZOSVRG(lr, snapshot_interval=2, snapshot_size=24, **PLAIN),
        (0.1, 0.15),
        (0.3, 0.6),
        1500,
    ),
    "zo_svrg_coordinates": Row(
        lambda lr: ZOSVRG(lr, snapshot_size=24, coordinates=True, **PLAIN),
        (0.3, 0.15),
        (3.0, 0.3),
        noise="coordinates",
    ),
    "sgd": Row(SGD, (0.1, 0.001), (1.0, 0.1), 2000),
    "adam": Row(Adam, (0.1, 0.001), (0.1, 0.1), 2000),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
@pytest.mark.parametrize("name", PROBLEMS)
def test_converges_within_the_budget(name: str, row: Row) -> None:
    function, data, best = PROBLEMS[name]
    rate, bound = getattr(row, name)
    p = problem(function, data, noise=row.noise)
    start = float(function(flat(p.view), data).mean())
    result = minimize(
        p.objective, p.view, data, row.make(rate),
        batch_size=8, max_queries=row.queries, seed=1, progress=False,
    )  # fmt: skip
    left = (float(function(flat(p.view), data).mean()) - best) / (start - best)
    print(f"{left:.2g} of the start's distance is left")
    assert result.queries <= row.queries
    assert left < bound


def least_squares(optimizer: Any, queries: int) -> float:
    """Appendix B.2: d = 100, n = 1000, y = X w + 0.001 noise; the loss after so many queries."""
    data = regression(1000, 100)
    w = torch.zeros(100, dtype=torch.float64)

    def loss(rows: Tensor) -> Tensor:
        return (rows[:, :-1] @ w - rows[:, -1]).square()

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    assert float(loss(data).mean()) > 80
    result = minimize(
        loss, ParameterView({"w": w}), data, optimizer,
        batch_size=50, max_queries=queries, progress=False,
        evaluation=EvaluationOptions(micro_batch_size=1000),
    )  # fmt: skip
    assert queries - 2000 < result.queries <= queries
    return float(loss(data).mean())


def svrg_of_appendix(directions: int, lr: float, snapshot_lr: float) -> MeZOSVRG:
    return MeZOSVRG(
        lr,
        snapshot_lr=snapshot_lr,
        snapshot_interval=2,
        snapshot_size="all",
        num_directions=directions,
        coupling="shared",
        one_sided=False,
        **PLAIN,
    )


def test_least_squares_of_appendix_b2() -> None:
    # A whole set split over 16 directions allows a rate at which a single one diverges.
    assert least_squares(svrg_of_appendix(16, 5e-3, 3e-2), 300_000) < 0.2
    assert least_squares(svrg_of_appendix(1, 3e-3, 3e-3), 300_000) > 5
    assert least_squares(MeZO(2e-3, **PAIR, **PLAIN), 200_000) < 0.5


def corrected_square(coupling: str | None, seed: int) -> float:
    """Mean square of a minibatch step's estimate less the snapshot's: one step after a snapshot."""
    p = problem(logistic, labelled(64, 10), start=0.2)
    common = PLAIN | {"lr": 1e-3}
    if coupling is None:
        (info,) = steps(MeZO(**PAIR, **common), *p, batch_size=4, seed=seed, count=1)
        return float((vector(p.view, info.update) / info.lr).square().mean())
    optimizer = MeZOSVRG(
        snapshot_interval=2, snapshot_size="all", num_directions=4, coupling=coupling,  # type: ignore[arg-type]
        one_sided=False, **common,
    )  # fmt: skip
    snapshot, minibatch = steps(optimizer, *p, batch_size=4, seed=seed, count=2)
    assert (snapshot.kind, minibatch.kind) == ("snapshot", "minibatch")
    g = vector(p.view, snapshot.update) / snapshot.lr
    return float((vector(p.view, minibatch.update) / minibatch.lr - g).square().mean())


def test_the_shared_direction_removes_the_variance() -> None:
    squares_of = {
        coupling: sum(corrected_square(coupling, seed) for seed in range(100))
        for coupling in ("shared", "independent", None)
    }
    assert squares_of["shared"] < 0.01 * squares_of[None]
    assert squares_of["independent"] > squares_of[None]
