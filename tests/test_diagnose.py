"""diagnose: known noise found, sensible advice, exact count, nothing left changed."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from problems import bits
from torch import Tensor

from objectives import F1, ROCAUC, Accuracy, CallableObjective, MatthewsCorrelation
from zo_adapt import Diagnosis, EvaluationOptions, Group, ParameterView, diagnose
from zo_adapt.diagnosis.advice import Noise, Scale, choose_batch, choose_scale, judge_snapshot
from zo_adapt.diagnosis.differences import MOST
from zo_adapt.errors import (
    DataError,
    NonFiniteObjectiveError,
    OptionError,
    PerturbationError,
    UndefinedMetricError,
)
from zo_adapt.evaluation.locally import Locally

TWO = [0.01, 0.02]


def linear(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Loss rows @ x: the rows are the gradients."""
    return lambda batch: batch @ x


def gradients(n: int, mean: float, spread: float, d: int = 6, seed: int = 1) -> Tensor:
    """n gradients of exactly this mean (in every coordinate) and total variance d spread^2."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return mean + spread * (rows - rows.mean(0)) / rows.std(0)


def probe(rows: Tensor, batch_size: int, **options: Any) -> Diagnosis:
    x = torch.zeros(rows.shape[1], dtype=torch.float64)
    settings = {"batch_size": batch_size, "perturbation_scales": TWO}
    return diagnose(linear(x), ParameterView({"x": x}), rows, **(settings | options))


@pytest.mark.parametrize("options", [{"workers": 2}, {"evaluator": Locally()}])
def test_refuses_other_processes_that_it_would_have_to_start(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="diagnose asks the model in this process"):
        probe(gradients(8, 0.5, 1.0), 4, evaluation=EvaluationOptions(**options))


@pytest.mark.parametrize("batch_size", [4, 200])
def test_known_noises_are_found_without_bias(batch_size: int, seed: int) -> None:
    """Also where a batch is half the data, whose mean is then nearly known."""
    rows = gradients(400, mean=0.5, spread=1.0)
    found = [probe(rows, batch_size, seed=seed + k).noise for k in range(60)]
    for values, exact in (([f.direction for f in found], 6 * 0.25), ([f.data for f in found], 6.0)):
        error = np.std(values) / 60**0.5
        assert abs(np.mean(values) - exact) < 5 * error
        assert error < 0.15 * exact, "the test has no power"
    spread = np.std([f.direction for f in found])
    assert 0.6 * spread < np.mean([f.error for f in found]) < 1.4 * spread


def test_a_batch_of_everything_has_no_data_noise() -> None:
    rows = gradients(32, mean=0.5, spread=5.0)
    found = probe(rows, 32, num_directions=256)
    assert found.noise.direction == pytest.approx(6 * 0.25, rel=0.4)
    assert found.noise.data == pytest.approx(6 * 25, rel=0.4)


def test_one_number_a_batch_is_told_apart_by_parts(seed: int) -> None:
    rows = gradients(400, mean=0.5, spread=1.0)
    x = torch.zeros(6, dtype=torch.float64)
    view = ParameterView({"x": x})
    mean = CallableObjective(lambda batch: float((batch @ x).mean()), mean_over_rows=True)
    found = [
        diagnose(
            mean, view, rows,
            batch_size=8, perturbation_scales=TWO, seed=seed + k,
        )
        for k in range(40)
    ]  # fmt: skip
    values = [f.noise.data for f in found]
    assert abs(np.mean(values) - 6.0) < 5 * np.std(values) / 40**0.5
    assert {f.queries - f.search_queries for f in found} == {
        16 * 8 * (2 * 2 + 2)
    }  # the base once more, in parts


class Scored:
    """A set-level objective."""

    def __init__(self, x: Tensor, min_rows: Any = "all") -> None:
        self.x, self.min_rows = x, min_rows
        self.sizes: list[int] = []

    def predict(self, batch: Tensor) -> Tensor:
        return batch @ self.x

    def score(self, predictions: list[Tensor]) -> float:
        joined = torch.cat(predictions)
        self.sizes.append(len(joined))
        return float(joined.mean())


@pytest.mark.parametrize("min_rows", ["all", 8, 2])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
def test_a_set_is_scored_without_each_row_and_never_cut(
    min_rows: Any, micro_batch_size: int | None
) -> None:
    x = torch.zeros(6, dtype=torch.float64)
    objective = Scored(x, min_rows)
    rows = gradients(64, 0.5, 1.0)
    options: Any = {"batch_size": 16, "evaluation": EvaluationOptions(micro_batch_size)}
    found = diagnose(objective, ParameterView({"x": x}), rows, **options)
    # ... but that the search for a displacement asks about parts, as an optimizer does.
    part = 16 if min_rows == "all" else max(4, min_rows)
    assert {16, 15} <= set(objective.sizes) <= {16, 15, part}
    by_row = diagnose(linear(x), ParameterView({"x": x}), rows, **options)
    for one in (found, by_row):
        assert one.queries - one.search_queries == 16 * 16 * (2 * 5 + 1)
    assert found.noise == pytest.approx(by_row.noise, rel=1e-9)
    for one, other in zip(found.scales, by_row.scales, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    assert found.reasons["snapshot"] == by_row.reasons["snapshot"]


def test_of_many_rows_several_are_left_out_together() -> None:
    x = torch.zeros(6, dtype=torch.float64)
    objective = Scored(x)
    rows = gradients(600, 0.5, 1.0)
    options = {"batch_size": 600, "num_directions": 4, "perturbation_scales": TWO}
    found = diagnose(objective, ParameterView({"x": x}), rows, **options)
    assert len(objective.sizes) == 4 * 5 * (1 + MOST) + found.search_queries // 600
    by_row = diagnose(linear(x), ParameterView({"x": x}), rows, **options)
    assert found.noise.data == pytest.approx(by_row.noise.data, rel=0.2)
    assert found.noise.direction == pytest.approx(by_row.noise.direction, rel=1e-9)


def test_the_data_noise_of_a_set_is_that_of_its_values() -> None:
    """A score that is no mean, exp of one: its variance over batches of 32 rows is known by far."""
    x = torch.zeros(6, dtype=torch.float64)

    class Exponential(Scored):
        def score(self, predictions: list[Tensor]) -> float:
            return math.exp(super().score(predictions))

    rows = gradients(4000, mean=0.5, spread=1.0)
    options = {"batch_size": 32, "num_directions": 300, "perturbation_scales": [1e-4, 2e-4]}
    found = diagnose(Exponential(x), ParameterView({"x": x}), rows, **options)
    assert found.noise.data == pytest.approx(6.0, rel=0.2)
    assert found.noise.direction == pytest.approx(6 * 0.25, rel=0.4)


class Undefined(Scored):
    """No value on fewer rows than a batch has."""

    def score(self, predictions: list[Tensor]) -> float:
        value = super().score(predictions)
        if self.sizes[-1] < 16:
            raise UndefinedMetricError("too few rows")
        return value


class Unsplit(Scored):
    """Predictions whose rows cannot be told."""

    def predict(self, batch: Tensor) -> Any:
        return {"sum": super().predict(batch).sum(), "count": len(batch)}

    def score(self, predictions: list[Any]) -> float:
        counts = sum(part["count"] for part in predictions)
        return float(sum(part["sum"] for part in predictions)) / counts


@pytest.mark.parametrize("kind", [Undefined, Unsplit])
def test_a_set_without_a_value_for_fewer_rows_has_no_data_noise_to_tell(kind: Any) -> None:
    x = torch.zeros(6, dtype=torch.float64)
    found = diagnose(kind(x), ParameterView({"x": x}), gradients(64, 0.5, 1.0), batch_size=16)
    assert math.isnan(found.noise.data)
    assert found.noise.direction > 0
    assert found.queries - found.search_queries == 16 * 16 * (2 * 5 + 1)
    assert found.batch_size >= 16
    assert not found.snapshot_helps
    assert "cannot be estimated" in found.reasons["snapshot"]


def labelled_texts(n: int = 96) -> tuple[torch.nn.Linear, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    x = torch.randn(n, 5, generator=generator)
    x[torch.arange(n), labels] += 0.5
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
        model.bias.zero_()
    return model, {"input": x, "labels": labels}


@pytest.mark.parametrize("batch_size", [32, 64])
def test_a_share_of_right_rows_has_the_noise_of_its_rows(batch_size: int) -> None:
    model, data = labelled_texts()
    view = ParameterView.trainable(model)

    def right(batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["input"]).argmax(1) == batch["labels"]).double()

    options = {"batch_size": batch_size, "num_directions": 12, "seed": 3}
    found = diagnose(Accuracy(model), view, data, **options)
    rows = CallableObjective(right, maximize=True, step_like=True)
    by_row = diagnose(rows, view, data, **options)
    assert found.noise.data == pytest.approx(by_row.noise.data, rel=1e-9)
    assert found.noise.direction == pytest.approx(by_row.noise.direction, rel=1e-9)
    assert [s.equal for s in found.scales] == [s.equal for s in by_row.scales]
    assert found.scales[0].equal > 0, "the test has no power"
    assert (found.batch_size, found.num_directions) == (by_row.batch_size, by_row.num_directions)


@pytest.mark.parametrize("metric", [F1, MatthewsCorrelation, ROCAUC])
def test_data_noise_of_a_metric_is_told_and_costs_no_queries(metric: Any) -> None:
    model, data = labelled_texts()
    found = diagnose(
        metric(model), ParameterView.trainable(model), data, batch_size=24, num_directions=3
    )
    assert found.noise.data > 0
    assert found.queries - found.search_queries == (2 * len(found.scales) + 1) * 3 * 24
    assert all(0 <= scale.equal <= 1 for scale in found.scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_changed_and_every_query_counted(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 6).to(dtype)
    before = bits(x).clone()
    state = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore  # noqa: NPY002
    sizes = []

    def objective(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return (batch @ x.double()).square()

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    view = ParameterView({"x": x}, groups=[Group("x", perturbation_scale=2.0)])
    found = diagnose(
        objective, view, gradients(50, 0.5, 1.0), batch_size=9, num_directions=5,
        evaluation=EvaluationOptions(micro_batch_size=4),
    )  # fmt: skip
    assert torch.equal(bits(x), before)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tobytes() == state[1]  # type: ignore  # noqa: NPY002
    assert found.queries == sum(sizes)
    assert found.queries - found.search_queries == 5 * 9 * (2 * len(found.scales) + 1)
    assert max(sizes) <= 4


def test_same_seed_same_diagnosis() -> None:
    rows = gradients(64, 0.5, 1.0)
    assert probe(rows, 8) == probe(rows, 8) != probe(rows, 8, seed=1)


def test_the_weights_are_restored_when_the_objective_raises() -> None:
    x = torch.zeros(6)

    def objective(batch: Any) -> float:
        if x.any():
            raise ZeroDivisionError
        return 0.0

    with pytest.raises(ZeroDivisionError):
        diagnose(objective, ParameterView({"x": x}))
    assert not x.any()


# Advice


def test_little_data_noise_asks_for_many_directions() -> None:
    found = probe(gradients(400, mean=1.0, spread=0.1), 16)
    assert (found.batch_size, found.num_directions, found.snapshot_helps) == (16, 16, False)


def test_much_data_noise_asks_for_many_rows() -> None:
    found = probe(gradients(4000, mean=1.0, spread=8.0), 16, num_directions=400)
    rows = found.noise.data / found.noise.direction  # about 64
    assert found.noise.direction > found.noise.error
    assert found.batch_size == min(math.ceil(rows), 128) > 30
    assert found.num_directions == 1
    assert not found.snapshot_helps


def test_a_snapshot_helps_at_the_optimum_alone() -> None:
    assert probe(gradients(20, mean=0.0, spread=2.0), 20, num_directions=64).snapshot_helps
    assert not probe(gradients(20, mean=2.0, spread=2.0), 20, num_directions=64).snapshot_helps


def test_a_smooth_function_keeps_the_default_scale() -> None:
    x = torch.zeros(6, dtype=torch.float64)
    rows = gradients(64, 0.5, 1.0)
    view = ParameterView({"x": x})
    found = diagnose(lambda b: (b @ x - 1).square(), view, rows, batch_size=8)
    assert found.perturbation_scale == pytest.approx(found.displacement / 25)
    assert [scale.equal for scale in found.scales] == [0.0] * 5
    assert all(scale.agreement == pytest.approx(1.0) for scale in found.scales)
    curvatures = [scale.curvature for scale in found.scales]
    # the error of a one-sided difference grows as mu
    assert curvatures[-1] / curvatures[0] == pytest.approx(256, rel=1e-3)


def test_steps_ask_for_a_larger_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, generator=generator, dtype=torch.float64)
    rows = torch.randn(512, 20, generator=generator, dtype=torch.float64)
    labels = rows @ (w + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)) > 0

    def wrong(batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((batch[0] @ w > 0) != batch[1]).double()

    found = diagnose(wrong, ParameterView({"w": w}), (rows, labels), batch_size=32)
    equal = [scale.equal for scale in found.scales]
    assert max(b - a for a, b in pairwise(equal)) <= 1 / 16  # falls, but for one draw of sixteen
    assert equal[0] > 0.9 > 0.5 >= equal[-1]
    assert found.perturbation_scale > 0.01
    assert found.batch_size >= 32


def test_rounding_asks_for_a_larger_scale() -> None:
    """A loss in fp32 beside a large constant: small differences are rounding."""
    x = torch.zeros(6, dtype=torch.float64)
    rows = gradients(64, 0.5, 1.0)

    def rounded(batch: Tensor) -> Tensor:
        return (batch @ x).float() + 2.0**19  # to 1/32

    found = diagnose(rounded, ParameterView({"x": x}), rows, batch_size=8)
    assert found.scales[0].agreement < 0.5 < 0.9 < found.scales[-1].agreement
    assert found.perturbation_scale > 0.01


def test_a_scale_where_the_objective_is_not_finite_is_not_advised() -> None:
    x = torch.zeros(6, dtype=torch.float64)

    def fragile(batch: Tensor) -> Tensor:
        return batch @ x if float(x.abs().max()) < 0.1 else batch @ x * math.inf

    found = diagnose(
        fragile, ParameterView({"x": x}), gradients(64, 0.5, 1.0), batch_size=8,
        perturbation_scales=[0.01, 0.02, 0.5],
    )  # fmt: skip
    assert math.isnan(found.scales[-1].signal)
    assert found.perturbation_scale < 0.1
    assert "nan" in str(found)


def test_a_constant_is_called_flat() -> None:
    found = diagnose(lambda batch: 1.0, ParameterView({"x": torch.zeros(3)}))
    assert [scale.equal for scale in found.scales] == [1.0] * 5
    assert "no two scales agree" in found.reasons["perturbation_scale"]
    assert (found.batch_size, found.num_directions) == (1, 1)


def test_it_reads_as_a_table_with_reasons() -> None:
    found = probe(gradients(64, 0.5, 1.0), 8)
    lines = str(found).splitlines()
    assert lines[0].split() == ["mu", "signal", "equal", "pairs", "curvature", "agreement"]
    assert lines[1].split()[0] == "0.01"
    for name in ("perturbation_scale: ", "batch_size: ", "num_directions: ", "snapshot: no"):
        assert name in str(found)
    assert lines[-1] == f"queries made: {found.queries}"
    assert max(map(len, lines)) <= 100


def test_the_rules_of_the_advice() -> None:
    scales = [Scale(mu, 1.0, 0.0, 0.0, a) for mu, a in ((0.001, 0.2), (0.01, 0.95), (0.1, 1.0))]
    assert choose_scale(scales, 0.001)[0].perturbation_scale == 0.01
    assert choose_scale(scales, 0.2)[0].perturbation_scale == 0.1
    assert choose_batch(Noise(1.0, 0.1, 5.0), 0.0, 16, 999)[:2] == (16, 3)
    assert choose_batch(Noise(1.0, 0.1, 50.0), 0.0, 16, 999)[:2] == (50, 1)
    assert choose_batch(Noise(1.0, 0.1, 500.0), 0.0, 16, 999)[:2] == (128, 1)
    assert choose_batch(Noise(1.0, 0.1, 50.0), 0.0, 16, 30)[:2] == (30, 1)
    assert choose_batch(Noise(0.1, 1.0, 5.0), 0.0, 16, 999)[:2] == (64, 1)
    # 81% equal on 16 rows: half of them on log(1/2) / log(0.81) = 3.3 times as many
    assert choose_batch(Noise(1.0, 0.1, 5.0), 0.81, 16, 999)[:2] == (53, 1)
    assert judge_snapshot(Noise(1.0, 0.1, 500.0), 400)[0]
    assert not judge_snapshot(Noise(1.0, 0.2, 500.0), 400)[0]
    assert not judge_snapshot(Noise(1.0, 0.1, math.nan), 400)[0]


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 65}, DataError, "batch_size=65"),
        ({"batch_size": 1}, OptionError, "choose at least 2"),
        ({"num_directions": 0}, OptionError, "num_directions=0"),
        ({"seed": -1}, OptionError, "seed=-1"),
        ({"perturbation_scales": [0.1]}, OptionError, "at least two"),
        ({"perturbation_scales": [0.1, -1.0]}, OptionError, "perturbation_scales=-1.0"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        probe(gradients(64, 0.5, 1.0), **({"batch_size": 8} | options))


def test_a_scale_below_the_resolution_is_named() -> None:
    view = ParameterView({"x": torch.ones(6, dtype=torch.bfloat16)})
    with pytest.raises(PerturbationError):
        diagnose(lambda batch: 1.0, view, perturbation_scales=[1e-6, 1.0])


def test_a_base_point_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NonFiniteObjectiveError):
        diagnose(lambda batch: math.nan, ParameterView({"x": torch.zeros(3)}))


def test_without_a_batch_size_a_usual_one_is_taken() -> None:
    x, rows = torch.zeros(4, dtype=torch.float64), gradients(64, 0.5, 1.0)[:, :4]
    found = diagnose(lambda batch: batch @ x, ParameterView({"x": x}), rows)
    assert found.queries == diagnose(
        lambda batch: batch @ x, ParameterView({"x": x}), rows, batch_size=16
    ).queries  # fmt: skip


def test_scales_where_most_pairs_are_equal_are_not_recommended() -> None:
    """Two of them agree on the few directions that moved, by chance."""
    table = [
        Scale(mu, 1.0, equal, 0.1, agreement)
        for mu, equal, agreement in [(1e-3, 0.95, 1.0), (1e-2, 0.7, 0.9), (1e-1, 0.2, 0.8)]
    ]
    assert choose_scale(table, 1e-3)[0].perturbation_scale == 1e-1
    assert choose_scale(table[:2], 1e-3)[0].perturbation_scale == 1e-3


def test_batches_are_fair_to_the_classes_as_those_of_minimize() -> None:
    """120 rows of one class and 8 of the other: without passes by class a batch has one alone."""
    x = torch.zeros(3, dtype=torch.float64)
    rows = {"x": torch.randn(128, 3, dtype=torch.float64), "labels": torch.arange(128) // 120}
    seen = []

    def objective(batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) == 16:  # and no part that a search for a displacement asks about
            seen.append(len(batch["labels"].unique()))
        return batch["x"] @ x

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    diagnose(objective, ParameterView({"x": x}), rows, batch_size=16)
    assert set(seen) == {2}


def test_the_scales_are_about_what_suits_the_displacement_found() -> None:
    for unit in (1.0, 1e3):
        x = torch.zeros(20, dtype=torch.float64)
        found = diagnose(
            lambda _, x=x, unit=unit: float((x / unit - 0.2).square().sum()),
            ParameterView({"x": x}),
        )
        middle = found.scales[2].perturbation_scale
        assert middle == pytest.approx(found.displacement / 25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_straight_line_bounds_nothing_and_the_displacement_is_the_views(dtype: Any) -> None:
    view = ParameterView({"x": torch.zeros(50, dtype=dtype)})
    found = diagnose(lambda _: float(view.tensors["x"].sum()) + 3.0, view)
    assert found.displacement == view.displacement
    assert "straight line" in found.reasons["displacement"]
