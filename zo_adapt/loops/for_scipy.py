"""The optimizers as methods of ``scipy.optimize.minimize``."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from zo_adapt.errors import OptionError
from zo_adapt.loops.ask_tell import AskTell
from zo_adapt.loops.restarts import Counted, Runs, mapping_over
from zo_adapt.optimizers.named import optimizer_named
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.options import at_least_one, integer

LOOP: dict[str, Any] = {
    "maxiter": None,
    "maxfev": None,
    "seed": 0,
    "disp": False,
    "noise": "gaussian",
    "units": None,
    "on_nonfinite": "stop",
    "restarts": 0,
    "workers": 1,
}


def scipy_method(optimizer: str | ZerothOrder = "mezo", **options: Any) -> Callable[..., Any]:
    """A ``method`` for ``scipy.optimize.minimize``: for noise, steps and plateaus.

    Args:
        optimizer: "mezo", "mezo-svrg", "zo-svrg", or an optimizer of this package.
        options: ``maxiter`` (steps), ``maxfev`` (calls of ``fun``; 1000 for each variable if
            neither is given), ``seed``, ``disp``, ``noise``; ``units`` and ``on_nonfinite`` of
            ``AskTell``; ``restarts`` (so many more runs from the best point of those before, the
            calls divided among all), ``workers`` (processes that ``fun`` is called in, -1 for all
            cores, or a function like ``map``); and, for an optimizer by name, its own
            (``displacement``: about how far the answer may be from ``x0``; ``shaping="ranks"``
            for counts and outliers; ``lr``, ``perturbation_scale``, ...). The ``options`` of
            ``scipy.optimize.minimize`` add to these and win.

    Returns:
        The method. It honours ``bounds`` (by reflection), ``callback`` in both signatures,
        StopIteration and ``args``; ``jac`` and ``hess`` are left unused with scipy's warning. Of
        the OptimizeResult, ``nfev`` counts every call of ``fun``, the last one, for ``fun`` at
        ``x``, included. The ``fun`` that a callback sees is the step's own estimate and costs
        nothing. Beside ``x``, the last point,
        there are ``x_best`` and ``fun_best``, the best of all that were called for (of a noisy
        function a lucky value), and ``x_mean``, the mean over the last quarter. ``success`` is
        False also where nothing moved.

    Raises:
        OptionError: Unknown options (``tol`` is one: there is none to test); constraints.

    Example:
        >>> from scipy.optimize import minimize
        >>> result = minimize(lambda x: ((x - 3) ** 2).sum(), [0.0, 0.0],
        ...                   method=scipy_method(maxfev=900))
        >>> bool(abs(result.x - 3).max() < 0.1), result.nfev, result.nit
        (True, 898, 105)
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
        _refuse(constraints=constraints)
        _warn_unused(jac=jac, hess=hess, hessp=hessp)
        counted = Counted(fun, args, forgives=loop["on_nonfinite"] != "stop")
        with mapping_over(loop["workers"], counted) as mapping:
            runs = Runs(optimizer, loop, bounds, counted, mapping)
            runs.all(x0, _notifier(callback, counted))
        best, found = runs.best, runs.best_candidate
        result = OptimizeResult(
            x=best.x,
            fun=best.fun,
            x_best=best.x if found is None else found.x,
            fun_best=best.fun if found is None else found.value,
            x_mean=best.asker.averaged,
            nfev=counted.calls,
            nit=runs.steps,
            status=best.status,
            success=best.status == 0,
            message=best.message,
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
        if integer("restarts", loop["restarts"]) < 0:
            raise OptionError(f"restarts={loop['restarts']!r}; choose an integer >= 0")
        if isinstance(self.optimizer, str):
            return loop, optimizer_named(self.optimizer, given)
        if given:
            raise OptionError(f"{sorted(given)} with an optimizer; give it to the optimizer")
        return loop, self.optimizer


def _notifier(
    callback: Callable[..., Any] | None, fun: Counted
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
