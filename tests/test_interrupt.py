"""Ctrl-C, sent as a real signal: the weights and the file are those of one step."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trajectories import STEPS, copies, equal, run, tensors

from zo_adapt import MeZOSVRG, ParameterView, Replay, Shift, Term, replay
from zo_adapt.interrupt import uninterrupted
from zo_adapt.noise import philox
from zo_adapt.noise.entries import DIRECTION_STREAM
from zo_adapt.trajectory.writer import Writer


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own handler: a job in the background begins with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def cut_in_half(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Interrupts where noise is made, once the counter that is given is at 1."""
    words, left = philox.words_numpy, [0]

    def words_and_interrupt(seed: int, key: int, stream: int, *place: int) -> Any:
        if stream == DIRECTION_STREAM and left[0]:
            left[0] -= 1
            if not left[0]:
                interrupt()
        return words(seed, key, stream, *place)

    monkeypatch.setattr(philox, "words_numpy", words_and_interrupt)
    return left


def test_an_update_is_applied_whole(cut_in_half: list[int]) -> None:
    live, expected = tensors(), tensors()
    update = Shift((Term(1, 0.5), Term(2, 0.25)), 0.9)
    ParameterView(expected).apply(update)
    cut_in_half[0] = 2  # the first tensor has its first term
    with pytest.raises(KeyboardInterrupt):
        ParameterView(live).apply(update)
    assert equal(live, expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("moment", ["record", "state", "weights"])
def test_a_run_stops_between_two_steps_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_in_half: list[int], moment: str
) -> None:
    whole, live, resumed, again = tensors(), tensors(), tensors(), tensors()
    run(whole, tmp_path / "whole", MeZOSVRG(snapshot_interval=2))
    append, write, appended = Writer.append, os.replace, [0]

    def counted(self: Writer, *args: Any) -> None:
        append(self, *args)
        appended[0] += 1
        if appended[0] == 5:
            if moment == "record":
                interrupt()
            cut_in_half[0] = 2 * (moment == "weights")

    def interrupted(*paths: Path) -> None:
        if appended[0] == 5 and moment == "state":
            interrupt()
        write(*paths)

    monkeypatch.setattr(Writer, "append", counted)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(live, tmp_path / "f", MeZOSVRG(snapshot_interval=2))
    monkeypatch.undo()
    assert replay(ParameterView(again), tmp_path / "f") == 5
    assert equal(live, again)
    run(resumed, tmp_path / "f", MeZOSVRG(snapshot_interval=2), resume=True)
    assert equal(resumed, whole)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_interrupted_replay_knows_that_it_is_on_the_way(
    tmp_path: Path, cut_in_half: list[int]
) -> None:
    states = [copies(tensors())]
    live = tensors(torch.bfloat16)
    watch = {"callback": lambda record: states.append(copies(live))}
    run(live, tmp_path / "f", MeZOSVRG(), **watch)
    again = tensors(torch.bfloat16)
    replayed = Replay(ParameterView(again), tmp_path / "f")
    cut_in_half[0] = 2  # the first tensor has its first term
    with pytest.raises(KeyboardInterrupt):
        replayed.to(STEPS)
    assert replayed.to(3) == 3
    assert equal(again, states[3])


def test_off_the_main_thread_no_handler_is_touched() -> None:
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        with uninterrupted():
            inside.set()
            go_on.wait(10)
        seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    go_on.set()
    thread.join()
    assert seen == ["done"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_process_that_has_no_handler_keeps_none(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_the_users_own_is_called_once_at_the_end() -> None:
    order: list[str] = []
    before = signal.signal(signal.SIGINT, lambda *_: order.append("handler"))
    try:
        with uninterrupted(), uninterrupted():
            interrupt()
            interrupt()
            order.append("work")
        assert order == ["work", "handler"]
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt) as raised, uninterrupted():
        interrupt()
        raise ValueError("the body's own")
    assert isinstance(raised.value.__context__, ValueError)
