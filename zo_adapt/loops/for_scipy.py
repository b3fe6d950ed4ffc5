"""The optimizers as methods of ``scipy.optimize.minimize``."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from zo_adapt.errors import NonFiniteObjectiveError, OptionError, StepTooLargeError
from zo_adapt.loops.ask_tell import AskTell, number
from zo_adapt.loops.result import StopReason
from zo_adapt.optimizers.named import optimizer_named
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.options import at_least_one
from zo_adapt.step import MEASUREMENT

LOOP: dict[str, Any] = {
    "maxiter": None,
    "maxfev": None,
    "seed": 0,
    "disp": False,
    "noise": "gaussian",
}
NO_STEP = 1
"""As scipy numbers a run that its maximum of calls has ended."""
STATUS = {
    StopReason.MAX_STEPS: 0,
    StopReason.MAX_QUERIES: 0,
    StopReason.NON_FINITE: 2,
    StopReason.STEP_TOO_LARGE: 3,
    StopReason.CALLBACK: 99,  # scipy's own number for it
}


def scipy_method(optimizer: str | ZerothOrder = "mezo", **options: Any) -> Callable[..., Any]:
    """A ``method`` for ``scipy.optimize.minimize``: for noise, steps and plateaus.

    Args:
        optimizer: "mezo", "mezo-svrg", "zo-svrg", or an optimizer of this package.
        options: ``maxiter`` (steps), ``maxfev`` (calls of ``fun``; 1000 for each variable if
            neither is given), ``seed``, ``disp``, ``noise``, and, for an optimizer by name, its own
            (``displacement``: about how far the answer may be from ``x0``; ``shaping="ranks"``
            for counts and outliers; ``lr``, ``perturbation_scale``, ...). The ``options`` of
            ``scipy.optimize.minimize`` add to these and win.

    Returns:
        The method. It honours ``callback`` in both signatures, StopIteration and ``args``; ``jac``
        and ``hess`` are left unused with scipy's warning. Of the OptimizeResult, ``nfev`` counts
        every call of ``fun``, the last one, for ``fun`` at ``x``, included. The ``fun`` that a
        callback sees is the step's own estimate and costs nothing.

    Raises:
        OptionError: Unknown options (``tol`` is one: there is none to test); bounds, constraints.

    Example:
        >>> from scipy.optimize import minimize
        >>> result = minimize(lambda x: ((x - 3) ** 2).sum(), [0.0, 0.0],
        ...                   method=scipy_method(maxfev=900))
        >>> bool(abs(result.x - 3).max() < 0.1), result.nfev, result.nit
        (True, 893, 102)
    """
    return _Method(optimizer, options)


class _Method:
    """What scipy calls; an object, so that it can be pickled."""

    def __init__(self, optimizer: str | ZerothOrder, options: dict[str, Any]) -> None:
        self.optimizer, self.options = optimizer, options
        self._settings({})  # what is wrong with the options is said here

    def __call__(
        self,
        fun: Callable[..., Any],
        x0: Any,
        args: tuple[Any, ...] = (),
        *,
        bounds: Any = None,
        constraints: Any = (),
        callback: Callable[..., Any] | None = None,
        jac: Any = None,
        hess: Any = None,
        hessp: Any = None,
        **options: Any,
    ) -> Any:
        from scipy.optimize import OptimizeResult

        loop, optimizer = self._settings(options)
        _refuse(bounds=bounds, constraints=constraints)
        _warn_unused(jac=jac, hess=hess, hessp=hessp)
        counted = _Counted(fun, args)
        asker = _asker(optimizer, x0, loop)
        reason = _run(asker, counted, _notifier(callback, counted))
        status, message = _outcome(asker, reason, loop["maxfev"])
        result = OptimizeResult(
            x=asker.x,
            fun=counted(asker.x),
            nfev=counted.calls,
            nit=asker.steps,
            status=status,
            success=status == 0,
            message=message,
        )
        if loop["disp"]:
            print(_report(result))
        return result

    def _settings(self, more: dict[str, Any]) -> tuple[dict[str, Any], ZerothOrder]:
        given = self.options | more
        loop = {name: given.pop(name, default) for name, default in LOOP.items()}
        for name in ("maxiter", "maxfev"):
            if loop[name] is not None:
                at_least_one(name, loop[name])
        if isinstance(self.optimizer, str):
            return loop, optimizer_named(self.optimizer, given)
        if given:
            raise OptionError(f"{sorted(given)} with an optimizer; give it to the optimizer")
        return loop, self.optimizer


def _asker(optimizer: ZerothOrder, x0: Any, loop: dict[str, Any]) -> AskTell:
    start = np.asarray(x0, dtype=np.float64)
    steps, calls = loop["maxiter"], loop["maxfev"]
    if steps is None and calls is None:
        calls = 1000 * start.size
    return AskTell(
        optimizer,
        start,
        max_steps=steps,
        max_queries=None if calls is None else calls - 1,  # one is left for fun at the final x
        seed=loop["seed"],
        noise=loop["noise"],
    )


def _run(asker: AskTell, fun: "_Counted", notify: Callable[[AskTell, float], None]) -> StopReason:
    """Until the budget is used up, or the reason why not."""
    while candidates := asker.ask():
        values = [fun(candidate) for candidate in candidates]
        try:
            record = asker.tell(values)
        except NonFiniteObjectiveError:
            return StopReason.NON_FINITE
        except StepTooLargeError:
            return StopReason.STEP_TOO_LARGE
        if record.kind == MEASUREMENT:
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
        return NO_STEP, f"maxfev={maxfev} is less than the calls of one step and of the answer"
    # scipy's own words where it has some
    stopped = reason is StopReason.CALLBACK
    return STATUS[reason], "`callback` raised `StopIteration`." if stopped else str(reason)


class _Counted:
    """``fun`` with its ``args``, counted."""

    def __init__(self, fun: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.fun, self.args, self.calls = fun, args, 0

    def __call__(self, x: np.ndarray) -> float:
        self.calls += 1
        return number(self.fun(x, *self.args))


def _notifier(
    callback: Callable[..., Any] | None, fun: _Counted
) -> Callable[[AskTell, float], None]:
    """The two signatures: ``callback(xk)`` and ``callback(intermediate_result=...)``."""
    from scipy.optimize import OptimizeResult

    def notify(asker: AskTell, value: float) -> None:
        if callback is None:
            return
        if _parameters(callback) == {"intermediate_result"}:
            result = OptimizeResult(x=asker.x, fun=value, nit=asker.steps, nfev=fun.calls)
            callback(intermediate_result=result)
        else:
            callback(asker.x)

    return notify


def _parameters(callback: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(callback).parameters)
    except ValueError:  # a builtin that has no signature
        return set()


def _refuse(**limits: Any) -> None:
    for name, limit in limits.items():
        if limit is not None and not (isinstance(limit, list | tuple) and len(limit) == 0):
            raise OptionError(
                f"{name}={limit!r}: this method has none; let fun clip or transform its argument"
            )


def _warn_unused(**derivatives: Any) -> None:
    for name, given in derivatives.items():
        if given is not None:
            warnings.warn(
                f"This method does not use derivative information ({name}).",
                RuntimeWarning,
                stacklevel=4,
            )


def _report(result: Any) -> str:
    return (
        f"{result.message}\n"
        f"         Current function value: {result.fun:f}\n"
        f"         Iterations: {result.nit:d}\n"
        f"         Function evaluations: {result.nfev:d}"
    )
