"""Which method for which function of 5 to 100 variables: ours beside SciPy's, CMA-ES and NGOpt.

    python benchmarks/black_box.py --output benchmarks/results/black_box.json

Four functions in a box, begun at a random point of it: Rosenbrock's valley, a quadratic with axes
in random directions (condition 1000), a bowl (condition 10) with additive noise of a tenth of the
start's value, and the same bowl in steps of a fiftieth of it. Every method may make the same number
of calls, 20 or 200 for each variable, and has its own defaults, CMA-ES its step of a fifth of the
box. Kept is the value without noise at the answer, as a share of the start's; a run that is not
done after --seconds of processor time is stopped. nevergrad and cma are asked where they are
installed. What lies in --output already is not run again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.optimize import minimize

from zo_adapt import scipy_method

Function = Callable[[np.ndarray], float]
BOX = 2.0
KINDS = ("valley", "ill", "noisy", "steps")
STOPPED = -1.0
"""In place of a value: the run took too long."""


class Stopped(Exception):
    """A method is not done in time."""


def problem(kind: str, size: int, seed: int) -> tuple[Function, np.ndarray]:
    """A function without its noise, and where to begin."""
    random = np.random.default_rng([seed, size])
    start, answer = random.uniform(-1, 1, size), random.uniform(-1, 1, size)
    if kind == "valley":
        return rosenbrock, start
    turn = np.linalg.qr(random.normal(size=(size, size)))[0] if kind == "ill" else np.eye(size)
    curvature = np.geomspace(1.0, 1e3 if kind == "ill" else 10.0, size)
    return lambda x: float((curvature * (turn @ (np.asarray(x) - answer)) ** 2).mean()), start


def rosenbrock(x: np.ndarray) -> float:
    """Smallest at ones, along a curved valley."""
    x = np.asarray(x)
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


class Seen:
    """The function as the method sees it, for so many calls and so many seconds."""

    def __init__(
        self, kind: str, true: Function, start: np.ndarray, seed: int, seconds: float
    ) -> None:
        self.kind, self.true, self.scale = kind, true, true(start)
        self.random, self.calls = np.random.default_rng(seed), 0
        self.end = time.process_time() + seconds

    def __call__(self, x: np.ndarray) -> float:
        if time.process_time() > self.end:
            raise Stopped
        self.calls += 1
        value = self.true(x)
        if self.kind == "noisy":
            return value + 0.1 * self.scale * self.random.normal()
        step = 0.02 * self.scale
        return round(value / step) * step if self.kind == "steps" else value


def ours(name: str, answer: str = "x") -> Callable[..., np.ndarray]:
    def run(function: Seen, start: np.ndarray, calls: int, seed: int) -> np.ndarray:
        key = (name, function.kind, start.size, calls, seed)
        if key not in _FOUND:  # both answers are of one run
            method = scipy_method(name, maxfev=calls, seed=seed)
            bounds = [(-BOX, BOX)] * start.size
            _FOUND[key] = minimize(function, start, bounds=bounds, method=method)
        return np.asarray(_FOUND[key][answer])

    return run


_FOUND: dict[Any, Any] = {}


def of_scipy(name: str) -> Callable[..., np.ndarray]:
    def run(function: Seen, start: np.ndarray, calls: int, seed: int) -> np.ndarray:
        bounds = [(-BOX, BOX)] * start.size
        found = minimize(function, start, bounds=bounds, method=name, options={"maxfev": calls})
        return np.asarray(found.x)

    return run


def of_nevergrad(function: Seen, start: np.ndarray, calls: int, seed: int) -> np.ndarray:
    import nevergrad

    space = nevergrad.p.Array(init=start).set_bounds(-BOX, BOX)
    space.random_state.seed(seed)
    method = nevergrad.optimizers.NGOpt(parametrization=space, budget=calls)
    return np.asarray(method.minimize(function).value)


def of_cma(function: Seen, start: np.ndarray, calls: int, seed: int) -> np.ndarray:
    import cma

    options = {"bounds": [-BOX, BOX], "maxfevals": calls, "seed": seed + 1, "verbose": -9}
    return np.asarray(cma.fmin2(function, start, 0.4 * BOX, options)[1].result.xfavorite)


METHODS: dict[str, Callable[..., np.ndarray]] = {
    "mezo": ours("mezo"),
    "mezo, x_mean": ours("mezo", "x_mean"),
    "mezo-svrg": ours("mezo-svrg"),
    "COBYQA": of_scipy("COBYQA"),
    "Powell": of_scipy("Powell"),
    "NGOpt": of_nevergrad,
    "CMA-ES": of_cma,
}


def share_left(name: str, kind: str, size: int, calls: int, seed: int, seconds: float) -> float:
    """The true value at a method's answer, as a share of the start's."""
    true, start = problem(kind, size, seed)
    function = Seen(kind, true, start, seed, seconds)
    try:
        found = METHODS[name](function, start, calls * size, seed)
    except Stopped:
        return STOPPED
    return true(found) / true(start)


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, int, int, int]]:
    for size in given.sizes:
        for calls in given.calls:
            for kind in given.kinds:
                for name in given.only:
                    for seed in range(given.seeds):
                        yield name, kind, size, calls, seed


def table(found: dict[str, float], given: argparse.Namespace) -> str:
    """Medians over the seeds, as a table of Markdown for each budget."""
    lines = []
    for calls in given.calls:
        heads = [f"{kind}, d = {' / '.join(map(str, given.sizes))}" for kind in given.kinds]
        lines += [f"{calls} calls a variable", "| |" + " | ".join(heads) + " |"]
        for name in given.only:
            row = []
            for kind in given.kinds:
                ends = []
                for size in given.sizes:
                    keys = [f"{name}|{kind}|{size}|{calls}|{s}" for s in range(given.seeds)]
                    each = [found[key] for key in keys if key in found]
                    bad = not each or STOPPED in each
                    ends.append("-" if bad else f"{statistics.median(each):.2g}")
                row.append(" / ".join(ends))
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--calls", type=int, nargs="+", default=[20, 200], help="for each variable")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(METHODS), help="methods")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    is_there = given.output is not None and given.output.exists()
    found: dict[str, float] = json.loads(given.output.read_text()) if is_there else {}
    for cell in cells(given):
        key = "|".join(map(str, cell))
        if key in found:
            continue
        try:
            found[key] = share_left(*cell, given.seconds)
        except ModuleNotFoundError as error:
            print(f"{cell[0]}: {error}", file=sys.stderr)
            continue
        if given.output is not None:
            given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, given))


if __name__ == "__main__":
    main()
