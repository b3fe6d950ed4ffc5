"""How nonlinear the responses to noise are: it bounds the displacement where a head is new."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, NoData, as_source
from zo_adapt.evaluation.protocol import Evaluation
from zo_adapt.optimizers.calibration import FORMER_RATIO, RATIO, Calibration
from zo_adapt.optimizers.nonlinearity import MOST, Nonlinearity
from zo_adapt.optimizers.responses import Response, response
from zo_adapt.optimizers.schedule import Budget


def stop(_: object) -> None:
    """End the run at its first step."""
    raise StopIteration


def under_a_new_head(strength: float, unit: float = 1.0) -> tuple[float, int]:
    """The displacement that is found for a head and the layer below it, and what that cost."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(128, 8, generator=drawn)
    labels = rows[:, 0].sign()
    head, below = torch.full((8,), 1e-3) * unit, torch.zeros(8, 8)

    def losses(batch: Any) -> Tensor:
        features = torch.sin(batch["rows"] + batch["rows"] @ below * strength / unit)
        return torch.log1p(torch.exp(-batch["labels"] * (features @ head / unit)))

    optimizer, view = MeZO(), ParameterView({"head": head, "below": below})
    data = {"rows": rows, "labels": labels}
    minimize(
        losses,
        view,
        data,
        optimizer,
        batch_size=16,
        max_queries=8_000,
        callback=stop,
        progress=False,
    )
    assert optimizer.state.finder is not None
    return optimizer.state.finder.calibration.found / unit, optimizer.measuring_queries


def test_a_new_head_does_not_hide_what_noise_does_to_the_features() -> None:
    """Of a head that knows nothing all losses are those of chance, whatever the features are."""
    weak, strong = under_a_new_head(0.3), under_a_new_head(6.0)
    assert strong[0] < weak[0] / 2
    assert max(weak[1], strong[1]) < 0.1 * 8_000
    assert strong[0] / 4 < under_a_new_head(6.0, 1e3)[0] < strong[0] * 4


def test_what_is_not_linear_in_a_response_is_measured() -> None:
    """Two rows, of values 1 + a s + b s^2 + c s^3 at s times the displacement."""
    batch = Batch(NoData(), range(1))
    a, b, c = np.array([2.0, -2.0]), np.array([0.5, 0.1]), np.array([0.4, -0.4])

    def at(s: float) -> Evaluation:
        values = 1 + a * s + b * s**2 + c * s**3
        return Evaluation(float(values.mean()), values)

    seen = response([batch], [at(s) for s in (0.0, 1.0, -1.0, 0.5, -0.5)])
    assert (seen.even, seen.odd) == pytest.approx((0.3, 2.4))
    assert seen.nonlinearity == pytest.approx(0.4 / math.hypot(2.4, 0.2))
    assert response([batch], [at(s) for s in (0.0, 1.0, -1.0)]).nonlinearity == 0.0


@pytest.mark.parametrize("start", [1e-3, 0.25, 1e2])
def test_the_search_ends_where_responses_are_as_linear_as_is_right(start: float) -> None:
    search = Calibration(start, target=RATIO, nonlinearity=Nonlinearity())
    while not search.finished and search.rounds < 12:
        rho = search.displacement
        bend = MOST * rho**2 / (0.7 + 0.3 * rho**2)
        search._narrow(Response(even=0.1 * rho**2, odd=rho, nonlinearity=bend))
    assert search.finished
    assert search.displacement == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("seen", [[1.4], [0.5, 0.8], [0.9, 0.9, 0.9]])
def test_noise_of_the_values_is_not_taken_for_nonlinearity(seen: list[float]) -> None:
    """A search that took it so would come nearer to the end, where noise is all there is."""
    search = Calibration(1.0, target=RATIO, nonlinearity=Nonlinearity())
    for bend in seen:
        assert search.nonlinearity is not None
        search._narrow(Response(even=0.01, odd=1.0, nonlinearity=bend))
    assert search.nonlinearity is None
    assert (search.displacement, search.low, search.high) == (1.0, None, None)


def test_a_search_that_a_former_version_began_goes_on_by_damage_alone() -> None:
    kept = Calibration(0.25).state_dict()
    del kept["nonlinearity"]
    search = Calibration.from_state(kept)
    samples = Samples(as_source({"x": torch.zeros(64, 1)}), 16, 0)
    search.aim(samples, Budget(max_queries=8_000), 100)
    assert (search.nonlinearity, search.target) == (None, FORMER_RATIO)
    now = Calibration(0.25, nonlinearity=Nonlinearity(0.1, 1))
    now.aim(samples, Budget(max_queries=8_000), 100)
    assert now.target == RATIO
    assert Calibration.from_state(json.loads(json.dumps(now.state_dict()))) == now
