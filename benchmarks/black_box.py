"""Which method for which function of 5 to 50 variables: ours beside SciPy's own.

    python benchmarks/black_box.py

A bowl with axes of unlike curvature (condition 10) in a box, x0 half its width from the answer, 60
calls a variable; exact, with noise of a tenth of the start's value, and with steps. Printed is the
value without noise at the answer, as a share of the start's, the median of five seeds. nevergrad
and cma are asked where they are installed.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.optimize import minimize

from zo_adapt import scipy_method

CALLS, CONDITION = 60, 10.0
Function = Callable[[np.ndarray], float]


def bowl(size: int) -> Function:
    """A quadratic with its answer at 0.75."""
    curvature = np.geomspace(1.0, CONDITION, size)
    return lambda x: float((curvature * (np.asarray(x) - 0.75) ** 2).mean())


def seen(kind: str, true: Function, size: int, seed: int) -> Function:
    """The function as the method sees it."""
    random, scale = np.random.default_rng(seed), true(np.full(size, 0.25))
    if kind == "noisy":
        return lambda x: true(x) + 0.1 * scale * random.normal()
    if kind == "steps":
        return lambda x: round(true(x) / (0.02 * scale)) * 0.02 * scale
    return true


def ours(
    function: Function, size: int, seed: int, answer: str = "x", name: str = "mezo"
) -> np.ndarray:
    method = scipy_method(name, maxfev=CALLS * size, seed=seed, displacement=0.5)
    found: Any = minimize(function, np.full(size, 0.25), bounds=[(0.0, 1.0)] * size, method=method)
    answers: np.ndarray = found[answer]
    return answers


def of_scipy(name: str) -> Callable[[Function, int, int], np.ndarray]:
    def run(function: Function, size: int, seed: int) -> np.ndarray:
        found = minimize(
            function,
            np.full(size, 0.25),
            bounds=[(0.0, 1.0)] * size,
            method=name,
            options={"maxfev": CALLS * size},
        )
        return np.asarray(found.x)

    return run


def of_nevergrad(function: Function, size: int, seed: int) -> np.ndarray:
    import nevergrad

    space = nevergrad.p.Array(init=np.full(size, 0.25)).set_bounds(0.0, 1.0)
    space.random_state.seed(seed)
    method = nevergrad.optimizers.NGOpt(parametrization=space, budget=CALLS * size)
    return np.asarray(method.minimize(function).value)


def of_cma(function: Function, size: int, seed: int) -> np.ndarray:
    import cma

    options = {"bounds": [0, 1], "maxfevals": CALLS * size, "seed": seed + 1, "verbose": -9}
    return np.asarray(cma.fmin2(function, np.full(size, 0.25), 0.2, options)[1].result.xfavorite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="methods (default: all that are installed)")
    given = parser.parse_args()
    methods: dict[str, Any] = {
        "mezo": ours,
        "mezo, x_mean": lambda *a: ours(*a, answer="x_mean"),
        "mezo-svrg": lambda *a: ours(*a, name="mezo-svrg"),
        "COBYQA": of_scipy("COBYQA"),
        "Nelder-Mead": of_scipy("Nelder-Mead"),
        "Powell": of_scipy("Powell"),
    }
    for name, method in {"nevergrad": of_nevergrad, "cma": of_cma}.items():
        if importlib.util.find_spec(name):
            methods["NGOpt" if name == "nevergrad" else "CMA-ES"] = method
    print(f"{'':20}" + "".join(f"{f'{kind} d={d}':>14}" for d in given.sizes for kind in KINDS))
    for title, method in methods.items():
        if given.only and title not in given.only:
            continue
        cells = []
        for size in given.sizes:
            true = bowl(size)
            start = true(np.full(size, 0.25))
            for kind in KINDS:
                ends = [
                    true(method(seen(kind, true, size, seed), size, seed)) / start
                    for seed in range(given.seeds)
                ]
                cells.append(f"{statistics.median(ends):>14.2g}")
        print(f"{title:20}" + "".join(cells), flush=True)


KINDS = ("exact", "noisy", "steps")

if __name__ == "__main__":
    main()
