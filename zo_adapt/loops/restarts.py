"""Runs of an optimizer on a plain function: one, or several from the best point so far."""

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from zo_adapt.errors import NonFiniteObjectiveError, OptionError, StepTooLargeError
from zo_adapt.evaluation.failures import Failures, is_failed_simulation
from zo_adapt.loops.ask_tell import SKIPPED, AskTell, Best
from zo_adapt.loops.given_losses import number
from zo_adapt.loops.result import StopReason
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.term import MEASUREMENT

Mapped = Callable[[Callable[[np.ndarray], Any], Sequence[np.ndarray]], Iterable[Any]]
"""A function like ``map``."""
NOT_MOVED = 4
NO_STEP = 1
"""As scipy numbers a run that its maximum of calls has ended."""
STATUS = {
    StopReason.MAX_STEPS: 0,
    StopReason.MAX_QUERIES: 0,
    StopReason.NON_FINITE: 2,
    StopReason.STEP_TOO_LARGE: 3,
    StopReason.CALLBACK: 99,  # scipy's own number for it
}


@dataclass
class Ended:
    """One run, and the function at its last point."""

    asker: AskTell
    x: np.ndarray
    fun: float
    status: int
    message: str


class Runs:
    """A run, and those that begin anew from the best point of the ones before."""

    def __init__(
        self,
        optimizer: ZerothOrder,
        loop: Mapping[str, Any],
        bounds: Any,
        fun: "Counted",
        mapping: Mapped,
    ) -> None:
        self._optimizer, self._loop, self._bounds = optimizer, loop, bounds
        self._fun, self._mapping = fun, mapping
        self._ended: list[Ended] = []

    @property
    def best(self) -> Ended:
        """The run whose last point is the best."""
        return min(self._ended, key=lambda run: run.fun if np.isfinite(run.fun) else np.inf)

    @property
    def best_candidate(self) -> Best | None:
        """The best of all that were called for."""
        found = [run.asker.best for run in self._ended if run.asker.best is not None]
        ends = [Best(run.x, run.fun) for run in self._ended if np.isfinite(run.fun)]
        return min([*found, *ends], key=lambda best: best.value, default=None)

    @property
    def steps(self) -> int:
        """Of all runs."""
        return sum(run.asker.steps for run in self._ended)

    def all(self, x0: Any, notify: Callable[[AskTell, float], None]) -> None:
        """Run until the calls are used up, or something else than that ends a run."""
        start = np.asarray(x0, dtype=np.float64)
        for count in range(self._loop["restarts"] + 1):
            if count and self._loop["maxiter"] == self.steps:
                break
            asker = self._asker(start, count)
            reason = _run(asker, self._fun, self._mapping, notify)
            status, message = _outcome(asker, reason, self._loop["maxfev"])
            value = self._fun(asker.x)
            if status == 0 and np.array_equal(asker.x, start):
                status = NOT_MOVED
                message = "nothing moved: fun gave equal values, or none, wherever it was called"
            elif status == 0 and not np.isfinite(value):
                status = STATUS[StopReason.NON_FINITE]
                message = f"fun is {value} at the last point; x_best and x_mean are others"
            self._ended.append(Ended(asker, asker.x, value, status, message))
            if status != 0:
                break
            start = self.best.x

    def _asker(self, start: np.ndarray, count: int) -> AskTell:
        steps, calls = self._loop["maxiter"], self._loop["maxfev"]
        runs = self._loop["restarts"] + 1 - count
        if steps is None and calls is None:
            calls = 1000 * start.size
        # One call of each run is left for fun at its last x.
        return AskTell(
            self._optimizer,
            start,
            max_steps=None if steps is None else max(1, (steps - self.steps) // runs),
            max_queries=None if calls is None else max(0, (calls - self._fun.calls) // runs - 1),
            seed=self._loop["seed"] + count,
            noise=self._loop["noise"],
            bounds=self._bounds,
            units=self._loop["units"],
            on_nonfinite=self._loop["on_nonfinite"],
        )


def _run(
    asker: AskTell,
    fun: "Counted",
    mapping: Mapped,
    notify: Callable[[AskTell, float], None],
) -> StopReason:
    """Until the budget is used up, or the reason why not."""
    while candidates := asker.ask():
        values = fun.all(candidates, mapping)
        try:
            record = asker.tell(values)
        except NonFiniteObjectiveError as error:
            if isinstance(error.__cause__, Exception) and asker.best is None:
                raise error.__cause__ from None  # it has no value anywhere: a mistake, more likely
            return StopReason.NON_FINITE
        except StepTooLargeError:
            return StopReason.STEP_TOO_LARGE
        if record.kind in (MEASUREMENT, SKIPPED):
            continue
        try:
            notify(asker, record.value)
        except StopIteration:
            return StopReason.CALLBACK
    if asker.stop_reason is None:
        raise RuntimeError("ask() ended without a reason")
    return asker.stop_reason


def _outcome(asker: AskTell, reason: StopReason, maxfev: int | None) -> tuple[int, str]:
    """Status and message; a run that could not make one step is no success."""
    if reason is StopReason.MAX_QUERIES and asker.steps == 0:
        few = f"maxfev={maxfev} is less than the calls of one step and of the answer"
        failed = f"no step was made in {asker.queries} calls: values of fun were not finite"
        return NO_STEP, few if asker.queries == 0 else failed
    # scipy's own words where it has some
    stopped = reason is StopReason.CALLBACK
    return STATUS[reason], "`callback` raised `StopIteration`." if stopped else str(reason)


@contextmanager
def mapping_over(workers: Any, fun: "Counted") -> Iterator[Mapped]:
    """A function like ``map``: as given, or over processes.

    Raises:
        OptionError: Neither a number of processes nor such a function; or ``fun`` cannot be sent.
    """
    if callable(workers):
        yield workers
        return
    if not isinstance(workers, int) or isinstance(workers, bool) or workers == 0 or workers < -1:
        raise OptionError(f"workers={workers!r}; choose processes >= 1, -1, or a function like map")
    if workers == 1:
        yield map
        return
    fun.check_sendable()
    # Not a fork of this process: it may have threads, torch's among them.
    with ProcessPoolExecutor(
        None if workers == -1 else workers, mp_context=get_context("spawn")
    ) as pool:
        yield pool.map


class Counted:
    """``fun`` with its ``args``, counted.

    Args:
        fun: As given to scipy.
        args: More arguments of it.
        forgives: Whether an error that it raises is given in the place of its value.
    """

    def __init__(
        self, fun: Callable[..., Any], args: tuple[Any, ...], *, forgives: bool = False
    ) -> None:
        self.calls = 0
        self._forgives, self._failures = forgives, Failures()
        self._bound = _Bound(fun, args, forgives)

    def __call__(self, x: np.ndarray) -> float:
        """The value at one point; NaN where there is none."""
        (value,) = self.all([x], map)
        return math.nan if value is None or isinstance(value, Exception) else value

    def check_sendable(self) -> None:
        """Refuse what other processes cannot be given, before any work."""
        try:
            pickle.dumps(self._bound)
        except Exception as error:
            raise OptionError(
                f"fun and its args cannot be sent to other processes ({error!r:.120}); define fun "
                "at the top of a module, or give workers=1 or a function like map"
            ) from error

    def all(self, points: Sequence[np.ndarray], mapping: Mapped) -> list[float | Exception | None]:
        """The values at several points, wherever they are computed; errors where it forgives."""
        self.calls += len(points)
        # map would take a StopIteration of ``fun`` for its own end.
        bound = self._bound
        found = [bound.value(x) for x in points] if mapping is map else mapping(bound, points)
        return [self._read(value) for value in found]

    def _read(self, value: Any) -> float | Exception | None:
        if self._forgives and isinstance(value, Exception):
            self._failures.add(value)
            return value
        return None if self._forgives and value is None else number(value)


@dataclass
class _Bound:
    """``fun`` of x alone; unlike a closure it can be sent to another process."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    forgives: bool = False

    def value(self, x: np.ndarray) -> Any:
        """The value, or the error where it forgives."""
        try:
            return self.fun(x, *self.args)
        except Exception as error:
            if not self.forgives or not is_failed_simulation(error):
                raise
            return error

    def __call__(self, x: np.ndarray) -> Any:
        """The same as another process can send it back: some errors cannot be pickled."""
        found = self.value(x)
        if isinstance(found, Exception):
            try:
                pickle.loads(pickle.dumps(found))
            except Exception:
                return RuntimeError(repr(found))
        return found
