"""The seeds of a run: one stream of the generator, in which each has its number."""

from collections.abc import Sequence
from typing import NamedTuple

from zo_adapt.noise import philox

SEED_STREAM = 3
NAME = "philox-words-v1"
"""Versioned: kept in every trajectory, whose records name seeds by their counter."""
LOOK_BACK = 8192
"""Counters searched for a seed: more than the directions of one record."""


class Seeds(NamedTuple):
    """seed number c = word c of the generator's stream 3 under a key.

    Args:
        key: The run's seed, 0 <= key < 2**64.

    Example:
        >>> stream = Seeds(key=0)
        >>> stream.take(5, 2) == stream.take(0, 7)[5:]
        True
    """

    key: int

    def take(self, first: int, count: int) -> list[int]:
        """Seeds number ``first`` to ``first + count - 1``."""
        block = first // philox.WORDS
        blocks = -(-(first + count) // philox.WORDS) - block
        words = philox.words_numpy(self.key, 0, SEED_STREAM, block, blocks)
        seeds: list[int] = words[first % philox.WORDS :][:count].tolist()
        return seeds

    def find(self, wanted: Sequence[int], drawn: int) -> list[int | None]:
        """The numbers of some seeds among those drawn last; None for one that is not there.

        Args:
            wanted: Seeds.
            drawn: How many seeds of the stream were drawn so far.
        """
        span = len(wanted)
        while True:
            # Most steps use what was drawn last; a step that refers to a snapshot, older ones.
            first = max(drawn - min(span, LOOK_BACK), 0)
            number = {seed: first + i for i, seed in enumerate(self.take(first, drawn - first))}
            found = [number.get(seed) for seed in wanted]
            if None not in found or first == 0 or span >= LOOK_BACK:
                return found
            span *= 8
