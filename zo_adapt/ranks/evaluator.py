"""Evaluations shared by several processes: each computes some blocks of a step, all get the values.

A step's probes are cut into the same blocks as in one process, and a value depends on its block
alone, so that it does not matter which rank computes it: the values, and with them the run, are bit
for bit those of one process on the same kind of device. What goes from rank to rank are the values,
in one exchange a step.
"""

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from zo_adapt.errors import OptionError, ReplicaError
from zo_adapt.evaluation.answers import evaluations
from zo_adapt.evaluation.failures import OnNonFinite
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.plan import Plan
from zo_adapt.evaluation.protocol import Evaluation, Evaluator, Probe
from zo_adapt.ranks.carried_errors import carried
from zo_adapt.ranks.group import COMPARED, EVALUATED, FAILED, FINE, Message, Ranks
from zo_adapt.ranks.launched import warn_of_shared_gpu
from zo_adapt.ranks.replicas import check_weights, checksums, short_hash
from zo_adapt.ranks.share import Share, Whole
from zo_adapt.ranks.values import Values

ROUNDING = 1e-2
"""Relative difference of the values of two ranks that hold parts of one model."""


class RankEvaluator:
    """An ``Evaluator`` of several processes, all of which ask it the same.

    Each rank gets its blocks in order, about as many rows as the others, so that it reads the data
    of its own rows alone (and of those that have to be measured before they are put together).
    Blocks of an objective whose calls are ``uneven`` come from a queue, to whoever is free. Where
    the ranks hold parts of one model, a forward is the work of all: each computes every block.

    Args:
        local: Evaluates in this process.
        ranks: The processes.
    """

    def __init__(self, local: LocalEvaluator, ranks: Ranks) -> None:
        self._local, self._ranks, self._number = local, ranks, 0
        self._together = local.view.is_sharded
        self.objective, self.view, self.sign = local.objective, local.view, local.sign
        self.micro_batch_size, self.measures = local.micro_batch_size, local.measures

    @property
    def queries(self) -> int:
        """Made so far by all ranks together, each counted once."""
        return self._local.queries

    @queries.setter
    def queries(self, queries: int) -> None:
        self._local.queries = queries

    @property
    def memory(self) -> int | None:
        """Bytes that candidates may take together."""
        return self._local.memory

    @memory.setter
    def memory(self, nbytes: int | None) -> None:
        self._local.memory = nbytes

    @property
    def joint_tokens(self) -> int | None:
        """Tokens up to which candidates go together, where that was measured: by rank 0."""
        return self._local.joint_tokens

    @joint_tokens.setter
    def joint_tokens(self, tokens: int | None) -> None:
        self._local.joint_tokens = tokens

    def measure(self, probes: Sequence[Probe]) -> None:
        """See ``LocalEvaluator``; all ranks go by the figure of the first."""

        def measured() -> bytes:
            self._local.measure(probes)
            return str(self._local.joint_tokens or "").encode()

        found = self._ranks.from_first(measured)
        self._local.joint_tokens = int(found) if found else None

    @property
    def plan(self) -> Plan:
        """How probes are evaluated here."""
        return replace(self._local.plan, ranks=self._ranks.size)

    @property
    def on_nonfinite(self) -> OnNonFinite:
        """See ``Evaluator``."""
        return self._local.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, way: OnNonFinite) -> None:
        self._local.on_nonfinite = way

    def reserve(self, queries: int) -> None:
        """See ``Evaluator``."""
        self._local.reserve(queries)

    def ready(self) -> AbstractContextManager[Any]:
        """See ``Evaluator``."""
        return self._local.ready()

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left; none was made.
            ObjectiveError: On any of the ranks; the same on all of them.
            LostRankError: A rank has ended or does not answer.
            ReplicaError: The ranks ask different probes, hold different weights, or compute
                different values.
        """
        self._local.reserve(sum(len(probe.batch) for probe in probes))
        number, self._number = self._number, self._number + 1
        compares = number % self._ranks.check_every == 0
        kind = Whole if self._together else Share
        share = kind(self._local, self._ranks, number, compares)
        failed: Exception | None = None
        try:
            own = share.computed(probes)
            if compares:
                own = own._replace(weights=short_hash(checksums(self.view).tobytes()))
            payload = own.packed()
        except Exception as error:
            failed, payload = error, carried(error)
        key = _asked(probes) if failed is None else share.at
        messages = self._ranks.exchange(
            EVALUATED, payload, status=FINE if failed is None else FAILED, key=key
        )
        self._ranks.raise_first(messages, failed)
        self._check_probes(messages)
        found = [Values.unpacked(message.payload) for message in messages]
        if compares or self._together:
            self._check_alike(found)
        return evaluations([answer for own in found for answer in own.answers], self.sign)

    def _check_probes(self, messages: Sequence[Message]) -> None:
        for rank, message in enumerate(messages):
            if message.key != messages[0].key:
                raise ReplicaError(
                    f"rank {rank} evaluates other points or rows than rank 0: its seed, optimizer, "
                    "budget or data differ, or its weights have led it to another step; start all "
                    "ranks with the same arguments"
                )

    def _check_alike(self, found: Sequence[Values]) -> None:
        if any(own.weights != found[0].weights for own in found):
            check_weights(self._ranks, self.view)
        for rank, own in enumerate(found):
            if not self._same(own.compared, found[0].compared):
                raise ReplicaError(_unlike(rank, own.compared, found[0].compared))

    def _same(self, one: np.ndarray, other: np.ndarray) -> bool:
        """Whether two ranks have the same values, of which those of rank 0 are used.

        Parts of a model are put together by the ranks themselves, each of which may round the sum
        in its own way.
        """
        if not self._together:
            return np.array_equal(one, other, equal_nan=True)
        scale = np.abs(other[np.isfinite(other)]).max(initial=0.0)
        return one.shape == other.shape and np.allclose(
            one, other, rtol=ROUNDING, atol=ROUNDING * scale, equal_nan=True
        )


def options_of(options: EvaluationOptions, ranks: Ranks | None) -> EvaluationOptions:
    """How several processes evaluate: without CUDA graphs, unless they are asked for.

    A shape is captured after some calls, which ranks see at different times, and a model may run
    other kernels while it is captured: values that are subtracted must come from the same ones.
    """
    if ranks is None or options.cuda_graphs != "auto":
        return options
    return replace(options, cuda_graphs="off")


def shared(local: Evaluator, ranks: Ranks | None) -> Evaluator:
    """The evaluator of several processes; that of this one where it is alone.

    Raises:
        OptionError: One that asks elsewhere, which several processes cannot share.
    """
    if ranks is None:
        return local
    if not isinstance(local, LocalEvaluator):
        raise OptionError(
            f"{type(local).__name__} with several processes: a served model is asked by one; start "
            "the script without a launcher, or give several servers as a ServerPool"
        )
    warn_of_shared_gpu(local.view)
    # Which candidates go together depends on the memory that there is: on the least of all ranks.
    own = np.array([-1 if local.memory is None else local.memory], np.int64)
    found = [int(message.payload[0]) for message in ranks.exchange(COMPARED, own)]
    local.memory = None if min(found) < 0 else min(found)
    return RankEvaluator(local, ranks)


def _asked(probes: Sequence[Probe]) -> int:
    """A checksum of points and rows."""
    total = 0
    for probe in probes:
        rows = np.array(probe.batch.rows, np.int64).tobytes()
        total = zlib.crc32(repr(probe.at).encode(), zlib.crc32(rows, total))
    return total


def _unlike(rank: int, theirs: np.ndarray, first: np.ndarray) -> str:
    shown = f"{len(theirs)} values, not {len(first)}"
    if len(theirs) == len(first):
        place = int(np.flatnonzero((theirs != first) & ~(np.isnan(theirs) & np.isnan(first)))[0])
        shown = f"{float(theirs[place])!r} for value {place}, not {float(first[place])!r}"
    return (
        f"the same probe has other values on rank {rank} than on rank 0 ({shown}): the objective "
        "or its collate function draws at random (draw from a generator that the examples seed), "
        "reads other data or other weights, or the ranks compute on devices of different kinds"
    )
