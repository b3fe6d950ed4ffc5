"""Bad input: each a named error, before any evaluation where that is possible."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from problems import regression
from torch import Tensor, nn

from zo_adapt import SGD, ZOSVRG, MeZO, MeZOSVRG, ParameterView, StopReason, minimize
from zo_adapt.errors import (
    DataError,
    DropoutError,
    ObjectiveError,
    OptionError,
    PerturbationError,
    ZOError,
)

QUIET: dict[str, Any] = {"progress": False}


def mezo(**options: Any) -> MeZO:
    return MeZO(**({"lr": 0.01, "perturbation_scale": 0.05} | options))


def one() -> ParameterView:
    return ParameterView({"x": torch.zeros(2)})


HYPER = {
    "lr 0": lambda: MeZO(0.0),
    "lr negative": lambda: MeZOSVRG(-1e-3),
    "lr nan": lambda: MeZO(math.nan),
    "sgd lr": lambda: SGD(lr=0.0),
    "mu 0": lambda: MeZO(1e-3, perturbation_scale=0.0),
    "mu negative": lambda: MeZO(1e-3, perturbation_scale=-1e-3),
    "displacement 0": lambda: MeZOSVRG(displacement=0.0),
    "snapshot_size 0": lambda: MeZOSVRG(1e-3, snapshot_size=0),
    "zo-svrg snapshot_size 0": lambda: ZOSVRG(1e-3, snapshot_size=0),
    "mu inf": lambda: ZOSVRG(1e-3, perturbation_scale=math.inf),
    "K 0": lambda: MeZO(1e-3, num_directions=0),
    "K float": lambda: MeZOSVRG(1e-3, num_directions=1.5),  # type: ignore[arg-type]
    "q 0": lambda: MeZOSVRG(1e-3, snapshot_interval=0),
    "q negative": lambda: ZOSVRG(1e-3, snapshot_interval=-1),
    "snapshot_size": lambda: MeZOSVRG(1e-3, snapshot_size=-5),
    "snapshot_lr": lambda: MeZOSVRG(1e-3, snapshot_lr=-1.0),
    "coupling": lambda: MeZOSVRG(1e-3, coupling="both"),  # type: ignore[arg-type]
    "weight_decay": lambda: MeZO(1e-3, weight_decay=-0.1),
    "weight_decay 1/lr": lambda: MeZO(0.5, weight_decay=2.0),
    "scale_memory": lambda: MeZO(1e-3, scale_memory=1.0),
}


@pytest.mark.parametrize("name", HYPER)
def test_hyper_parameters_are_checked_at_once(name: str) -> None:
    with pytest.raises(OptionError):
        HYPER[name]()


def never(batch: Any) -> float:
    raise AssertionError("evaluated before the input was checked")


never.mean_over_rows = True  # type: ignore[attr-defined]


ROWS = regression(6, 2)
SNAPSHOT: dict[str, Any] = {"snapshot_interval": 2, "snapshot_size": 7, "perturbation_scale": 0.1}
CALLS: dict[str, tuple[type[ZOError], str, Any, Any, dict[str, Any]]] = {
    "no budget": (OptionError, "max_steps", None, mezo, {}),
    "negative steps": (OptionError, "-1", None, mezo, {"max_steps": -1}),
    "negative queries": (OptionError, "-5", None, mezo, {"max_queries": -5}),
    "seed": (OptionError, "seed=-1", None, mezo, {"max_steps": 1, "seed": -1}),
    "no batch": (DataError, "1..6", ROWS, mezo, {"max_steps": 1}),
    "long batch": (DataError, "batch_size=7", ROWS, mezo, {"max_steps": 1, "batch_size": 7}),
    "batch of 0": (DataError, "batch_size=0", ROWS, mezo, {"max_steps": 1, "batch_size": 0}),
    "snapshot": (
        DataError,
        "snapshot_size=7 with 6",
        ROWS,
        lambda: MeZOSVRG(0.1, **SNAPSHOT),
        {"max_steps": 1, "batch_size": 2},
    ),
    "zo snapshot": (
        DataError,
        "snapshot_size=7 with 6",
        ROWS,
        lambda: ZOSVRG(0.1, **SNAPSHOT),
        {"max_steps": 1, "batch_size": 2},
    ),
    "ragged": (
        DataError,
        r"\[5, 6\]",
        (ROWS, ROWS[:5]),
        mezo,
        {"max_steps": 1, "batch_size": 2},
    ),
    "no length": (DataError, "no length", iter([1]), mezo, {"max_steps": 1, "batch_size": 1}),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_are_named_before_any_evaluation(name: str) -> None:
    error, words, data, make, options = CALLS[name]
    with pytest.raises(error, match=words):
        minimize(never, one(), data, make(), **options, **QUIET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_perturbation_below_the_resolution_is_refused(dtype: torch.dtype) -> None:
    view = ParameterView({"fine": torch.zeros(2), "coarse": torch.full((9,), 100.0, dtype=dtype)})
    smallest = 50 * torch.finfo(dtype).eps
    with pytest.raises(PerturbationError, match=rf"{dtype}.*choose at least {smallest:.3g}"):
        minimize(never, view, None, mezo(perturbation_scale=smallest * 0.9), max_steps=1, **QUIET)
    fine = minimize(
        lambda batch: float(view.tensors["coarse"].double().sum()), view, None,
        mezo(perturbation_scale=smallest * 1.1), max_steps=1, **QUIET,
    )  # fmt: skip
    assert fine.steps == 1


DROPPING: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)),
    "alpha": lambda: nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(0.1)),
    "lstm": lambda: nn.LSTM(2, 2, num_layers=2, dropout=0.1),
    "attention": lambda: nn.MultiheadAttention(2, 1, dropout=0.1),
    "bert": FAMILIES["bert"],
    "opt": FAMILIES["opt"],  # calls the function: it holds no dropout module
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_left_on_is_refused(name: str) -> None:
    model = DROPPING[name]().train()
    view = ParameterView.full(model)
    with pytest.raises(DropoutError, match=r"model\.eval\(\)"):
        minimize(never, view, None, mezo(), max_steps=1, **QUIET)
    model.eval()
    result = minimize(lambda batch: 0.0, view, None, mezo(), max_steps=1, **QUIET)
    assert result.steps == 1


RETURNS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "wrong length": (lambda batch: torch.ones(len(batch) + 1), r"shape \(5,\) for 4"),
    "matrix": (lambda batch: torch.ones(4, 4), r"shape \(4, 4\)"),
    "nothing": (lambda batch: None, "NoneType"),
    "text": (lambda batch: "low", "str"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_an_objective_that_returns_no_loss_is_named(name: str) -> None:
    returns, words = RETURNS[name]
    view = one()
    before = view.hash()
    with pytest.raises(ObjectiveError, match=words):
        minimize(returns, view, ROWS, mezo(), batch_size=4, max_steps=1, **QUIET)
    assert view.hash() == before


def test_a_tensor_that_requires_grad_is_refused() -> None:
    weight = torch.ones(2, requires_grad=True)
    view = ParameterView({"w": weight})

    def objective(batch: Any) -> Tensor:
        with torch.enable_grad():
            return weight.square().sum()

    with pytest.raises(ObjectiveError, match="requires grad"):
        minimize(objective, view, None, mezo(), max_steps=1, **QUIET)
    fine = minimize(lambda batch: weight.square().sum(), view, None, mezo(), max_steps=1, **QUIET)
    assert fine.steps == 1, "without enable_grad the loop's no_grad holds"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_explained(value: float) -> None:
    result = minimize(lambda batch: value, one(), None, mezo(), max_steps=3, **QUIET)
    assert result.stop_reason is StopReason.NON_FINITE
    assert str(value) in result.message
    assert (result.steps, math.isnan(result.value)) == (0, True)


def test_a_step_beyond_every_number_stops_at_the_last_good_one() -> None:
    view, values = one(), iter([1.0, 1.0, 1e200, -1e200])
    before = view.hash()
    result = minimize(lambda batch: next(values), view, None, mezo(lr=1e200), max_steps=3, **QUIET)
    assert result.stop_reason is StopReason.STEP_TOO_LARGE
    assert "use a smaller lr" in result.message
    assert (result.steps, view.hash()) == (1, before)


@pytest.mark.parametrize(
    "kind", [float, np.float32, np.float64, torch.tensor], ids=lambda k: k.__name__
)
def test_any_scalar_will_do(kind: Callable[[float], Any]) -> None:
    view = one()
    result = minimize(
        lambda batch: kind(float((view.tensors["x"] - 3).square().sum())),
        view,
        None,
        mezo(),
        max_steps=3,
        **QUIET,
    )
    assert result.history[0].value == pytest.approx(18, abs=0.3)
