"""Seconds until a run is as good as MeZO at its best, for benchmarks/evidence.py."""

import time
from typing import Any

from evidence_pieces import DIGITS, LS, Run
from evidence_problems import Problem

LOOKS = 100
"""Along a run, evenly by queries or by steps."""
FIGURES = {DIGITS: "accuracy", LS: "training"}


class Clock:
    """Looks along a run with the processor's seconds so far, without those of the looks."""

    def __init__(self, run: Run, problem: Problem) -> None:
        self._figure, self._problem = FIGURES[run.problem], problem
        self._run, self._seen, self._looking = run, -1, 0.0
        self._start = time.process_time()
        self.rows: list[tuple[int, int, float, float]] = []
        """Step, queries, seconds, figure."""

    def look(self, step: Any) -> None:
        """Look, where a hundredth of the run is over since the last time."""
        now = time.process_time()
        done = step.queries if self._run.queries else step.step
        part = LOOKS * done // (self._run.queries or self._run.steps or 1)
        if part > self._seen:
            value = self._problem.measure()[self._figure]
            self.rows.append(
                (step.step, step.queries, round(now - self._start - self._looking, 4), value)
            )
            self._seen = part
            self._looking += time.process_time() - now
