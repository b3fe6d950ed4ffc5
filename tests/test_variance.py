"""What is watched of a run's noise, against what is known of a quadratic."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor

from objectives import CausalLMLoss
from zo_adapt import (
    SGD,
    Group,
    Metrics,
    MeZO,
    MeZOSVRG,
    ParameterView,
    PeftServer,
    Result,
    ServedEvaluator,
    TrackVariance,
    minimize,
)
from zo_adapt.errors import OptionError

D, N = 400, 64


def problem() -> tuple[Tensor, Tensor, Any]:
    """f_i(x) = |x - a_i|^2 / 2: a gradient x - mean a, and noise of the a_i."""
    a = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    x = torch.zeros(D, dtype=torch.float64)
    return x, a, lambda rows: 0.5 * (rows - x).square().sum(1)


def run(optimizer: Any, tracked: TrackVariance | None, steps: int = 9) -> tuple[Result, Tensor]:
    x, a, loss = problem()
    metrics = None if tracked is None else {"noise": tracked, "loss": loss}
    result = minimize(
        loss, ParameterView({"x": x}), a, optimizer,
        batch_size=16, max_steps=steps, progress=False, metrics=Metrics(metrics or {}, every=3),
    )  # fmt: skip
    return result, x


def test_noise_of_a_quadratic_is_what_it_is() -> None:
    x, a, _ = problem()
    result, _ = run(MeZO(lr=1e-9), TrackVariance(9, num_directions=64))
    assert result.metrics is not None
    gradient = float((x - a.mean(0)).square().sum())
    spread = float((a - a.mean(0)).square().sum(1).mean()) * N / (N - 1)
    assert result.metrics["noise_direction_noise"] == pytest.approx(gradient, rel=0.5)
    assert result.metrics["noise_data_noise"] == pytest.approx(spread, rel=0.2)
    shares = spread / (spread + gradient)
    assert result.metrics["noise_data_share"] == pytest.approx(shares, rel=0.2)


def test_the_noise_is_that_of_single_examples_though_batches_are_stratified() -> None:
    """At 0 the gradients of the two classes are -2 and 2: G is 0, and sigma^2 4 d."""
    x = torch.zeros(8)
    labels = torch.arange(256) % 2
    data = [{"y": 2.0 * float(label) - 1, "labels": int(label)} for label in labels]

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return (batch["y"][:, None].float() - x).square().sum(1)

    view, watch = ParameterView({"x": x}), TrackVariance(every=1, num_directions=256, batch_size=2)
    options: dict[str, Any] = {"batch_size": 16, "max_steps": 1, "progress": False}
    optimizer = MeZO(lr=1e-12, perturbation_scale=1e-3)
    found = minimize(loss, view, data, optimizer, metrics={"v": watch}, **options).metrics
    assert found is not None
    assert found["v_data_noise"] == pytest.approx(32, rel=0.3)
    assert abs(found["v_direction_noise"]) < 8  # of stratified pairs: -32


def test_the_control_variate_explains_much_near_its_snapshot_and_less_far_away() -> None:
    found = []
    for rate in (1e-5, 2e-3):
        optimizer = MeZOSVRG(lr=rate, snapshot_interval=5, snapshot_size="all")
        result, _ = run(optimizer, TrackVariance(9))
        assert result.metrics is not None
        found.append((result.metrics["noise_explained"], result.metrics["noise_distance"]))
    (near, short), (far, long) = found
    assert near > 0.99 and near > far
    assert short < 0.1 * long


def test_the_distance_is_that_of_the_weights() -> None:
    x, a, loss = problem()
    at_snapshot: list[Tensor] = []
    result = minimize(
        loss, ParameterView({"x": x}), a,
        MeZOSVRG(lr=1e-3, snapshot_interval=4, snapshot_size="all"),
        batch_size=16, max_steps=4, progress=False,
        metrics={"noise": TrackVariance(1)}, callback=lambda step: at_snapshot.append(x.clone()),
    )  # fmt: skip
    # theta_bar is where the run began: the first step is the snapshot's own.
    assert result.metrics is not None
    assert result.metrics["noise_distance"] == pytest.approx(float(x.norm()), rel=0.15)


def test_the_cosine_is_that_of_an_estimate_from_few_directions() -> None:
    result, _ = run(MeZO(lr=1e-9), TrackVariance(1, gradient=True), steps=20)
    cosines = [step.metrics["noise_cosine"] for step in result.history if step.metrics]
    # Of N = 32 directions (four shares of 16 rows) in d = 400 dimensions, with data noise.
    assert len(cosines) == 20
    mean = sum(cosines) / 20
    assert 0.05 < mean < math.sqrt(32 / D)


def test_the_cosine_is_over_what_moves() -> None:
    """A part at rest, however steep, is no direction that a step could have taken."""
    cosines = []
    for steep in (0.0, 1e3):
        x, a, loss = problem()
        rests = torch.zeros(3, dtype=torch.float64)
        view = ParameterView(
            {"x": x, "rests": rests}, groups=[Group("rests", perturbation_scale=0.0)]
        )
        result = minimize(
            lambda rows, loss=loss, rests=rests, steep=steep: loss(rows) + steep * rests.sum(),
            view, a, MeZO(lr=1e-9, perturbation_scale=1e-3), batch_size=16, max_steps=1,
            progress=False, metrics={"noise": TrackVariance(1, gradient=True)},
        )  # fmt: skip
        assert result.metrics is not None
        cosines.append(result.metrics["noise_cosine"])
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-6)
    assert cosines[0] > 0.01


def test_a_run_is_the_same_when_it_is_watched() -> None:
    for optimizer in (MeZO(), MeZOSVRG()):
        watched, x = run(optimizer, TrackVariance(2, gradient=True))
        alone, y = run(optimizer, None)
        assert torch.equal(x, y)
        assert watched.queries == alone.queries
        assert [s.value for s in watched.history] == [s.value for s in alone.history]
        assert watched.metric_queries > 0 == alone.metric_queries


def test_each_is_measured_at_its_own_steps() -> None:
    result, _ = run(MeZO(lr=1e-9), TrackVariance(2))
    seen = {step.step: sorted(step.metrics) for step in result.history if step.metrics}
    noise = ["noise_data_noise", "noise_data_share", "noise_direction_noise"]
    assert seen == {
        2: noise, 3: ["loss"], 4: noise, 6: ["loss", *noise], 8: noise, 9: ["loss"],
    }  # fmt: skip
    assert sorted(result.metrics or ()) == ["loss", *noise]


def test_a_first_order_run_has_the_usual_scale() -> None:
    result, _ = run(SGD(1e-3), TrackVariance(9))
    assert (result.metrics or {})["noise_direction_noise"] > 0


def test_a_served_model_is_not_watched_by_a_local_one(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama", "causal"), LoraConfig(r=2)).eval()
    with pytest.raises(OptionError, match=r"'noise' watches.*ServedEvaluator asks elsewhere"):
        minimize(
            CausalLMLoss(model), ParameterView.trainable(model),
            [{"input_ids": [5, 6, 7]}, {"input_ids": [7, 6, 5]}],
            batch_size=2, max_steps=1, progress=False, trajectory=tmp_path / "run.zot",
            metrics={"noise": TrackVariance(1)}, evaluation=ServedEvaluator(PeftServer(model)),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"every": 0}, {"num_directions": 0}, {"batch_size": 1.5}])
def test_numbers_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        TrackVariance(**options)
