"""Work that Ctrl-C must not cut in half."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, an interrupt waits; it is raised at the end, when what was begun is whole.

    For weights and for the file that describes them: after Ctrl-C both are those of one step. Only
    the main thread is ever interrupted; elsewhere this does nothing.

    Example:
        >>> with uninterrupted():
        ...     pass
    """
    if threading.current_thread() is not threading.main_thread() or _Waiting.begun:
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *received: waiting.append(received))
    _Waiting.begun = True
    try:
        yield
    finally:
        _Waiting.begun = False
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


class _Waiting:
    """Whether interrupts of the main thread wait already: what is within need not see to it."""

    begun = False
