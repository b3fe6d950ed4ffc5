"""Reward functions with TRL's signature: the columns they take, their calls and their sum."""

import asyncio
import functools
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from objectives._lists import as_list, as_number
from zo_adapt.errors import DataError, NonFiniteObjectiveError, ObjectiveError, OptionError

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``, or async."""
GIVEN = ("prompts", "completions", "completion_ids")
"""What every reward is called with; all else is a column of the data."""


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
        self.names = [_name(function) for function in self.functions]
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise OptionError(
                f"{len(self.weights)} reward_weights for {len(self.functions)} reward functions; "
                "give one for each"
            )
        if not np.isfinite(self.weights).all():
            raise OptionError(f"reward_weights={self.weights}; choose finite numbers")
        self._accepted = [
            _parameters(name, function)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        self._loop: _Loop | None = None

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Refuse data without a column that a reward function cannot do without.

        Raises:
            DataError: Names the column and the function.
        """
        for name, (_, required) in zip(self.names, self._accepted, strict=True):
            missing = sorted(required - columns.keys() - set(GIVEN))
            if missing:
                raise DataError(
                    f"the reward function {name!r} needs the column {missing[0]!r}, the examples "
                    f"have {sorted(columns)} beside the prompt; add it to every example, or give "
                    "the parameter a default"
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
        given = dict(zip(GIVEN, (prompts, completions, completion_ids), strict=True))
        arguments = {**columns, **given}
        total = Rewarded(np.zeros(len(prompts)), np.zeros(len(prompts), bool))
        for name, weight, returned in zip(
            self.names, self.weights, self._returned(arguments), strict=True
        ):
            own = _checked(name, returned, len(prompts))
            total = Rewarded(total.values + weight * own.values, total.counted | own.counted)
        return total

    def _returned(self, arguments: Mapping[str, Any]) -> list[Any]:
        """What every function returns; those that are async wait at the same time."""
        returned: list[Any] = []
        try:
            for name, function, (accepted, _) in zip(
                self.names, self.functions, self._accepted, strict=True
            ):
                chosen = arguments.keys() if accepted is None else accepted & arguments.keys()
                # Lists of its own: a function that changes them changes nothing for the next.
                own = {key: list(arguments[key]) for key in chosen}
                with _absent_columns_named(name, arguments):
                    returned.append(function(**own))
        except BaseException:
            for result in returned:
                if inspect.iscoroutine(result):
                    result.close()
            raise
        waiting = [
            _awaited(name, result, arguments)
            for name, result in zip(self.names, returned, strict=True)
            if inspect.isawaitable(result)
        ]
        if not waiting:
            return returned
        self._loop = self._loop or _Loop()
        done = iter(self._loop.results(waiting))
        return [next(done) if inspect.isawaitable(result) else result for result in returned]


async def _awaited(name: str, result: Awaitable[Any], arguments: Mapping[str, Any]) -> Any:
    with _absent_columns_named(name, arguments):
        return await result


@contextmanager
def _absent_columns_named(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a KeyError of a name that is no column becomes a DataError."""
    try:
        yield
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in arguments:
            raise
        raise DataError(
            f"the reward function {name!r} raised KeyError: {key!r}; if that is a column, the "
            f"examples have {sorted(arguments.keys() - set(GIVEN))} beside the prompt: add it to "
            "every example"
        ) from error


class _Loop:
    """An event loop in a thread of its own.

    One for the objective's life, since a client session that a reward keeps is bound to its loop;
    in a thread, since a notebook's own thread has a loop that runs already.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="zo_adapt-async")
        thread.start()
        weakref.finalize(self, _stop, self._loop, thread)

    def results(self, waiting: Sequence[Awaitable[Any]]) -> list[Any]:
        """The results in order; all have ended, also when one raised, which is then raised here."""

        async def gathered() -> list[Any]:
            return await asyncio.gather(*waiting, return_exceptions=True)

        future = asyncio.run_coroutine_threadsafe(gathered(), self._loop)
        try:
            results = future.result()
        except BaseException:
            future.cancel()
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


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
