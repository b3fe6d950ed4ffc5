"""Optimizers by name, for callers that have strings: ZOConfig, scipy."""

from collections.abc import Callable, Mapping
from typing import Any

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.keywords import keywords_of
from zo_adapt.optimizers.mezo import MeZO
from zo_adapt.optimizers.mezo_svrg import MeZOSVRG
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.zo_svrg import ZOSVRG

OPTIMIZERS: dict[str, Callable[..., ZerothOrder]] = {
    "mezo-svrg": MeZOSVRG,
    "mezo": MeZO,
    "zo-svrg": ZOSVRG,
}


def optimizer_named(name: str, options: Mapping[str, Any]) -> ZerothOrder:
    """The optimizer of a name, with some of its options.

    Raises:
        OptionError: No such optimizer, an option it does not have, or a value outside its range.

    Example:
        >>> optimizer_named("mezo", {"num_directions": 4}).estimate
        TwoSided(num_directions=4)
    """
    if name not in OPTIMIZERS:
        raise OptionError(f"optimizer={name!r}; choose one of {sorted(OPTIMIZERS)}")
    own = keywords_of(OPTIMIZERS[name])
    if foreign := options.keys() - own:
        raise OptionError(f"{name} has no {sorted(foreign)}; leave it out (it has {sorted(own)})")
    return OPTIMIZERS[name](**options)
