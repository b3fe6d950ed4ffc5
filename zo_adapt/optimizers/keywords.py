"""The optimizers' keywords: short ways to say which estimate and which step size."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.estimator import Estimator, OneSided, TwoSided
from zo_adapt.optimizers.schedule import Annealing, Schedule
from zo_adapt.optimizers.step_size import ByDistance, Rate, StepSize
from zo_adapt.options import renamed

SHAPINGS = ("auto", "base", "others", "ranks", "zscore")


class StepSizeKeywords(TypedDict, total=False):
    """In place of ``apply``; None is as if left out.

    displacement: rho of the step by distance, where there is no ``lr``; left out, it is measured.
    normalize: Divide estimates by their running scale; without ``lr`` they always are.
    schedule, weight_decay, scale_memory, annealing: See ``StepSize``.
    """

    displacement: float | None
    normalize: bool | None
    schedule: str | Schedule | None
    weight_decay: float
    scale_memory: float
    annealing: Annealing | None


class Keywords(StepSizeKeywords, total=False):
    """In place of ``estimate`` and ``apply``; None is as if left out.

    perturbation_scale, num_directions: See ``Estimator``.
    one_sided: ``OneSided`` or ``TwoSided``.
    shaping: "ranks", "zscore"; one-sided also "base" and "others", the baselines; "auto".
    """

    perturbation_scale: float | None
    num_directions: int
    one_sided: bool
    shaping: Literal["auto", "base", "others", "ranks", "zscore"]


def split(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the estimate, and those of the step size.

    Raises:
        TypeError: A keyword that no optimizer has.
    """
    if unknown := keywords.keys() - Keywords.__annotations__.keys():
        raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
    size = StepSizeKeywords.__annotations__.keys()
    own = {name: value for name, value in keywords.items() if name not in size}
    return own, {name: value for name, value in keywords.items() if name in size}


def estimator_of(
    estimate: Estimator | None, keywords: dict[str, Any], usual: Estimator
) -> Estimator:
    """The estimator given, or the usual one with what the keywords change.

    Raises:
        OptionError: Both are given, or a shaping that the estimator does not have.
    """
    usually = isinstance(usual, OneSided)
    if keywords.get("shaping", "auto") in (None, "loo"):
        keywords = keywords | {"shaping": _new_shaping(keywords, usually)}
    given = {name: value for name, value in keywords.items() if value is not None}
    if estimate is not None:
        _check_type("estimate", estimate, Estimator, "TwoSided(...) or OneSided(...)")
        _refuse_both("estimate", estimate, given)
        return estimate
    one_sided = given.pop("one_sided", usually)
    shaping = given.pop("shaping", "auto")
    if shaping not in SHAPINGS:
        raise OptionError(f"shaping={shaping!r}; choose one of {SHAPINGS}")
    given = {"num_directions": usual.num_directions} | given
    if not one_sided:
        if shaping in ("base", "others"):
            raise OptionError(
                f"shaping={shaping!r} with one_sided=False: the two points of a pair are each "
                "other's baseline; choose one_sided=True or shaping='auto'"
            )
        return TwoSided(shaping="none" if shaping == "auto" else shaping, **given)
    if shaping in ("ranks", "zscore"):
        return OneSided(shaping=shaping, **given)
    return OneSided(baseline=shaping, **given)


def step_size_of(apply: StepSize | None, lr: float | None, keywords: dict[str, Any]) -> StepSize:
    """The step size given, or the one that ``lr`` and the keywords describe.

    Raises:
        OptionError: Both are given, or ``lr`` and a distance.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    if apply is not None:
        _check_type("apply", apply, StepSize, "ByDistance(...) or Rate(...)")
        _refuse_both("apply", apply, given if lr is None else {"lr": lr} | given)
        return apply
    if lr is not None:
        if "displacement" in given:
            raise OptionError(
                f"lr={lr} and displacement={given['displacement']}: two ways to say how far a step "
                "goes; give one (perturbation_scale says how far probes are)"
            )
        return Rate(lr, **given)
    if given.pop("normalize", True) is False:
        raise OptionError("normalize=False needs a learning rate: give lr > 0")
    return ByDistance(**given)


def keywords_of(optimizer: Callable[..., Any]) -> set[str]:
    """The names of all keywords of an optimizer."""
    found: set[str] = set()
    for name, parameter in inspect.signature(optimizer).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            (collected,) = parameter.annotation.__args__  # of Unpack[...]
            found |= collected.__annotations__.keys()
        else:
            found.add(name)
    return found


def _new_shaping(keywords: Mapping[str, Any], usually: bool) -> str:
    old, new = keywords["shaping"], "others"
    if old is None:
        # It meant no shaping: differences from the base point, or those of pairs.
        new = "base" if keywords.get("one_sided", usually) else "auto"
    renamed(f"shaping={old!r}", f"shaping={new!r}", stacklevel=5)
    return new


def _check_type(name: str, given: object, wanted: type, example: str) -> None:
    if not isinstance(given, wanted):
        raise OptionError(f"{name}={given!r}; give {example}")


def _refuse_both(name: str, given: object, keywords: Mapping[str, Any]) -> None:
    if keywords:
        raise OptionError(
            f"{name}={given!r} and beside it {sorted(keywords)}; give them to "
            f"{type(given).__name__}"
        )
