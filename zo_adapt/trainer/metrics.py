"""Metrics beside the loss of a training: objectives where Trainer logs, noise at its own steps."""

from typing import Any

from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import EvaluatedBy
from zo_adapt.loops.monitor import Metrics, Monitor
from zo_adapt.loops.run import Run


class MeasuredMetrics:
    """For Trainer: what is measured beside the loss, its queries counted apart."""

    args: Any
    state: Any
    control: Any
    train_dataset: Any
    eval_dataset: Any
    _metrics: Metrics
    _way: EvaluatedBy
    _monitor: Monitor | None = None

    @property
    def metric_queries(self) -> int:
        """Forward passes of one sample made for ``metrics``, beside the budget."""
        return 0 if self._monitor is None else self._monitor.queries

    def log_watched(self) -> None:
        """Log what watches the estimates, where it is due and no other log comes at this step."""
        if self._monitor is None or self.control.should_log:
            return
        if found := self._monitor.watched(self.state.global_step):
            self.log(found)  # type: ignore[attr-defined]

    def _begin_metrics(self, run: Run, options: EvaluationOptions) -> None:
        self._monitor = Monitor(
            self._metrics,
            run.evaluator.view,
            self.train_dataset if self.eval_dataset is None else self.eval_dataset,
            evaluation=options,
            batch_size=self.args.eval_batch_size,
            way=self._way,
            ranks=run.ranks,
        )
        self._monitor.follow(run)

    def _measured(self) -> dict[str, float]:
        """The metrics at the weights as they are."""
        return {} if self._monitor is None else self._monitor.logged(self.state.global_step)
