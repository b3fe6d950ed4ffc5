"""The displacement that nobody gave: found by forward passes, in any unit, the same on resume."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, bits, flat, logistic, problem, regression, squares
from torch import Tensor

from objectives import CallableObjective
from zo_adapt import AskTell, MeZO, MeZOSVRG, ParameterView, Step, minimize, replay
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.optimizers.calibration import RATIO, Calibration
from zo_adapt.optimizers.former_looks import Evidence
from zo_adapt.optimizers.look_ahead import LookAhead, narrowed, parabola
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.responses import Response
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.optimizers.step_size import ByDistance
from zo_adapt.term import Shift, Term

QUIET: dict[str, Any] = {"progress": False}
OPTIMIZERS = pytest.mark.parametrize("make", [MeZO, MeZOSVRG])
Make = Callable[..., ZerothOrder]


def found(optimizer: ZerothOrder) -> float:
    """The displacement that the first step was made with."""
    finder = optimizer.state.finder
    assert finder is not None
    return finder.calibration.displacement


def tuned(make: Make, unit: float, queries: int = 6_000) -> tuple[Tensor, float]:
    """Least squares in unknowns measured in a unit: where they end, in units of 1, and the loss."""
    rows, x = regression(200, 20), torch.zeros(20, dtype=torch.float64)
    minimize(
        lambda batch: squares(x / unit, batch), ParameterView({"x": x}), rows, make(),
        batch_size=16, max_queries=queries, **QUIET,
    )  # fmt: skip
    return x / unit, float(squares(x / unit, rows).mean())


@OPTIMIZERS
def test_least_squares_are_solved_whatever_the_unit(make: Make) -> None:
    at_first = float(squares(torch.zeros(20, dtype=torch.float64), regression(200, 20)).mean())
    for unit in (1.0, 1e4, 1e-4):
        assert tuned(make, unit)[1] < 0.2 * at_first


@OPTIMIZERS
@pytest.mark.parametrize(("size", "unit", "target"), [(3, 1.0, 100.0), (20, 1e4, 0.2)])
def test_a_function_of_a_few_variables_in_any_unit(
    make: Make, size: int, unit: float, target: float
) -> None:
    x = torch.zeros(size, dtype=torch.float64)

    def distance(_: object) -> float:
        return float((x / unit - target).square().sum())

    minimize(distance, ParameterView({"x": x}), None, make(), max_steps=300, **QUIET)
    assert distance(None) < 1e-2 * size * target**2


@OPTIMIZERS
@pytest.mark.parametrize("steps", [2, 6, 16])
def test_a_short_trial_does_not_harm_what_is_at_its_best(make: Make, steps: int) -> None:
    rows = regression(200, 20, noise=0.3)
    x = torch.linalg.lstsq(rows[:, :-1], rows[:, -1:]).solution[:, 0]
    before = float(squares(x, rows).mean())
    minimize(
        lambda batch: squares(x, batch), ParameterView({"x": x}), rows, make(),
        batch_size=16, max_steps=steps, **QUIET,
    )  # fmt: skip
    assert float(squares(x, rows).mean()) < 2.0 * before


def test_what_is_given_is_taken() -> None:
    p = problem()
    optimizer = MeZO(displacement=0.125)
    result = minimize(p.objective, p.view, p.data, optimizer, batch_size=8, max_steps=3, **QUIET)
    assert optimizer.state.finder is None
    assert optimizer.state.descent.displacement == 0.125
    assert result.queries == 3 * 64


def test_measurements_are_queries_and_the_perturbation_follows() -> None:
    p = problem()
    optimizer, steps = MeZO(), list[Step]()
    result = minimize(
        p.objective, p.view, p.data, optimizer, batch_size=8, max_queries=4_000,
        callback=steps.append, **QUIET,
    )  # fmt: skip
    assert optimizer.measuring_queries > 0
    assert steps[0].queries == optimizer.measuring_queries + 64
    assert [step.step for step in steps] == list(range(1, result.steps + 1))
    assert 0.9 * 4_000 < result.queries <= 4_000
    assert {step.kind for step in steps} == {"minibatch"}
    assert optimizer.perturbation_scale == optimizer.state.descent.displacement / 25
    kept = MeZO(perturbation_scale=1e-3)
    minimize(p.objective, p.view, p.data, kept, batch_size=8, max_steps=2, **QUIET)
    assert kept.perturbation_scale == 1e-3


def test_a_budget_too_small_for_measurements_has_none_and_stays_near() -> None:
    p = problem()
    optimizer = MeZO(num_directions=1)
    result = minimize(p.objective, p.view, p.data, optimizer, batch_size=8, max_queries=40, **QUIET)
    assert optimizer.measuring_queries == 0
    assert found(optimizer) == p.view.displacement / 8
    assert optimizer.state.descent.displacement == found(optimizer)
    assert (result.steps, result.queries) == (2, 32)


def test_within_bounds_the_search_goes_no_further_than_they_allow() -> None:
    assert Calibration(4.0, farthest=1.5).displacement == 1.5
    search = Calibration(0.9, farthest=1.0)
    search.narrow(Response(even=0.05, odd=1.0))  # much further
    assert (search.displacement, search.finished) == (1.0, False)
    search.narrow(Response(even=0.2, odd=1.2))  # near: a part of it is followed
    assert (search.displacement, search.finished) == (1.0, True)


def test_a_budget_for_one_look_does_not_leap_beyond_it() -> None:
    search = Calibration(0.25)
    search.narrow(Response(even=1e-6, odd=1.0))
    assert search.displacement == 8.0
    search.give_up()
    assert (search.displacement, search.finished) == (0.5, True)
    flat = Calibration(0.25)
    flat.narrow(Response(even=0.0, odd=0.0))
    flat.give_up()
    assert flat.displacement == 0.25


@OPTIMIZERS
def test_resumed_between_measurements_the_run_is_the_same(make: Make, tmp_path: Path) -> None:
    def run(file: Path, p: Problem, stop: int | None = None, resume: bool = False) -> list[Step]:
        def callback(step: Step) -> None:
            if step.step == stop:
                raise StopIteration

        result = minimize(
            p.objective, p.view, p.data, make(), batch_size=8, max_queries=2_500,
            callback=callback, trajectory=file, resume=resume, **QUIET,
        )  # fmt: skip
        return result.history

    whole = problem(logistic)
    history = run(tmp_path / "whole.zot", whole)
    for stop in (1, len(history) // 2):
        part, file = problem(logistic), tmp_path / f"{stop}.zot"
        run(file, part, stop)
        again = problem(logistic)
        assert run(file, again, resume=True) == history
        for name, tensor in whole.view.tensors.items():
            assert torch.equal(bits(tensor), bits(again.view.tensors[name]))
        replayed = problem(logistic)
        replay(replayed.view, file)
        assert replayed.view.hash() == whole.view.hash()


@OPTIMIZERS
def test_ask_and_tell_measure_as_the_loop_does(make: Make) -> None:
    x = torch.zeros(4, dtype=torch.float64)

    def bowl(at: Any) -> float:
        return float(((torch.as_tensor(at) - 30.0) ** 2).sum())

    result = minimize(
        lambda _: bowl(x), ParameterView({"x": x}), None, make(), max_queries=2_000, **QUIET
    )
    asker = AskTell(make(), np.zeros(4), max_queries=2_000)
    kinds = list[str]()
    while candidates := asker.ask():
        before = asker.steps
        record = asker.tell([bowl(one) for one in candidates])
        kinds.append(record.kind)
        assert asker.steps - before == (record.kind != "measurement")
        if len(kinds) == 3:
            asker = copy.deepcopy(asker)
    assert (asker.steps, asker.queries) == (result.steps, result.queries)
    assert np.array_equal(asker.x, x.numpy())
    assert kinds[0] == "measurement"


def test_where_far_places_have_no_value_the_search_comes_nearer() -> None:
    x = torch.zeros(4)

    def walled(_: object) -> float:
        inside = bool((x.abs() < 0.05).all())
        return float((x - 0.02).square().sum()) if inside else math.inf

    optimizer = MeZO()
    minimize(walled, ParameterView({"x": x}), None, optimizer, max_steps=50, **QUIET)
    assert found(optimizer) < 0.05
    assert walled(None) < walled_at_zero()


def walled_at_zero() -> float:
    """Its value at the start."""
    return 4 * 0.02**2


def test_a_count_goes_as_far_as_the_view_assumes() -> None:
    """On few rows damage and gain of a count are noise: a search shrank until nothing moved."""
    x = torch.zeros(50)
    rows = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    wanted = rows @ torch.ones(50) > 0

    def right(batch: Any) -> Tensor:
        return ((batch["rows"] @ x > 0) == batch["wanted"]).float()

    count = CallableObjective(right, maximize=True, step_like=True, mean_over_rows=True)
    view, optimizer = ParameterView({"x": x}), MeZO()
    result = minimize(
        count, view, {"rows": rows, "wanted": wanted}, optimizer,
        batch_size=32, max_queries=4000, progress=False,
    )  # fmt: skip
    assert optimizer.settings()["displacement"] == view.displacement
    assert optimizer.measuring_queries == 0
    assert float(right({"rows": rows, "wanted": wanted}).mean()) > 0.8
    assert result.history[0].queries == 8 * 32


def test_where_nothing_responds_the_displacement_is_the_views() -> None:
    search = Calibration(0.25)
    while not search.finished:
        search.narrow(Response(even=0.0, odd=0.0))
    assert (search.displacement, search.rounds) == (0.25, 4)


def test_a_kept_state_does_not_change_with_the_run() -> None:
    p, optimizer = problem(), MeZO()
    states = list[dict[str, Any]]()

    def keep(step: Step) -> None:
        states.append(optimizer.state_dict()["finder"]["look_ahead"])

    minimize(
        p.objective, p.view, p.data, optimizer, batch_size=8, max_queries=2_500, callback=keep,
        **QUIET,
    )  # fmt: skip
    assert [len(state["window"]) for state in states[:3]] == [1, 2, 3]


@pytest.mark.parametrize("start", [1e-6, 0.25, 1e5])
@pytest.mark.parametrize("right", [1e-2, 3.0])
def test_the_search_ends_where_damage_is_a_fifth_of_the_signal(start: float, right: float) -> None:
    search = Calibration(start)
    while not search.finished and search.rounds < 12:
        rho = search.displacement
        search.narrow(Response(even=RATIO * rho**2 / right, odd=rho))
    assert search.finished
    assert search.displacement == pytest.approx(right, rel=0.3)


def test_a_parabola_is_found_with_its_error() -> None:
    points = np.array([-1.0, 0.0, 1.0])
    rows = (2.0 + 3.0 * points + 0.5 * points**2)[:, None] + np.arange(4.0)
    assert parabola(points, rows) == pytest.approx((3.0, 1.0, 0.0))
    noisy = rows + np.outer(points, [1.0, -1.0, 1.0, -1.0])
    slope, _, error = parabola(points, noisy)
    assert slope == pytest.approx(3.0)
    assert error == pytest.approx(np.std([1, -1, 1, -1], ddof=1) / 2)
    five = np.linspace(-1, 1, 5)
    assert parabola(five, (five**2 + five)[:, None])[:2] == pytest.approx((1.0, 2.0))


@pytest.mark.parametrize(("numbers", "looks"), [(4, True), (800, True), (2_000, False)])
def test_runs_look_ahead_where_directions_outnumber_the_view(numbers: int, looks: bool) -> None:
    x, optimizer = torch.zeros(numbers, dtype=torch.float64), MeZO()
    minimize(
        lambda _: float((x - 3.0).square().sum()), ParameterView({"x": x}), None, optimizer,
        max_queries=1_000, **QUIET,
    )  # fmt: skip
    finder = optimizer.state.finder
    assert finder is not None
    assert (finder.look_ahead.taken > 0) is looks
    assert finder.look_ahead.growth <= max(4.0, (1_000 / numbers) ** 0.5)


@OPTIMIZERS
def test_steps_whose_best_length_is_known_go_on_for_as_long_as_there_is_a_slope(make: Make) -> None:
    x = torch.zeros(10, dtype=torch.float64)

    def bowl(_: object) -> float:
        return float((x - 0.2).square().sum())

    optimizer = make()
    minimize(bowl, ParameterView({"x": x}), None, optimizer, max_steps=500, **QUIET)
    assert bowl(None) < 1e-9
    # Probes come nearer as the minimum does.
    assert optimizer.perturbation_scale < 0.05 * found(optimizer) / 25


@OPTIMIZERS
@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_looks_find_the_length_of_steps_wherever_they_begin(
    make: Make, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first displacement that is three times too short or four times too long is mended."""
    monkeypatch.setattr("zo_adapt.optimizers.calibration.RATIO", 0.2 * factor)
    rows, x = regression(200, 5), torch.zeros(5, dtype=torch.float64)
    at_first = float(squares(x, rows).mean())
    minimize(
        lambda batch: squares(x, batch), ParameterView({"x": x}), rows, make(),
        batch_size=16, max_queries=10_000, **QUIET,
    )  # fmt: skip
    best = torch.linalg.lstsq(rows[:, :-1], rows[:, -1:]).solution[:, 0]
    assert float((squares(x, rows) - squares(best, rows)).mean()) < 0.02 * at_first


def test_looks_come_early_and_end_before_the_steps_get_short() -> None:
    looks = LookAhead(rows=32, looks=32, window=[Shift((Term(1, 1.0),))])
    due = list[float]()
    for done in np.linspace(0, 1, 1_001):
        while looks.is_due(done):
            due.append(done)
            looks.taken += 1
    assert len(due) == 32
    assert due[0] < 0.01
    assert due[-1] == pytest.approx(0.85)
    assert sum(done < 0.25 for done in due) > 12


@pytest.mark.parametrize("schedule", ["auto", "cooldown", "linear"])
def test_rates_are_kept_to_the_last_eighth_unless_a_schedule_is_given(schedule: str) -> None:
    x, rates = torch.zeros(4, dtype=torch.float64), list[float]()
    optimizer = MeZO(displacement=0.25, schedule=schedule)
    result = minimize(
        lambda _: float((x - 3.0).square().sum()), ParameterView({"x": x}), None, optimizer,
        max_steps=64, callback=lambda step: rates.append(step.lr), **QUIET,
    )  # fmt: skip
    assert result.steps == 64
    assert optimizer.settings()["schedule"] == ("linear" if schedule == "linear" else "cooldown")
    falls = [k for k, (one, other) in enumerate(pairwise(rates)) if other < 0.999 * one]
    assert falls == ([*range(63)] if schedule == "linear" else [*range(56, 63)])


@pytest.mark.parametrize(("is_new", "looks"), [(True, True), (False, False)])
def test_only_weights_that_nobody_has_trained_are_looked_at(is_new: bool, looks: bool) -> None:
    """On trained ones looks did harm, also where directions outnumber the view."""
    samples, ahead = Samples(as_source(range(64)), 16, 0), LookAhead()
    ahead.plan(samples, Budget(None, 100_000), 144, 8, 500, is_new=is_new)
    assert ahead.acts is looks


def test_a_look_changes_as_much_as_it_knows() -> None:
    certain, many = 0.0, 1_000_000
    assert narrowed(4.0, -1.0, 1.0, certain, many)[0] == pytest.approx(2.0, rel=1e-4)
    assert narrowed(4.0, 0.5, 1.0, certain, many)[0] == pytest.approx(0.5, rel=1e-4)
    assert narrowed(4.0, -9.0, 1.0, certain, many)[0] == 3.0  # at most, of one look
    assert narrowed(4.0, -1.0, -1.0, certain, many)[0] == 3.0  # it bends the other way
    assert narrowed(4.0, 0.0, 0.0, 1.0, many) == (1.0, 4.0)  # nothing changes
    assert narrowed(4.0, -1.0, 1.0, 1e9, many) == (pytest.approx(1.0), pytest.approx(4.0))
    assert narrowed(4.0, -1.0, 1.0, certain, 1)[0] < 1.9  # so few directions are chance


def test_what_one_look_does_not_show_many_do() -> None:
    length, doubt = 1.0, 4.0
    for _ in range(40):  # the best length is twice that of the start
        bend = length**2
        factor, doubt = narrowed(doubt, bend - 2 * length, bend, bend, 1_000)
        length *= factor
    assert length == pytest.approx(2.0, rel=0.15)
    assert doubt < 0.2


def begins_as_in_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches begin as they did before looks had a doubt."""
    init = LookAhead.__init__

    def former(self: LookAhead, *values: Any, **named: Any) -> None:
        init(self, *values, **({"former": Evidence()} | named))

    monkeypatch.setattr(LookAhead, "__init__", former)
    steps_fall_as_before(monkeypatch)


def steps_fall_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a schedule that is not given be what it was before "cooldown" was usual."""
    usual = property(lambda self: "linear" if self.schedule == "auto" else self.schedule)
    monkeypatch.setattr(ByDistance, "schedule_in_force", usual)


@pytest.mark.parametrize("given", [{}, {"schedule": "linear"}])
def test_a_run_whose_steps_fell_linearly_goes_on_so(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(file: Path, stop: int | None = None, resume: bool = False) -> Tensor:
        def callback(step: Step) -> None:
            if step.step == stop:
                raise StopIteration

        at = problem()
        minimize(
            at.objective, at.view, at.data, MeZO(**given), batch_size=8, max_steps=40, seed=3,
            callback=callback, trajectory=file, resume=resume, **QUIET,
        )  # fmt: skip
        return flat(at.view)

    with monkeypatch.context() as patch:
        steps_fall_as_before(patch)
        whole = run(tmp_path / "whole.zot")
        run(tmp_path / "part.zot", stop=20)
    assert torch.equal(bits(whole), bits(run(tmp_path / "part.zot", resume=True)))
    assert not torch.equal(bits(whole), bits(run(tmp_path / "now.zot"))) or given


@OPTIMIZERS
def test_a_run_of_the_first_version_goes_on_as_it_was_begun(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(file: Path, stop: int | None = None, resume: bool = False) -> tuple[Tensor, Any]:
        def callback(step: Step) -> None:
            if step.step == stop:
                raise StopIteration

        optimizer, x = make(), torch.zeros(4, dtype=torch.float64)
        minimize(
            lambda _: float((x - 3.0).square().sum()), ParameterView({"x": x}), None, optimizer,
            max_steps=60, callback=callback, trajectory=file, resume=resume, **QUIET,
        )  # fmt: skip
        return x, optimizer.state

    with monkeypatch.context() as patch:
        begins_as_in_version_1(patch)
        whole, state = run(tmp_path / "whole.zot")
        run(tmp_path / "part.zot", stop=20)
    again, resumed = run(tmp_path / "part.zot", resume=True)
    assert torch.equal(bits(whole), bits(again))
    assert resumed.finder.look_ahead.taken == state.finder.look_ahead.taken >= 4
    assert resumed.descent.step_size.schedule_in_force == "linear"
    assert resumed.perturbation_scale == resumed.descent.displacement / 25


def test_a_round_that_cannot_tell_is_asked_again_on_more_rows() -> None:
    """Rows of a language model differed by more than any damage, and a search leapt to 32 times."""
    search = Calibration(0.25)
    search.narrow(Response(even=-0.06, odd=0.22, error=0.15))
    assert (search.displacement, search.rows_factor, search.finished) == (0.25, 2, False)
    search.narrow(Response(even=0.1, odd=0.22, error=0.01))
    assert search.displacement < 0.25
