"""The methods that benchmarks/evidence.py compares, each made from one learning rate."""

from collections.abc import Callable, Mapping
from functools import partial
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
from zo_adapt.optimizers.schedule import Annealing

MU = 1e-3
Make = Callable[[float], Optimizer]


def constant(lr: float) -> Rate:
    """A plain rate."""
    return Rate(lr, schedule="constant")


def svrg(
    lr: float,
    k: int = 1,
    mu: float = MU,
    second: float = 1.0,
    anneal: int | None = None,
    **options: Any,
) -> MeZOSVRG:
    """Algorithm 1 with one rate, whole-set snapshots every second step and a shared direction.

    Args:
        lr: eta_1, of the snapshot steps.
        k: Directions that share a large batch.
        mu: The perturbation.
        second: eta_2 / eta_1, of the minibatch steps.
        anneal: Steps of an epoch of Algorithm 4; None: no annealing.
        options: Of the optimizer.
    """
    annealing = Annealing(factor=5.0, threshold=1.05, window=anneal) if anneal else None
    usual: dict[str, Any] = {"snapshot_interval": 2, "snapshot_size": "all", "coupling": "shared"}
    return MeZOSVRG(
        estimate=TwoSided(k, perturbation_scale=mu),
        apply=Rate(second * lr, schedule="constant", annealing=annealing),
        snapshot_lr=lr,
        **(usual | options),
    )


def eight(lr: float, mu: float = MU) -> MeZO:
    """Eight directions on the same rows, each value less the mean of the others."""
    return MeZO(estimate=OneSided(8, perturbation_scale=mu), apply=constant(lr))


def of_eight(kind: Any, lr: float, **options: Any) -> Optimizer:
    """A recursive estimator, eight pairs a large batch."""
    made: Optimizer = kind(
        estimate=TwoSided(8, perturbation_scale=MU), apply=constant(lr), **options
    )
    return made


def by_coordinates(lr: float, **options: Any) -> ZOSVRG:
    """ZO-SVRG-Coord of Liu et al. 2018; a step is 2 or 4 d forwards of every row."""
    return ZOSVRG(
        apply=constant(lr), perturbation_scale=MU, snapshot_interval=5, coordinates=True, **options
    )


COORDINATES: dict[str, Make] = {
    "ZO-SVRG by coordinates": by_coordinates,
    "ZO-SVRG by coordinates, large batch 128": partial(by_coordinates, snapshot_size=128),
}
METHODS: dict[str, Make] = {
    "FO-SGD": lambda lr: SGD(lr, schedule="constant"),
    "FO-Adam": lambda lr: Adam(lr, schedule="constant"),
    "MeZO": lambda lr: MeZO.paper(lr, perturbation_scale=MU),
    "MeZO-SVRG as printed": partial(svrg, second=0.01, coupling="independent"),
    "MeZO-SVRG, one rate, two directions": partial(svrg, coupling="independent"),
    "MeZO-SVRG, one rate, shared direction": svrg,
    "MeZO, all rows": partial(svrg, snapshot_interval=1),
    "MeZO, 8 directions compared": eight,
    "ZO-SPIDER": partial(of_eight, ZOSPIDER, snapshot_interval=5),
    "ZO-PAGE": partial(of_eight, ZOPAGE, restart_probability=0.2),
    "ZO-STORM": partial(of_eight, ZOSTORM, momentum=0.1),
    "ZO-SVRG (Algorithm 2)": lambda lr: ZOSVRG.paper(lr, perturbation_scale=MU),
    **COORDINATES,
    "ZO-SAGA": lambda lr: ZOSAGA(apply=constant(lr), perturbation_scale=MU),
    "MeZO, mu = 0.01": lambda lr: MeZO.paper(lr, perturbation_scale=0.01),
    "MeZO, mu = 0.05": lambda lr: MeZO.paper(lr, perturbation_scale=0.05),
    "MeZO, mu = 0.1": lambda lr: MeZO.paper(lr, perturbation_scale=0.1),
    "MeZO, 8 directions compared, mu = 0.01": partial(eight, mu=0.01),
    "MeZO-SVRG, one rate, shared direction, mu = 0.01": partial(svrg, mu=0.01),
}
"""In the words of the papers; "as printed": two rates, two directions, the text of Algorithm 1."""

OWN: dict[str, Callable[[], Optimizer]] = {"MeZO()": MeZO, "MeZOSVRG()": MeZOSVRG}
"""This library's settings, which find their own step: no rate is chosen."""

ABLATIONS: dict[str, Mapping[str, Any]] = {
    "base": {},
    **{f"mu = {mu:g}": {"mu": mu} for mu in (1e-1, 1e-2, 1e-4)},
    **{f"q = {q}": {"snapshot_interval": q} for q in (1, 5, 10)},
    **{f"large batch {rows}": {"snapshot_size": rows} for rows in (64, 256, 1024, "all")},
    **{f"{k} directions a large batch": {"k": k} for k in (4, 16)},
    "two directions": {"coupling": "independent"},
    "second rate 1/10": {"second": 0.1},
    "second rate 1/100": {"second": 0.01},
    "annealing": {"anneal": 32},
}
"""Appendix E: one thing changed at a time."""
BASES = {"least squares": "all", "MNIST": 256, "encoder, LoRA": 256}
"""The large batch of the base: the whole set leaves 94 steps on MNIST, 46 on the encoder."""


def optimizer_of(method: str, problem: str, lr: float | None) -> Optimizer:
    """The optimizer of a run, by name."""
    if lr is None:
        return OWN[method]()
    if method in METHODS:
        return METHODS[method](lr)
    return svrg(lr, **({"snapshot_size": BASES[problem]} | dict(ABLATIONS[method])))
