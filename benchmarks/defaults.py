"""The default step against the best of a sweep over seven displacements, everywhere.

Adapters and partial views of an encoder on three text tasks, a language model, small networks from
scratch, least squares and plain variables in several units; and whether runs of a few steps leave a
model unharmed. A displacement is chosen on the seed of the sweep and compared on the other seeds,
which the choice has not seen.

    python benchmarks/defaults.py --quick                       # a few cells, 1 to 2 minutes
    python benchmarks/defaults.py --cells "LoRA|MNIST" --processes 2
    python benchmarks/defaults.py --report                      # tables of what has been run
    python benchmarks/defaults.py --prepare FOLDER              # for a machine without a network,
    python benchmarks/defaults.py --assets FOLDER --deadline 500  # which runs from this folder

Results are kept in benchmarks/results/defaults.json; a run that is there is not made again.
"""

import argparse
import os
import platform
import re
import sys
import time
import traceback
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from default_problems import LANGUAGE, LANGUAGE_ADAPTERS, OTHER_ADAPTERS, VIEWS, WHITE, problem
from default_tables import SWEPT, best_multiple, load, report, save

from zo_adapt import MeZO, MeZOSVRG, minimize

RESULTS = Path(__file__).parent / "results" / "defaults.json"
MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SEEDS = (2, 3, 4)
"""The rule was chosen on seeds 0 and 1."""
FEW_STEPS = (2, 6, 16, 120)


class Cell(NamedTuple):
    """What is tuned: with a sweep of displacements or not, in full or only some steps."""

    view: str
    task: str
    sweep: bool = True
    steps: int | None = None
    seeds: int = 3

    @property
    def name(self) -> str:
        """As it stands in the results."""
        return f"{self.view} | {self.task}" + (f" | {self.steps} steps" if self.steps else "")


MATRIX = ("BBC 32 tokens, 7,680", "movie, 30,000", "BBC 48 tokens, 40,000")
LONG = ("movie, 400,000", "BBC 128 tokens, 100,000", "movie, 100,000")
PLAIN = [
    Cell("perceptron", "MNIST, 200,000"),
    Cell("last layers of a convnet", "MNIST, soft accuracy, 40,000"),
    *(
        Cell("100 unknowns", f"least squares, 100,000, unit {unit}")
        for unit in ("1", "1e3", "1e-3")
    ),
    *(Cell("20 of them", f"variables, 1,000 steps, unit {unit}") for unit in ("1", "1e4")),
    Cell("3 of them, from 0 to 100", "variables, 1,000 steps, unit 1", sweep=False),
]
SVRG = " by MeZOSVRG"
PLAIN += [
    cell._replace(view=cell.view + SVRG, sweep=False) for cell in PLAIN if "MNIST" not in cell.task
]
CELLS = [
    *(
        Cell(view, task, sweep=False, seeds=5)
        for task in LONG
        for view in VIEWS
        if view.endswith(WHITE)
    ),
    *(Cell(view, MATRIX[0], seeds=5) for view in VIEWS),
    *(
        Cell(view, task, seeds=5 if view.endswith(WHITE) else 3)
        for task in MATRIX[1:]
        for view in VIEWS
    ),
    *(Cell(view, task, sweep=False) for task in MATRIX for view in OTHER_ADAPTERS),
    *PLAIN,
    *(Cell(view, MATRIX[0], sweep=False, steps=n, seeds=1) for n in FEW_STEPS for view in VIEWS),
    *(Cell(view, task) for task in LANGUAGE for view in LANGUAGE_ADAPTERS),
    *(
        Cell(view, task, sweep=False, steps=n, seeds=1)
        for n in FEW_STEPS
        for task in LANGUAGE
        for view in LANGUAGE_ADAPTERS
    ),
]
QUICK = "20 of them|100 unknowns.*unit 1$"


class Job(NamedTuple):
    """One run of a cell: the default (``multiple`` None) or a displacement."""

    cell: Cell
    seed: int
    multiple: float | None
    assets: str | None = None
    share: float = 1.0
    schedule: str = "cooldown"

    @property
    def key(self) -> tuple[str, int, float | None, str]:
        """What tells runs apart."""
        return self.cell.name, self.seed, self.multiple, self.schedule

    def cost(self) -> float:
        """Longest first, by the queries that the task's name ends in; the default looks around."""
        numbers = re.findall(r"\d+,\d+", self.cell.task)
        queries = float(numbers[-1].replace(",", "")) if numbers else 1e3
        tokens = float(found[1]) if (found := re.search(r"(\d+) tokens", self.cell.task)) else 48.0
        return queries * tokens * (1.0 if self.multiple else 2.5) * (not self.cell.steps)


def optimizer_of(view: str, displacement: float | None, schedule: str) -> MeZO | MeZOSVRG:
    """The default, or a displacement in place of the one it finds."""
    kind = MeZOSVRG if view.endswith(SVRG) else MeZO
    return kind(displacement=displacement, schedule=schedule)


def run(job: Job) -> dict[str, Any]:
    """Tune once and measure."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cell = job.cell
    at = problem(cell.view, cell.task, job.seed, job.assets)
    budget = {"max_steps": cell.steps} if cell.steps else dict(at.budget)
    if job.share < 1.0:
        budget = {name: max(1, int(number * job.share)) for name, number in budget.items()}
    multiple = job.multiple
    optimizer = optimizer_of(cell.view, multiple and multiple * at.centre, job.schedule)
    most = None if job.share == 1.0 else 64
    before, started = at.measure(most), time.perf_counter()
    result = minimize(
        at.objective,
        at.view,
        at.data,
        optimizer,
        batch_size=at.batch_size,
        seed=job.seed,
        progress=False,
        **budget,
    )
    finder = None if multiple else optimizer.state.finder
    return {
        "cell": cell.name,
        "seed": job.seed,
        "multiple": multiple,
        "schedule": job.schedule,
        "before": rounded(before),
        "after": rounded(at.measure(most)),
        "found": finder and rounded(finder.calibration.displacement / at.centre),
        "growth": finder and rounded(finder.look_ahead.growth),
        "queries": result.queries,
        "steps": result.steps,
        "stop": result.stop_reason.name,
        "seconds": rounded(time.perf_counter() - started),
    }


def rounded(value: Any) -> Any:
    """Five digits."""
    if isinstance(value, dict):
        return {name: rounded(number) for name, number in value.items()}
    return float(f"{value:.5g}")


def wanted(cells: list[Cell], done: dict[Any, dict[str, Any]], args: Any) -> list[Job]:
    """The runs still to make, the most needed first, and of these the longest."""
    jobs: list[tuple[int, Job]] = []
    for cell in cells:
        urgency = 1 + (MATRIX.index(cell.task) if cell.task in MATRIX else 0)
        seeds = args.seeds[: cell.seeds]
        jobs += [(0, Job(cell, seed, None)) for seed in seeds]
        if not cell.sweep or args.defaults_only:
            continue
        jobs += [(urgency, Job(cell, SWEPT, multiple)) for multiple in MULTIPLES]
        rows = [row for row in done.values() if row["schedule"] == args.schedule]
        best = best_multiple(rows, cell.name, SWEPT, len(MULTIPLES))
        jobs += [(urgency, Job(cell, seed, best)) for seed in seeds if best]
    jobs = [(first, job._replace(schedule=args.schedule)) for first, job in jobs]
    jobs = [(first, job) for first, job in jobs if job.key not in done]
    jobs.sort(key=lambda pair: (pair[0], -pair[1].cost()))
    return [job._replace(assets=args.assets, share=args.share) for _, job in jobs]


def run_all(cells: list[Cell], args: Any) -> None:
    """Run what is missing, until nothing is or the deadline has come; keep every result."""
    kept = load(args.results)
    done = {(r["cell"], r["seed"], r["multiple"], r["schedule"]): r for r in kept["runs"]}
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if machine not in kept["machines"]:
        kept["machines"].append(machine)
    here, started = kept["machines"].index(machine), time.monotonic()
    failed: set[Any] = set()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        running: dict[Future[Any], Job] = {}
        while True:
            under_way = {job.key for job in running.values()} | failed
            jobs = [job for job in wanted(cells, done, args) if job.key not in under_way]
            if time.monotonic() - started > args.deadline:
                jobs = []
            for job in jobs[: args.processes - len(running)]:
                running[pool.submit(run, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    row = future.result() | {"machine": here}
                except Exception:
                    failed.add(job.key)
                    print(job.key, traceback.format_exc(), file=sys.stderr, flush=True)
                    continue
                done[job.key] = row
                kept["runs"].append(row)
                save(kept, args.results)
                print(f"{time.monotonic() - started:.0f} s", brief(row), flush=True)


def brief(row: dict[str, Any]) -> str:
    """A run in a line."""
    how = "default" if row["multiple"] is None else f"x {row['multiple']:g}"
    how += f", {row['schedule']} | seed {row['seed']}"
    return f"{row['cell']} | {how}: {row['after']}, {row['seconds']:.0f} s"


def main() -> None:
    """Run the cells asked for, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", metavar="PATTERN", help="names that a regular expression finds")
    parser.add_argument("--without", metavar="PATTERN", help="names to leave out")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--defaults-only", action="store_true", help="no sweeps")
    parser.add_argument("--schedule", default="cooldown", help="of the step, usual: %(default)s")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--share", type=float, default=1.0, help="of every budget, for a trial")
    parser.add_argument("--assets", help="folder that --prepare made")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few cells, results thrown away")
    args = parser.parse_args()
    if args.prepare:
        import accuracy
        from mnist import write_digits

        accuracy.prepare(args.prepare)
        write_digits(args.prepare)
        return
    if args.quick:
        args.cells, args.results = args.cells or QUICK, Path(f"/tmp/defaults-{os.getpid()}.json")
    cells = [c for c in CELLS if re.search(args.cells or "", c.name)]
    if args.without:
        cells = [c for c in cells if not re.search(args.without, c.name)]
    if not args.report:
        run_all(cells, args)
    names = [(c.name, c.sweep, c.steps) for c in cells]
    print(report(load(args.results), names, args.schedule))


if __name__ == "__main__":
    main()
