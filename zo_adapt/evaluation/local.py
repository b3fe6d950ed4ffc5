"""Evaluations in this process: probes in, values out, queries counted here alone.

An evaluator composes its *route* once (``routes``: reuse the frozen trunk, replay graphs) and then
answers every step's probes: those that may go together at several points in one forward
(``joint``), the others one at a time.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from zo_adapt.data.rows import NoRowsError
from zo_adapt.evaluation.answers import Answer, Block, CountingEvaluator, all_arrived, evaluations
from zo_adapt.evaluation.graphs import Graphs
from zo_adapt.evaluation.joint.along import AlongFactors
from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.joint.joining import Joint
from zo_adapt.evaluation.joint.measured import measured_tokens
from zo_adapt.evaluation.joint.row_blocks import JointBatch
from zo_adapt.evaluation.later import made, made_of
from zo_adapt.evaluation.objective import ObjectiveLike
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.places import Place
from zo_adapt.evaluation.plan import Plan
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.evaluation.routes import graphs_for, route_of, trunk_for
from zo_adapt.evaluation.signal import is_quantised, why_not_the_same
from zo_adapt.evaluation.start_checks import randomness_kept
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk
from zo_adapt.evaluation.values import on_host
from zo_adapt.interrupt import gradients_off
from zo_adapt.view.buffers import WatchedBuffers
from zo_adapt.view.parameters import ParameterView

logger = logging.getLogger(__name__)
UNBOUNDED_TOKENS = 1 << 40
"""While it is measured how many are worth joining, nothing but memory limits them."""


class LocalEvaluator(CountingEvaluator):
    """Evaluates probes in this process.

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
        limits = {"batch_size": batch_size, "max_queries": max_queries}
        super().__init__(objective, view, options, **limits, maximize=maximize)
        found = trunk_for(view, options.reuse_trunk), graphs_for(self.objective, view, options)
        self.trunk = found[0] if isinstance(found[0], FrozenTrunk) else None
        self._graphs = found[1] if isinstance(found[1], Graphs) else None
        self._several = self._may_wait = False
        self._route = route_of(self._called, self.trunk, self._graphs)
        self._along = AlongFactors(self.objective, view)
        self._joint = Joint(self.objective, view, options, self.micro_batch_size, self._along)
        names = dict(zip(("trunk", "graphs"), found, strict=True))
        self.measures = options.joint_rows == "measured" and self.objective.row_bytes is None
        self._asks_again = is_quantised(view.model)
        self._buffers = WatchedBuffers(view.model)
        self._why_not = {name: why for name, why in names.items() if isinstance(why, str)}

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left.
            ObjectiveError: The objective returned something that is not a loss.
        """
        self.reserve(sum(len(probe.batch) for probe in probes))
        finite = self.on_nonfinite == "stop"
        checked = [answer.checked(finite=finite) for answer in self.answers(probes)]
        return evaluations(checked, self.sign)

    def answers(
        self,
        probes: Sequence[Probe],
        choose: Callable[[list[Block]], Iterable[Block]] = lambda blocks: blocks,
        note: Callable[[Block], None] = lambda block: None,
    ) -> list[Answer]:
        """What the objective returned for the blocks that the probes are cut into.

        Args:
            probes: Of a step.
            choose: Those of the blocks that are to be computed here.
            note: Called with each of them before an error of it could be raised.
        """
        if self._graphs is not None:
            self._graphs.begin()
        found = list[tuple[Block, list[Answer]]]()
        with gradients_off(), self.ready(), all_arrived(found, note):
            for block in choose(self._blocks(probes)):
                note(block)
                found.append((block, []))
                found[-1][1].extend(self._answers(block, probes))
                if self._asks_again:
                    self._ask_again(block, probes, found[-1][1])
            self._buffers.check(lambda: [self._asked_again(one, probes) for one, _ in found])
        self.view.updates.read_addresses()  # while the GPU is still at it
        answers = [answer for _, own in found for answer in own]
        returned = on_host([answer.returned for answer in answers])
        return [
            answer._replace(returned=one) for answer, one in zip(answers, returned, strict=True)
        ]

    @property
    def memory(self) -> int | None:
        """Bytes that candidates may take together: with the probes, what decides which do."""
        return None if self._joint.sizes is None else self._joint.sizes.memory

    @memory.setter
    def memory(self, nbytes: int | None) -> None:
        if self._joint.sizes is not None and nbytes is not None:
            self._joint.sizes.memory = nbytes

    @property
    def joint_tokens(self) -> int | None:
        """Tokens up to which candidates go together, where that was measured."""
        return None if self._joint.sizes is None else self._joint.sizes.tokens

    @joint_tokens.setter
    def joint_tokens(self, tokens: int | None) -> None:
        if self._joint.sizes is not None:
            self._joint.sizes.tokens = tokens

    def measure(self, probes: Sequence[Probe]) -> None:
        """Find up to how many tokens candidates go together.

        Args:
            probes: Of a step; its first batch is asked about. They are not counted as queries.
        """
        self.joint_tokens = UNBOUNDED_TOKENS
        with gradients_off(), self.ready(), randomness_kept(self.view.model):
            most = max((len(block.probes) for block in self._blocks(probes)), default=1)
            found = measured_tokens(self._call_together, probes, most) if most > 1 else None
        self.joint_tokens, self._joint.most = found, 1

    def _call_together(self, probes: Sequence[Probe]) -> None:
        """Compute what the objective returns for probes in one forward, and wait for it."""
        if self._graphs is not None:
            self._graphs.begin()
        parts = self._parts(probes[0]) if len(probes) == 1 else ()
        block = Block(tuple(range(len(probes))), parts)
        on_host([answer.returned for answer in self._asked_again(block, probes)])

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

    def _called(self, content: Any) -> Any:
        """What the route is made of: the objective, or the part of it that needs the model.

        No more than that where a fast way is on trial, which compares values.
        """
        later = self.objective.predict_later if self._may_wait else None
        is_tried = self.trunk is not None and self.trunk.why_not is None
        if later is None or is_tried or self._score is None:
            return self._function(content)
        return made(later(content))

    def _routed(self, content: Any, place: Place) -> Any:
        """What the objective returns at a place; where more is to be computed, later."""
        self._may_wait = self._several
        try:
            return self._route(content, place.key)
        finally:
            self._may_wait = False

    def _blocks(self, probes: Sequence[Probe]) -> list[Block]:
        """The probes that go together, at several points in one forward, then the others."""
        groups = self._joint.groups(probes)
        if groups:
            first, last = (probes[index].batch for index in (groups[0][0], groups[0][-1]))
            groups = groups if self._joint.is_sound(first, last, self._route) else []
        joint = {index for group in groups for index in group}
        alone = [index for index in range(len(probes)) if index not in joint]
        blocks = [Block(tuple(group)) for group in groups]
        blocks += [Block((index,), self._parts(probes[index])) for index in alone]
        calls = [probes[index].batch.micro_batches(self.micro_batch_size) for index in alone]
        self._several = len(groups) + sum(map(len, calls)) > 1
        return blocks

    def rows_of(self, block: Block, probes: Sequence[Probe]) -> int:
        """How many rows a block has."""
        batches = [probes[number].batch for number in block.probes]
        if block.parts:
            parts = batches[0].micro_batches(self.micro_batch_size)
            batches = [parts[part] for part in block.parts]
        return sum(map(len, batches))

    def _parts(self, probe: Probe) -> tuple[int, ...]:
        """Numbers of a probe's micro-batches; none where all are needed for one value."""
        cut = self._score is None
        return tuple(range(len(probe.batch.micro_batches(self.micro_batch_size)))) if cut else ()

    def _ask_again(self, block: Block, probes: Sequence[Probe], answers: list[Answer]) -> None:
        """Once, where weights are quantised: find out whether their kernels repeat themselves."""
        self._asks_again = False
        answers[:] = [answer.arrived() for answer in answers]
        reason = why_not_the_same(answers, lambda: self._asked_again(block, probes))
        if reason is not None:
            self._why_not["repeats"] = reason

    def _asked_again(self, block: Block, probes: Sequence[Probe]) -> list[Answer]:
        """The same, all of it at once."""
        self._several = False
        return self._answers(block, probes)

    def _answers(self, block: Block, probes: Sequence[Probe]) -> list[Answer]:
        if len(block.probes) == 1:
            (number,) = block.probes
            return self._alone(number, probes[number], block.parts)
        together = self._together(block.probes, probes)
        if together is not None:
            return together
        return [
            answer
            for number in block.probes
            for answer in self._alone(number, probes[number], self._parts(probes[number]))
        ]

    def _alone(self, number: int, probe: Probe, parts: tuple[int, ...]) -> list[Answer]:
        batches = probe.batch.micro_batches(self.micro_batch_size)
        chosen = [batches[part] for part in parts] if parts else batches
        contents = [batch.content for batch in chosen]
        place = self._along.place(probe.at, batches[0], self._route)
        with self._entered(place, contents):
            returned = [self._routed(content, place) for content in contents]
            if self._score is not None:
                return [Answer(number, 0, len(probe.batch), made_of(returned, self._score))]
        return [
            Answer(number, part, len(batch), one)
            for part, batch, one in zip(parts, chosen, returned, strict=True)
        ]

    def _together(self, numbers: Sequence[int], probes: Sequence[Probe]) -> list[Answer] | None:
        """What the objective returned for probes in one forward; None where they cannot go so."""
        batch = JointBatch([probes[number].batch for number in numbers])
        try:
            place = self._joint.at([probes[number].at for number in numbers], batch)
            with self._entered(place, [batch.content]):
                returned = self._routed(batch.content, place)
            # A score is of predictions themselves, so they are read at once.
            pieces = batch.read_later(returned) if self._score else batch.rows_of(returned)
        except torch.OutOfMemoryError as error:
            error.add_note(f"{len(batch)} rows were evaluated together; lower joint_rows")
            raise
        except (NotJoint, NoRowsError) as reason:
            logger.debug("evaluated one at a time: %s", reason)
            return None
        if self._score is not None:
            pieces = [made_of([piece], self._score) for piece in pieces]
        rows = map(len, (probes[number].batch for number in numbers))
        return [Answer(n, 0, size, one) for n, size, one in zip(numbers, rows, pieces, strict=True)]
