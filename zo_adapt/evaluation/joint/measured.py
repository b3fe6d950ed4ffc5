"""Up to how many tokens one more candidate in a forward is cheaper than a forward of its own."""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from zo_adapt.evaluation.protocol import Probe

logger = logging.getLogger(__name__)

PAYS = 0.8
"""Share of a forward of its own that one more candidate may cost."""
TRIES = 3
"""Times are the least of so many: whatever else a machine does makes them longer."""


def tokens_worth_joining(seconds: Callable[[int], float], tokens: int, most: int) -> int:
    """Tokens of the largest forward in which the last candidates were worth joining.

    Twice as many candidates are tried as long as each of those that come in addition costs less
    than ``PAYS`` of a forward of its own.

    Args:
        seconds: Time that so many candidates take together.
        tokens: Of one candidate.
        most: Candidates that there is room for.

    Example:
        >>> tokens_worth_joining(lambda count: max(1.0, count - 3.0), tokens=100, most=64)
        400
        >>> tokens_worth_joining(lambda count: 1.0 * count, tokens=100, most=64)
        100
    """
    count, alone = 1, seconds(1)
    before = alone
    while 2 * count <= most:
        try:
            now = seconds(2 * count)
        except torch.OutOfMemoryError:
            break
        if now - before > PAYS * count * alone:
            break
        count, before = 2 * count, now
    return count * tokens


def measured_tokens(
    call: Callable[[Sequence[Probe]], None], probes: Sequence[Probe], most: int
) -> int:
    """The tokens up to which this machine is faster with candidates together.

    Args:
        call: Computes probes in one forward and waits for the end.
        probes: Of a step. All are asked about the rows of the first.
        most: Of them that there is room for.
    """
    batch = probes[0].batch
    alike = [Probe(probe.at, batch) for probe in probes]
    tokens = len(batch) * max(1, batch.width)
    found = tokens_worth_joining(
        lambda count: least_seconds(lambda: call(alike[:count])), tokens, most
    )
    logger.info("candidates go together up to %d tokens, as was measured", found)
    return found


def least_seconds(work: Callable[[], object]) -> float:
    """The least time of some calls of what waits for a GPU itself, after one that warms up."""
    work()
    found = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)
