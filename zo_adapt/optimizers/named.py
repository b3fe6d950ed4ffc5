"""Optimizers by name, for callers that have strings: ZOConfig, scipy."""

from collections.abc import Callable, Mapping
from typing import Any

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.keywords import keywords_of
from zo_adapt.optimizers.mezo import MeZO
from zo_adapt.optimizers.mezo_svrg import MeZOSVRG
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.recursive import ZOPAGE, ZOSPIDER, ZOSTORM
from zo_adapt.optimizers.saga import ZOSAGA
from zo_adapt.optimizers.zo_svrg import ZOSVRG

OPTIMIZERS: dict[str, Callable[..., ZerothOrder]] = {
    "mezo": MeZO,
    "mezo-svrg": MeZOSVRG,
    "zo-svrg": ZOSVRG,
    "zo-spider": ZOSPIDER,
    "zo-page": ZOPAGE,
    "zo-storm": ZOSTORM,
    "zo-saga": ZOSAGA,
}


def optimizer_named(name: str, options: Mapping[str, Any]) -> ZerothOrder:
    """The optimizer of a name, with some of its options.

    Raises:
        OptionError: No such optimizer, an option it does not have, or a value outside its range.

    Example:
        >>> optimizer_named("mezo", {"num_directions": 4}).estimate
        OneSided(num_directions=4, baseline='others')
    """
    if name not in OPTIMIZERS:
        raise OptionError(f"optimizer={name!r}; choose one of {sorted(OPTIMIZERS)}")
    own = keywords_of(OPTIMIZERS[name])
    if foreign := options.keys() - own:
        others = [other for other, make in OPTIMIZERS.items() if foreign <= keywords_of(make)]
        way_out = f"leave it out (it has {sorted(own)})"
        if others:
            way_out += f", or choose optimizer={' or '.join(map(repr, others))}"
        raise OptionError(f"{name} has no {sorted(foreign)}; {way_out}")
    return OPTIMIZERS[name](**options)
