"""A signal at every instruction of an operation, and what it leaves behind.

Python calls a signal's handler between two instructions of the main thread, with the frame that was
to go on. A trace function is called between any two instructions of any Python frame, torch's and
transformers' included; at the n-th of them it calls the handler that is installed then, with that
frame. That is every position at which Python itself could, and more: it looks for signals only at
calls and jumps. Beside that, real ones come from a timer at random moments.
"""

import contextlib
import gc
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from zo_adapt import interrupt

SIGNALS = interrupt.SIGNALS


class Cut(Exception):
    """What the handlers of all signals but SIGINT raise."""


class Subject(NamedTuple):
    """What is attacked.

    Args:
        prepare: Puts everything at its start; not attacked.
        work: What is attacked.
        faults: Says what is wrong after it was cut; gives nothing where all is well.
        model: In which nothing may stay patched.
    """

    prepare: Callable[[], None]
    work: Callable[[], Any]
    faults: Callable[[], list[str]]
    model: nn.Module | None = None


class Outcome(NamedTuple):
    """How many positions were attacked, how many were cut there, and what was found wrong."""

    attacked: int
    cut: int
    faults: list[str]


armed = [True]
"""Whether a handler raises; a timer may ring when the work is over."""


def cut_off(number: int, frame: FrameType | None) -> None:
    """The handler of all signals but SIGINT."""
    if armed[0]:
        raise Cut


HANDLERS = dict.fromkeys(SIGNALS, cut_off) | {signal.SIGINT: signal.default_int_handler}


@contextlib.contextmanager
def handlers() -> Iterator[None]:
    """Inside, each of the signals raises where it is handled."""
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def instructions(work: Callable[[], Any]) -> int:
    """How many Python instructions some work takes."""
    counter = _Trace(-1, 0)
    counter.run(work)
    return counter.seen


def attack(subject: Subject, most: int) -> Outcome:
    """Cut the work at every position, or at ``most`` of them at equal distances."""
    subject.prepare()
    subject.work()  # what is made at first use is there
    subject.prepare()
    total = instructions(subject.work)
    places = (
        sorted({index * total // most for index in range(most)}) if most < total else range(total)
    )
    patched, faults, cuts = marks(subject.model), [], 0
    for index, place in enumerate(places):
        number = SIGNALS[index % len(SIGNALS)]
        subject.prepare()
        trace = _Trace(place, number)
        cuts += trace.run(subject.work)
        found = [*subject.faults(), *left_behind(), *differing(patched, marks(subject.model))]
        if found:
            faults.append(f"{number.name} at {place} ({trace.where}): {'; '.join(found)}")
            repair()
    return Outcome(len(places), cuts, faults)


def attack_by_timer(subject: Subject, times: int, seed: int) -> Outcome:
    """Real signals, from a timer, at random moments of the work."""
    moments, faults, cuts = random.Random(seed), [], 0
    for _ in range(3):
        subject.prepare()
        began = time.perf_counter()
        subject.work()
        length = time.perf_counter() - began
    patched = marks(subject.model)
    for _ in range(times):
        subject.prepare()
        cuts += _rung(subject.work, moments.uniform(1e-6, length))
        found = [*subject.faults(), *left_behind(), *differing(patched, marks(subject.model))]
        if found:
            faults.append("; ".join(found))
            repair()
    return Outcome(times, cuts, faults)


def _rung(work: Callable[[], Any], seconds: float) -> bool:
    """Do the work, with a signal after so many seconds; whether that cut it."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        work()
        armed[0] = False
    except Cut:
        return True
    finally:
        armed[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        armed[0] = True
    return False


class _Trace:
    """Calls the handler that is installed at the n-th instruction."""

    def __init__(self, place: int, number: int) -> None:
        self.place, self.number, self.seen, self.where = place, number, 0, ""

    def run(self, work: Callable[[], Any]) -> bool:
        """Do the work; whether it was cut."""
        sys.settrace(self._entering)
        try:
            work()
        except (KeyboardInterrupt, Cut):
            return True
        finally:
            sys.settrace(None)
        return False

    def _entering(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._running

    def _running(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            self.seen += 1
            if self.seen == self.place + 1:
                sys.settrace(None)
                code = frame.f_code
                self.where = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
                handler = signal.getsignal(self.number)
                if callable(handler):
                    handler(self.number, frame)
        return self._running


def left_behind() -> list[str]:
    """Guards, signals that wait, and handlers that are not the ones of before."""
    faults = []
    if interrupt._guards or interrupt._waiting or interrupt._handlers:
        faults.append("a guard is left")
    if _get_current_dispatch_mode_stack():
        faults.append("operations are observed still")
    if not torch.is_grad_enabled():
        faults.append("gradients are off")
    faults += [
        f"the handler of {number.name} is another"
        for number, handler in HANDLERS.items()
        if signal.getsignal(number) is not handler
    ]
    return faults


def repair() -> None:
    """Let one fault not be counted at every later position."""
    gc.collect()
    torch.set_grad_enabled(True)
    while _get_current_dispatch_mode_stack():
        torch._C._pop_torch_dispatch_stack()
    interrupt._guards.clear()
    interrupt._waiting.clear()
    interrupt._handlers.clear()
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def marks(model: nn.Module | None) -> dict[str, Any]:
    """What a patched module would show: its own forward, parameters, hooks and mode."""
    if model is None:
        return {}
    return {
        name: (
            module.__dict__.get("forward"),
            id(module._parameters),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for the first module that is not as it was."""
    return [f"{name!r} is patched" for name in before if before[name] != after[name]][:1]


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors' values."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit; 0.0 and -0.0 differ."""
    return all(torch.equal(_bits(one[name]), _bits(other[name])) for name in one)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)
