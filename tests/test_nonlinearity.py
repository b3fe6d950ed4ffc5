"""How nonlinear the responses to noise are: it bounds the displacement where a head is new."""

import json
import math

import numpy as np
import peft
import pytest
import torch
from tiny_models import tiny_model, token_rows

from objectives import ClassificationLoss
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, NoData, as_source
from zo_adapt.evaluation.protocol import Evaluation
from zo_adapt.optimizers.calibration import RATIO, TRAINED_RATIO, Calibration
from zo_adapt.optimizers.responses import MOST_NONLINEAR, Nonlinearity, Response, response
from zo_adapt.optimizers.schedule import Budget

WHERE = ["query", "key", "value", "dense"]


def stop(_: object) -> None:
    """End the run at its first step."""
    raise StopIteration


def found_for(strength: float) -> tuple[float, int]:
    """What is found for an adapter that moves the features so much, and what finding it cost."""
    base = tiny_model("bert", num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=strength, target_modules=WHERE)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    data = [{"input_ids": ids, "label": n % 2} for n, ids in enumerate(token_rows(64))]
    optimizer, view = MeZO(), ParameterView.trainable(model)
    minimize(
        ClassificationLoss(model), view, data, optimizer, batch_size=16, max_queries=8_000,
        callback=stop, progress=False,
    )  # fmt: skip
    assert optimizer.state.finder is not None
    return optimizer.state.finder.calibration.found, optimizer.measuring_queries


def test_a_new_head_does_not_hide_what_noise_does_to_the_features() -> None:
    """Of a head that knows nothing all losses are those of chance, whatever the features are."""
    weak, strong = found_for(4), found_for(256)
    assert strong[0] < weak[0] / 3
    assert max(weak[1], strong[1]) < 0.1 * 8_000


def test_without_trained_weights_only_damage_is_measured() -> None:
    x, rows = torch.zeros(4), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    optimizer = MeZO()
    minimize(
        lambda batch: torch.sin(batch @ x), ParameterView({"x": x}), rows, optimizer, batch_size=16,
        max_queries=2_000, callback=stop, progress=False,
    )  # fmt: skip
    assert optimizer.state.finder is not None
    search = optimizer.state.finder.calibration
    assert (search.nonlinearity, search.target) == (None, RATIO)


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
    search = Calibration(start, target=TRAINED_RATIO, nonlinearity=Nonlinearity())
    while not search.finished and search.rounds < 12:
        rho = search.displacement
        bend = MOST_NONLINEAR * rho**2 / (0.7 + 0.3 * rho**2)
        search.narrow(Response(even=0.1 * rho**2, odd=rho, nonlinearity=bend))
    assert search.finished
    assert search.displacement == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("seen", [[1.4], [0.5, 0.8, 1.1, 1.3], [0.9, 0.9, 0.9, 0.9]])
def test_noise_of_the_values_is_not_taken_for_nonlinearity(seen: list[float]) -> None:
    """A search that took it so would come nearer to the end, where noise is all there is."""
    search = Calibration(1.0, target=TRAINED_RATIO, nonlinearity=Nonlinearity())
    for bend in seen:
        assert search.nonlinearity is not None
        search.narrow(Response(even=0.01, odd=1.0, nonlinearity=bend))
    assert search.nonlinearity is None
    assert (search.displacement, search.low, search.high) == (1.0, None, None)


def test_one_rise_may_be_chance() -> None:
    """Of 32 rows one round of rsLoRA rose to .95, and its search went four times too far."""
    search = Calibration(1.0, target=TRAINED_RATIO, nonlinearity=Nonlinearity())
    search.narrow(Response(even=0.1, odd=0.3, nonlinearity=0.5))
    nearer = search.displacement
    search.narrow(Response(even=0.05, odd=0.25, nonlinearity=0.95))
    assert search.nonlinearity is not None
    assert search.displacement < nearer
    assert not search.finished


def test_values_that_were_not_noisy_nearby_are_not_noisy_further_away() -> None:
    search = Calibration(1.0, target=TRAINED_RATIO, nonlinearity=Nonlinearity())
    search.narrow(Response(even=0.05, odd=0.4, nonlinearity=0.1))
    further = search.displacement
    search.narrow(Response(even=0.1, odd=0.6, nonlinearity=1.4))
    assert search.nonlinearity is not None
    assert 1.0 < search.displacement < further


def test_a_search_that_a_former_version_began_goes_on_by_damage_alone() -> None:
    kept = Calibration(0.25).state_dict()
    del kept["nonlinearity"]
    search = Calibration.from_state(kept)
    samples = Samples(as_source({"x": torch.zeros(64, 1)}), 16, 0)
    search.aim(samples, Budget(max_queries=8_000), 100)
    assert (search.nonlinearity, search.target) == (None, RATIO)
    now = Calibration(0.25, nonlinearity=Nonlinearity(0.1, 1))
    now.aim(samples, Budget(max_queries=8_000), 100)
    assert now.target == TRAINED_RATIO
    assert Calibration.from_state(json.loads(json.dumps(now.state_dict()))) == now
