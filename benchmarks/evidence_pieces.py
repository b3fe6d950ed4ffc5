"""What benchmarks/evidence.py runs: every method of every cell, its grid first, then the seeds."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evidence_methods import COORDINATES, OWN
from evidence_packages import GRIDS as OF_PACKAGES
from evidence_plan import (
    DIGITS,
    GRIDS,
    LANGUAGE,
    LS,
    PLAN,
    RATES,
    SEEDS,
    TIMED,
    TUNING,
    WATCHED,
    Run,
)


def grid_of(run: Run) -> Sequence[float]:
    """The rates that every method of a problem is tried with."""
    if run.method in COORDINATES:  # few steps along whole gradients: also the rates of the others
        return RATES
    of_piece = GRIDS.get(f"{run.piece}: {run.problem}")
    return OF_PACKAGES.get(run.method) or of_piece or GRIDS.get(run.problem, RATES)


def tuned(results: Mapping[str, Any], run: Run) -> float | None:
    """The rate with the smallest held-out loss on the seed for tuning; None: not all are there."""
    losses = {}
    for lr in grid_of(run):
        found = results.get(run._replace(lr=lr, seed=TUNING).key)
        if found is None:
            return None
        value = found.get("validation")
        losses[lr] = math.inf if value is None else value
    return min(losses, key=losses.__getitem__)


def watched(results: Mapping[str, Any]) -> Iterator[Run]:
    """Runs whose noise is watched, at the rates that were chosen for as many steps."""
    for piece, problem, rows, steps, length in (
        ("methods", LS, 32, 2_000, 2_000),
        ("methods", DIGITS, 32, 1_000, 300),
        ("encoder", "encoder, LoRA", 64, 150, 150),
    ):
        for method, seed in itertools.product(WATCHED, SEEDS):
            run = Run(piece, problem, method, None, rows, None, steps, seed)
            lr = tuned(results, run)
            if lr is not None:
                yield run._replace(piece="variance", lr=lr, steps=length)


def timed(results: Mapping[str, Any]) -> Iterator[Run]:
    """Runs that are read against the clock, at the rates that were chosen.

    Long ones of Algorithm 1 at the rates for as many steps as the papers have.
    """
    for piece, problem, queries, steps, rows in (
        ("methods", DIGITS, 200_000, 1_000, 32),
        ("methods", LS, 100_000, 2_000, 32),
        ("encoder", "encoder, LoRA", 30_000, 150, 64),
    ):
        cell = Run(piece, problem, "", None, rows, None, None, TUNING)
        for method, seed in itertools.product(TIMED if piece == "methods" else LANGUAGE, SEEDS):
            by_steps = "SVRG," in method or "printed" in method
            run = cell._replace(method=method, queries=None if by_steps else queries,
                                steps=steps if by_steps else None)  # fmt: skip
            lr = None if method in OWN else tuned(results, run)
            if lr is not None or method in OWN:
                longer = {"steps": 4 * steps} if by_steps else {"queries": 2 * queries}
                yield run._replace(piece="time", lr=lr, seed=seed, **longer)


def exact(quick: bool) -> Iterator[Run]:
    """Runs that are made again, replayed and resumed."""
    problems = ((LS, 20_000, 32), (DIGITS, 50_000, 32), ("encoder, LoRA", 2_000, 16),
                ("causal LM, LoRA", 2_000, 16))  # fmt: skip
    methods = (("MeZO()", None), ("MeZOSVRG()", None), ("MeZO", 1e-3), ("ZO-SPIDER", 1e-3))
    for (problem, queries, rows), (method, lr) in itertools.product(problems, methods):
        if problem == LS or not quick:
            yield Run("exactness", problem, method, lr, rows, queries, None, SEEDS[0])


def schedule_of(run: Run) -> str | None:
    """How the steps of this library's settings shrink today; None: the method has a rate."""
    return str(OWN[run.method]().apply.schedule_in_force) if run.method in OWN else None


def is_former(run: Run, found: Mapping[str, Any]) -> bool:
    """Whether it is of a default that is no more."""
    return found.get("schedule") != schedule_of(run)


def made(results: Mapping[str, Any], run: Run) -> bool:
    """Whether nothing is left to do."""
    return run.key in results and not is_former(run, results[run.key])


def theory(quick: bool) -> Iterator[Run]:
    """Runs that have no rate to choose."""
    horizons = (100, 1000)
    for seed, d in itertools.product(SEEDS, (10, 100) if quick else (10, 100, 1000)):
        of = f"d = {d}"
        yield Run("moments", of, "SPSA", None, 1, None, None, seed)
        for steps in horizons:
            yield Run("rate of convergence", of, "MeZO", None, 1, None, steps, seed)
    if quick:
        return
    for seed, d in itertools.product(SEEDS, (10, 100, 1000)):
        of = f"d = {d}"
        yield Run("Theorem 5.3", of, "eta = rho / L", None, 16, None, 100, seed)
        for steps in horizons:
            yield Run("Theorem 5.3", of, "eta = rho / L (d + 2)", None, 16, None, steps, seed)
    for seed, rows, steps in itertools.product(SEEDS, (16, 32, 64, 128, 256), (1_000, 10_000)):
        yield Run("Theorem 5.3", "d = 10", f"large batch {rows}", None, 16, None, steps, seed)
    for steps, seed, d in itertools.product((10_000, 100_000), SEEDS, (10, 100, 1000)):
        of = f"d = {d}"
        yield Run("rate of convergence", of, "MeZO", None, 1, None, steps, seed)
        yield Run("Theorem 5.3", of, "eta = rho / L (d + 2)", None, 16, None, steps, seed)


def open_runs(results: Mapping[str, Any], quick: bool, pieces: Sequence[str]) -> Iterator[Run]:
    """What is to be done, the most wanted first: where a grid is done, the seeds."""
    for cell in PLAN:
        if (quick and not cell.quick) or not wanted(cell.piece, cell.problem, pieces):
            continue
        for method in cell.methods:
            run = Run(cell.piece, cell.problem, method, None, cell.batch_size, cell.queries,
                      cell.steps, TUNING)  # fmt: skip
            lr = None if method in OWN else tuned(results, run)
            if lr is None and method not in OWN:
                runs = [run._replace(lr=one) for one in grid_of(run)]
            else:
                runs = [run._replace(lr=lr, seed=seed) for seed in SEEDS]
            yield from (one for one in runs if not made(results, one))
    more = [] if quick else itertools.chain(watched(results), timed(results))
    for run in itertools.chain(more, exact(quick), theory(quick)):
        if not made(results, run) and wanted(run.piece, run.problem, pieces):
            yield run


def wanted(piece: str, problem: str, pieces: Sequence[str]) -> bool:
    """Whether one of the names that were asked for is part of this one's."""
    return not pieces or any(one in f"{piece}: {problem}" for one in pieces)
