"""Seconds until a run is as good as MeZO at its best, for benchmarks/evidence.py."""

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from evidence_cells import Claim, Found, Results, markdown
from evidence_plan import DIGITS, LS, SEEDS, TIMED, Run
from evidence_problems import Problem

LOOKS = 100
"""Along a run, evenly by queries or by steps."""
LORA = "encoder, LoRA"
FIGURES = {DIGITS: "accuracy", LS: "training", LORA: "accuracy"}
CLOCKS = {LORA: time.perf_counter}
"""The processor's own seconds; of the encoder, which is for a GPU, those of the wall."""
ON = {LORA: "seconds of the wall"}


class Clock:
    """Looks along a run with the seconds so far, without those of the looks."""

    def __init__(self, run: Run, problem: Problem) -> None:
        self._figure, self._problem = FIGURES[run.problem], problem
        self._run, self._seen, self._looking = run, -1, 0.0
        self._now = CLOCKS.get(run.problem, time.process_time)
        self._start = self._now()
        self.rows: list[tuple[int, int, float, float]] = []
        """Step, queries, seconds, figure."""

    def look(self, step: Any) -> None:
        """Look, where a hundredth of the run is over since the last time."""
        now = self._now()
        done = step.queries if self._run.queries else step.step
        part = LOOKS * done // (self._run.queries or self._run.steps or 1)
        if part > self._seen:
            value = self._problem.measure()[self._figure]
            seconds = round(now - self._start - self._looking, 4)
            self.rows.append((step.step, step.queries, seconds, value))
            self._seen = part
            self._looking += self._now() - now


class Look(NamedTuple):
    """A row of a clock."""

    steps: float
    queries: float
    seconds: float
    value: float


class Way(NamedTuple):
    """A method's runs: where each was as good as MeZO at its best, None where it never was."""

    lr: float | None
    reached: list[Look | None]
    best: list[float]
    queries: float
    """Of a whole run."""

    def mean(self, figure: str) -> float | None:
        """None where a seed did not get there."""
        values = [None if look is None else float(getattr(look, figure)) for look in self.reached]
        there = [value for value in values if value is not None]
        return statistics.fmean(there) if len(there) == len(values) else None


def ways(found: Results, problem: str) -> dict[str, Way]:
    """Every method with all seeds, against MeZO on the same seed."""
    runs: dict[str, dict[int, tuple[Run, Found]]] = {}
    for run, one in found.of("time"):
        if run.problem == problem and one.get("clock"):
            runs.setdefault(run.method, {})[run.seed] = run, one
    whole = {method: seeds for method, seeds in runs.items() if len(seeds) == len(SEEDS)}
    if "MeZO" not in whole or len(whole) < 2:
        return {}
    sign = -1 if FIGURES[problem] == "training" else 1

    def best(one: Found) -> float:
        return max(sign * float(row[3]) for row in one["clock"])

    targets = {seed: best(one) for seed, (_, one) in whole["MeZO"].items()}
    return {
        method: Way(
            whole[method][0][0].lr,
            [
                next((Look(*r) for r in whole[method][s][1]["clock"] if sign * r[3] >= t), None)
                for s, t in targets.items()
            ],
            [sign * best(one) for _, one in whole[method].values()],
            statistics.fmean(one["clock"][-1][1] for _, one in whole[method].values()),
        )
        for method in TIMED
        if method in whole
    }


def table(found: Results) -> str:
    """Seconds, queries and steps by method."""
    rows = []
    for problem in FIGURES:
        for method, way in ways(found, problem).items():
            count = sum(look is not None for look in way.reached)
            rate = "" if way.lr is None else f" (lr {way.lr:g})"
            name = f"{problem}, {method}{rate}"
            best = f"{statistics.fmean(way.best):.3g}"
            figures = [way.mean(figure) for figure in ("seconds", "queries", "steps")]
            if None in figures:
                text = [f"{count} of {len(way.reached)} did", "-", "-"]
            else:
                text = [f"{figures[0]:.2g}", *(f"{one:,.0f}" for one in figures[1:])]
            rows.append([name, *text, best, f"{way.queries:,.0f}"])
    header = ["", "seconds", "queries", "steps", "its own best", "queries of a run"]
    return markdown(header, rows)


def claims(found: Results, link: str) -> Iterator[Claim]:
    """Whether variance reduction gets there sooner, by the clock."""
    for problem in FIGURES:
        there = ways(found, problem)
        for method in ("MeZO-SVRG as printed", "MeZO()"):
            if method not in there:
                continue
            ours, plain = there[method].mean("seconds"), there["MeZO"].mean("seconds")
            count = sum(look is not None for look in there[method].reached)
            text = f"MeZO {plain:.2g} s; {method} "
            text += f"{ours:.2g} s" if ours else f"in {count} of {len(SEEDS)} runs"
            clock = ON.get(problem, "a CPU's seconds, one thread")
            setting = f"{problem}, {clock}"
            what = "accuracy" if FIGURES[problem] == "accuracy" else "loss"
            holds = "yes" if ours and plain and ours < plain else "no"
            yield f"{method} reaches MeZO's best {what} sooner", setting, text, holds, link
