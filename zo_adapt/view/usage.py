"""Who uses a view now: while it is shifted, nobody else may shift or change its memory."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter

from torch import Tensor

from zo_adapt.errors import ViewError, ViewInUseError
from zo_adapt.interrupt import Guard
from zo_adapt.view.buffers import same_bits
from zo_adapt.view.inspection import Addresses


class Usage:
    """Counts the shifts of a view that are open, all of one thread.

    Another view may hold the same memory: what is done by way of it counts as done to this one.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 2)
        >>> usage, other = Usage({"w": weight}), Usage({"row": weight[0]})
        >>> with usage.shifting():
        ...     other.check_free("apply")
        Traceback (most recent call last):
            ...
        zo_adapt.errors.ViewInUseError: apply while another view of the same memory is shifted; \
leave shifted() first
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._holder: dict[str, int] = {}  # setdefault is atomic; a lock could not be pickled
        self._depth = 0
        self._written: set[str] = set()
        """Names of tensors that were written inside a shift, and may have been put back."""

    @contextmanager
    def shifting(self) -> Iterator[None]:
        """Inside, the calling thread alone may shift the view, again if it likes.

        Raises:
            ViewInUseError: Another thread is shifting it, or another view of its memory is shifted;
                or (at the end) its tensors have another dtype, device or shape than at the start.
        """
        me = threading.get_ident()
        if self._holder.get("thread", me) != me:
            raise ViewInUseError(_OTHER_THREAD)
        with Guard(self._leave) as guard:
            self._depth += 1
            _open.append(self)
            if self._holder.setdefault("thread", me) != me:
                raise ViewInUseError(_OTHER_THREAD)
            if self._depth == 1:
                self._check_others("shifted()")
            kinds = list(map(KIND, self._tensors.values()))
            guard.open()
            try:
                yield
            except Exception as error:
                # What does not go together any more says so in many ways.
                if list(map(KIND, self._tensors.values())) != kinds:
                    raise ViewInUseError(_CONVERTED) from error
                raise
            if list(map(KIND, self._tensors.values())) != kinds:
                raise ViewInUseError(_CONVERTED)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a shift is in force: what an objective writes to the tensors, it must put back.

        Torch counts writes. Tensors that were written once are compared from the next time on.

        Raises:
            ViewInUseError: (at the end) One of them was given other numbers.
        """
        copies = {name: self._tensors[name].detach().clone() for name in self._written}
        depth, counts = self._depth, self._counts()
        yield
        if self._depth != depth:  # shifts that end in the wrong order: they say so themselves
            return
        now = self._counts()
        self._written.update(name for name, count in counts.items() if now[name] != count)
        changed = [n for n, copy in copies.items() if not same_bits(self._tensors[n], copy)]
        if changed:
            raise ViewInUseError(
                f"the objective changed {changed[0]!r} in place ({len(changed)} tensors of the "
                "view in all), so that no value was that of a probe's weights; compute with a "
                "changed copy of the weights, or put back the numbers that were there"
            )

    def _counts(self) -> dict[str, int]:
        return {
            name: 0 if tensor.is_inference() else tensor._version
            for name, tensor in self._tensors.items()
        }

    def _leave(self) -> None:
        self._depth -= 1
        _open.remove(self)
        if self._depth == 0:
            self._holder.clear()

    def check_free(self, action: str) -> None:
        """Refuse to change a view that is shifted: the change would be undone with the shift.

        Raises:
            ViewInUseError: It is shifted, or another view of its memory.
        """
        if self._depth:
            raise ViewInUseError(f"{action} while the view is shifted; leave shifted() first")
        self._check_others(action)

    def _check_others(self, action: str) -> None:
        others = {id(other): other for other in tuple(_open) if other is not self}
        if any(self._shares_memory(other) for other in others.values()):
            raise ViewInUseError(
                f"{action} while another view of the same memory is shifted; leave shifted() first"
            )

    def _shares_memory(self, other: "Usage") -> bool:
        held = Addresses(self._tensors)
        return any(held.meeting(tensor) for tensor in other._tensors.values())


def check_mode(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of inference mode: torch writes some of them, and raises at the next."""
    if any(map(Tensor.is_inference, tensors.values())):
        name = next(name for name, tensor in tensors.items() if tensor.is_inference())
        raise ViewError(
            f"{name!r} was made in inference mode and cannot be changed outside of it; make, load "
            "or convert the model outside of torch.inference_mode()"
        )


KIND = attrgetter("dtype", "device", "shape")
_CONVERTED = (
    "tensors of the view changed their dtype, device or shape while it was shifted; convert the "
    "model (half(), to()) before or after a probe"
)
_open: list[Usage] = []
"""Those that are shifted now, in any thread, once for every shift."""
_OTHER_THREAD = (
    "another thread is evaluating at shifted weights of this view; give every thread a view of a "
    "model of its own, or make them take turns"
)
