"""A view in use refuses what would corrupt it, and signals never leave it shifted."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from zo_adapt import MeZO, ParameterView, Shift, Term, minimize
from zo_adapt.errors import ViewInUseError
from zo_adapt.evaluation.forward import replaced_forwards
from zo_adapt.interrupt import Guard

TERMS = [Term(1, 0.5)]
KINDS = [
    number
    for name in ("SIGINT", "SIGTERM", "SIGALRM")
    if (number := getattr(signal, name, None)) is not None
]


class Cut(Exception):
    """What a user's handler raises."""


@contextmanager
def cutting(number: int) -> Iterator[None]:
    """A handler that raises, as a timeout's does."""

    def raising(*_: Any) -> None:
        raise Cut

    before = signal.signal(number, raising)
    try:
        yield
    finally:
        signal.signal(number, before)


def view() -> ParameterView:
    return ParameterView({"x": torch.arange(6.0)})


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_in_the_body_is_handled_at_once(number: int) -> None:
    tuned, reached = view(), []
    before = tuned.hash()
    with cutting(number):
        with pytest.raises(Cut), tuned.shifted(TERMS):
            reached.append(tuned.hash())
            signal.raise_signal(number)
            reached.append("too far")
        assert signal.getsignal(number) is not signal.SIG_DFL
    assert reached != []
    assert reached[-1] != "too far"
    assert tuned.hash() == before


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_before_the_body_or_after_it_waits_until_all_is_undone(number: int) -> None:
    order: list[str] = []
    with cutting(number):
        with pytest.raises(Cut), Guard(lambda: order.append("undone")) as guard:
            signal.raise_signal(number)
            order.append("written")
            guard.open()
        with pytest.raises(Cut), Guard(lambda: signal.raise_signal(number)):
            order.append("written again")
    assert order == ["written", "undone", "written again"]


def test_an_error_that_an_objective_catches_does_not_end_its_evaluation() -> None:
    """A reward with a time limit of its own: the weights stay shifted while it goes on."""
    tuned, seen = view(), []
    before = tuned.hash()
    with cutting(signal.SIGALRM), tuned.shifted(TERMS):
        inside = tuned.hash()
        try:
            signal.raise_signal(signal.SIGALRM)
        except Cut:
            seen.append(tuned.hash())
    assert seen == [inside]
    assert before != inside
    assert tuned.hash() == before


def test_handlers_that_were_there_are_there_again() -> None:
    for number in KINDS:
        with cutting(number):
            handler = signal.getsignal(number)
            with view().shifted(TERMS):
                pass
            assert signal.getsignal(number) is handler


@pytest.mark.parametrize("action", ["apply", "restore", "minimize"])
def test_a_shifted_view_is_not_changed(action: str) -> None:
    tuned = view()
    before, kept = tuned.hash(), tuned.snapshot()
    with tuned.shifted(TERMS), pytest.raises(ViewInUseError, match="shifted"):
        if action == "apply":
            tuned.apply(Shift((Term(2, 1.0),)))
        elif action == "restore":
            tuned.restore(kept)
        else:
            minimize(lambda _: 0.0, tuned, None, MeZO(lr=0.1), max_steps=1, progress=False)
            tuned.apply(Shift((Term(2, 1.0),)))
    assert tuned.hash() == before


def test_another_thread_waits_its_turn_or_is_refused() -> None:
    tuned, found = view(), []

    def use() -> None:
        try:
            with tuned.shifted(TERMS):
                found.append("shifted")
        except ViewInUseError as error:
            found.append(str(error))

    with tuned.shifted(TERMS):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert len(found) == 1
    assert "another thread" in found[0]
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found[-1] == "shifted"


def test_shifts_within_shifts_and_the_wrong_order() -> None:
    tuned = view()
    before = tuned.hash()
    with tuned.shifted(TERMS):
        outer = tuned.hash()
        with tuned.shifted([Term(2, 0.25)]):
            assert tuned.hash() not in (before, outer)
        assert tuned.hash() == outer
    assert tuned.hash() == before
    first, second = tuned.shifted(TERMS), tuned.shifted([Term(2, 0.25)])
    first.__enter__()
    second.__enter__()
    with pytest.raises(ViewInUseError, match="reverse order"):
        first.__exit__(None, None, None)
    assert tuned.hash() == before
    second.__exit__(None, None, None)
    assert tuned.hash() == before


def test_a_model_converted_inside_a_probe_is_named() -> None:
    model = nn.Linear(3, 3)
    tuned = ParameterView.full(model)
    with pytest.raises(ViewInUseError, match="dtype"), tuned.shifted(TERMS):
        model.half()


def test_forwards_are_put_back_whatever_comes() -> None:
    layer = nn.Linear(2, 2)
    own = layer.forward
    layer.forward = own  # type: ignore[method-assign]  # as accelerate does
    with (
        cutting(signal.SIGINT),
        pytest.raises(Cut),
        replaced_forwards({layer: lambda x: x}),
    ):
        signal.raise_signal(signal.SIGINT)
    assert layer.__dict__["forward"] is own
