"""The calls of reward functions on the same texts: those that wait may do so in the background."""

import asyncio
import inspect
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from zo_adapt.errors import DataError

GIVEN = ("prompts", "completions", "completion_ids")
"""What every reward is called with; all else is a column of the data."""
MOSTLY = 5
"""A function waits that takes so many times the time in which it computes."""
WORTH = 0.05
"""Share of the time that the texts took, from which on it pays not to wait for a function."""


class KnownFunction(NamedTuple):
    """A reward function and what is known of it.

    Args:
        name: For messages.
        call: The function.
        accepted: Names of the arguments it takes; None for any.
        required: Of those it cannot do without.
    """

    name: str
    call: Callable[..., Any]
    accepted: frozenset[str] | None
    required: frozenset[str]


class BoundToThread(Exception):
    """A function must be called in the thread in which it was called before."""


class Calls:
    """All functions, called once on the same texts, in their order; the async ones wait together.

    Args:
        functions: What is called.
        arguments: Completions and columns.
        waits: Of each function, whether it mostly waits; changed where that is seen.
        seconds: Time that the texts took; inf where it does not matter.
        loop: Runs what is async.
    """

    def __init__(
        self,
        functions: Sequence[KnownFunction],
        arguments: Mapping[str, Any],
        waits: list[bool],
        seconds: float,
        loop: Callable[[], "EventLoop"],
    ) -> None:
        self._functions, self._arguments, self._waits = functions, arguments, waits
        self._least, self._loop = WORTH * seconds, loop
        self._returned: list[Any] = []
        self._home, self._is_over = threading.get_ident(), False
        self._waiting: list[Coroutine[Any, Any, Any]] = []
        self._running: Running | None = None

    def begin(self) -> bool:
        """Call the functions that do not wait, and those before them; whether more is to come."""
        quick = [number for number, waits in enumerate(self._waits) if not waits]
        self._call_until(max(quick, default=-1) + 1)
        is_whole = len(self._returned) == len(self._functions)
        return not is_whole or any(map(inspect.isawaitable, self._returned))

    def finish(self) -> list[Any]:
        """What every function returns, after the rest of the calls.

        Raises:
            BoundToThread: This is another thread, and one of the calls minds; finish in the first.
        """
        self._call_until(len(self._functions))
        self._waiting = [
            _awaited(function.name, result, self._arguments)
            for function, result in zip(self._functions, self._returned, strict=True)
            if inspect.isawaitable(result)
        ]
        if not self._waiting:
            return self._returned
        loop = self._loop()
        self._running = loop.begin(self._waiting)
        if self._is_over:
            self._running.cancel()
        try:
            done = iter(self._running.results())
        except BaseException:
            loop.call(self._close)
            raise
        return [next(done) if inspect.isawaitable(r) else r for r in self._returned]

    def cancel(self) -> None:
        """Call nothing more, and end what is async."""
        self._is_over = True
        if self._running is not None:
            self._running.cancel()

    def _call_until(self, stop: int) -> None:
        try:
            while len(self._returned) < stop and not self._is_over:
                self._returned.append(self._call(len(self._returned)))
        except BaseException as error:
            if threading.get_ident() != self._home and "thread" in str(error).lower():
                self._waits[len(self._returned)] = False
                raise BoundToThread from error
            self._close()
            raise
        if self._is_over:
            self._close()
            raise InterruptedError("the rewards are no more wanted")

    def _call(self, number: int) -> Any:
        function = self._functions[number]
        accepted = function.accepted
        chosen = self._arguments.keys() if accepted is None else accepted & self._arguments.keys()
        # Lists of its own: a function that changes them changes nothing for the next.
        own = {key: list(self._arguments[key]) for key in chosen}
        wall, computing = time.perf_counter(), time.thread_time()
        with absent_columns_named(function.name, self._arguments):
            returned = function.call(**own)
        wall, computing = time.perf_counter() - wall, time.thread_time() - computing
        # What computes would be in the way of the model's own code, and may be bound to its thread.
        self._waits[number] |= wall > max(MOSTLY * computing, self._least)
        return returned

    def _close(self) -> None:
        """End what was never begun, of which Python would warn."""
        for result in (*self._waiting, *self._returned):
            is_new = inspect.iscoroutine(result) and inspect.getcoroutinestate(result)
            if is_new == inspect.CORO_CREATED:
                result.close()


async def _awaited(name: str, result: Awaitable[Any], arguments: Mapping[str, Any]) -> Any:
    with absent_columns_named(name, arguments):
        return await result


@contextmanager
def absent_columns_named(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a KeyError of a name that is no column becomes a DataError."""
    try:
        yield
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in arguments:
            raise
        raise DataError(
            f"the reward function {name!r} raised KeyError: {key!r}; if that is a column, the "
            f"examples have {sorted(arguments.keys() - set(GIVEN))} beside the prompt: add it to "
            "every example"
        ) from error


class EventLoop:
    """An event loop in a thread of its own.

    One for the objective's life, since a client session that a reward keeps is bound to its loop;
    in a thread, since a notebook's own thread has a loop that runs already.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="zo_adapt-async")
        thread.start()
        weakref.finalize(self, _stop, self._loop, thread)

    def begin(self, waiting: Sequence[Awaitable[Any]]) -> "Running":
        """Run them at the same time."""
        return Running(self._loop, waiting)

    def call(self, function: Callable[[], None]) -> None:
        """Call a function in the loop's thread, after what was asked for before."""
        self._loop.call_soon_threadsafe(function)


class Running:
    """What is async, at the same time in a loop of another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, waiting: Sequence[Awaitable[Any]]) -> None:
        self._loop, self._waiting = loop, waiting
        self._ended = Future[list[Any]]()
        self._task: asyncio.Task[list[Any]] | None = None
        loop.call_soon_threadsafe(self._start)

    def results(self) -> list[Any]:
        """The results in order; all have ended, also when one raised, which is then raised here."""
        try:
            results = self._ended.result()
        except BaseException:
            self.cancel()
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def cancel(self) -> None:
        """End all of it; ``results`` then waits until it has ended, and raises."""
        self._loop.call_soon_threadsafe(self._end)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._gathered())
        self._task.add_done_callback(self._note_end)

    def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _gathered(self) -> list[Any]:
        return await asyncio.gather(*self._waiting, return_exceptions=True)

    def _note_end(self, task: "asyncio.Task[list[Any]]") -> None:
        if task.cancelled():
            self._ended.set_exception(CancelledError())
        elif (error := task.exception()) is not None:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(task.result())


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
