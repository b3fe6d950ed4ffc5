"""What a rank says of a step, as numbers that are sent."""

from typing import NamedTuple

import numpy as np

from zo_adapt.evaluation.answers import Answer


class Values(NamedTuple):
    """What a rank says of a step.

    Args:
        compared: Values that every rank has computed.
        answers: To its own blocks.
        weights: A hash of its weights, where they are compared.
    """

    compared: np.ndarray
    answers: list[Answer]
    weights: int = 0

    def packed(self) -> np.ndarray:
        """All of it as int64; of float64 the bits."""
        parts = [np.array([self.weights, len(self.compared)], np.int64), _bits(self.compared)]
        for probe, part, rows, values in self.answers:
            parts += [np.array([probe, part, rows, values.ndim], np.int64), _bits(values)]
        return np.concatenate(parts)

    @classmethod
    def unpacked(cls, payload: np.ndarray) -> "Values":
        """The inverse of ``packed``."""
        numbers, end = payload.view(np.float64), 2 + int(payload[1])
        compared, answers = numbers[2:end], []
        while end < len(payload):
            probe, part, rows, is_vector = map(int, payload[end : end + 4])
            start, end = end + 4, end + 4 + (rows if is_vector else 1)
            values = numbers[start:end].copy()
            answers.append(Answer(probe, part, rows, values if is_vector else values.reshape(())))
        return cls(compared, answers, int(payload[0]))


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float64).reshape(-1).view(np.int64)
