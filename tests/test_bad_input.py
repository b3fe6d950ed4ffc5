"""Bad input: each a named error, before any evaluation where that is possible."""

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from problems import regression
from torch import Tensor, nn

from zo_adapt import (
    SGD,
    ZOSVRG,
    Adam,
    Annealing,
    Data,
    EvaluationOptions,
    Group,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Shift,
    StopReason,
    Term,
    minimize,
)
from zo_adapt.errors import (
    DataError,
    DropoutError,
    ObjectiveError,
    OptionError,
    PerturbationError,
    TermError,
    ZOError,
)

QUIET: dict[str, Any] = {"progress": False}
EMPTY: Iterator[float] = iter(())


def mezo(**options: Any) -> MeZO:
    pair = {"lr": 0.01, "perturbation_scale": 0.05, "num_directions": 1, "one_sided": False}
    return MeZO(**(pair | options))


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
    "lr text": lambda: MeZO("1e-2"),  # type: ignore[arg-type]
    "lr true": lambda: MeZO(True),
    "lr complex": lambda: MeZO(1e-2 + 0j),  # type: ignore[arg-type]
    "lr list": lambda: SGD(lr=[1e-2]),  # type: ignore[arg-type]
    "lr huge": lambda: MeZO(10**400),
    "mu text": lambda: MeZO(1e-3, perturbation_scale="1e-3"),  # type: ignore[arg-type]
    "weight_decay text": lambda: MeZO(1e-3, weight_decay="0.1"),  # type: ignore[arg-type]
    "weight_decay nan": lambda: SGD(lr=1e-3, weight_decay=math.nan),
    "scale_memory text": lambda: MeZO(1e-3, scale_memory="0.9"),  # type: ignore[arg-type]
    "annealing text": lambda: Annealing(factor="5"),  # type: ignore[arg-type]
    "K text": lambda: MeZO(1e-3, num_directions="2"),  # type: ignore[arg-type]
    "K true": lambda: MeZO(1e-3, num_directions=True),
    "K whole float": lambda: MeZO(1e-3, num_directions=2.0),  # type: ignore[arg-type]
}


KINDS: list[Any] = [np.float32(0.25), np.array(0.25), Fraction(1, 4), Decimal("0.25")]
NO_FACTORS: list[Any] = [True, "0.25", math.nan, math.inf, 1j, [0.25], 10**400, Decimal("NaN"), -1]


def test_factors_of_a_group_are_numbers_of_any_library() -> None:
    for value in KINDS:
        group = Group("x", lr=value, perturbation_scale=value)
        assert (group.lr, group.perturbation_scale) == (0.25, 0.25)
        assert type(group.lr) is float
    for value in NO_FACTORS:
        for name in ("lr", "perturbation_scale"):
            with pytest.raises(OptionError, match=f"{name}="):
                Group("x", **{name: value})
        for kind in (SGD, Adam):
            with pytest.raises(OptionError, match="weight_decay="):
                kind(1e-2, weight_decay=value)


def test_terms_are_numbers_of_any_library() -> None:
    def moved(term: Any) -> Tensor:
        view = ParameterView({"x": torch.zeros(4)})
        view.apply(Shift((term,)))
        return view.tensors["x"]

    expected = moved(Term(2, 0.25))
    for seed in (np.int64(2), torch.tensor(2), np.uint8(2)):
        for coefficient in KINDS:
            assert torch.equal(moved(Term(seed, coefficient)), expected)
    wrong: list[Any] = [(2.0, 0.1), (True, 0.1), ("2", 0.1), (Fraction(2), 0.1), (2, "1"), (2, 1j)]
    for term in [*wrong, (2, None), (2, 0.1, 0.0), (2, 0.1, True), (2, True)]:
        with pytest.raises(TermError):
            moved(Term(*term))


def test_rows_of_a_joint_call_are_an_integer_of_any_library() -> None:
    assert EvaluationOptions(joint_rows=np.int64(2)).joint_rows == 2  # type: ignore[arg-type]
    for rows in (0, True, 2.0, "2", None):
        with pytest.raises(OptionError, match="joint_rows="):
            EvaluationOptions(joint_rows=rows)  # type: ignore[arg-type]


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
    **{
        f"batch of {size!r}": (
            OptionError,
            f"batch_size={size!r}; choose an integer",
            ROWS,
            mezo,
            {"max_steps": 1, "batch_size": size},
        )
        for size in (2.0, "2", True)
    },
    "no examples": (DataError, "hold no examples", [], mezo, {"max_steps": 1, "batch_size": 1}),
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
    "a number as text": (lambda batch: "3.5", "'3.5', a str"),
    "numbers as text": (lambda batch: ["1", "2", "3", "4"], "a list"),
    "bytes": (lambda batch: b"3", "a bytes"),
    "complex": (lambda batch: 1 + 2j, "a complex"),
    "complex array": (lambda batch: np.ones(4, complex), "a ndarray"),
    "complex tensor": (lambda batch: torch.ones(4, dtype=torch.complex64), "complex tensor"),
    "no time": (lambda batch: np.datetime64("NaT"), "a datetime64"),
    "a time": (lambda batch: np.full(4, 3, "m8[s]"), "a ndarray"),
    "masked": (lambda batch: np.ma.masked_equal([1.0, 2, 3, 4], 2), "masked entries"),
    "one masked": (lambda batch: np.ma.masked, "masked entries"),
    "objects": (lambda batch: np.array([1.0, "2", 3, 4], dtype=object), "a ndarray"),
    "none among numbers": (lambda batch: [1.0, None, 3.0, 4.0], "a list"),
    "sparse": (lambda batch: torch.ones(4).to_sparse(), "sparse tensor"),
    "meta": (lambda batch: torch.ones(4, device="meta"), "meta tensor"),
    "mapping": (lambda batch: {0: 1.0}, "a dict"),
    "set": (lambda batch: {1.0}, "a set"),
    "generator": (lambda batch: (1.0 for _ in batch), "a generator"),
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


def test_numbers_of_any_library_will_do() -> None:
    for values in (
        [True, False, 3, 4.5],
        [Fraction(1, 2), Decimal("1.5"), np.float32(2), torch.tensor(3.0)],
        np.array([1, 2.5, True, Fraction(3)], dtype=object),
        np.ma.array([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([1, 2, 3, 4], dtype=torch.int8),
    ):
        result = minimize(
            lambda batch, v=values: v, one(), ROWS, mezo(), batch_size=4, max_steps=1, **QUIET
        )
        assert result.value == pytest.approx(sum(float(value) for value in values) / 4)


@pytest.mark.parametrize("size", [np.int64(2), np.int8(2), np.array(2), torch.tensor(2)], ids=str)
def test_integers_of_any_library_will_do(size: Any) -> None:
    view, options = one(), {"max_steps": size, "seed": size, **QUIET}
    result = minimize(
        lambda batch: float(view.tensors["x"].sum()), view, ROWS, mezo(num_directions=size),
        batch_size=size, **options,
    )  # fmt: skip
    assert (result.steps, result.queries) == (2, 16), "2 rows, 2 directions of 2 points, 2 steps"


def test_stop_iteration_of_an_objective_is_an_error_and_ends_no_run_in_silence() -> None:
    for calls in range(6):
        values = iter([1.0] * calls)
        with pytest.raises(StopIteration):
            minimize(
                lambda batch, v=values: next(v), one(), None, mezo(num_directions=2), max_steps=2,
                **QUIET,
            )  # fmt: skip
    with pytest.raises(StopIteration):
        minimize(
            lambda batch: 1.0, one(), None, mezo(), max_steps=2,
            metrics={"m": lambda batch: next(EMPTY)}, **QUIET,
        )  # fmt: skip
    rows = Data([1, 2, 3], collate=lambda examples: next(EMPTY))
    with pytest.raises(StopIteration):
        minimize(lambda batch: 1.0, one(), rows, mezo(), batch_size=1, max_steps=2, **QUIET)


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
