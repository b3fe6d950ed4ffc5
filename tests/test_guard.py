"""A view in use refuses what would corrupt it, and signals never leave it shifted."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zo_adapt import EvaluationOptions, MeZO, ParameterView, Shift, Term, minimize
from zo_adapt.errors import ViewInUseError
from zo_adapt.evaluation.model_state import replaced_forwards
from zo_adapt.interrupt import Guard, undone, uninterrupted

TERMS = [Term(1, 0.5)]
KINDS = [
    number
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGPROF", "SIGXCPU")
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
            x = tuned.tensors["x"]
            minimize(
                lambda _: float(x.sum()), tuned, None, MeZO(lr=0.1), max_steps=1, progress=False
            )
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


OTHER_VIEWS: dict[str, Callable[[nn.Module], ParameterView]] = {
    "the same tensors": ParameterView.full,
    "one of them": lambda model: ParameterView.matching(model, "bias"),
    "a part of one": lambda model: ParameterView({"row": model.weight.data[0]}),  # type: ignore[index]
    "layer by layer": lambda model: ParameterView.full(model, scratch="layer"),
}


@pytest.mark.parametrize("name", OTHER_VIEWS)
@pytest.mark.parametrize("scratch", ["copy", "layer"])
def test_another_view_of_the_same_memory_is_refused_inside_a_shift(name: str, scratch: Any) -> None:
    model = nn.Linear(3, 2)
    tuned, other = ParameterView.full(model, scratch=scratch), OTHER_VIEWS[name](model)
    before, snapshot = tuned.hash(), other.snapshot()
    data = torch.ones(4, 3)

    def tune() -> None:
        minimize(lambda x: model(x).mean(1), other, data, max_steps=1, batch_size=2, progress=False)

    inside: list[Callable[[], Any]] = [
        lambda: other.apply(Shift(TERMS)),
        lambda: other.restore(snapshot),
        lambda: other.shifted(TERMS).__enter__(),
        tune,
    ]
    for act in inside:
        with (
            pytest.raises(ViewInUseError, match="another view of the same memory is shifted"),
            tuned.shifted(TERMS),
        ):
            act()
        assert tuned.hash() == before
    other.apply(Shift(TERMS))
    assert tuned.hash() != before


def test_a_view_of_other_memory_is_free_inside_a_shift() -> None:
    model = nn.Linear(3, 2)
    weight, bias = (ParameterView.matching(model, name) for name in ("weight", "bias"))
    with weight.shifted(TERMS), bias.shifted(TERMS):
        pass
    start = bias.hash()
    with weight.shifted(TERMS):
        bias.apply(Shift(TERMS))
    assert bias.hash() != start


WAYS: dict[str, dict[str, Any]] = {
    "copy": {"scratch": "copy"},
    "low rank": {"noise": "lowrank"},
}


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double], ids=["half", "double"])
@pytest.mark.parametrize("joint_rows", ["auto", "off"])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_converted_inside_a_probe_is_named(
    way: str, joint_rows: Any, convert: Callable[[nn.Module], nn.Module]
) -> None:
    model = nn.Linear(3, 3).eval()
    tuned = ParameterView.full(model, **WAYS[way])
    with pytest.raises(ViewInUseError, match="dtype"), tuned.shifted(TERMS):
        convert(model)
    model.float()
    calls: list[int] = []

    def loss(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        if len(calls) > 6:  # at every call, of which some are at shifted weights
            (convert if model.weight.dtype == torch.float32 else nn.Module.float)(model)
        return model(batch.to(model.weight.dtype)).square().mean(1)  # type: ignore[no-any-return]

    with pytest.raises(ViewInUseError, match="dtype"):
        minimize(
            loss, tuned, torch.ones(8, 3), MeZO(displacement=0.1), batch_size=8, max_steps=3,
            evaluation=EvaluationOptions(joint_rows=joint_rows), progress=False,
        )  # fmt: skip


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


def test_a_time_limit_is_not_taken_for_a_failed_attempt() -> None:
    """Whichever call of the objective it cuts: the first look, the check of rows or the step."""
    data = torch.arange(8.0).view(4, 2)

    def calls_until(cut: int) -> int:
        model, calls = nn.Linear(2, 1).eval(), [0]

        def loss(batch: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == cut:
                signal.raise_signal(signal.SIGALRM)
            return model(batch).square().mean(1)

        tuned = ParameterView.full(model)
        start = tuned.hash()
        try:
            minimize(loss, tuned, data, MeZO(), batch_size=2, max_steps=1, progress=False)
        except Cut:
            assert tuned.hash() == start
            assert torch.is_grad_enabled()
            return calls[0]
        return -calls[0]

    with cutting(signal.SIGALRM):
        whole = -calls_until(0)
        assert whole > 3
        assert [calls_until(cut) for cut in range(1, whole + 1)] == list(range(1, whole + 1))


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_while_the_handlers_are_exchanged_leaves_none_of_ours(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, exchanged = signal.signal, [0]

    def cut_at(moment: int) -> bool:
        def exchanging(which: int, handler: Any) -> Any:
            before = exchange(which, handler)
            exchanged[0] += 1
            if exchanged[0] == moment:
                signal.raise_signal(number)
            return before

        exchanged[0] = 0
        with monkeypatch.context() as patched:
            patched.setattr(signal, "signal", exchanging)
            try:
                with uninterrupted():
                    pass
            except Cut:
                return True
        return False

    with ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(cutting(kind))
        handlers = [signal.getsignal(kind) for kind in KINDS]
        cuts = [cut_at(moment) for moment in range(1, 2 * len(KINDS) + 1)]
        assert all(cuts)
        assert [signal.getsignal(kind) for kind in KINDS] == handlers


def test_changes_are_undone_in_reverse_also_where_one_of_them_fails() -> None:
    done: list[str] = []

    def changes() -> Iterator[Any]:
        yield lambda: done.append("first undone")
        yield lambda: done.append("second undone")
        raise ValueError("the third cannot be made")

    with pytest.raises(ValueError, match="third"), undone(changes()):
        done.append("never here")
    assert done == ["second undone", "first undone"]


def clamped(x: Tensor) -> None:
    x.clamp_(max=0.2)


def put_back(x: Tensor) -> None:
    before = x.clone()
    x.mul_(2.0)
    x.copy_(before)


@pytest.mark.parametrize("change", [clamped, put_back])
def test_a_tensor_that_an_objective_writes_must_be_put_back(
    change: Callable[[Tensor], None],
) -> None:
    """Without a model nothing is looked at before: torch's count of writes tells."""
    tuned = view()
    before, x = tuned.hash(), tuned.tensors["x"]

    def value(_: object) -> float:
        change(x)
        return float((x - 1).square().sum())

    options: dict[str, Any] = {"max_steps": 2, "progress": False}
    if change is put_back:
        assert minimize(value, tuned, None, MeZO(lr=0.1), **options).steps == 2
        return
    with pytest.raises(ViewInUseError, match="changed 'x' in place"):
        minimize(value, tuned, None, MeZO(lr=0.1), **options)
    assert tuned.hash() == before


@pytest.mark.parametrize("way", ["joint", "lowrank", "alone"])
def test_writes_that_large_batches_alone_make_are_named_in_every_way(way: str) -> None:
    model = nn.Linear(4, 2)
    noise = "lowrank" if way == "lowrank" else "gaussian"
    tuned = ParameterView.full(model, noise=noise)

    def value(batch: Tensor) -> Tensor:
        if len(batch) > 2:  # the first look is at two rows
            with torch.no_grad():
                model.weight.mul_(0.999)
        return model(batch).square().mean(1)

    with pytest.raises(ViewInUseError, match="changed 'weight' in place"):
        minimize(
            value,
            tuned,
            torch.randn(16, 4),
            MeZO(displacement=0.1),
            batch_size=8,
            max_steps=4,
            progress=False,
            evaluation=EvaluationOptions(joint_rows="off" if way == "alone" else "auto"),
        )
