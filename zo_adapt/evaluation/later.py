"""Values that are on their way while the model computes what comes next."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from zo_adapt.interrupt import is_from_handler

PATIENCE = 5.0
"""Seconds for which a run that has failed waits for a call that nothing can stop."""


class Later(Protocol):
    """A value that may not be there yet."""

    def result(self) -> Any:
        """Wait for the value, or raise the error that there was; the same when asked again."""

    def cancel(self) -> None:
        """The value is no more wanted."""


class InBackground:
    """Calls a function in a thread of its own, which ends when the function does.

    The function sees the caller's context variables, and gradients as they are switched here.

    Args:
        function: What is called.
        stop: Called by ``cancel``, to end the function early.

    Example:
        >>> InBackground(lambda: 1 + 1).result()
        2
    """

    def __init__(
        self, function: Callable[[], Any], stop: Callable[[], object] = lambda: None
    ) -> None:
        self._found, self._stop = Future[Any](), stop
        self.is_cancelled = False
        """Whether the result is no more wanted."""
        gradients, context = torch.is_grad_enabled(), contextvars.copy_context()

        def called() -> None:
            try:
                with torch.set_grad_enabled(gradients):
                    value = context.run(function)
            except BaseException as error:  # raised where the result is asked for
                self._found.set_exception(error)
            else:
                self._found.set_result(value)

        self._thread = threading.Thread(target=called, daemon=True, name="zo_adapt-background")
        begun = _begun.get()
        if begun is not None:
            begun.append(self)
        self._thread.start()

    def result(self) -> Any:
        """Wait for what the function returns, or raise what it raised."""
        try:
            return self._found.result()
        finally:
            if self._found.done():  # and no signal has ended the waiting
                self._thread.join()

    def cancel(self) -> None:
        """Ask the function to end, and wait for that, but not for long."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._stop()
            if self._thread.ident is not None:
                self._thread.join(PATIENCE)

    def wait(self) -> None:
        """Wait until the function has ended, in whatever way."""
        if self._thread.ident is not None:
            self._thread.join()


_begun: ContextVar[list[InBackground] | None] = ContextVar("begun", default=None)


@contextmanager
def cancelled_on_failure() -> Iterator[None]:
    """Inside, calls may be begun in the background; they are cancelled if this ends by an error.

    Also those that nobody knows of, since a signal came right after they were begun.
    """
    token = _begun.set([])
    try:
        yield
    except BaseException:
        for one in _begun.get() or ():
            one.cancel()
        raise
    finally:
        _begun.reset(token)


class Made:
    """What is made of values on their way; made once.

    Attributes:
        is_cancelled: Whether it is no more wanted.

    Example:
        >>> Made(lambda: 3).result()
        3
    """

    def __init__(self, make: Callable[[], Any], *of: Later) -> None:
        self._make, self._of = make, of
        self._found: Future[Any] | None = None
        self.is_cancelled = False

    def result(self) -> Any:
        """What is made, or the error that there was."""
        if self._found is None:
            found = Future[Any]()
            try:
                found.set_result(self._make())
            except Exception as error:
                if is_from_handler(error):  # and none of the values'
                    raise
                found.set_exception(error)
            self._found = found
        return self._found.result()

    def cancel(self) -> None:
        """Cancel what it is made of."""
        if not self.is_cancelled:
            self.is_cancelled = True
            for one in self._of:
                one.cancel()


def made(value: Any) -> Made:
    """A value that is there, or on its way, as a ``Made``."""
    if isinstance(value, Made):
        return value
    return Made(value.result, value) if hasattr(value, "result") else Made(lambda: value)


def made_of(values: Sequence[Any], make: Callable[[list[Any]], Any]) -> Any:
    """What is made of values: at once, or where some are on their way, once they are there.

    Example:
        >>> made_of([1, 2], sum), made_of([1, Made(lambda: 2)], sum).result()
        (3, 3)
    """
    late = [value for value in values if isinstance(value, Made)]
    if not late:
        return make(list(values))
    return Made(lambda: make([v.result() if isinstance(v, Made) else v for v in values]), *late)
