"""What a result says of its steps: they never helped, did harm, or could have gone on."""

import math
from typing import Any

import pytest
import torch
from problems import problem, regression, squares

from zo_adapt import SGD, MeZO, ParameterView, Step, minimize
from zo_adapt.loops.step_advice import verdict
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.optimizers.responses import Nonlinearity, Response

QUIET: dict[str, Any] = {"progress": False}


def steps(values: list[float]) -> list[Step]:
    """A history with these values and a scatter of 0.02."""
    return [
        Step(n + 1, n, value + 0.02 * math.sin(7.0 * n), 0.1, 0.0) for n, value in enumerate(values)
    ]


def optimizer(**options: Any) -> MeZO:
    """One whose run has begun."""
    made = MeZO(**options)
    made.start(problem().view, 0)
    return made


FLAT, LINE = [1.0] * 96, [1.0 - n / 96 for n in range(96)]
ARRIVED = [0.01 + 90.0 * 0.5**n for n in range(96)]


@pytest.mark.parametrize(
    ("values", "sign", "options", "said"),
    [
        (FLAT, 1.0, {}, ["loss did not improve", "max_queries", "softness"]),
        (FLAT, -1.0, {"displacement": 0.5}, ["value did not improve", "leave displacement out"]),
        (FLAT, 1.0, {"lr": 0.1}, ["leave lr out"]),
        (LINE, 1.0, {}, ["still improved", "max_queries", "measured, is 0.25"]),
        (LINE, 1.0, {"displacement": 0.5}, ["displacement is used up", "displacement=1"]),
        (LINE, 1.0, {"lr": 0.1}, ["still improved", "or lr"]),
        (LINE, -1.0, {"displacement": 0.5}, ["ended worse", "displacement=0.25"]),
        (LINE[::-1], 1.0, {"lr": 0.1}, ["ended worse", "smaller lr"]),
        (LINE[::-1], 1.0, {}, ["ended worse", "displacement=0.125"]),
    ],
)
def test_it_says_what_happened_and_what_to_set(
    values: list[float], sign: float, options: dict[str, Any], said: list[str]
) -> None:
    history = [step._replace(value=sign * step.value) for step in steps(values)]
    if sign < 0 and values is LINE:
        history = steps([1.0 + value for value in values])  # a reward that falls
    found = verdict(history, sign, optimizer(**options))
    assert all(part in found for part in said), found


@pytest.mark.parametrize(("bend", "further"), [(0.05, True), (0.3, False)])
def test_where_responses_are_linear_a_longer_displacement_is_named(
    bend: float, further: bool
) -> None:
    made = optimizer()
    assert made.state.finder is not None
    search = made.state.finder.calibration
    search.nonlinearity = Nonlinearity()  # as of a model that was trained
    search.narrow(Response(even=0.4, odd=1.0, nonlinearity=bend))
    assert ("displacement=0.5:" in verdict(steps(LINE), 1.0, made)) is further


@pytest.mark.parametrize("values", [ARRIVED, LINE[:20], [1.0, math.nan] * 48])
def test_a_run_that_arrived_or_is_a_trial_is_left_alone(values: list[float]) -> None:
    assert verdict(steps(values), 1.0, optimizer()) == ""


def test_the_result_of_a_count_that_stays_at_chance_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.zeros(3), torch.arange(64.0)

    def chance(batch: Any) -> torch.Tensor:
        return (torch.rand(len(batch), generator=generator) < 0.9).float()

    result = minimize(
        chance, ParameterView({"x": x}), rows, MeZO(displacement=0.2), batch_size=8, max_steps=48,
        **QUIET,
    )  # fmt: skip
    assert "did not improve" in result.advice
    assert "leave displacement out" in result.advice
    assert result.advice in str(result)


@pytest.mark.parametrize("make", [lambda: MeZO(displacement=0.01), lambda: SGD(1e-4)])
def test_a_run_that_was_too_short_says_so(make: Any) -> None:
    rows, x = regression(200, 20), torch.zeros(20, dtype=torch.float64)
    made: Optimizer = make()
    result = minimize(
        lambda batch: squares(x, batch), ParameterView({"x": x}), rows, made, batch_size=200,
        max_steps=60, **QUIET,
    )  # fmt: skip
    assert "still improved" in result.advice
