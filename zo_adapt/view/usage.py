"""Who uses a view now: while it is shifted, nobody else may shift or change it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from zo_adapt.errors import ViewInUseError
from zo_adapt.interrupt import Guard


class Usage:
    """Counts the shifts of a view that are open, all of one thread.

    Example:
        >>> usage = Usage()
        >>> with usage.shifting():
        ...     usage.check_free("apply")
        Traceback (most recent call last):
            ...
        zo_adapt.errors.ViewInUseError: apply while the view is shifted; leave shifted() first
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}  # setdefault is atomic; a lock could not be pickled
        self._depth = 0

    @contextmanager
    def shifting(self) -> Iterator[None]:
        """Inside, the calling thread alone may shift the view, again if it likes.

        Raises:
            ViewInUseError: Another thread is shifting it.
        """
        me = threading.get_ident()
        if self._holder.get("thread", me) != me:
            raise ViewInUseError(_OTHER_THREAD)
        with Guard(self._leave) as guard:
            self._depth += 1
            if self._holder.setdefault("thread", me) != me:
                raise ViewInUseError(_OTHER_THREAD)
            guard.open()
            yield

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder.clear()

    def check_free(self, action: str) -> None:
        """Refuse to change a view that is shifted: the change would be undone with the shift.

        Raises:
            ViewInUseError: It is shifted.
        """
        if self._depth:
            raise ViewInUseError(f"{action} while the view is shifted; leave shifted() first")


_OTHER_THREAD = (
    "another thread is evaluating at shifted weights of this view; give every thread a view of a "
    "model of its own, or make them take turns"
)
