"""What is seen of a run: a line before it and a bar while it goes."""

import logging
import sys
from typing import Any

from tqdm.auto import tqdm

from zo_adapt.optimizers.budget import Budget
from zo_adapt.step import Step

logger = logging.getLogger(__name__)


def announce(line: str, shown: bool) -> None:
    """Say a line in the log and, where there is a bar, above it."""
    logger.info("%s", line)
    if shown:
        tqdm.write(line, file=sys.stderr)


class Bar:
    """A progress bar over the budget: in queries where these are limited, else in steps.

    Where both are, its end is what the steps will come to, so that the time left is real.

    Args:
        budget: Limits.
        steps: Made already.
        queries: Made already.
        shown: Whether there is anything to see.
    """

    def __init__(self, budget: Budget, steps: int, queries: int, *, shown: bool) -> None:
        self._budget = budget
        self._metrics: dict[str, float] = {}
        self._in_queries = budget.max_queries is not None
        self._bar: tqdm[Any] = tqdm(
            total=budget.max_queries if self._in_queries else budget.max_steps,
            initial=queries if self._in_queries else steps,
            unit="query" if self._in_queries else "step",
            disable=not shown,
            dynamic_ncols=True,
        )

    def show(self, step: Step) -> None:
        """Move on to a step, with its value and the last that was measured."""
        bar, budget = self._bar, self._budget
        if budget.max_steps is not None and budget.max_queries is not None and self._in_queries:
            per_step = step.queries / step.step
            bar.total = min(budget.max_queries, round(budget.max_steps * per_step))
        bar.update((step.queries if self._in_queries else step.step) - bar.n)
        self._metrics |= step.metrics or {}
        said = {"value": step.value, **self._metrics}
        words = {name: f"{value:.4g}" for name, value in said.items()}
        if not self._in_queries:
            words["queries"] = f"{step.queries:,}"
        bar.set_postfix(words, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
