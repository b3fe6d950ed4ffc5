"""What a run returns, as a table, as a figure and as words."""

import math
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from problems import problem

from zo_adapt import Metrics, MeZO, Result, StopReason, TrackVariance, minimize
from zo_adapt.errors import MissingPackageError, NonFiniteObjectiveError
from zo_adapt.loops.result import reason_of


def run(steps: int = 7, **options: Any) -> Result:
    p = problem()
    return minimize(
        options.pop("objective", p.objective), p.view, p.data, MeZO(lr=0.05, num_directions=1),
        batch_size=6, max_steps=steps, progress=False, **options,
    )  # fmt: skip


def test_the_recommended_optimizer_needs_no_name() -> None:
    p = problem()
    result = minimize(p.objective, p.view, p.data, batch_size=6, max_steps=3, progress=False)
    assert result.steps == 3
    assert {step.kind for step in result.history} == {"minibatch"}
    q = problem()
    named = minimize(q.objective, q.view, q.data, MeZO(), batch_size=6, max_steps=3, progress=False)
    assert named.history == result.history


def test_success_is_work_done_without_a_fault() -> None:
    assert run().success
    assert not run(steps=0).success
    broken = run(objective=lambda batch: math.nan)
    assert (broken.success, broken.stop_reason) == (False, StopReason.NON_FINITE)
    halfway = Result(1.0, 3, 6, StopReason.STEP_TOO_LARGE, "", [])
    assert not halfway.success


def test_a_result_is_frozen_and_reads_as_a_few_lines() -> None:
    result = run(metrics={"twice": lambda batch: 2.0})
    with pytest.raises(FrozenInstanceError):
        result.value = 0.0  # type: ignore[misc]
    lines = str(result).splitlines()
    assert lines[0].startswith("Result: 7 steps, 84 queries, value ")
    assert "twice 2 (24 queries beside)" in lines[1]
    assert "maximum number of steps" in lines[2]
    assert 3 <= len(lines) <= 5
    assert "Step(" not in str(result)


def test_it_says_how_it_evaluated_and_why_not_faster() -> None:
    result = run()
    assert set(result.evaluation.why_not) >= {"trunk", "graphs"}
    assert str(result.evaluation) in str(result)


def test_the_history_as_a_table() -> None:
    table = run(metrics=Metrics({"twice": lambda batch: 2.0, "value": lambda b: 5.0}, every=3))
    frame = table.to_pandas()
    assert list(frame.index) == [1, 2, 3, 4, 5, 6, 7]
    assert list(frame["queries"]) == [12 * k for k in range(1, 8)]
    assert list(frame["value"]) == [step.value for step in table.history]
    assert frame["twice"].dropna().to_dict() == {3: 2.0, 6: 2.0}
    assert frame["metrics.value"].dropna().to_dict() == {3: 5.0, 6: 5.0}
    assert run(steps=0).to_pandas().empty


def test_the_history_as_a_figure() -> None:
    result = run(metrics=Metrics({"twice": lambda batch: 2.0}, every=3))
    values, metric = result.plot().axes
    assert [line.get_xdata()[-1] for line in values.lines] == [84, 84]
    assert list(values.lines[0].get_ydata()) == [step.value for step in result.history]
    assert list(metric.lines[0].get_xdata()) == [36, 72]
    assert metric.get_ylabel() == "twice"
    assert len(run(steps=0).plot().axes) == 1
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    ), "the figure belongs to no window"


def test_noises_and_the_share_of_the_data_are_drawn_beside_other_metrics() -> None:
    watched = {"twice": lambda batch: 2.0, "noise": TrackVariance(every=2, batch_size=4)}
    result = run(metrics=Metrics(watched, every=3))
    *_, metric, shares, noises = result.plot().axes
    assert [axes.get_ylabel() for axes in (metric, shares, noises)] == [
        "twice",
        "noise: share of data noise",
        "noise: noise of an example",
    ]
    assert list(shares.lines[0].get_xdata())[:3] == [24, 48, 72]
    assert all(0 <= share <= 1 for share in shares.lines[0].get_ydata())
    for line in noises.lines:
        name = "noise_" + str(line.get_label()).replace(" ", "_")
        measured = [step.metrics[name] for step in result.history if name in (step.metrics or {})]
        assert list(line.get_ydata()) == measured != []
    assert [line.get_label() for line in noises.lines] == ["direction noise", "data noise"]


@pytest.mark.parametrize(("method", "package"), [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_a_package_that_is_missing_is_named(
    method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(steps=1)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package}.*pip install 'zo_adapt\[plot\]'"):
        getattr(result, method)()


def test_a_subclass_of_a_fault_ends_a_run_as_the_fault_does() -> None:
    class OutOfTheTankError(NonFiniteObjectiveError):
        pass

    assert reason_of(OutOfTheTankError()) is StopReason.NON_FINITE

    def empty(batch: Any) -> float:
        raise OutOfTheTankError("nothing left")

    result = run(objective=empty)
    assert result.stop_reason is StopReason.NON_FINITE
    assert "nothing left" in result.message
