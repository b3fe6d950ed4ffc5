"""The loop: budgets, callback, history, sign, set objectives, micro-batches."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import labelled, logistic, problem
from torch import Tensor

from objectives import CallableObjective
from zo_adapt import (
    SGD,
    Data,
    EvaluationOptions,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Result,
    Step,
    StopReason,
    minimize,
)

QUIET: dict[str, Any] = {"progress": False}


def mezo(**options: Any) -> MeZO:
    pair = {"lr": 0.01, "perturbation_scale": 0.05, "num_directions": 1, "one_sided": False}
    return MeZO(**(pair | options))


def bowl(view: ParameterView) -> Callable[[Any], float]:
    return lambda batch: float(sum((t - 3).square().sum() for t in view.tensors.values()))


def one() -> ParameterView:
    return ParameterView({"x": torch.zeros(2)})


class Counting:
    """Counts the calls of an objective."""

    def __init__(self, objective: Callable[[Any], Any]) -> None:
        self.objective, self.calls = objective, 0

    def __call__(self, batch: Any) -> Any:
        self.calls += 1
        return self.objective(batch)


def test_the_example_of_the_contract() -> None:
    x = torch.zeros(2)
    result = minimize(
        lambda batch: float(((x - 3) ** 2).sum()),
        ParameterView({"x": x}),
        None,
        MeZO(lr=1e-2, perturbation_scale=1e-3, num_directions=1),
        max_steps=500,
        **QUIET,
    )
    assert bool(((x - 3).abs() < 0.05).all())
    assert (result.steps, result.queries) == (500, 1000)
    assert result.stop_reason is StopReason.MAX_STEPS
    assert result.message == "the maximum number of steps was reached"


def test_nothing_is_evaluated_after_the_callback_stops() -> None:
    view = one()
    objective, seen = Counting(bowl(view)), []

    def stop_at_three(record: Step) -> None:
        seen.append((record.step, objective.calls, view.hash()))
        if record.step == 3:
            raise StopIteration

    result = minimize(objective, view, None, mezo(), max_steps=10, callback=stop_at_three, **QUIET)
    assert [(step, calls) for step, calls, _ in seen] == [(1, 2), (2, 4), (3, 6)]
    assert objective.calls == result.queries == 6
    assert result.stop_reason is StopReason.CALLBACK
    assert view.hash() == seen[-1][2]


def test_another_error_in_the_callback_is_not_swallowed() -> None:
    def broken(record: Step) -> None:
        raise ZeroDivisionError

    view = one()
    with pytest.raises(ZeroDivisionError):
        minimize(bowl(view), view, None, mezo(), max_steps=3, callback=broken, **QUIET)


@pytest.mark.parametrize(
    ("budget", "nit", "reason"),
    [
        ({"max_steps": 3}, 3, StopReason.MAX_STEPS),
        ({"max_steps": 0}, 0, StopReason.MAX_STEPS),
        ({"max_queries": 7}, 3, StopReason.MAX_QUERIES),
        ({"max_queries": 0}, 0, StopReason.MAX_QUERIES),
        ({"max_queries": 100, "max_steps": 4}, 4, StopReason.MAX_STEPS),
        ({"max_queries": 5, "max_steps": 4}, 2, StopReason.MAX_QUERIES),
    ],
)
def test_budgets(budget: dict[str, int], nit: int, reason: StopReason) -> None:
    view = one()
    objective = Counting(bowl(view))
    result = minimize(objective, view, None, mezo(), **budget, **QUIET)
    assert (result.steps, result.stop_reason) == (nit, reason)
    assert result.queries == objective.calls == 2 * nit
    assert math.isnan(result.value) == (nit == 0)


def test_the_history_is_what_the_callback_saw() -> None:
    p = problem(logistic)
    seen: list[Step] = []
    optimizer = MeZOSVRG(
        0.02,
        snapshot_lr=0.1,
        snapshot_interval=2,
        snapshot_size=12,
        num_directions=3,
        one_sided=False,
        perturbation_scale=0.05,
    )
    result = minimize(
        p.objective, p.view, p.data, optimizer, batch_size=4,
        max_steps=4, callback=seen.append, **QUIET,
    )  # fmt: skip
    assert result.history == seen
    assert [r.step for r in seen] == [1, 2, 3, 4]
    assert [r.queries for r in seen] == [24, 40, 64, 80]
    assert [r.kind for r in seen] == ["snapshot", "minibatch"] * 2
    assert [r.lr for r in seen] == [0.1, 0.02] * 2
    assert result.value == seen[-1].value


def test_the_progress_bar_shows_queries(capsys: pytest.CaptureFixture[str]) -> None:
    view = one()
    minimize(bowl(view), view, None, mezo(), max_queries=8)
    shown = capsys.readouterr().err
    assert "8/8" in shown
    assert "value=" in shown
    minimize(bowl(view), view, None, mezo(), max_queries=8, **QUIET)
    assert not capsys.readouterr().err


def test_maximize_flips_the_sign_once() -> None:
    down, up = one(), one()
    optimizers: list[Any] = [mezo(), mezo()]
    falling = minimize(bowl(down), down, None, optimizers[0], max_steps=20, **QUIET)
    reward = CallableObjective(lambda batch: -bowl(up)(batch), maximize=True)
    rising = minimize(reward, up, None, optimizers[1], max_steps=20, **QUIET)
    assert up.hash() == down.hash()
    assert [r.value for r in rising.history] == [-r.value for r in falling.history]
    assert rising.history[-1].value > rising.history[0].value


def test_a_first_order_optimizer_maximizes_too() -> None:
    x = torch.zeros(2)
    result = minimize(
        CallableObjective(lambda batch: -(x - 3).square().sum(), maximize=True),
        ParameterView({"x": x}),
        None,
        SGD(lr=0.1),
        max_steps=30,
        **QUIET,
    )
    assert bool(((x - 3).abs() < 0.2).all())
    assert result.history[-1].value > result.history[0].value
    assert not x.requires_grad


class SetSum:
    """A set-level objective: nothing is known before all micro-batches are predicted."""

    def __init__(self, view: ParameterView) -> None:
        self.view, self.predicted, self.scored = view, [], []  # type: ignore[var-annotated]

    def predict(self, batch: Tensor) -> list[int]:
        self.predicted.append(len(batch))
        return batch[:, 0].tolist()  # type: ignore[no-any-return]

    def score(self, predictions: list[list[int]]) -> float:
        rows = [row for part in predictions for row in part]
        self.scored.append(len(rows))
        return float(sum(t.square().sum() for t in self.view.tensors.values())) + sum(rows)


def test_a_set_objective_is_scored_once_for_each_point() -> None:
    view = one()
    objective = SetSum(view)
    data = torch.arange(12)[:, None]
    result = minimize(
        objective, view, data, mezo(), batch_size=10, max_steps=3,
        evaluation=EvaluationOptions(micro_batch_size=4), **QUIET,
    )  # fmt: skip
    assert objective.scored == [10] * 6
    assert max(objective.predicted) <= 4
    assert sum(objective.predicted) == result.queries == 60


def test_all_points_of_a_step_see_one_draw_of_the_collate_function() -> None:
    """Also where the batch is cut for the memory's sake, and evaluated part by part."""
    x, generator, calls = torch.zeros(1), torch.Generator().manual_seed(0), []

    def noisy(rows: list[float]) -> torch.Tensor:
        calls.append(len(rows))
        return torch.randn(len(rows), generator=generator)

    def objective(batch: Tensor) -> Tensor:
        return (batch + x).square()

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    minimize(
        objective, ParameterView({"x": x}),
        Data([0.0] * 12, collate=noisy), MeZO(lr=1e-9), batch_size=12, max_steps=3, progress=False,
        evaluation=EvaluationOptions(micro_batch_size=4, joint_rows="off"),
    )  # fmt: skip
    assert calls == [4] * 9


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7, None])
def test_micro_batches_are_weighted_exactly(size: int | None, per_example: bool) -> None:
    def weights_after(micro: int | None) -> tuple[ParameterView, Result, list[int]]:
        p = problem(logistic, labelled(10, 10))
        sizes: list[int] = []

        def objective(batch: Tensor) -> Any:
            sizes.append(len(batch))
            losses = p.objective(batch)
            return losses if per_example else float(losses.mean())

        objective.mean_over_rows = True  # type: ignore[attr-defined]
        options = QUIET | {"batch_size": 10, "max_steps": 5, "evaluation": EvaluationOptions(micro)}
        return p.view, minimize(objective, p.view, p.data, mezo(lr=0.1), **options), sizes

    whole, expected, _ = weights_after(10)
    view, result, sizes = weights_after(size)
    assert max(sizes) <= (size or 10)
    assert sum(sizes) == result.queries == expected.queries
    for a, b in zip(result.history, expected.history, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-12)
    for name, tensor in view.tensors.items():
        assert torch.allclose(tensor, whole.tensors[name], rtol=1e-11)
