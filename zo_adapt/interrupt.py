"""Work that no signal cuts in half, and changes that are undone whatever ends them.

Python calls a signal's handler between any two bytecodes of the main thread, and what the handler
raises (KeyboardInterrupt, a timeout) surfaces there: also in the middle of a ``finally`` that was
to put weights back. So while something is changed, signals wait: from before the first write to
after the last, but for the body in between, which may take long and is cut at once. Within the
body, too, they wait where this package's own frames or contextlib's run, for these lie on the way
from the body to the undoing; the code of an objective, a model or a caller does not.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch.utils import _python_dispatch

_NAMES = (
    *("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGBREAK"),
    *("SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF", "SIGXCPU"),
)
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Those that ask a program to end, or that a time limit or a queue of jobs sends."""
CONTEXTS = (contextlib, torch.autograd.grad_mode, torch.overrides, _python_dispatch)
OWN_FILES = (str(Path(__file__).parent), *(str(module.__file__) for module in CONTEXTS))
"""Frames of these files lie between a body and its undoing."""

Handler = Callable[[int, FrameType | None], Any]


class Guard:
    """A context in which signals wait; what was done inside is undone at its end.

    Args:
        undo: Called at the end, whatever happened, before any signal that waits is handled.

    Example:
        >>> done = []
        >>> with Guard(lambda: done.append("undone")) as guard:
        ...     done.append("written")    # signals wait
        ...     guard.open()
        ...     done.append("evaluated")  # a signal ends this at once
        >>> done
        ['written', 'evaluated', 'undone']
    """

    def __init__(self, undo: Callable[[], None] | None = None) -> None:
        self._undo = undo
        self.is_open = False
        """Whether signals are handled inside."""

    def __enter__(self) -> Self:
        if _is_main_thread():
            if not _guards:
                _install()
            # From here on signals wait: nothing is raised between this line and the body.
            _guards.append(self)
        return self

    def open(self) -> None:
        """Let signals in until the end."""
        self.is_open = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_open = False
        try:
            if self._undo is not None:
                self._undo()
        finally:
            if self in _guards:
                _guards.remove(self)
            if _is_main_thread():
                _handle_waiting()


def uninterrupted() -> Guard:
    """A context in which signals wait; they are handled at its end, when what was begun is whole.

    For weights and for the file that describes them: after Ctrl-C both are those of one step. Only
    the main thread is ever interrupted; elsewhere this does nothing.

    Example:
        >>> with uninterrupted():
        ...     pass
    """
    return Guard()


@contextlib.contextmanager
def undone(changes: Iterable[Callable[[], Any]]) -> Iterator[None]:
    """Inside, changes are in force; afterwards all that were made are undone, the last one first.

    Args:
        changes: Gives for each change what undoes it; a generator makes them as it is read, so that
            no signal comes between a change and the note of how to undo it.

    Example:
        >>> values = [1]
        >>> def appended(value):
        ...     values.append(value)
        ...     return values.pop
        >>> with undone(appended(value) for value in (2, 3)):
        ...     print(values)
        [1, 2, 3]
        >>> values
        [1]
    """
    undos: list[Callable[[], Any]] = []

    def undo() -> None:
        while undos:
            undos.pop()()

    with Guard(undo) as guard:
        for change in changes:
            undos.append(change)
        guard.open()
        yield


@contextlib.contextmanager
def gradients_off() -> Iterator[None]:
    """As ``torch.no_grad()``, whose end a signal may cut: gradients would stay off.

    Example:
        >>> with gradients_off():
        ...     torch.is_grad_enabled()
        False
    """
    before = torch.is_grad_enabled()
    with Guard(lambda: torch._C._set_grad_enabled(before)) as guard:
        torch._C._set_grad_enabled(False)
        guard.open()
        yield


_guards: list[Guard] = []
_handlers: dict[int, Handler] = {}
"""What was installed before, while ours are."""
_waiting: dict[int, FrameType | None] = {}
"""One of each kind, as an operating system keeps them."""


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _install() -> None:
    """Put our handler in place of those written in Python; others end the process anyway."""
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not _receive:
                _handlers[number] = handler
                signal.signal(number, _receive)
    except BaseException:  # a signal that ours is not in place for yet
        _handle_waiting()
        raise


def _uninstall() -> None:
    """Put the handlers of before back, all of them, also where one that is back already raises."""
    raised = None
    while _handlers:
        try:
            for number, handler in list(_handlers.items()):
                if signal.getsignal(number) is _receive:  # and not one that was installed inside
                    signal.signal(number, handler)
                _handlers.pop(number, None)
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


def _receive(number: int, frame: FrameType | None) -> None:
    # Without a guard the handlers are just being exchanged.
    if not _guards or not (_guards[-1].is_open and _is_foreign(frame)):
        _waiting.setdefault(number, frame)
        return
    handler = _handlers.get(number)
    if handler is not None:
        handler(number, frame)


def _is_foreign(frame: FrameType | None) -> bool:
    return frame is None or not frame.f_code.co_filename.startswith(OWN_FILES)


def _handle_waiting() -> None:
    """Handle what waits, unless a guard further out still keeps it waiting."""
    if _guards and not _guards[-1].is_open:
        return
    handlers = dict(_handlers)
    try:
        if not _guards:
            _uninstall()
    finally:
        _call(handlers)


def _call(handlers: dict[int, Handler]) -> None:
    """Call the handlers of the signals that wait, each once, also where one of them raises."""
    try:
        while _waiting:
            number = next(iter(_waiting))
            frame = _waiting.pop(number)
            if number in handlers:
                handlers[number](number, frame)
    finally:
        if _waiting:
            _call(handlers)


def is_from_handler(error: BaseException) -> bool:
    """Whether the handler of a signal raised an error: it is for the caller, not a failed attempt.

    Code that tries something and goes another way where that fails asks this first. Without it a
    timeout would be taken for a failure, and the run go on as if there had been none.

    Example:
        >>> try:
        ...     1 / 0
        ... except ZeroDivisionError as error:
        ...     is_from_handler(error)
        False
    """
    handlers = [*_handlers.values(), *map(signal.getsignal, SIGNALS)]
    codes = {_code_of(handler) for handler in handlers if callable(handler)} - {None}
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code in codes:
            return True
        place = place.tb_next
    return False


def _code_of(handler: Handler) -> Any:
    called: Any = handler if hasattr(handler, "__code__") else type(handler).__call__
    return getattr(called, "__code__", None)
