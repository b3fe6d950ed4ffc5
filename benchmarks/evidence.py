"""What holds of the paper's experiments and claims: small, repeatable, with seeds.

Each piece is a set of runs; a run that is in benchmarks/results/evidence.json is not made again, so
that pieces made on several days, or on several machines, add up. ``--report`` writes the tables and
figures of docs/evidence.md.

    python benchmarks/evidence.py --quick               # the reduced form: make evidence
    python benchmarks/evidence.py --pieces "least squares" --processes 2
    python benchmarks/evidence.py --report
"""

import argparse
import json
import math
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from evidence_methods import ABLATIONS, METHODS
from evidence_problems import PROBLEMS, Problem, gradient_floor, moments

from zo_adapt import MeZO, MeZOSVRG, minimize

RESULTS = Path(__file__).parent / "results" / "evidence.json"
SEEDS, TUNING = (0, 1, 2), 9
"""Rates are chosen on a seed, that is other data, weights and directions, that no table counts."""


class Run(NamedTuple):
    """One run of a method.

    Args:
        piece: Which question it belongs to.
        problem, method: By name.
        lr: The rate; None: the method finds its own step.
        batch_size: Rows of a minibatch.
        queries, steps: The budget, one of the two.
        seed: Of data, weights and directions.
    """

    piece: str
    problem: str
    method: str
    lr: float | None
    batch_size: int
    queries: int | None
    steps: int | None
    seed: int

    @property
    def key(self) -> str:
        """What tells runs apart."""
        return json.dumps(self)


def optimizer_of(run: Run) -> Any:
    """The optimizer of a run."""
    if run.method == "MeZO()":
        return MeZO()
    if run.method == "MeZOSVRG()":
        return MeZOSVRG()
    return {**METHODS, **ABLATIONS}[run.method](run.lr or math.nan)


def result_of(run: Run) -> dict[str, Any]:
    """Figures at the end of a run; a diverged one has an infinite loss."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    if run.piece == "moments":
        found = moments(run.problem, run.seed)
    elif run.piece == "rate of convergence":
        found = gradient_floor(int(run.problem.split()[-1]), run.steps or 0, run.seed)
    else:
        problem: Problem = PROBLEMS[run.problem](run.seed)
        result = minimize(
            problem.objective,
            problem.view,
            problem.data,
            optimizer_of(run),
            batch_size=run.batch_size,
            max_queries=run.queries,
            max_steps=run.steps,
            seed=run.seed,
            progress=False,
        )
        found = problem.measure() | {"steps": result.steps, "queries": result.queries}
        found |= {"stopped": result.stop_reason.name}
    figures = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in found.items()
    }
    return figures | {"seconds": round(time.process_time() - start, 2)}


GRIDS = {
    "least squares": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "MNIST perceptron": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
QUERIES = {"least squares": 100_000, "MNIST perceptron": 200_000}
STEPS = {"least squares": 2_000, "MNIST perceptron": 2_000}
OWN = ("MeZO()", "MeZOSVRG()")
SLOW = ("ZO-SVRG (Algorithm 2)", "ZO-SAGA")
"""One sample a forward: on least squares alone."""


def tuned(results: dict[str, Any], run: Run) -> float | None:
    """The rate with the smallest training loss on the seed for tuning; None: not all are there."""
    losses = {}
    for lr in GRIDS[run.problem]:
        found = results.get(run._replace(lr=lr, seed=TUNING).key)
        if found is None:
            return None
        losses[lr] = found.get("training loss") or math.inf
    return min(losses, key=losses.__getitem__)


def comparisons(quick: bool) -> Iterator[Run]:
    """Every method of the papers, at equal queries and at equal steps; its grid on one seed."""
    problems = ("least squares",) if quick else GRIDS
    for problem in problems:
        slow = () if problem == "least squares" and not quick else SLOW
        methods = [method for method in METHODS if method not in slow]
        for method in methods:
            yield Run("methods", problem, method, math.nan, 32, QUERIES[problem], None, TUNING)
            if not quick:
                yield Run("methods", problem, method, math.nan, 32, None, STEPS[problem], TUNING)
    if quick:
        return
    for method in ABLATIONS:
        yield Run("ablations", "least squares", method, math.nan, 32, 200_000, None, TUNING)
    for batch_size in (64, 128):
        for method in (
            "MeZO (Algorithm 1 of MeZO)",
            "MeZO-SVRG as printed",
            "MeZO-SVRG, one rate, shared direction",
            "FO-SGD",
        ):
            yield Run(
                "batch sizes", "MNIST perceptron", method, math.nan, batch_size, 200_000, None,
                TUNING,
            )  # fmt: skip


def without_rates(quick: bool) -> Iterator[Run]:
    """Runs that have no rate to choose."""
    for seed in SEEDS:
        for problem in ("least squares",) if quick else GRIDS:
            for method in OWN:
                yield Run("methods", problem, method, None, 32, QUERIES[problem], None, seed)
                if not quick:
                    yield Run("methods", problem, method, None, 32, None, STEPS[problem], seed)
        for dimensions in (10, 100) if quick else (10, 100, 1000):
            yield Run("moments", f"d = {dimensions}", "SPSA", None, 1, None, None, seed)
            for steps in (100, 1000) if quick else (100, 1000, 10_000):
                yield Run(
                    "rate of convergence", f"d = {dimensions}", "MeZO", None, 1, None, steps, seed
                )


def open_runs(results: dict[str, Any], quick: bool, pieces: str) -> list[Run]:
    """What is to be done now: grids first, then, where a grid is done, the other seeds."""
    wanted = list(without_rates(quick))
    for run in comparisons(quick):
        lr = tuned(results, run)
        if lr is None:
            wanted += [run._replace(lr=one) for one in GRIDS[run.problem]]
        else:
            wanted += [run._replace(lr=lr, seed=seed) for seed in SEEDS]
    return [r for r in wanted if r.key not in results and pieces in f"{r.piece}: {r.problem}"]


def load() -> dict[str, Any]:
    """The results so far."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def save(results: dict[str, Any]) -> None:
    """Keep the results, with what made the last of them."""
    made_by = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    RESULTS.parent.mkdir(exist_ok=True)
    scratch = RESULTS.with_suffix(".new")
    scratch.write_text(json.dumps({"made by": made_by, "runs": results}, indent=0, sort_keys=True))
    os.replace(scratch, RESULTS)


def work(arguments: argparse.Namespace) -> None:
    """Make what is missing, until it is all there or the time is over."""
    results, deadline = load(), time.monotonic() + arguments.deadline
    while runs := open_runs(results, arguments.quick, arguments.pieces):
        context = get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
            futures = {pool.submit(result_of, run): run for run in runs}
            for done, future in enumerate(as_completed(futures), 1):
                run = futures[future]
                try:
                    results[run.key] = future.result()
                except Exception:
                    traceback.print_exc()
                    pool.shutdown(cancel_futures=True)
                    raise
                save(results)
                print(f"{done}/{len(runs)}", *run, results[run.key], flush=True)
                if time.monotonic() > deadline:
                    pool.shutdown(cancel_futures=True)
                    return


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="least squares and theory alone")
    parser.add_argument("--pieces", default="", help="part of 'piece: problem'")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report:
        work(arguments)
    from evidence_report import report

    report(load())


if __name__ == "__main__":
    main()
