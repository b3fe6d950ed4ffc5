"""Integration with transformers: the loop is Trainer's, the step is this package's.

``ZOTrainer`` replaces what happens between a batch and new weights. Evaluation, callbacks, logging,
``compute_metrics``, checkpoints and the progress bar are Trainer's own code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging

from zo_adapt.data.sources import Source
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.first_look import look_first
from zo_adapt.evaluation.locally import Locally
from zo_adapt.evaluation.objective import Objective, ObjectiveLike, as_objective, rows_needed
from zo_adapt.evaluation.plan import Plan
from zo_adapt.evaluation.protocol import BudgetExhausted, EvaluatedBy
from zo_adapt.evaluation.start_checks import check_all_examples
from zo_adapt.loops import former
from zo_adapt.loops.arguments import check_evaluator, checked_objective
from zo_adapt.loops.loop import announce
from zo_adapt.loops.monitor import Metrics, as_metrics
from zo_adapt.loops.result import FAULTS, StopReason, reason_of
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.options import former_keywords
from zo_adapt.ranks.carried_errors import Stopped
from zo_adapt.ranks.evaluator import options_of, shared
from zo_adapt.trainer.checks import (
    check_arguments,
    check_choices,
    check_model,
    check_watched,
    warn_of_ignored,
)
from zo_adapt.trainer.config import ZOConfig
from zo_adapt.trainer.data import Batching, TrainerSamples, readable
from zo_adapt.trainer.ends import AtRunEnds
from zo_adapt.trainer.loss import TrainerLoss
from zo_adapt.trainer.metrics import MeasuredMetrics
from zo_adapt.trainer.order import AS_DRAWN, SpreadBatches, sampler_of
from zo_adapt.trainer.planned import PlannedSteps
from zo_adapt.trainer.resuming import WholeCheckpoints
from zo_adapt.trainer.sharing import SharedSteps
from zo_adapt.trainer.tuned_view import TunedView, has_no_values, start_adapters
from zo_adapt.view.parameters import ParameterView

logger = logging.get_logger(__name__)


class ZOTrainer(
    MeasuredMetrics, TunedView, WholeCheckpoints, PlannedSteps, SpreadBatches, SharedSteps, Trainer
):
    """transformers.Trainer whose training step sees losses only, never a gradient.

    theta <- optimizer step on f(theta) = mean loss of the training batch

    Large batches (snapshots) are drawn from ``train_dataset`` through the trainer's own collator;
    one no larger than the training batch is the training batch.
    Beside Trainer's figures, ``queries`` (forward passes of one sample in training) and
    ``projected_gradient`` are logged, and ``learning_rate`` is the one applied.

    Args:
        model, args, ...: Trainer's own arguments; ``args`` is a ``ZOConfig``.
        view: What is tuned; every parameter with ``requires_grad`` by default.
        objective: Called with the collated batch; ``compute_loss``, in fp32, by default. One that
            gives values per example weights micro-batches exactly. Where no other
            ``data_collator`` is given, its own ``collate`` makes the training batches, of examples
            with all their columns (prompts, documents); evaluation stays Trainer's.
        zo_optimizer: An optimizer of this package, with its own schedule, instead of the one that
            ``args`` describes.
        evaluator: Where the objective's values come from: None, this process;
            ``ServedEvaluator(server)``, a model behind a server (``served_lora`` makes one without
            its base for here).
        metrics: Objectives by name, or ``Metrics`` of them, measured and logged beside the loss at
            every logging step; on ``eval_dataset`` if they have no data of their own, or else on
            ``train_dataset``. ``TrackVariance`` among them has steps of its own.

    Attributes:
        stop_reason: Why training ended before its last step, or None. See ``StopReason``.
        queries: Forward passes of one sample made by training steps.
        metric_queries: Those that ``metrics`` took, beside ``queries``.
        lora_start_queries: Those that ``lora_start_rows`` took, beside ``queries``.

    Raises:
        OptionError: Arguments that contradict each other or cannot work.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> data = [{"input_ids": [2, i], "labels": i % 2} for i in range(8)]
        >>> args = ZOConfig("runs", max_steps=2, displacement=0.1, report_to="none", use_cpu=True,
        ...                 disable_tqdm=True, logging_strategy="no", save_strategy="no")
        >>> trainer = ZOTrainer(BertForSequenceClassification(config), args, train_dataset=data)
        >>> trainer.train().metrics["queries"]  # doctest: +ELLIPSIS
        {...}
        128
    """

    args: ZOConfig

    @former_keywords({"metrics_data": former.METRICS["metrics_data"]}, former.translate)
    def __init__(
        self,
        model: nn.Module | None = None,
        args: ZOConfig | None = None,
        *positional: Any,
        view: ParameterView | None = None,
        objective: ObjectiveLike | None = None,
        zo_optimizer: Optimizer | None = None,
        evaluator: EvaluatedBy | None = None,
        metrics: Metrics | Mapping[str, ObjectiveLike] | None = None,
        **options: Any,
    ) -> None:
        args = ZOConfig("tmp_trainer") if args is None else args
        check_arguments(args, ZOConfig)
        check_choices(args, view, objective, zo_optimizer, options)
        check_model(model if view is None else view.model)
        warn_of_ignored(args, objective is not None, options)
        collator = options.get("data_collator", positional[0] if positional else None)
        check_evaluator(evaluator)
        wanted = None if objective is None else checked_objective(objective)
        if evaluator is not None and wanted is None:
            raise OptionError(
                "evaluator=... without an objective: Trainer's own loss runs the model in this "
                "process; give objective=CausalLMLoss(model), for one"
            )
        self._way = Locally() if evaluator is None else evaluator
        self._batching = Batching(self, wanted, collator)
        args._n_gpu = 1  # as Trainer does where a model must not be replicated on every GPU
        super().__init__(model, args, *positional, **options)
        self.train_dataset = readable(self.train_dataset)
        if has_no_values(self.model):
            self.accelerator.device_placement = False  # of the base there is nothing to be moved
        if self.accelerator.scaler is not None:  # fp16: there are no gradients to scale
            self.accelerator.scaler = torch.amp.GradScaler(enabled=False)
        self._given = (view, wanted, zo_optimizer)
        self._metrics = as_metrics(metrics)
        self._run: Run | None = None
        self._is_begun = self._is_said = False
        self.lora_start_queries = 0
        self._end = AtRunEnds(self)
        self.add_callback(self._end)

    @property
    def stop_reason(self) -> StopReason | None:
        """Why training ended before its last step, or None."""
        return self._end.reason

    @property
    def queries(self) -> int:
        """Forward passes of one sample made by the training steps of this run."""
        return 0 if self._run is None else self._run.evaluator.queries

    @property
    def evaluation(self) -> Plan:
        """How training steps were evaluated, and in ``why_not`` why not faster."""
        return Plan() if self._run is None else self._run.evaluator.plan

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's, whole on every rank; of examples as they are where the objective collates."""
        with self._batching.loading(), self.loading_whole():
            return super().get_train_dataloader()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One step of the optimizer of this package; returns the batch's mean loss for the log."""
        if self._run is None:
            raise OptionError("training_step needs a run; call train()")
        loss = 0.0
        try:
            rows = self._batching.received(inputs)
            self._samples.receive(rows, self._numbers())
            if not self._is_begun:
                self._look(self._run.evaluator.objective, rows)
                self._begin_log(self._run)
            self._say_once(self._run)
            step = self._run.step()
            loss = step.value
            self._end.steps.append(step.brief())
        except BudgetExhausted:
            self._end.stop(StopReason.MAX_QUERIES, made=False)
        except Stopped:
            self._end.stop(StopReason.CALLBACK, made=False)
        except FAULTS as error:
            reason = reason_of(error)
            logger.error(f"Training stops: {reason} ({error})")
            self._end.stop(reason, made=False)
        else:
            is_last = self.state.global_step + 1 == self._planned
            if is_last or self.queries == self.args.max_queries:
                self._end.stop(StopReason.MAX_QUERIES, made=True)
        return torch.tensor(loss, device=self.args.device)

    def _say_once(self, run: Run) -> None:
        """What is about to happen and what it will cost, before the first step."""
        if not self._is_said:
            self._is_said = True
            announce(run.outlook(), shown=self.is_first_rank and not self.args.disable_tqdm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the figures of the zeroth-order steps."""
        if self.is_in_train and self._run is not None:
            logs = {**logs, "queries": self.queries}  # evaluate() returns the ones it was given
            if "loss" in logs and self._run.last is not None:
                logs.pop("grad_norm", None)  # there is no gradient: it would read 0
                logs["learning_rate"] = self._run.last.lr
                logs["projected_gradient"] = self._run.last.projected_gradient
                logs.update(self._measured())
        super().log(logs, start_time)

    def _look(self, objective: Objective, rows: Source) -> None:
        """Look at the first rows of a stream, as is done before the run where there is a length."""
        if isinstance(self._way, Locally):
            look_first(objective, rows, self.view)
        else:
            self._way.prepared(objective, rows, self.view)

    def begin_run(self, loader: Any) -> None:
        """Forget the last run and start one on what ``train_dataset`` gives; Trainer calls this.

        Raises:
            ZOError: Named errors for bad input, before any evaluation.
        """
        if not hasattr(self.lr_scheduler, "lr_lambdas"):
            raise OptionError(
                f"lr_scheduler_type={self.args.lr_scheduler_type} is no function of the step; "
                "choose linear, cosine, constant or another of those"
            )
        self.keep_modes()
        self.view.check_ready()
        _, objective, optimizer = self._given
        ranks = self.find_ranks()
        options = options_of(self.args.evaluation_options(self.view), ranks)
        self.zo_optimizer = optimizer or self.args.build_optimizer(self.schedule_in_force)
        source = self._batching.training(loader)
        check_watched(self._metrics.tracked, source)
        objective = objective or TrainerLoss(self, self.model_wrapped)
        if source.has_length:
            as_stored = self._batching.is_usual
            check_all_examples(objective, loader.dataset, as_stored=as_stored)
            objective = self._way.prepared(as_objective(objective), source, self.view)
            if isinstance(objective, TrainerLoss):
                objective.keep_whole_if_needed(source)
        self.lora_start_queries = 0
        if self.args.lora_start_rows and self._checkpoint is None:
            self.lora_start_queries = start_adapters(self, as_objective(objective), source)
        evaluator = shared(
            self._way.bound_to(
                as_objective(objective),
                self.view,
                options,
                batch_size=self.state.train_batch_size,
                max_queries=self.args.max_queries,
            ),
            ranks,
        )
        self._sampler = sampler_of(loader)
        self._samples = TrainerSamples(
            source,
            self.args.seed,
            rows_needed(evaluator.objective),
            self.args.stratify,
            AS_DRAWN if self._sampler is None else self._sampler.order,
        )
        budget = Budget(self._limit, self.args.max_queries)
        self._run = Run(
            self.zo_optimizer, evaluator, self._samples, budget, self.args.seed, ranks=ranks
        )
        self._begin_metrics(self._run, options)
        self._is_begun = self._is_said = False
        # Of a stream the first examples come with the first step; a checkpoint knows what they say.
        if source.has_length or self._checkpoint is not None:
            self._begin_log(self._run)

    def _end_run(self) -> None:
        if self._run is not None:
            self._end.advise(self._run)
            self._run.close()
