"""The caller's variables: arrays in, tensors inside, within bounds and in units of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, from_numpy, nn

from zo_adapt.errors import ArgumentTypeError, OptionError, ViewError
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.tensors import check_whole


class Form:
    """How the caller gave the variables: one array or a mapping, of numpy arrays or of tensors.

    Args:
        x0: An array, a tensor, numbers, or a mapping of names to these.

    Raises:
        ViewError: Something that is not numbers.

    Example:
        >>> form, tensors = Form.of({"a": [1, 2]})
        >>> tensors["a"].dtype, form.filled(tensors)
        (torch.float64, {'a': array([1., 2.])})
    """

    def __init__(self, x0: Any) -> None:
        self.single = not isinstance(x0, Mapping)
        named = {"x": x0} if self.single else dict(x0)
        self.as_tensor = {name: isinstance(value, Tensor) for name, value in named.items()}

    @classmethod
    def of(cls, x0: Any) -> tuple["Form", dict[str, Tensor]]:
        """The form, and copies of the variables as tensors.

        Raises:
            ViewError: An empty array.
            ArgumentTypeError: A model or a view.
        """
        if isinstance(x0, nn.Module | ParameterView):
            raise ArgumentTypeError(
                f"x0 is a {type(x0).__name__}; give an array, a tensor or a mapping of these, or "
                "tune a model by minimize(objective, view, data)"
            )
        form = cls(x0)
        named = {"x": x0} if form.single else x0
        copies = {name: _copied(name, value) for name, value in named.items()}
        if empty := sorted(name for name, tensor in copies.items() if tensor.numel() == 0):
            raise ViewError(f"{empty} has no elements; leave it out")
        return form, copies

    def filled(self, tensors: Mapping[str, Tensor]) -> Any:
        """Copies of the tensors, in the caller's form."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        given: dict[str, Any] = {
            name: copies[name] if as_tensor else copies[name].numpy()
            for name, as_tensor in self.as_tensor.items()
        }
        return given["x"] if self.single else given


def _copied(name: str, value: Any) -> Tensor:
    """Integers and lists become float64, as scipy has it; other dtypes stay."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    check_whole(name, value)
    array = np.asarray(value)
    native = np.float64 if array.dtype.kind in "iu" else array.dtype.newbyteorder("=")
    try:
        return from_numpy(array.astype(native, order="C"))
    except TypeError as error:
        raise ViewError(f"{name!r} is of type {array.dtype}, not numbers") from error


Units = Literal["auto"] | float | Sequence[float] | np.ndarray | Mapping[str, Any] | None


class Box:
    """What the caller sees of variables u that may be any numbers.

    x = low + w T(u unit / w),  w = high - low,  T the triangle wave of period 2 with T(t) = t on
    [0, 1]: what would go beyond a bound comes back. With one bound x = low + |u unit - low|, with
    none x = u unit; with two that are equal x = low. Reflection changes neither scales nor
    gradients inside, and an answer at the very bound is reached.

    Args:
        tensors: x0 by name.
        bounds: None; (low, high) of all variables, of each, or by name; scipy's ``Bounds``. None
            and infinity are no bound.
        units: Steps are alike in every variable when measured in these: numbers > 0, one or one for
            each, or by name; "auto": the width of the bounds where there are two, otherwise |x0|,
            otherwise 1; None: 1.

    Raises:
        OptionError: Bounds of another shape, low > high, x0 outside, or units <= 0.

    Example:
        >>> box = Box({"x": torch.tensor([0.5, 3.0])}, bounds=[(0.0, 1.0), (None, None)])
        >>> box.outer({"x": torch.tensor([1.25, 9.0])})["x"].tolist()
        [0.75, 9.0]
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], bounds: Any = None, units: Units = None
    ) -> None:
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}
        self._units: dict[str, Tensor] = {}
        for name, x0 in tensors.items():
            if (bounds is None and units is None) or not x0.is_floating_point():
                continue  # what is no number is the view's to refuse
            low, high = _sides(name, x0, _of(bounds, name, len(tensors) == 1))
            if bounds is not None:
                self._sides[name] = low, high
            if units is not None:
                given = _of(units, name, len(tensors) == 1)
                self._units[name] = _checked_units(name, given, x0, low, high)

    def inner(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unbounded variables of some within the bounds."""
        units = self._units
        return {name: x / units[name] if name in units else x for name, x in tensors.items()}

    def outer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the caller sees of unbounded variables."""
        return {name: self._one(name, u) for name, u in tensors.items()}

    @property
    def farthest(self) -> float | None:
        """Half the width of the bounds, in units: beyond it, what comes back repeats itself.

        The median of the variables that have two bounds; None where none has.
        """
        halves = [torch.empty(0, dtype=torch.float64)]
        for name, (low, high) in self._sides.items():
            half = (high - low).double() / 2 / self._units.get(name, torch.ones_like(low))
            halves.append(half[half.isfinite() & (half > 0)])
        every = torch.cat(halves)
        return float(every.median()) if len(every) else None

    def _one(self, name: str, u: Tensor) -> Tensor:
        x = u * self._units[name] if name in self._units else u
        if name not in self._sides:
            return x
        low, high = self._sides[name]
        return torch.minimum(torch.maximum(_reflected(x, low, high), low), high)


def _reflected(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    inside = (x >= low) & (x <= high)  # and not a bit changed there
    if inside.all():
        return x
    has_low, has_high, width = low.isfinite(), high.isfinite(), high - low
    distance = (x - low).remainder(2 * width.where(width > 0, torch.ones_like(width)))
    both = low + torch.minimum(distance, 2 * width - distance)
    one = torch.where(has_low, low + (x - low).abs(), high - (high - x).abs())
    found = torch.where(has_low & has_high, both, torch.where(has_low | has_high, one, x))
    return torch.where(inside, x, found)


def _of(given: Any, name: str, is_alone: bool) -> Any:
    """What is given for one array."""
    if not isinstance(given, Mapping):
        if not is_alone and np.ndim(getattr(given, "lb", given)) > 1:
            raise OptionError("with several arrays give bounds and units by name")
        return given
    if is_alone and name not in given and given:
        raise OptionError(f"{sorted(given)} are not the name of a variable; that is {name!r}")
    return given.get(name)


def _sides(name: str, x0: Tensor, bounds: Any) -> tuple[Tensor, Tensor]:
    if bounds is None:
        pairs = np.array([-np.inf, np.inf])
    elif hasattr(bounds, "lb"):
        pairs = np.stack(np.broadcast_arrays(bounds.lb, bounds.ub)).astype(np.float64)
    else:
        pairs = _pairs(name, bounds, tuple(x0.shape))
    try:
        low, high = (np.broadcast_to(side, tuple(x0.shape)) for side in pairs)
    except ValueError as error:
        raise OptionError(
            f"bounds of shape {pairs.shape[1:]} for {name!r} of shape {tuple(x0.shape)}; give one "
            "(low, high), or one for each variable"
        ) from error
    value = x0.double().numpy()
    if np.isnan(pairs).any() or not (low <= high).all():
        raise OptionError(f"bounds of {name!r}: no low may be above its high; got {bounds!r:.80}")
    if not ((low <= value) & (value <= high)).all():
        place = np.unravel_index(int(np.argmax((value < low) | (value > high))), value.shape)
        raise OptionError(
            f"x0 of {name!r} is {value[place]:g} at {list(map(int, place))}, outside its bounds "
            f"{low[place]:g}..{high[place]:g}; start within them"
        )
    return torch.tensor(low, dtype=x0.dtype), torch.tensor(high, dtype=x0.dtype)


def _pairs(name: str, bounds: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Lows and highs of (low, high), or of a list of these."""
    rows = list(bounds) if isinstance(bounds, Sequence | np.ndarray) else []
    is_one = len(rows) == 2 and all(side is None or np.ndim(side) == 0 for side in rows)
    pairs = [rows] if is_one else rows
    if not pairs or not all(isinstance(p, Sequence | np.ndarray) and len(p) == 2 for p in pairs):
        raise OptionError(f"bounds of {name!r} are {bounds!r:.80}; give (low, high) pairs")
    lows = np.array([-np.inf if low is None else low for low, _ in pairs], dtype=np.float64)
    highs = np.array([np.inf if high is None else high for _, high in pairs], dtype=np.float64)
    if is_one:
        return np.concatenate([lows, highs])
    if lows.size == int(np.prod(shape)):
        lows, highs = lows.reshape(shape), highs.reshape(shape)
    return np.stack([lows, highs])


def _checked_units(name: str, given: Any, x0: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if given is None:
        return torch.ones_like(x0)
    if isinstance(given, str):
        if given != "auto":
            raise OptionError(f"units={given!r}; choose 'auto', numbers > 0 or None")
        width, size = high - low, x0.abs()
        usual = torch.where(size > 0, size, torch.ones_like(size))
        return torch.where(width.isfinite() & (width > 0), width, usual)
    try:
        units = np.broadcast_to(np.asarray(given, dtype=np.float64), tuple(x0.shape))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"units of {name!r} are {given!r:.80}; give one number for each"
        ) from error
    if not (np.isfinite(units) & (units > 0)).all():
        raise OptionError(f"units of {name!r} are {given!r:.80}; each must be finite and > 0")
    return torch.tensor(units, dtype=x0.dtype)
