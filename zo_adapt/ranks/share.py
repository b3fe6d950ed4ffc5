"""The part of a step that one rank computes."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from zo_adapt.evaluation.answers import Block, merged
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.ranks.group import Ranks
from zo_adapt.ranks.values import Values


class Share:
    """What this rank computes of one step.

    Args:
        local: Evaluates.
        ranks: Who shares.
        number: Of the evaluation.
        compares: Compute the last block as well, whoever else does, to compare its values. It comes
            after the others, when what draws at random has drawn for other rows on every rank.

    Attributes:
        at: Where it is, as a number that grows in the order in which one process would go: so that
            of several errors the first is known.
    """

    def __init__(self, local: LocalEvaluator, ranks: Ranks, number: int, compares: bool) -> None:
        self._local, self._ranks, self._number = local, ranks, number
        self._compares = compares
        self._all: list[Block] = []
        self._owns_last = False
        self.at = 0

    def computed(self, probes: Sequence[Probe]) -> Values:
        """The answers to this rank's blocks."""
        answers = []
        chosen = partial(self._chosen, probes=probes)
        for answer in self._local.answers(probes, chosen, self._note):
            self.at = len(self._all) + answer.probe
            answers.append(answer.checked(finite=self._local.on_nonfinite == "stop"))
        if not self._compares or not self._all:
            return Values(np.empty(0), answers)
        last = [answer for answer in answers if self._all[-1].holds(answer)]
        if not self._owns_last:
            answers = [answer for answer in answers if not self._all[-1].holds(answer)]
        return Values(np.concatenate([np.ravel(answer.returned) for answer in last]), answers)

    def _note(self, block: Block) -> None:
        self.at = self._all.index(block.split()[0])

    def _chosen(self, blocks: list[Block], probes: Sequence[Probe]) -> Iterator[Block]:
        self._all = [part for block in blocks for part in block.split()]
        for block in self._shared_out(probes):
            self._owns_last |= block.split()[-1] == self._all[-1]
            yield block
        if self._compares and self._all and not self._owns_last:
            yield self._all[-1]

    def _shared_out(self, probes: Sequence[Probe]) -> Iterator[Block]:
        """This rank's blocks: from the queue, or its part of the row."""
        if self._local.objective.uneven:
            numbers = self._ranks.queue(self._number)
            while (number := next(numbers)) < len(self._all):
                yield self._all[number]
            return
        rows = [self._local.rows_of(block, probes) for block in self._all]
        owners = shared_out(rows, self._ranks.size)
        yield from merged(
            [b for b, rank in zip(self._all, owners, strict=True) if rank == self._ranks.rank]
        )


class Whole(Share):
    """What every rank computes of one step where the model lies in parts on all of them."""

    def computed(self, probes: Sequence[Probe]) -> Values:
        """The answers, to be compared; those of rank 0 are used."""
        answers = []
        for answer in self._local.answers(probes):
            self.at = answer.probe
            answers.append(answer.checked(finite=self._local.on_nonfinite == "stop"))
        compared = [np.ravel(answer.returned) for answer in answers]
        own = answers if self._ranks.is_first else []
        return Values(np.concatenate(compared) if compared else np.empty(0), own)


def shared_out(rows: Sequence[int], ranks: int) -> list[int]:
    """The rank that computes each block: neighbours stay together, and rows are about even.

    Args:
        rows: Of each block.
        ranks: How many there are.

    Example:
        >>> shared_out([8, 8, 8, 8, 8, 8], 3)
        [0, 0, 1, 1, 2, 2]
        >>> shared_out([8, 8], 3)
        [0, 1]
    """
    if len(rows) <= ranks:
        return list(range(len(rows)))
    total, before, owners = sum(rows), 0, []
    for count in rows:
        owners.append((2 * before + count) * ranks // (2 * total))
        before += count
    return owners
