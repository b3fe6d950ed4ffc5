"""Evaluations in this process: probes in, values out, queries counted here alone.

An evaluator composes its *route* once (``routes``: reuse the frozen trunk, replay graphs) and then
answers every step's probes: those that may go together at several points in one forward
(``joint``), the others one at a time.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from zo_adapt.data.rows import NoRowsError
from zo_adapt.data.sources import Source
from zo_adapt.evaluation.counting import CountingEvaluator
from zo_adapt.evaluation.first_look import look_first
from zo_adapt.evaluation.graphs import Graphs
from zo_adapt.evaluation.joint.along import AlongFactors
from zo_adapt.evaluation.joint.batch import JointBatch
from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.joint.joining import Joint
from zo_adapt.evaluation.objective import Objective, ObjectiveLike
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.places import Place
from zo_adapt.evaluation.plan import Plan
from zo_adapt.evaluation.protocol import Evaluation, Evaluator, Probe
from zo_adapt.evaluation.routes import route_of, trunk_for
from zo_adapt.evaluation.signal import Signal, is_coarse, measured_first
from zo_adapt.evaluation.start_checks import resolve_mean_over_rows
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk
from zo_adapt.evaluation.values import Returned, on_host
from zo_adapt.interrupt import gradients_off
from zo_adapt.optimizers.perturbation import finest_perturbation, usual_perturbation
from zo_adapt.view.parameters import ParameterView

logger = logging.getLogger(__name__)
PLAIN = EvaluationOptions(joint_rows="off", reuse_trunk="off", cuda_graphs="off")
"""Nothing that has to be trusted first."""


class LocalEvaluator(CountingEvaluator):
    """Evaluates probes and counts queries. One query = one forward of one sample.

    Args:
        objective: What is asked: an ``Objective``, or any callable of a batch.
        view: Where the probes shift.
        options: Memory and speed.
        batch_size: Rows of a step's minibatch: most rows in one call of the objective where the
            options do not say; None is no limit.
        max_queries: Budget; a step that does not fit is not begun.
        maximize: Flip the sign, here and nowhere else; None: as the objective says.

    Raises:
        OptionError: The options cannot be had with this view.
    """

    def __init__(
        self,
        objective: ObjectiveLike,
        view: ParameterView,
        options: EvaluationOptions | None = None,
        *,
        batch_size: int | None = None,
        max_queries: int | None = None,
        maximize: bool | None = None,
    ) -> None:
        options = options or EvaluationOptions()
        super().__init__(
            objective,
            view,
            options,
            batch_size=batch_size,
            max_queries=max_queries,
            maximize=maximize,
        )
        found = trunk_for(view, options.reuse_trunk), _graphs(self.objective, view, options)
        self.trunk = found[0] if isinstance(found[0], FrozenTrunk) else None
        self._graphs = found[1] if isinstance(found[1], Graphs) else None
        self._route = route_of(self._function, self.trunk, self._graphs)
        self._along = AlongFactors(self.objective, view)
        self._joint = Joint(self.objective, view, options, self.micro_batch_size, self._along)
        names = dict(zip(("trunk", "graphs"), found, strict=True))
        self._why_not = {name: why for name, why in names.items() if isinstance(why, str)}

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left.
            ObjectiveError: The objective returned something that is not a loss.
        """
        self.reserve(sum(len(probe.batch) for probe in probes))
        if self._graphs is not None:
            self._graphs.begin()
        with gradients_off(), self.ready():
            together = self._together(probes)
            returned = [
                self._scored([together[index]], [len(probe.batch)])
                if index in together
                else self._alone(probe)
                for index, probe in enumerate(probes)
            ]
        self.view.updates.read_addresses()  # while the GPU is still at it
        return [self._evaluation(*one) for one in on_host(returned)]

    @property
    def memory(self) -> int | None:
        """Bytes that candidates may take together: with the probes, what decides which do."""
        return self._joint.memory

    @memory.setter
    def memory(self, nbytes: int | None) -> None:
        self._joint.memory = nbytes

    @property
    def plan(self) -> Plan:
        """How probes are evaluated, as far as the evaluations made so far have shown."""
        ways: dict[str, Any] = {
            "joint": self._joint,
            "factors": self._along,
            "trunk": self.trunk,
            "graphs": self._graphs,
        }
        found = {name: way.why_not for name, way in ways.items() if way is not None}
        why_not = self._why_not | {name: why for name, why in found.items() if why is not None}
        trunk = None if "trunk" in why_not else self.trunk
        return Plan(
            candidates=self._joint.most,
            layers=0 if trunk is None else trunk.layers,
            nbytes=0 if trunk is None else trunk.nbytes,
            captured="graphs" not in why_not,
            graphs=0 if self._graphs is None else len(self._graphs),
            why_not=why_not,
        )

    def _entered(self, place: Place, contents: Sequence[Any]) -> AbstractContextManager[None]:
        """Inside, the model computes at a place; it is left alone where only graphs will run."""
        return place.entered(all(self._route.replays(one, place.key) for one in contents))

    def _alone(self, probe: Probe) -> Returned:
        parts = probe.batch.micro_batches(self.micro_batch_size)
        contents = [part.content for part in parts]
        place = self._along.place(probe.at, parts[0], self._route)
        with self._entered(place, contents):
            returned = [self._route(content, place.key) for content in contents]
            return self._scored(returned, [len(part) for part in parts])

    def _together(self, probes: Sequence[Probe]) -> dict[int, Any]:
        """What the objective returned for the probes that go together, by their index."""
        found: dict[int, Any] = {}
        for group in self._joint.groups(probes):
            if not self._joint.is_sound(
                probes[group[0]].batch, probes[group[-1]].batch, self._route
            ):
                break
            batch = JointBatch([probes[index].batch for index in group])
            try:
                place = self._joint.at([probes[index].at for index in group], batch)
                with self._entered(place, [batch.content]):
                    returned = self._route(batch.content, place.key)
                # A score is of predictions themselves, so they are read at once.
                pieces = batch.read(returned) if self._score else batch.rows_of(returned)
            except torch.OutOfMemoryError as error:
                error.add_note(f"{len(batch)} rows were evaluated together; lower joint_rows")
                raise
            except (NotJoint, NoRowsError) as reason:
                logger.debug("evaluated one at a time: %s", reason)
                continue
            found.update(zip(group, pieces, strict=True))
        return found


class Locally:
    """The way of evaluating where none is given: in this process. See ``EvaluatedBy``."""

    def prepared(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The objective, after a look at what an evaluation of it reads and changes."""
        look_first(objective, source, view)
        objective = self.resolved(objective, source, view)
        look_for_signal(objective, source, view)
        return objective

    def resolved(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The objective, saying whether its value is a mean over rows."""
        return resolve_mean_over_rows(objective, source, view.model)

    def bound_to(
        self,
        objective: Objective,
        view: ParameterView,
        options: EvaluationOptions,
        *,
        batch_size: int | None = None,
        max_queries: int | None = None,
    ) -> Evaluator:
        """An evaluator of this process."""
        return LocalEvaluator(
            objective, view, options, batch_size=batch_size, max_queries=max_queries
        )


def look_for_signal(objective: Objective, source: Source, view: ParameterView) -> Signal | None:
    """Measure whether a coarse model's differences are signal, where they can be.

    Args:
        objective: What is asked.
        source: Of the rows.
        view: Its usual mu is made large enough.

    Returns:
        What was found; None for models in fp32 and for objectives that jump.
    """
    view.least_perturbation = 0.0
    if not is_coarse(view.model) or objective.step_like:
        return None
    usual = usual_perturbation(view.displacement, finest_perturbation(view), False)
    return measured_first(LocalEvaluator(objective, view, PLAIN), source, usual)


def _graphs(objective: Objective, view: ParameterView, options: EvaluationOptions) -> Graphs | str:
    """The graphs of a run, or why there are none."""
    if options.cuda_graphs == "off":
        return "they are switched off"
    if options.cuda_graphs == "auto" and not objective.capturable:
        return "the objective does not say that it can be captured"
    return Graphs(view)
