"""What a user may say of several processes."""

from dataclasses import dataclass
from typing import Any

from zo_adapt.errors import ArgumentTypeError
from zo_adapt.options import at_least_one, positive


@dataclass(frozen=True)
class Workers:
    """Several processes that share the evaluations of a run.

    Under a launcher (``torchrun``, ``accelerate launch``) they are found by themselves.

    Args:
        count: Processes to start on this machine, this one included, where no launcher has started
            any; None starts none.
        timeout: Seconds that a process waits for the others, > 0: for the slowest evaluation of a
            step, or else the run ends with a ``LostRankError``.
        check_every: Evaluations from one comparison of the processes' weights and values to the
            next, >= 1; the first is always compared.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> Workers(2, timeout=60)
        Workers(count=2, timeout=60.0, check_every=100)
    """

    count: int | None = None
    timeout: float = 600.0
    check_every: int = 100

    def __post_init__(self) -> None:
        count = None if self.count is None else at_least_one("workers", self.count)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "timeout", positive("timeout", self.timeout))
        object.__setattr__(self, "check_every", at_least_one("check_every", self.check_every))


def as_workers(workers: Any) -> Workers:
    """The workers as they are, or so many; None is none.

    Raises:
        ArgumentTypeError: Something else.
        OptionError: Fewer than one.
    """
    if isinstance(workers, Workers):
        return workers
    if isinstance(workers, str | bytes | float | bool | type):
        raise ArgumentTypeError(f"workers={workers!r}; give a number of processes, or Workers(...)")
    return Workers(workers)
