"""The methods that benchmarks/evidence.py compares, each made from one learning rate."""

from collections.abc import Callable
from typing import Any

from zo_adapt import (
    SGD,
    ZOPAGE,
    ZOSAGA,
    ZOSPIDER,
    ZOSTORM,
    ZOSVRG,
    Adam,
    MeZO,
    MeZOSVRG,
    OneSided,
    Rate,
    TwoSided,
)
from zo_adapt.optimizers.optimizer import Optimizer

MU = 1e-3
PAIR = TwoSided(1, perturbation_scale=MU)
SNAPSHOT: dict[str, Any] = {"snapshot_interval": 2, "snapshot_size": "all"}
SECOND_RATE = 0.01
"""eta_2 / eta_1 where there are two: the paper's minibatch rate is so much smaller."""


def constant(lr: float) -> Rate:
    """A plain rate."""
    return Rate(lr, schedule="constant")


def algorithm_1(lr: float, **options: Any) -> MeZOSVRG:
    """MeZO-SVRG with one rate, whole-set snapshots every second step, one direction."""
    return MeZOSVRG(**({"estimate": PAIR, "apply": constant(lr)} | SNAPSHOT | options))


def two_rates(lr: float) -> MeZOSVRG:
    """Algorithm 1 as printed: two directions a minibatch step, its rate a hundredth."""
    return algorithm_1(lr, apply=constant(SECOND_RATE * lr), snapshot_lr=lr, coupling="independent")


def by_name(name: str) -> Callable[[float], Optimizer]:
    """How to make a method of a rate."""
    return METHODS[name]


METHODS: dict[str, Callable[[float], Optimizer]] = {
    "FO-SGD": lambda lr: SGD(lr, schedule="constant"),
    "FO-Adam": lambda lr: Adam(lr, schedule="constant"),
    "MeZO (Algorithm 1 of MeZO)": lambda lr: MeZO.paper(lr, perturbation_scale=MU),
    "MeZO, 8 directions compared": lambda lr: MeZO(
        estimate=OneSided(8, perturbation_scale=MU), apply=constant(lr)
    ),
    "MeZO-SVRG as printed": two_rates,
    "MeZO-SVRG, one rate, two directions": lambda lr: algorithm_1(lr, coupling="independent"),
    "MeZO-SVRG, one rate, shared direction": lambda lr: algorithm_1(lr, coupling="shared"),
    "ZO-SVRG (Algorithm 2)": lambda lr: ZOSVRG(
        apply=constant(lr), perturbation_scale=MU, snapshot_interval=5
    ),
    "ZO-SAGA": lambda lr: ZOSAGA(apply=constant(lr), perturbation_scale=MU),
    "ZO-SPIDER": lambda lr: ZOSPIDER(
        estimate=TwoSided(8, perturbation_scale=MU), apply=constant(lr), snapshot_interval=5
    ),
    "ZO-PAGE": lambda lr: ZOPAGE(
        estimate=TwoSided(8, perturbation_scale=MU), apply=constant(lr), restart_probability=0.2
    ),
    "ZO-STORM": lambda lr: ZOSTORM(
        estimate=TwoSided(8, perturbation_scale=MU), apply=constant(lr), momentum=0.1
    ),
}

ABLATIONS: dict[str, Callable[[float], Optimizer]] = {
    **{
        f"mu = {mu:g}": lambda lr, mu=mu: algorithm_1(
            lr, estimate=TwoSided(1, perturbation_scale=mu)
        )
        for mu in (1e-1, 1e-2, 1e-3, 1e-4)
    },
    **{f"q = {q}": lambda lr, q=q: algorithm_1(lr, snapshot_interval=q) for q in (1, 2, 5, 10)},
    **{
        f"large batch of {rows}": lambda lr, rows=rows: algorithm_1(lr, snapshot_size=rows)
        for rows in (64, 256, "all")
    },
    **{
        f"{k} directions a large batch": lambda lr, k=k: algorithm_1(
            lr, estimate=TwoSided(k, perturbation_scale=MU)
        )
        for k in (1, 4, 16)
    },
    "shared direction": lambda lr: algorithm_1(lr, coupling="shared"),
    "two directions": lambda lr: algorithm_1(lr, coupling="independent"),
    "two rates": two_rates,
    "annealing": lambda lr: MeZOSVRG.paper(lr, lr, coupling="shared", perturbation_scale=MU),
}
"""Appendix E: one thing changed at a time, from one rate, a shared direction, q = 2, all rows."""
