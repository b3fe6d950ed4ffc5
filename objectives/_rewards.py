"""Reward functions with TRL's signature: the columns they take, their calls and their sum."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from objectives._lists import as_list, as_number
from objectives._reward_calls import GIVEN, BoundToThread, Calls, EventLoop, KnownFunction
from zo_adapt.errors import DataError, NonFiniteObjectiveError, ObjectiveError, OptionError
from zo_adapt.evaluation.later import InBackground, Made

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``, or async."""


class Rewarded(NamedTuple):
    """Rewards of some examples.

    Args:
        values: (b,), float64; 0 where all functions returned None.
        counted: (b,), whether one of them did not.
    """

    values: np.ndarray
    counted: np.ndarray


class Rewards:
    """The weighted sum of reward functions, one number per example.

    r_i = sum_k w_k f_k(i), over the functions that do not return None for example i

    Args:
        functions: One reward function or several.
        weights: One for each; None: 1 each.

    Raises:
        OptionError: No function, something that cannot be called, or not by keywords; weights that
            do not fit.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions or not all(callable(function) for function in self.functions):
            raise OptionError(
                f"reward_funcs={functions!r}; give a function "
                "f(prompts, completions, completion_ids=None, **columns), or a list of them"
            )
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise OptionError(
                f"{len(self.weights)} reward_weights for {len(self.functions)} reward functions; "
                "give one for each"
            )
        if not np.isfinite(self.weights).all():
            raise OptionError(f"reward_weights={self.weights}; choose finite numbers")
        self._functions = [_described(function) for function in self.functions]
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing is running, and nothing is known of how long functions take."""
        self._loop: EventLoop | None = None
        self._last: tuple[Made, InBackground] | None = None
        self._waits = [inspect.iscoroutinefunction(function) for function in self.functions]

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: no threads."""
        running = ("_loop", "_last", "_waits")
        return {name: value for name, value in vars(self).items() if name not in running}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._begin_anew()

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Refuse data without a column that a reward function cannot do without.

        Raises:
            DataError: Names the column and the function.
        """
        for function in self._functions:
            missing = sorted(function.required - columns.keys() - set(GIVEN))
            if missing:
                raise DataError(
                    f"the reward function {function.name!r} needs the column {missing[0]!r}, the "
                    f"examples have {sorted(columns)} beside the prompt; add it to every example, "
                    "or give the parameter a default"
                )

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
    ) -> Rewarded:
        """The sums, and which examples have one.

        Raises:
            DataError: A function read a column that the examples have not.
            ObjectiveError: A function did not return a list of numbers and None, one per example.
            NonFiniteObjectiveError: It returned NaN or infinity.
        """
        calls = self._calls(prompts, completions, completion_ids, columns)
        self._wait_for_last()
        calls.begin()
        return self._sum(len(prompts), calls.finish())

    def begin(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
        *,
        seconds: float,
    ) -> Made:
        """The same, begun: what waits does so in the background.

        Functions that compute are called here, in the caller's thread, and so are those before them
        in the list. At most one call of each runs at a time.

        Args:
            prompts: With the rest, what is given to the functions.
            completions: See above.
            completion_ids: See above.
            columns: See above.
            seconds: Time that the completions took; what waits for much less may do so here.

        Raises:
            ObjectiveError: Of these, or of those that were begun before; what is raised in the
                background is raised where the result is asked for.
        """
        calls = self._calls(prompts, completions, completion_ids, columns, seconds)
        self._wait_for_last()
        if not calls.begin():
            total = self._sum(len(prompts), calls.finish())
            return Made(lambda: total)
        running = InBackground(calls.finish, calls.cancel)

        def summed() -> Rewarded:
            try:
                returned = running.result()
            except BoundToThread:
                returned = calls.finish()
            return self._sum(len(prompts), returned)

        found = Made(summed, running)
        self._last = found, running
        return found

    def _calls(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
        seconds: float = math.inf,
    ) -> Calls:
        given = dict(zip(GIVEN, (prompts, completions, completion_ids), strict=True))
        return Calls(self._functions, {**columns, **given}, self._waits, seconds, self._event_loop)

    def _event_loop(self) -> EventLoop:
        self._loop = self._loop or EventLoop()
        return self._loop

    def _wait_for_last(self) -> None:
        """Until what was begun last has ended: no function is called twice at once.

        Raises:
            ObjectiveError: Of what was begun last.
        """
        if self._last is not None:
            found, running = self._last
            if running.is_cancelled:
                running.wait()
            else:
                found.result()
            self._last = None

    def _sum(self, rows: int, returned: Sequence[Any]) -> Rewarded:
        total = Rewarded(np.zeros(rows), np.zeros(rows, bool))
        for function, weight, found in zip(self._functions, self.weights, returned, strict=True):
            own = _checked(function.name, found, rows)
            total = Rewarded(total.values + weight * own.values, total.counted | own.counted)
        return total


def _described(function: Callable[..., Any]) -> KnownFunction:
    name = _name(function)
    return KnownFunction(name, function, *_parameters(name, function))


def _name(function: RewardFunction) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _parameters(
    name: str, function: RewardFunction
) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Names of the arguments a function takes, None for any, and of those it cannot do without.

    Raises:
        OptionError: One of them cannot be given by its name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return None, frozenset()
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if unnamed:
        raise OptionError(
            f"the reward function {name!r} takes {unnamed} by position only, and all is given by "
            "name; remove the / from its parameters"
        )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = frozenset(p.name for p in named if p.default is p.empty)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None, required
    return frozenset(p.name for p in named), required


def _checked(name: str, returned: Any, rows: int) -> Rewarded:
    """What a function returned."""
    rewards = as_list(returned)
    if rewards is None:
        raise ObjectiveError(
            f"the reward function {name!r} returned {type(returned).__name__}; return a list of "
            "one number, or None, per completion"
        )
    if len(rewards) != rows:
        raise ObjectiveError(
            f"the reward function {name!r} returned {len(rewards)} rewards for {rows} completions; "
            "return one, or None, per completion"
        )
    numbers = [0.0 if reward is None else as_number(reward) for reward in rewards]
    if None in numbers:
        raise ObjectiveError(
            f"the reward function {name!r} returned {rewards!r:.80}, not numbers and None: "
            f"{rewards[numbers.index(None)]!r:.40} is neither"
        )
    values = np.array(numbers, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NonFiniteObjectiveError(
            f"the reward function {name!r} returned {values[bad[0]]} for example {bad[0]} of the "
            "batch; return None to skip an example"
        )
    return Rewarded(values, np.array([reward is not None for reward in rewards], bool))
