"""Whether differences of a coarse model are signal: measured before a run, and by diagnose."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_candidates import with_lora
from tiny_models import token_rows

from objectives import CausalLMLoss, ExactMatch
from zo_adapt import EvaluationOptions, MeZO, Objective, ParameterView, diagnose, minimize
from zo_adapt.data.sources import as_source
from zo_adapt.errors import RoundingWarning
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.locally import look_for_signal
from zo_adapt.evaluation.signal import correlation, is_coarse, measured


def texts(rows: int = 12) -> list[dict[str, Any]]:
    return [{"input_ids": row} for row in token_rows(rows, 9)]


class Rounded(Objective):
    """A smooth function of a view, in steps of a size."""

    mean_over_rows = True

    def __init__(self, x: torch.Tensor, step: float) -> None:
        self.x, self.step = x, step

    def __call__(self, batch: Any) -> np.ndarray:
        values = (batch @ self.x).sin().numpy()
        return np.asarray(np.round(values / self.step) * self.step)


@pytest.mark.parametrize("step, raised", [(1e-9, 0), (0.02, 1), (0.05, 2)])
def test_mu_is_doubled_until_differences_are_signal(step: float, raised: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, generator=generator, dtype=torch.float64) * 0.1
    rows = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    view = ParameterView({"x": x})
    before = view.hash()
    evaluator = LocalEvaluator(Rounded(x, step), view, EvaluationOptions())
    found = measured(evaluator, as_source(rows), 1e-3)
    assert found.is_enough and view.hash() == before
    assert found.perturbation_scale >= 1e-3 * 2**raised
    assert (found.perturbation_scale == 1e-3) == (raised == 0)
    assert ("times the usual one" in str(found)) == (raised > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_is_perturbed_far_enough(family: str, dtype: torch.dtype) -> None:
    model = with_lora(family, dtype=dtype)
    view = ParameterView.trainable(model)
    loss = CausalLMLoss(model)
    assert is_coarse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        found = look_for_signal(loss, as_source(texts(), loss.collate), view)
        optimizer = MeZO(lr=1e-6)
        minimize(loss, view, texts(), optimizer, batch_size=4, max_steps=1, progress=False)
    assert found is not None
    if found.is_enough:
        assert optimizer.perturbation_scale >= found.perturbation_scale


def test_other_models_and_counts_are_left_alone() -> None:
    model = with_lora("llama")
    view, loss = ParameterView.trainable(model), CausalLMLoss(model)
    assert look_for_signal(loss, as_source(texts(), loss.collate), view) is None
    half = with_lora("llama", dtype=torch.bfloat16)
    count = ExactMatch(half)
    source = as_source(texts(), count.collate)
    assert look_for_signal(count, source, ParameterView.trainable(half)) is None


def test_too_coarse_is_said() -> None:
    class Random(CausalLMLoss):
        calls = 0

        def __call__(self, batch: object) -> torch.Tensor:
            type(self).calls += 1
            generator = torch.Generator().manual_seed(type(self).calls)
            return torch.rand(len(batch["input_ids"]), generator=generator)  # type: ignore[index, call-overload]

    model = with_lora("llama", dtype=torch.bfloat16)
    loss, view = Random(model), ParameterView.trainable(model)
    with pytest.warns(RoundingWarning, match="too coarse"):
        look_for_signal(loss, as_source(texts(), loss.collate), view)
    assert view.least_perturbation == 0.0


def test_diagnose_reports_it() -> None:
    model = with_lora("llama", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)
        found = diagnose(
            CausalLMLoss(model), ParameterView.trainable(model), texts(), num_directions=4
        )
    assert "correlate by" in found.reasons["rounding"] and "rounding:" in str(found)
    fine = with_lora("llama")
    found = diagnose(CausalLMLoss(fine), ParameterView.trainable(fine), texts(), num_directions=4)
    assert "rounding" not in found.reasons


def test_the_correlation_is_about_zero() -> None:
    one = np.array([1.0, 2.0])
    assert correlation(one, 2 * one) == pytest.approx(1.0)
    assert correlation(one, 0 * one) == 0.0
