"""What an objective says of itself, and what holds of one that says nothing."""

import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn

from objectives import CallableObjective, CausalLMLoss
from zo_adapt import (
    EvaluationOptions,
    MeZO,
    MeZOSVRG,
    Objective,
    ParameterView,
    SetObjective,
    diagnose,
    minimize,
)
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DropoutError, OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.objective import ATTRIBUTES, as_objective, rows_needed
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.evaluation.start_checks import resolve_mean_over_rows
from zo_adapt.term import HERE

QUIET: dict[str, Any] = {
    "progress": False,
    "evaluation": EvaluationOptions(joint_rows="off"),
}


class Duck:
    """An objective of another origin: it has the attributes that it needs, and no base."""

    maximize, step_like, min_rows = True, True, 8

    def collate(self, examples: list[Any]) -> Tensor:
        return torch.tensor(examples)

    def predict(self, batch: Tensor) -> Tensor:
        return batch

    def score(self, predictions: list[Tensor]) -> float:
        return float(torch.cat(predictions).mean())


class Recorder:
    """A function of a batch that keeps the number of rows of each call."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        self.value, self.rows = value, []  # type: ignore[var-annotated]

    def __call__(self, batch: Tensor) -> Any:
        self.rows.append(len(batch))
        return self.value(batch)


PAIRS = partial(MeZO, 1e-3, one_sided=False, num_directions=4)


def one_number(batch: Tensor) -> float:
    return float(batch.mean())


def each_row(batch: Tensor) -> Tensor:
    return batch.double()


def one() -> ParameterView:
    return ParameterView({"x": torch.zeros(2)})


def test_every_attribute_has_a_default_and_a_sentence() -> None:
    for name in ATTRIBUTES:
        assert hasattr(Objective, name)
        assert f"        {name}: " in (Objective.__doc__ or "")


def test_what_is_not_said_has_the_default() -> None:
    bare = as_objective(lambda batch: 0.0)
    assert {name: getattr(bare, name) for name in ATTRIBUTES} == {
        name: getattr(Objective, name) for name in ATTRIBUTES
    }
    duck = as_objective(Duck())
    assert isinstance(duck, SetObjective)
    assert (duck.maximize, duck.step_like, duck.min_rows) == (True, True, 8)
    assert (duck.independent_rows, duck.capturable, duck.evaluating) == (True, False, None)
    assert duck.collate is not None
    assert duck(torch.tensor([1.0, 3.0])) == 2.0
    assert as_objective(duck) is duck


def test_a_set_that_says_nothing_is_never_cut() -> None:
    class Silent:
        def predict(self, batch: Tensor) -> Tensor:
            return batch

        def score(self, predictions: list[Tensor]) -> float:
            return 0.0

    assert rows_needed(as_objective(Silent())) == sys.maxsize


def test_an_attribute_may_be_put_on_a_function() -> None:
    def reward(batch: Any) -> float:
        return 0.0

    reward.maximize = True  # type: ignore[attr-defined]
    assert as_objective(reward).maximize


@pytest.mark.parametrize("given", [3.0, "f1", object(), Duck, CallableObjective])
def test_what_is_no_objective_is_named(given: Any) -> None:
    with pytest.raises(OptionError, match=r"cannot be called|is the class"):
        minimize(given, one(), None, MeZO(1e-3), max_steps=1, **QUIET)


@pytest.mark.parametrize("rows", [0, -1, 2.5, "some"])
def test_min_rows_is_a_number_of_rows_or_all(rows: Any) -> None:
    duck = Duck()
    duck.min_rows = rows
    with pytest.raises(OptionError, match="min_rows"):
        as_objective(duck)


def test_former_names_are_read_with_a_warning() -> None:
    duck = Duck()
    duck.joint, duck.min_rows = False, None  # type: ignore[attr-defined, assignment]
    with pytest.warns(DeprecationWarning, match="independent_rows|all") as warned:
        read = as_objective(duck)
    assert len(warned) == 2
    assert (read.independent_rows, read.min_rows) == (False, "all")


# --- One number a call: the call is whole ---------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        Recorder,
        lambda value: CallableObjective(Recorder(value), step_like=True),
    ],
)
def test_one_number_is_asked_of_the_whole_batch_and_values_of_a_share(make: Any) -> None:
    def rows(value: Callable[[Tensor], Any]) -> list[int]:
        objective = make(value)
        minimize(
            objective, one(), torch.arange(64.0), PAIRS(), batch_size=16,
            max_steps=1, **QUIET,
        )  # fmt: skip
        recorder: Recorder = getattr(objective, "function", objective)
        return recorder.rows

    assert rows(one_number) == [2, 2] + [16] * 8  # the same two rows twice: does it draw?
    assert rows(each_row) == [2, 1] + [4] * 8


def test_a_snapshot_of_one_number_is_one_call() -> None:
    recorder = Recorder(one_number)
    optimizer = MeZOSVRG(
        1e-3, snapshot_interval=1, snapshot_size=48, perturbation_scale=1e-2, num_directions=1
    )
    minimize(recorder, one(), torch.arange(64.0), optimizer, batch_size=16, max_steps=1, **QUIET)
    assert recorder.rows[:2] == [2, 2]
    assert set(recorder.rows[2:]) == {48}


def test_one_that_says_it_is_a_mean_is_cut_and_not_looked_at() -> None:
    recorder = Recorder(one_number)
    objective = CallableObjective(recorder, mean_over_rows=True)
    options = {"batch_size": 16, "max_steps": 1}
    options = QUIET | options | {"evaluation": EvaluationOptions(2, "off")}
    minimize(
        objective,
        one(),
        torch.arange(64.0),
        PAIRS(),
        **options,
    )
    assert recorder.rows == [2] * 16


def test_in_batch_negatives_see_the_batch_that_was_asked_for() -> None:
    """A contrastive loss is log n without a signal: its value tells how many rows it saw."""
    x = torch.zeros(1)

    def contrastive(batch: Tensor) -> float:
        scores = (batch @ batch.T) * 0.0 + x
        return float(nn.functional.cross_entropy(scores, torch.arange(len(batch))))

    data = torch.randn(64, 3)
    optimizer = MeZO(1e-9, one_sided=False, num_directions=4, perturbation_scale=1e-3)
    result = minimize(
        contrastive, ParameterView({"x": x}), data, optimizer, batch_size=16, max_steps=1, **QUIET
    )
    assert result.value == pytest.approx(np.log(16), abs=1e-4)


@pytest.mark.parametrize("says", [False, True])
def test_values_per_example_that_depend_on_the_others_are_not_cut_either(says: bool) -> None:
    x = torch.zeros(1)

    def contrastive(batch: Tensor) -> Tensor:
        scores = (batch @ batch.T) * 0.0 + x
        targets = torch.arange(len(batch))
        return nn.functional.cross_entropy(scores, targets, reduction="none")

    objective = CallableObjective(contrastive, independent_rows=not says)
    optimizer = MeZO(1e-9, one_sided=False, num_directions=4, perturbation_scale=1e-3)
    result = minimize(
        objective, ParameterView({"x": x}), torch.randn(64, 3), optimizer, batch_size=16,
        max_steps=1, **QUIET,
    )  # fmt: skip
    assert result.value == pytest.approx(np.log(16), abs=1e-4)


@pytest.mark.parametrize("call", [minimize, diagnose])
def test_micro_batches_of_one_number_are_refused(call: Any) -> None:
    more: dict[str, Any] = {"optimizer": MeZO(1e-3), "max_steps": 1, "progress": False}
    more = {} if call is diagnose else more
    data = torch.arange(64.0)
    with pytest.raises(OptionError, match="mean_over_rows=True"):
        call(one_number, one(), data, batch_size=16, evaluation=EvaluationOptions(4), **more)
    call(one_number, one(), data, batch_size=16, evaluation=EvaluationOptions(16), **more)


def test_a_metric_of_interest_that_is_one_number_is_one_call() -> None:
    recorder = Recorder(one_number)
    result = minimize(
        each_row, one(), torch.arange(64.0), MeZO(1e-3), batch_size=4, max_steps=1,
        metrics={"mean": recorder}, **QUIET,
    )  # fmt: skip
    assert recorder.rows == [2, 2, 64]
    assert result.metrics == {"mean": 31.5}


def test_a_token_mean_does_not_depend_on_micro_batches() -> None:
    model = tiny_model("gpt2", "causal")
    data = [{"input_ids": row} for row in token_rows(8)]
    loss = CausalLMLoss(model, reduction="token")
    batch = Batch(as_source(data, loss.collate), range(8))
    view = ParameterView.full(model)
    value = LocalEvaluator(loss, view, batch_size=2).evaluate([Probe(HERE, batch)])[0].value
    with torch.no_grad():
        assert value == pytest.approx(float(loss(data).mean()), rel=1e-6)
    with pytest.raises(OptionError, match="micro_batch_size=2"):
        LocalEvaluator(loss, view, EvaluationOptions(2))


def test_a_sum_is_a_mean_over_rows_if_its_parts_are() -> None:
    mean = CallableObjective(one_number, mean_over_rows=True)
    unknown, whole = CallableObjective(one_number), CallableObjective(one_number)
    whole.mean_over_rows = False
    assert (mean + mean).mean_over_rows is True
    assert (mean + unknown).mean_over_rows == "auto"
    assert (mean + unknown + whole).mean_over_rows is False


# --- The look at two rows ------------------------------------------------------------------------


def test_a_function_without_a_value_on_two_rows_is_whole() -> None:
    def needs_many(batch: Tensor) -> float:
        if len(batch) < 16:
            raise ValueError("too few")
        return 0.0

    options = {"batch_size": 16, "max_steps": 1} | QUIET
    minimize(
        needs_many,
        one(),
        torch.arange(64.0),
        PAIRS(),
        **options,
    )


def test_an_error_of_the_function_is_still_its_own() -> None:
    def broken(batch: Tensor) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minimize(broken, one(), torch.arange(64.0), MeZO(1e-3), batch_size=16, max_steps=1, **QUIET)


def test_nothing_global_is_drawn_from_and_no_query_counted() -> None:
    def draws(batch: Any) -> Any:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        return torch.zeros(len(batch))

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore  # noqa: NPY002
    source = as_source([0.0] * 4, draws)
    found = resolve_mean_over_rows(as_objective(draws), source, None)
    assert found.mean_over_rows is True
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tobytes()  # type: ignore  # noqa: NPY002


def test_the_model_is_in_evaluation_mode_while_it_is_looked_at() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).train()
    view = ParameterView.full(model)
    modes: list[bool] = []

    def loss(batch: Tensor) -> Tensor:
        modes.append(model.training)
        return model(batch[:, None]).square()[:, 0]  # type: ignore[no-any-return]

    with pytest.raises(DropoutError):
        minimize(loss, view, torch.arange(8.0), MeZO(1e-3), batch_size=4, max_steps=1, **QUIET)
    assert not modes
    objective = CallableObjective(loss, model=model)
    minimize(objective, view, torch.arange(8.0), MeZO(1e-3), batch_size=4, max_steps=1, **QUIET)
    assert not any(modes)


@pytest.mark.parametrize("value", [one_number, each_row])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, value: Any) -> None:
    def run(steps: int, file: str) -> ParameterView:
        x = torch.zeros(2)
        view = ParameterView({"x": x})

        def objective(batch: Tensor) -> Any:
            return value((batch - x[0]).square())

        def stop(step: Any) -> None:
            if step.step == steps:
                raise StopIteration

        minimize(
            objective, view, torch.arange(32.0), PAIRS(), batch_size=8,
            max_steps=6, trajectory=tmp_path / file, resume=True, callback=stop, **QUIET,
        )  # fmt: skip
        return view

    whole = run(6, "whole")
    run(3, "cut")
    assert run(6, "cut").hash() == whole.hash()


def test_a_context_of_evaluation_is_entered_for_the_look() -> None:
    entered: list[int] = []

    class Watched(CallableObjective):
        def evaluating(self) -> Any:  # type: ignore[override]
            entered.append(1)
            return nullcontext()

    resolve_mean_over_rows(Watched(each_row), as_source(torch.arange(4.0)), None)
    assert entered == [1]
