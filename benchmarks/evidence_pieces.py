"""What benchmarks/evidence.py runs: every method of every cell, its grid first, then the seeds."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from evidence_methods import ABLATIONS, COORDINATES, OWN
from evidence_packages import GRIDS as OF_PACKAGES
from evidence_packages import installed

SEEDS, TUNING = (0, 1, 2), 9
"""Rates are chosen on a seed, that is other data, weights and directions, that no table counts."""
THEORY = ("moments", "rate of convergence", "Theorem 5.3")
EQUAL = (
    "MeZO",
    "MeZO-SVRG as printed",
    "MeZO-SVRG, one rate, shared direction",
    "MeZO-SVRG, one rate, two directions",
    "FO-SGD",
    "FO-Adam",
    "MeZO()",
    "MeZOSVRG()",
    "MeZO, 8 directions compared",
)
RECURSIVE = ("ZO-SPIDER", "ZO-PAGE", "ZO-STORM")
SHORT = (*EQUAL[:3], "MeZO()", "MeZOSVRG()")
COUNTING = ("MeZO()", "MeZOSVRG()", "MeZO, mu = 0.01",
            "MeZO-SVRG, one rate, shared direction, mu = 0.01")  # fmt: skip
WRITING = (*COUNTING, "MeZO, mu = 0.05")
"""Between a pair of 0.01 apart from the middle 5 of 16 texts differ, of 0.05 11."""
WIDE = (*COUNTING, "MeZO, mu = 0.1")
"""As far as ``MeZO()`` perturbs an adapter for a metric."""
ENCODER = ("MeZO", *EQUAL[1:3], "MeZO()", "MeZOSVRG()")
FITTING = tuple(name for name in ABLATIONS if name != "large batch 1024")
FIRST_ORDER = ("FO-SGD", "FO-Adam")
ONE_SAMPLE = ("MeZO", "ZO-SVRG (Algorithm 2)", "ZO-SAGA")
WHOLE_SET, LARGE_BATCH = COORDINATES
TIMED = ("MeZO", *EQUAL[1:3], *EQUAL[4:])
LANGUAGE = (*EQUAL[:3], *FIRST_ORDER, "MeZO()", "MeZOSVRG()")
WATCHED = ("MeZO", "MeZO-SVRG as printed", "MeZO-SVRG, one rate, shared direction")


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


class Cell(NamedTuple):
    """Methods at one budget; ``quick``: also in the reduced form."""

    piece: str
    problem: str
    methods: Sequence[str]
    queries: int | None = None
    steps: int | None = None
    batch_size: int = 32
    quick: bool = False


LS, DIGITS = "least squares", "MNIST"
LANGUAGE_PLAN = tuple(
    Cell("causal LM", f"causal LM, {view}", methods, queries, steps, 16)
    for view, methods, queries, steps in (
        ("LoRA", ENCODER, 10_000, None),
        ("last layers", ENCODER, 10_000, None),
        ("LoRA, bf16", (*EQUAL[:3], "MeZO()"), 10_000, None),
        ("LoRA", FIRST_ORDER, 10_000, None),
        ("last layers", FIRST_ORDER, 10_000, None),
        ("last layers", EQUAL[:3], None, 100),
        ("all weights", ENCODER, 10_000, None),
        ("LoRA, bf16", EQUAL[:3], None, 100),
        ("all weights, bf16", (*EQUAL[:2], "MeZO()"), 10_000, None),
        ("last layers, bf16", (*EQUAL[:2], "MeZO()"), 10_000, None),
        ("all weights", FIRST_ORDER, 10_000, None),
        ("LoRA", EQUAL[:3], None, 100),
        ("all weights, bf16", EQUAL[:3], None, 100),
        ("LoRA, bf16", FIRST_ORDER, 10_000, None),
        ("last layers, bf16", EQUAL[:2], None, 100),
        ("all weights", EQUAL[:3], None, 100),
    )
)
"""What completes a claim comes first, and of that what is quick."""
PLAN = (
    Cell("methods", LS, (*EQUAL, *RECURSIVE), queries=100_000, quick=True),
    Cell("methods", DIGITS, EQUAL, queries=200_000, quick=True),
    Cell("methods", LS, (*EQUAL, "MeZO, all rows", *RECURSIVE), steps=2_000, quick=True),
    Cell("methods", DIGITS, ("MeZO", "MeZO, all rows", *EQUAL[1:], *RECURSIVE), steps=1_000),
    Cell("ablations", DIGITS, tuple(ABLATIONS), queries=200_000),
    Cell("ablations", LS, FITTING, queries=1_000_000),
    *(Cell("batch sizes", DIGITS, SHORT, queries=200_000, batch_size=b)
      for b in (64, 128, 512, 16)),
    *(Cell("batch sizes", "MNIST, 16,384 images", ("MeZO", "MeZO()"), queries=200_000, batch_size=b)
      for b in (32, 512, 2048, 4096)),
    Cell("methods", LS, EQUAL[:3], queries=1_000_000),
    Cell("methods", DIGITS, RECURSIVE, queries=200_000),
    Cell("objectives", "MNIST, accuracy", COUNTING, queries=50_000),
    Cell("ablations", LS, FITTING, steps=300),
    Cell("objectives", "ranking, NDCG", COUNTING, queries=4_000, batch_size=16),
    Cell("objectives", "MNIST, F1", COUNTING, queries=50_000, batch_size=128),
    Cell("objectives", "generation, reward", COUNTING, queries=1_000, batch_size=16),
    Cell("objectives", "passages, NDCG", COUNTING, queries=4_000, batch_size=16),
    Cell("objectives", "headlines, reward", WRITING, queries=1_920, batch_size=16),
    *(Cell("objectives", f"encoder, {metric}", WIDE, queries=30_000, batch_size=128)
      for metric in ("accuracy", "F1")),
    Cell("one sample a forward", LS, ONE_SAMPLE, queries=4_000),
    Cell("one sample a forward", LS, ("MeZO", LARGE_BATCH), queries=100_000),
    Cell("one sample a forward", LS, ("MeZO", WHOLE_SET, LARGE_BATCH), queries=1_000_000),
    Cell("one sample a forward", LS, ONE_SAMPLE[1:2], queries=100_000),
    Cell("one sample a forward", DIGITS, ONE_SAMPLE, queries=20_000),
    Cell("bf16", "MNIST, bf16", (*EQUAL[:3], "MeZO()"), queries=200_000),
    Cell("packages", LS, tuple(installed()), queries=100_000),
    Cell("encoder", "encoder, LoRA", ENCODER, queries=30_000, batch_size=64),
    Cell("encoder", "encoder, LoRA", ENCODER[:3], steps=150, batch_size=64),
    Cell("encoder", "encoder, all weights", ENCODER, queries=30_000, batch_size=64),
    Cell("encoder", "encoder, LoRA", FIRST_ORDER, queries=30_000, batch_size=64),
    Cell("encoder", "encoder, last layers", ENCODER, queries=30_000, batch_size=64),
    *LANGUAGE_PLAN,
    *(Cell("encoder", f"encoder, {view}", FIRST_ORDER, queries=30_000, batch_size=64)
      for view in ("last layers", "all weights")),
    *(Cell("encoder", f"encoder, {view}", ENCODER[:3], steps=150, batch_size=64)
      for view in ("last layers", "all weights")),
    Cell("encoder", "encoder, LoRA", RECURSIVE, queries=30_000, batch_size=64),
    *(Cell("encoder", f"encoder, {view}, bf16", (*EQUAL[:2], "MeZO()"), queries=30_000,
           batch_size=64) for view in ("LoRA", "last layers", "all weights")),
    Cell("ablations", "encoder, LoRA", FITTING, queries=30_000, batch_size=64),
    Cell("one sample a forward", "encoder, LoRA", ONE_SAMPLE, queries=4_000, batch_size=16),
    *(Cell("encoder", f"encoder, {view}, bf16", EQUAL[:2], steps=150, batch_size=64)
      for view in ("LoRA", "last layers", "all weights")),
    *(Cell("encoder", f"encoder, {view}, bf16", (EQUAL[2], *FIRST_ORDER), queries=30_000,
           batch_size=64) for view in ("LoRA", "last layers", "all weights")),
    *(Cell("batch sizes", DIGITS, EQUAL[:3], steps=1_000, batch_size=b) for b in (64, 128)),
    Cell("methods", LS, RECURSIVE, queries=1_000_000),
    Cell("one sample a forward", "causal LM, LoRA", ONE_SAMPLE, queries=2_000, batch_size=16),
)  # fmt: skip
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
GRIDS = {
    LS: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    **{f"encoder, LoRA{half}": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0) for half in ("", ", bf16")},
    **{f"encoder, {view}{half}": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
       for view in ("last layers", "all weights") for half in ("", ", bf16")},
    "ablations: encoder, LoRA": (1e-2, 3e-2, 1e-1, 3e-1),
    "ranking, NDCG": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "generation, reward": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    **dict.fromkeys(("encoder, accuracy", "encoder, F1"), (1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
    **dict.fromkeys(("passages, NDCG", "headlines, reward"), (1e-3, 1e-2, 1e-1, 1.0, 10.0)),
    **{f"causal LM, LoRA{half}": (1e-4, 1e-3, 1e-2, 1e-1, 1.0) for half in ("", ", bf16")},
    **{f"causal LM, last layers{half}": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2) for half in ("", ", bf16")},
    **{f"causal LM, all weights{half}": (1e-6, 1e-5, 1e-4) for half in ("", ", bf16")},
}  # fmt: skip


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
                ("causal LM, LoRA", 320, 16))  # fmt: skip
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
