"""Probes in, values out, where the model is served: candidates are loaded, asked and unloaded."""

import copy
import itertools
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Self

from zo_adapt.data.sources import Source
from zo_adapt.errors import NotServableError
from zo_adapt.evaluation.answers import Answer, CountingEvaluator, evaluations
from zo_adapt.evaluation.objective import Objective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.plan import Plan
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.evaluation.start_checks import resolve_mean_over_rows
from zo_adapt.interrupt import gradients_off
from zo_adapt.serve.adapter import ServedAdapter
from zo_adapt.serve.asking import Answers, answering
from zo_adapt.serve.protocol import Candidate, ServedModel, Tuned
from zo_adapt.serve.report import Report
from zo_adapt.serve.rounds import AtOnce, Task, answered, first_question, unloading
from zo_adapt.serve.self_test import SelfTest
from zo_adapt.serve.soft_prompt import SoftPrompt
from zo_adapt.term import HERE, Shift
from zo_adapt.view.parameters import ParameterView

logger = logging.getLogger(__name__)


class ServedEvaluator(CountingEvaluator):
    """Evaluates probes by a model that runs elsewhere: ``minimize(..., evaluator=this)``.

    The view's LoRA adapter lives here and its base lives there. A step's points become candidates,
    adapters with names that are never used again: as many as the server takes at once are loaded,
    asked together and unloaded. The tensors of a candidate have the very bits that
    ``view.shifted`` gives, so that on a deterministic server a run is repeated, and resumed, bit by
    bit. Whatever goes wrong, the weights and the trajectory are those of the last good step.

    Objectives of language models put their questions to the server by themselves: CausalLMLoss,
    VerbalizerLoss, ExactMatch, GenerationReward, and all that is made of these.

    Args:
        server: Where the model runs: ``PeftServer(model)``, ``VLLMServer(url)``.
        lora_config: Of the adapter, as ``peft.LoraConfig`` or the content of adapter_config.json;
            None: that of the view's model.
        self_test: Whether the server is tested before the first step (a few requests, which are not
            counted as queries); see ``SelfTest``.

    Attributes:
        report: What the self-test found; None before it.

    Raises:
        ServedModelError: The server failed. NotServableError: It cannot run this adapter, or the
            objective asks it nothing.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from objectives import CausalLMLoss
        >>> from zo_adapt import MeZO, ParameterView, minimize
        >>> from zo_adapt.serve.peft_server import PeftServer
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        >>> model = get_peft_model(GPT2LMHeadModel(config), lora).eval()
        >>> data = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}]
        >>> result = minimize(
        ...     CausalLMLoss(model), ParameterView.trainable(model), data, MeZO(lr=1e-2),
        ...     batch_size=2, max_steps=2, progress=False,
        ...     evaluator=ServedEvaluator(PeftServer(model)))
        >>> result.steps, result.queries
        (2, 32)
    """

    def __init__(
        self, server: ServedModel, *, lora_config: Any = None, self_test: bool = True
    ) -> None:
        self.server = server
        self.report: Report | None = None
        self._lora_config, self._tests = lora_config, self_test
        self._names = Names()
        self._candidates = 1

    def resolved(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The objective, saying whether its value is a mean over rows; asked at the weights."""
        if objective.mean_over_rows != "auto" or len(source) < 2:
            return objective
        adapter = self._adapter(view)
        with self._loaded([HERE], adapter) as (name,), answering(AtOnce(self.server, name)):
            return resolve_mean_over_rows(objective, source, view.model)

    def prepared(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The same, after a check of the adapter and the self-test of the server.

        Raises:
            NotServableError: The server cannot run the adapter, or the objective asks it nothing.
            SelfTestError: What the server answers cannot be tuned by.
        """
        view.leave_at_rest(())
        adapter = self._adapter(view)
        content = source.take(range(min(2, len(source))))
        question = first_question(objective, content)
        if self._tests:
            test = SelfTest(self.server, adapter, question, self._names)
            self.report = test.run()
            raised = self.report.raised > 0
            view.least_perturbation = self.report.perturbation_scale if raised else 0.0
            logger.info("%s", self.report)
        return self.resolved(objective, source, view)

    def bound_to(
        self,
        objective: Objective,
        view: ParameterView,
        options: EvaluationOptions,
        *,
        batch_size: int | None = None,
        max_queries: int | None = None,
    ) -> Self:
        """An evaluator of one objective on the same server."""
        bound = copy.copy(self)
        CountingEvaluator.__init__(
            bound, objective, view, options, batch_size=batch_size, max_queries=max_queries
        )
        bound._served = self._adapter(view)
        return bound

    _served: Tuned | None = None
    memory: int | None = None
    """Nothing is computed here: what candidates may take together is the server's own affair."""

    @property
    def plan(self) -> Plan:
        """How many candidates are asked together."""
        why = "the model is served"
        return Plan(self._candidates, why_not={"trunk": why, "graphs": why})

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left.
            ObjectiveError: The objective returned something that is not a loss.
            ServedModelError: The server failed; nothing is left on it, if it can still be reached.
        """
        if self._served is None:
            raise NotServableError(
                "this evaluator has no objective and no view yet; give it to minimize or ZOTrainer"
                " as evaluator=..., or call bound_to(objective, view, EvaluationOptions())"
            )
        self.reserve(sum(len(probe.batch) for probe in probes))
        found: list[Answer] = []
        with gradients_off(), self.ready():
            for points in _in_portions(probes, self.server.limits.adapters):
                found += self._at(points, probes, self._served)
        finite = self.on_nonfinite == "stop"
        checked = [answer.checked(finite=finite) for answer in found]
        return evaluations(checked, self.sign)

    def _at(
        self, points: Mapping[Shift, Sequence[int]], probes: Sequence[Probe], adapter: Tuned
    ) -> list[Answer]:
        """The answers to the probes of some points."""
        self._candidates = max(self._candidates, len(points))
        tasks: list[Task] = []
        with self._loaded(list(points), adapter) as names:
            for name, indices in zip(names, points.values(), strict=True):
                tasks += [
                    Task(index, name, part, Answers())
                    for index in indices
                    for part in probes[index].batch.micro_batches(self.micro_batch_size)
                ]
            values = answered(self._function, tasks, self.server)
        found = [
            Answer(task.probe, part, len(task.part), value)
            for part, (task, value) in enumerate(zip(tasks, values, strict=True))
        ]
        if self._score is None:
            return found
        found.sort(key=lambda answer: answer[:2])
        return [
            Answer(index, 0, len(probes[index].batch), self._score([one.returned for one in own]))
            for index, own in groupby(found, lambda answer: answer.probe)
        ]

    @contextmanager
    def _loaded(self, points: Sequence[Shift], adapter: Tuned) -> Iterator[list[str]]:
        """Inside, the candidates are on the server, under the names given."""
        names: list[str] = []
        with unloading(self.server, names):
            for tensors in adapter.at(points):
                names.append(self._names.new())
                self.server.load(Candidate(names[-1], tensors), adapter.config)
            yield names

    def _adapter(self, view: ParameterView) -> Tuned:
        prompt = self._lora_config is None and view.is_soft_prompt
        adapter: Tuned = SoftPrompt(view) if prompt else ServedAdapter(view, self._lora_config)
        adapter.check(self.server.limits)
        return adapter


class Names:
    """Names of candidates: never the same twice, on any server, in any process."""

    def __init__(self) -> None:
        self._run, self._count = secrets.token_hex(6), itertools.count()

    def new(self) -> str:
        """The next name."""
        # The process, too: a fork has the same counter.
        return f"zo-{self._run}-{os.getpid()}-{next(self._count)}"


def _in_portions(probes: Sequence[Probe], most: int) -> Iterator[dict[Shift, list[int]]]:
    """The points of the probes, each with the indices of its probes; at most so many at once."""
    points: dict[Shift, list[int]] = {}
    for index, probe in enumerate(probes):
        points.setdefault(probe.at, []).append(index)
    entries = list(points.items())
    for first in range(0, len(entries), most):
        yield dict(entries[first : first + most])
