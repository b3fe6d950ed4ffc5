"""The processes of a run ("ranks"), and the few numbers that they exchange.

The numbers lie on the host, so they go by gloo also where the models are on GPUs: unlike NCCL it
gives an error, not the end of the process, when another rank has died. A process group of the
user's own, or of Accelerate's, is used as it is; a second one over the same ranks has the timeout.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from zo_adapt.errors import LostRankError, ReplicaError
from zo_adapt.evaluation.workers import Workers
from zo_adapt.ranks.carried_errors import carried, rebuilt

EVALUATED, WRITTEN, COMPARED, SHARED, CLOSED = range(5)
"""What an exchange is for."""
FINE, FAILED, LEFT = range(3)
"""How it goes for a rank: as it should; an error that all ranks raise; it makes no more steps."""
HEAD = 4
LEAST_ROOM, MOST_ROOM = 32, 1 << 16
"""Numbers of 8 bytes that an exchange has room for: what the ones before needed, between these."""
GRACE = 2.0
"""Seconds in which ranks that see an exchange fail report, so that those that do not are named."""


class Message(NamedTuple):
    """What one rank says in an exchange.

    Args:
        kind: What the exchange is for.
        status: How it goes.
        key: Of an error: where in the step. Otherwise a checksum of what was asked.
        payload: int64.
    """

    kind: int
    status: int
    key: int
    payload: np.ndarray


class Ranks:
    """The ranks of a process group, of which this process is one.

    Args:
        group: Of torch.distributed, for tensors on the host.
        workers: Timeout and comparisons.

    Attributes:
        rank: Number of this process; 0 writes files and shows the bar.
        size: How many there are.
        is_over: Whether some rank has left the run: there are no more exchanges.
        check_every: Evaluations from one comparison of the ranks to the next.
        nbytes: Sent by this rank so far.
    """

    def __init__(self, group: Any, workers: Workers) -> None:
        self._group, self._timeout = group, workers.timeout
        self.check_every = workers.check_every
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.is_over = False
        self.nbytes = 0
        self._room = LEAST_ROOM
        self._failures = count()
        self._name = "zo_adapt"
        # Processes that a run has started count from the beginning: the name is that of rank 0.
        number = self.exchange(COMPARED, np.array([next(_runs)], np.int64))[0].payload[0]
        self._name = f"zo_adapt/{number}"

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def exchange(
        self, kind: int, payload: np.ndarray | None = None, *, status: int = FINE, key: int = 0
    ) -> list[Message]:
        """Give every rank what this one has; what each of them has, in their order.

        Raises:
            LostRankError: A rank has ended or does not answer.
            ReplicaError: The ranks are at different places of their run.
            Exception: What another rank has left with.
        """
        payload = np.empty(0, np.int64) if payload is None else payload
        head = np.array([kind, status, key, len(payload)], np.int64)
        found = self._gathered(np.concatenate([head, _padded(payload, self._room)]))
        sizes = found[:, HEAD - 1]
        most = int(sizes.max())
        # All ranks have seen the same sizes, so all of them make the second round, or none does.
        payloads = self._gathered(_padded(payload, most)) if most > self._room else found[:, HEAD:]
        messages = [
            Message(int(row[0]), int(row[1]), int(row[2]), own[:size])
            for row, own, size in zip(found, payloads, sizes.tolist(), strict=True)
        ]
        if kind in (EVALUATED, WRITTEN):
            self._room = min(max(self._room, most), MOST_ROOM)
        if kind != CLOSED:
            self._check(kind, messages)
        return messages

    def _check(self, kind: int, messages: Sequence[Message]) -> None:
        for rank, message in enumerate(messages):
            if message.status == LEFT:
                self.is_over = True
                raise rebuilt(message.payload, rank)
        kinds = [message.kind for message in messages]
        if len(set(kinds)) > 1:
            self.is_over = True
            raise ReplicaError(
                f"the ranks do different things at the same time ({kinds}): one has ended its run "
                "earlier, or runs another script; start all with the same arguments"
            )

    def _gathered(self, mine: np.ndarray) -> np.ndarray:
        """The rows of all ranks."""
        out = torch.empty((self.size, len(mine)), dtype=torch.int64)
        finished, self.is_over = (
            self.is_over,
            True,
        )  # an exchange that is cut off cannot be repeated
        try:
            dist.all_gather(list(out.unbind()), torch.from_numpy(mine), group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.is_over = finished
        self.nbytes += mine.nbytes
        return out.numpy()

    def _lost(self, error: RuntimeError) -> LostRankError:
        missing = self._missing()
        who = f"of rank {', '.join(map(str, missing))}" if missing else "of another rank"
        return LostRankError(
            f"rank {self.rank} of {self.size} has no answer {who} ({self._timeout:g} s are allowed)"
            f": it has ended or hangs. The weights are those of the last good step; see the output "
            f"of that rank, and start again with resume=True. ({error})"
        )

    def _missing(self) -> list[int]:
        """Ranks that do not see the failure, as far as is known."""
        try:
            store, name = _store(), f"{self._name}/failed/{next(self._failures)}"
            store.set(f"{name}/{self.rank}", "1")
            others, end = set(range(self.size)) - {self.rank}, time.monotonic() + GRACE
            while others and time.monotonic() < end:
                others = {rank for rank in others if not store.check([f"{name}/{rank}"])}
                time.sleep(GRACE / 20)
            return sorted(others)
        except RuntimeError:  # rank 0 keeps the store
            return [0] if self.rank else []

    def from_first(self, make: Callable[[], bytes]) -> bytes:
        """What rank 0 makes, on every rank; its error is raised on every rank."""
        try:
            data = make() if self.is_first else b""
            failed = None
        except Exception as error:
            failed, status = error, FAILED
            payload = carried(error)
        else:
            padded = data + bytes(-len(data) % 8)
            status = FINE
            payload = np.concatenate([[len(data)], np.frombuffer(padded, np.int64)])
        first = self.exchange(SHARED, payload if self.is_first else None, status=status)[0]
        if failed is not None:
            raise failed
        if first.status == FAILED:
            raise rebuilt(first.payload, 0)
        return first.payload[1:].tobytes()[: int(first.payload[0])]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What is raised inside on any rank is raised on all of them at the end."""
        try:
            yield
        except Exception as error:
            self.agreed(error)
            raise
        self.agreed(None)

    def agreed(self, error: Exception | None) -> None:
        """Raise on every rank what this one, or the first of those that have an error, has.

        Raises:
            Exception: The error.
        """
        status = FINE if error is None else FAILED
        messages = self.exchange(
            WRITTEN, None if error is None else carried(error), status=status, key=0
        )
        self.raise_first(messages, error)

    def raise_first(self, messages: Sequence[Message], own: Exception | None) -> None:
        """Raise the error that one process would have met first, if there is any."""
        failed = [(m.key, rank) for rank, m in enumerate(messages) if m.status == FAILED]
        if not failed:
            return
        _, rank = min(failed)
        if rank == self.rank and own is not None:
            raise own
        raise rebuilt(messages[rank].payload, rank) from own

    def queue(self, name: int) -> Iterator[int]:
        """Numbers 0, 1, ... of which every rank gets others, when it asks for the next."""
        store, key = _store(), f"{self._name}/queue/{name}"
        try:
            if self.is_first and name:
                store.delete_key(f"{self._name}/queue/{name - 1}")
            while True:
                yield store.add(key, 1) - 1
        except RuntimeError as error:
            raise self._lost(error) from error

    def close(self, error: BaseException | None = None) -> None:
        """Say that this rank makes no more steps; every rank says so, once.

        Args:
            error: Why, if it is not that the budget is used up: others that are in a step raise it.
        """
        if self.is_over:
            return
        payload = None if error is None else carried(error)
        self.exchange(CLOSED, payload, status=FINE if error is None else LEFT)
        self.is_over = True


@contextmanager
def closing_ranks(ranks: Ranks | None) -> Iterator[None]:
    """At its end this rank says that it makes no more steps, and why, if something was raised."""
    try:
        yield
    except BaseException as error:
        if ranks is not None:
            # A budget that is used up is so on every rank, each of which says the same.
            ranks.close(error)
        raise
    if ranks is not None:
        ranks.close()


_runs = count()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _padded(payload: np.ndarray, size: int) -> np.ndarray:
    """So many numbers, of a longer payload the first ones."""
    out = np.zeros(size, np.int64)
    out[: len(payload)] = payload[:size]
    return out
