"""``joint_rows="measured"``: what goes together is timed once, and kept with the run."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from test_candidates import examples, with_lora

from objectives import ClassificationLoss
from zo_adapt import EvaluationOptions, MeZO, ParameterView, ZOConfig, minimize
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.joint import measured
from zo_adapt.evaluation.joint.measured import least_seconds, tokens_worth_joining
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.ranks.evaluator import RankEvaluator
from zo_adapt.trajectory.safe_file import read_state

MEASURED = EvaluationOptions(joint_rows="measured", reuse_trunk="off")


def seconds_of(*times: float) -> Callable[[Any], float]:
    """In place of a clock: these times, one after the other, of work that is done."""
    left = iter(times)

    def found(work: Callable[[], Any]) -> float:
        work()
        return next(left)

    return found


@pytest.mark.parametrize(
    ("times", "most", "expected"),
    [
        ([1, 1, 1, 1], 8, 8),
        ([1, 1, 1, 1], 7, 4),  # as many as there is room for
        ([1, 1.9], 8, 1),
        ([1, 1.5, 2.5, 6.0], 64, 4),
    ],
)
def test_joined_are_as_many_as_are_cheaper_than_alone(
    times: list[float], most: int, expected: int
) -> None:
    by_count = {2**power: time for power, time in enumerate(times)}
    assert tokens_worth_joining(by_count.__getitem__, 10, most) == 10 * expected


def test_where_the_memory_ends_so_does_the_search() -> None:
    def seconds(count: int) -> float:
        if count > 2:
            raise torch.OutOfMemoryError
        return 1.0

    assert tokens_worth_joining(seconds, 10, 64) == 20
    calls = count()
    assert least_seconds(lambda: next(calls)) < 1
    assert next(calls) == 4, "one that warms up and three that count"


def a_run(times: Any = None, **options: Any) -> tuple[Any, ParameterView]:
    torch.manual_seed(0)
    view = ParameterView.trainable(model := with_lora("bert"))
    settings: dict[str, Any] = {"batch_size": 16, "max_steps": 4, "progress": False}
    settings |= {"optimizer": MeZO(displacement=0.25), "evaluation": MEASURED}
    result = minimize(ClassificationLoss(model), view, examples(48), **{**settings, **options})
    return result, view


@pytest.mark.parametrize(("times", "together"), [((1, 1, 1, 1, 1, 1, 1), True), ((1, 3), False)])
def test_a_run_goes_by_what_was_measured(
    times: tuple[float, ...], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = a_run(evaluation=EvaluationOptions(joint_rows="off", reuse_trunk="off"))
    monkeypatch.setattr(measured, "least_seconds", seconds_of(*times))
    result, _ = a_run()
    assert (result.evaluation.candidates > 1) == together
    assert result.queries == expected.queries, "what was timed is no query"
    assert [r.value for r in result.history] == pytest.approx(
        [r.value for r in expected.history], rel=1e-5
    )


def test_a_resumed_run_goes_on_with_the_same_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole.zot", tmp_path / "stopped.zot"
    monkeypatch.setattr(measured, "least_seconds", seconds_of(1, 1.2, 4))
    expected, there = a_run(trajectory=whole)
    monkeypatch.setattr(measured, "least_seconds", seconds_of(1, 1.2, 4))

    def stop(step: Any) -> None:
        if step.step == 2:
            raise StopIteration

    a_run(trajectory=stopped, callback=stop)
    state = read_state(stopped.with_name("stopped.zot.state"))
    assert state["run"]["joint_tokens"] > 0
    monkeypatch.setattr(measured, "least_seconds", seconds_of())  # no time is left to be taken
    result, view = a_run(trajectory=stopped, resume=True)
    assert result.history == expected.history
    assert view.hash() == there.hash()
    assert whole.read_bytes() == stopped.read_bytes()


def test_all_ranks_go_by_the_first() -> None:
    class First:
        def from_first(self, make: Any) -> bytes:
            return b"96"

    view = ParameterView.trainable(model := with_lora("bert"))
    evaluator = LocalEvaluator(ClassificationLoss(model), view, MEASURED)
    RankEvaluator(evaluator, First()).measure([])  # type: ignore[arg-type]
    assert evaluator.joint_tokens == 96


def test_measuring_leaves_weights_rows_and_generators_as_they_were() -> None:
    view = ParameterView.trainable(model := with_lora("bert"))
    loss = ClassificationLoss(model)
    evaluator = LocalEvaluator(loss, view, MEASURED, batch_size=16)
    optimizer, before = MeZO(displacement=0.25), view.hash()
    optimizer.start(view, 0)
    samples = Samples(as_source(examples(48), loss.collate), 16, 0)
    state = torch.get_rng_state()
    evaluator.measure(optimizer.propose(samples))
    assert evaluator.joint_tokens is not None
    assert evaluator.queries == 0
    assert view.hash() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trainer_names_what_it_cannot_measure(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'measured' is of minimize alone"):
        ZOConfig(str(tmp_path), joint_rows="measured", report_to="none", use_cpu=True)
