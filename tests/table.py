"""The optimizers under contract: one row each, with the queries that its step t must take.

24 examples, minibatches of 6. A new optimizer is one more row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from zo_adapt import (
    SGD,
    ZOPAGE,
    ZOSAGA,
    ZOSPIDER,
    ZOSTORM,
    ZOSVRG,
    Adam,
    Annealing,
    MeZO,
    MeZOSVRG,
)

EXAMPLES, BATCH = 24, 6
PLAIN: dict[str, Any] = {"perturbation_scale": 0.05, "normalize": False, "schedule": "constant"}
PAIR: dict[str, Any] = {"num_directions": 1, "one_sided": False}
SVRG = PLAIN | {
    "lr": 0.02,
    "snapshot_lr": 0.05,
    "snapshot_interval": 3,
    "snapshot_size": 16,
    "num_directions": 4,
    "coupling": "shared",
    "one_sided": False,
}


class Row(NamedTuple):
    """How to make an optimizer, and the queries of its step t (from 0)."""

    kind: Callable[..., Any]
    options: dict[str, Any]
    queries: Callable[[int], int]
    noise: str = "gaussian"

    def make(self, **options: Any) -> Any:
        """A fresh optimizer; ``options`` overrule the row's."""
        row = dict(self.options)
        if "annealed" in row:
            row = row | {"annealing": Annealing(factor=2.0, threshold=0.9, window=2)}
            del row["annealed"]
        return self.kind(**(row | options))


def cycle(snapshot: int, other: int) -> Callable[[int], int]:
    return lambda t: snapshot if t % 3 == 0 else other


ZEROTH_ORDER = {
    "mezo": Row(MeZO, PLAIN | PAIR | {"lr": 0.05}, lambda t: 12),
    "mezo_split": Row(MeZO, PLAIN | PAIR | {"lr": 0.05, "num_directions": 3}, lambda t: 12),
    "mezo_more_directions_than_rows": Row(
        MeZO, PLAIN | PAIR | {"lr": 0.05, "num_directions": 8}, lambda t: 96
    ),
    "mezo_one_sided": Row(MeZO, PLAIN | {"lr": 0.05, "num_directions": 3}, lambda t: 18),
    "mezo_from_base_points": Row(
        MeZO,
        PLAIN | {"lr": 0.05, "num_directions": 3, "shaping": "base"},
        lambda t: 24,
    ),
    "mezo_by_distance": Row(
        MeZO,
        PAIR | {"lr": None, "displacement": 0.5, "perturbation_scale": 0.05, "schedule": "linear"},
        lambda t: 12,
    ),
    "mezo_normalised": Row(
        MeZO,
        PLAIN | PAIR | {"lr": 0.01, "normalize": True, "schedule": "linear", "scale_memory": 0.9},
        lambda t: 12,
    ),
    "svrg_shared": Row(MeZOSVRG, SVRG, cycle(32, 24)),
    "svrg_independent": Row(MeZOSVRG, SVRG | {"coupling": "independent"}, cycle(32, 24)),
    "svrg_one_sided": Row(MeZOSVRG, SVRG | {"one_sided": True, "num_directions": 2}, cycle(32, 24)),
    "svrg_from_base_points": Row(
        MeZOSVRG,
        SVRG | {"one_sided": True, "num_directions": 2, "shaping": "base"},
        cycle(48, 24),
    ),
    "svrg_by_distance": Row(
        MeZOSVRG,
        SVRG | {"lr": None, "snapshot_lr": None, "normalize": True, "displacement": 0.5},
        cycle(32, 24),
    ),
    "svrg_whole_set": Row(MeZOSVRG, SVRG | {"snapshot_size": "all"}, cycle(48, 24)),
    "svrg_normalised": Row(
        MeZOSVRG,
        SVRG | {"lr": 0.01, "normalize": True, "schedule": "cosine", "scale_memory": 0.9},
        cycle(32, 24),
    ),
    "svrg_annealed": Row(MeZOSVRG, SVRG | {"annealed": True}, cycle(32, 24)),
    "zo_svrg": Row(
        ZOSVRG, PLAIN | {"lr": 0.02, "snapshot_interval": 3, "snapshot_size": 8}, cycle(16, 24)
    ),
    "zo_svrg_coordinates": Row(
        ZOSVRG,
        PLAIN | {"lr": 0.02, "snapshot_interval": 3, "snapshot_size": 8, "coordinates": True},
        cycle(160, 240),
        "coordinates",
    ),
    "spider": Row(
        ZOSPIDER,
        PLAIN | {"lr": 0.02, "snapshot_interval": 3, "snapshot_size": 16, "num_directions": 4},
        cycle(32, 24),
    ),
    "spider_by_distance": Row(
        ZOSPIDER,
        {
            "displacement": 0.5,
            "perturbation_scale": 0.05,
            "snapshot_interval": 3,
            "num_directions": 4,
        },
        cycle(48, 24),
    ),
    "page": Row(
        ZOPAGE,
        PLAIN | {"lr": 0.02, "restart_probability": 1.0, "num_directions": 4},
        lambda t: 48,
    ),
    "storm": Row(
        ZOSTORM,
        PLAIN | {"lr": 0.02, "momentum": 0.5, "num_directions": 4},
        lambda t: 24 if t else 48,
    ),
    "saga": Row(ZOSAGA, PLAIN | {"lr": 0.02}, lambda t: 12 if t else 48),
}
FIRST_ORDER = {
    "sgd": Row(SGD, {"lr": 0.1, "schedule": "constant"}, lambda t: 6),
    "adam": Row(Adam, {"lr": 0.05, "schedule": "linear"}, lambda t: 6),
}
ALL = ZEROTH_ORDER | FIRST_ORDER
