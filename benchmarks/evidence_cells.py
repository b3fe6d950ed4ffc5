"""The results of benchmarks/evidence.py by cell: what the seeds of one setting ended at."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from evidence_pieces import grid_of, is_former
from evidence_plan import SEEDS, TUNING, Run

DIVERGED = 200.0
"""A training loss beyond which a run counts as diverged; they start at 2.3 to 132."""
Found = dict[str, Any]
Claim = tuple[str, str, str, str, str]
"""Claim, setting, found, whether it holds, figure or table."""


class Where(NamedTuple):
    """A setting; one of queries and steps."""

    piece: str
    problem: str
    queries: int | None = None
    steps: int | None = None
    batch_size: int = 32

    @property
    def budget(self) -> str:
        """In words."""
        return f"{self.queries:,} queries" if self.queries else f"{self.steps:,} steps"


class Cell(NamedTuple):
    """Runs of the seeds that count, and the rate that they had."""

    runs: Sequence[Found]
    lr: float | None
    at_edge: bool
    former: bool = False
    """Of a default that is no more."""

    def values(self, figure: str) -> list[float | None]:
        """The figure of every seed; None where it diverged."""
        return [
            one.get(figure) if _number(one.get("training")) < DIVERGED else None
            for one in self.runs
        ]

    def good(self, figure: str) -> list[float]:
        """The figure of those that did not diverge."""
        return [value for value in self.values(figure) if value is not None]

    def mean(self, figure: str = "training") -> float:
        """NaN where nothing is there; a diverged run makes a loss infinite."""
        if not self.runs:
            return math.nan
        if figure == "training" and len(self.good(figure)) < len(self.runs):
            return math.inf
        return statistics.mean(self.good(figure) or [math.nan])

    def text(self, figure: str = "training") -> str:
        """Mean and standard deviation, with the rate."""
        good = self.good(figure)
        if not self.runs:
            return "-"
        lost = len(self.runs) - len(good)
        parts = [spread(good)] if good else []
        parts += [f"{lost} of {len(self.runs)} diverged"] if lost else []
        if self.lr is not None:
            parts.append(f"(lr {self.lr:g}{', edge' if self.at_edge else ''})")
        parts += ["(former default)"] if self.former else []
        return " ".join(parts)

    def short(self, figure: str = "training") -> str:
        """The mean alone."""
        good = self.good(figure)
        lost = f"{len(self.runs) - len(good)} of {len(self.runs)} diverged"
        if not good:
            return lost
        mean = f"{statistics.mean(good):.3g}{' (former default)' if self.former else ''}"
        return mean if len(good) == len(self.runs) else f"{mean} ({lost})"


class Results:
    """All results by setting and method."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.runs = [(Run(*json.loads(key)), found) for key, found in results.items()]
        self._by: dict[tuple[Where, str], list[tuple[Run, Found]]] = {}
        for run, found in self.runs:
            where = Where(run.piece, run.problem, run.queries, run.steps, run.batch_size)
            self._by.setdefault((where, run.method), []).append((run, found))

    def cell(self, where: Where, method: str) -> Cell:
        """The runs at the best rate; none where a seed is missing."""
        runs = self._by.get((where, method), [])
        tried = {r.lr: _number(f.get("validation")) for r, f in runs if r.seed == TUNING}
        lr = min(tried, key=lambda one: tried[one]) if tried else None
        counted = [found for run, found in runs if run.seed in SEEDS and run.lr == lr]
        former = any(is_former(run, found) for run, found in runs)
        if len(counted) < len(SEEDS):
            return Cell((), None, False)
        grid = grid_of(runs[0][0]) if lr is not None else ()
        return Cell(counted, lr, bool(grid) and lr in (grid[0], grid[-1]), former)

    def of(self, piece: str) -> list[tuple[Run, Found]]:
        """The counted runs of a piece."""
        return [
            (run, found) for run, found in self.runs if run.piece == piece and run.seed in SEEDS
        ]


def _number(value: Any) -> float:
    return math.inf if value is None else float(value)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{deviation}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
