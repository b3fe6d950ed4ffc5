"""What holds of the paper's experiments and claims: small, repeatable, with seeds.

A run that is in one of the files benchmarks/results/evidence*.json is not made again: pieces that
were made on several days, or machines, add up. Every call ends by writing the tables and figures of
docs/evidence.md.

    python benchmarks/evidence.py --quick               # the reduced form: make evidence
    python benchmarks/evidence.py --pieces "methods: MNIST" ablations --processes 2
    python benchmarks/evidence.py --deadline 300 --into evidence-gpu   # a short piece elsewhere
    python benchmarks/evidence.py --report
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import queue
import sys
import time
import traceback
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

import evidence_packages
import evidence_theory
from evidence_exact import exactness
from evidence_lm import AT_ONCE
from evidence_methods import COORDINATES, optimizer_of
from evidence_pieces import is_former, open_runs, schedule_of
from evidence_plan import SEEDS, THEORY, Run
from evidence_problems import PROBLEMS, least_squares_rows, squares, squares_at
from evidence_time import Clock
from evidence_variance import Track

from zo_adapt import EvaluationOptions, ParameterView, ZOError, minimize

RESULTS = Path(__file__).parent / "results"
CURVE = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)
"""Steps after which the training loss is kept."""
LOOKED_AT = ("methods", "variance", "time")
"""Pieces whose runs are looked at on their way."""
MOST_STEPS = 1_000
"""Of the theory's runs by the library; longer ones are in plain tensors, which a test compares."""


def result_of(run: Run) -> dict[str, Any]:
    """Figures at the end of a run; those of a diverged one are missing."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    of = {"packages": of_package, "exactness": exactness} | dict.fromkeys(THEORY, of_theory)
    found = of.get(run.piece, of_method)(run)
    figures = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in found.items()
    }
    return figures | {"seconds": round(time.process_time() - start, 2)}


def of_theory(run: Run) -> dict[str, Any]:
    """Figures of a test of the theory."""
    dimensions, steps = int(run.problem.split()[-1]), run.steps or 0
    if run.piece == "moments":
        return evidence_theory.moments(dimensions, run.seed)
    try:
        if run.piece == "Theorem 5.3" and steps > MOST_STEPS:
            return evidence_theory.theorem_by_hand(run.method, dimensions, steps, run.seed)[0]
        if run.piece == "Theorem 5.3":
            return evidence_theory.theorem(run.method, dimensions, steps, run.seed)
        if steps > MOST_STEPS:
            return evidence_theory.by_hand(dimensions, steps, run.seed)[0]
        return evidence_theory.gradient_floor(dimensions, steps, run.seed)
    except ZOError as error:
        return {"stopped": str(error).splitlines()[0]}


def of_package(run: Run) -> dict[str, Any]:
    """Tune the least squares by another package."""
    x, (data, _) = torch.zeros(100, dtype=torch.float64), least_squares_rows(run.seed)
    rows = evidence_packages.Rows(data, squares, run.batch_size, run.queries or 0, run.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        evidence_packages.tune(run.method, x, rows, run.lr or math.nan)
    return squares_at(x, run.seed) | {"queries": (run.queries or 0) - rows.left}


def of_method(run: Run) -> dict[str, Any]:
    """Tune the problem and measure it."""
    problem = PROBLEMS[run.problem](run.seed)
    view = problem.view
    if run.method in COORDINATES:
        view = ParameterView(view.tensors, model=view.model, noise="coordinates")
    curve: list[tuple[int, int, float]] = []
    track = Track(run, problem) if run.piece == "variance" else None
    clock = Clock(run, problem) if run.piece == "time" else None
    of_language = run.problem.startswith("causal LM")
    before = problem.measure() if run.piece == "objectives" else {}

    def look(step: Any) -> None:
        if track is not None:
            track.look(step)
        elif clock is not None:
            clock.look(step)
        elif step.step in CURVE:
            curve.append((step.step, step.queries, round(problem.measure()["training"], 5)))

    try:
        result = minimize(
            problem.objective,
            view,
            problem.data,
            optimizer_of(run.method, run.problem, run.lr),
            batch_size=run.batch_size,
            max_queries=run.queries,
            max_steps=run.steps,
            seed=run.seed,
            callback=look if run.piece in LOOKED_AT and run.seed in SEEDS else None,
            metrics=None if track is None else track.metrics,
            evaluation=EvaluationOptions(micro_batch_size=AT_ONCE if of_language else None),
            progress=False,
        )
    except ZOError as error:
        return {"stopped": str(error).splitlines()[0]}
    found = problem.measure() | {"steps": result.steps, "queries": result.queries}
    found |= {"before": before} if before else {}
    found |= {"curve": curve} if curve else {}
    found |= {} if track is None else {"track": track.rows(result.history)}
    found |= {} if clock is None else {"clock": clock.rows}
    return found | {"stopped": result.stop_reason.name}


def load() -> dict[str, Any]:
    """The results so far, of all files; of two, that of today's default."""
    found = dict[str, Any]()
    for file in sorted(RESULTS.glob("evidence*.json")):
        for key, one in json.loads(file.read_text())["runs"].items():
            if key not in found or not is_former(Run(*json.loads(key)), one):
                found[key] = one
    return found


def save(runs: dict[str, Any], into: str) -> None:
    """Keep results, with what made them."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{into}.json"
    before = json.loads(file.read_text())["runs"] if file.exists() else {}
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    )
    made_by = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    lines = ",\n".join(
        f"{json.dumps(k)}:{json.dumps(v)}" for k, v in sorted((before | runs).items())
    )
    scratch = file.with_suffix(".new")
    scratch.write_text(f'{{"made by":{json.dumps(made_by)},"runs":{{\n{lines}\n}}}}\n')
    os.replace(scratch, file)


def work(arguments: argparse.Namespace) -> None:
    """Make what is missing, until it is all there or the time is over; half a run is nothing."""
    results, new, saved = load(), dict[str, Any](), time.monotonic()
    deadline = saved + arguments.deadline
    done: queue.Queue[tuple[Run, Any]] = queue.Queue()
    at_work: set[Run] = set()

    def failed(run: Run, error: BaseException) -> None:
        traceback.print_exception(error)
        done.put((run, {"stopped": f"{type(error).__name__}: {error}"}))

    def start(run: Run) -> None:
        at_work.add(run)
        pool.apply_async(
            result_of,
            (run,),
            callback=lambda found: done.put((run, found)),
            error_callback=lambda error: failed(run, error),
        )

    with get_context("spawn").Pool(arguments.processes) as pool:
        while True:
            missing = open_runs(results, arguments.quick, arguments.pieces)
            free = (run for run in missing if run not in at_work)
            for run in itertools.islice(free, arguments.processes + 1 - len(at_work)):
                start(run)
            if not at_work:
                break
            try:
                run, found = done.get(timeout=max(0.0, min(deadline - time.monotonic(), 1e6)))
            except queue.Empty:
                break
            at_work.discard(run)
            schedule = schedule_of(run)
            found |= {"schedule": schedule} if schedule else {}
            results[run.key] = new[run.key] = found
            if time.monotonic() > saved + 5:
                save(new, arguments.into)
                saved = time.monotonic()
            shown = {
                k: v for k, v in found.items() if k not in ("curve", "track", "clock", "before")
            }
            print(len(new), *run, shown, flush=True)
        pool.terminate()
        pool.join()
    if new:
        save(new, arguments.into)


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="least squares, MNIST and theory alone"
    )
    parser.add_argument("--pieces", nargs="*", default=[], help="parts of 'piece: problem'")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds")
    parser.add_argument("--into", default="evidence", help="name of the file of new results")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--no-report", action="store_true", help="write no page")
    arguments = parser.parse_args()
    if not arguments.report:
        work(arguments)
    if not arguments.no_report:
        from evidence_report import report

        report(load())


if __name__ == "__main__":
    main()
