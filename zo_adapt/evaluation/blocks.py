"""A step's probes cut into blocks: what one call of the objective answers, wherever it is made.

How probes are cut depends on the probes alone, never on how many processes share the blocks, so
that a value is computed from the same rows, side by side in the same order, in any of them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from zo_adapt.evaluation.protocol import Evaluation
from zo_adapt.evaluation.values import checked_values


class Block(NamedTuple):
    """Probes that are computed in one forward, or micro-batches of a single one.

    Args:
        probes: Their numbers in the step.
        parts: Numbers of the micro-batches; none: all that there are, for one answer.
    """

    probes: tuple[int, ...]
    parts: tuple[int, ...] = ()

    def split(self) -> list["Block"]:
        """The smallest blocks that others could compute instead."""
        if not self.parts:
            return [self]
        return [Block(self.probes, (part,)) for part in self.parts]

    def holds(self, answer: "Answer") -> bool:
        """Whether an answer is one to this block."""
        return answer.probe in self.probes and (not self.parts or answer.part in self.parts)


def joined(blocks: Sequence[Block]) -> Iterator[Block]:
    """Neighbouring micro-batches of one probe as one block: the view is then shifted once."""
    for (probes, cut), run in groupby(blocks, key=lambda block: (block.probes, bool(block.parts))):
        parts = tuple(part for block in run for part in block.parts)
        yield Block(probes, parts if cut else ())


class Answer(NamedTuple):
    """What the objective returned for a probe, or for a micro-batch of it.

    Args:
        probe: Its number in the step.
        part: Number of the micro-batch.
        rows: Of which it is the answer.
        returned: As it was returned; after ``checked`` float64 of shape () or (rows,).
    """

    probe: int
    part: int
    rows: int
    returned: Any

    def checked(self) -> "Answer":
        """The same with numbers.

        Raises:
            ObjectiveError: See ``checked_values``.
        """
        return self._replace(returned=checked_values(self.returned, self.rows))


def evaluations(answers: Sequence[Answer], sign: float) -> list[Evaluation]:
    """One evaluation for every probe, of checked answers in any order.

    Args:
        answers: All of a step.
        sign: -1.0 where the objective is maximised.
    """
    ordered = sorted(answers, key=lambda answer: answer[:2])
    return [_evaluation(list(own), sign) for _, own in groupby(ordered, lambda one: one.probe)]


def _evaluation(answers: list[Answer], sign: float) -> Evaluation:
    values = [answer.returned for answer in answers]
    if all(value.ndim == 1 for value in values):
        per_example = sign * (values[0] if len(values) == 1 else np.concatenate(values))
        return Evaluation(float(per_example.sum()) / len(per_example), per_example)
    means = [float(value.mean()) for value in values]
    if len(means) == 1:
        return Evaluation(sign * means[0])
    return Evaluation(sign * float(np.average(means, weights=[one.rows for one in answers])))
