"""Over a run: fresh directions, schedules by steps or queries, annealing on the loss."""

import math
from typing import Any

import pytest
import torch

from zo_adapt import Annealing, MeZO, MeZOSVRG, ParameterView, minimize
from zo_adapt.errors import OptionError
from zo_adapt.optimizers.descent import Annealed


def one() -> ParameterView:
    return ParameterView({"x": torch.zeros(2)})


def moving(view: ParameterView) -> Any:
    return lambda batch: float(view.tensors["x"].sum())


def rates(schedule: Any, steps: int = 4) -> list[float]:
    view = one()
    optimizer = MeZO(
        0.5,
        num_directions=1,
        one_sided=False,
        perturbation_scale=0.05,
        normalize=True,
        schedule=schedule,
    )
    result = minimize(moving(view), view, None, optimizer, max_steps=steps, progress=False)
    return [record.lr for record in result.history]


def test_schedules() -> None:
    assert rates("constant") == [0.5] * 4
    assert rates("linear") == pytest.approx([0.5, 0.375, 0.25, 0.125])
    cosine = [0.25 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert rates("cosine") == pytest.approx(cosine)
    assert rates(lambda progress: progress**2) == pytest.approx(
        [0, 0.5 / 16, 0.5 / 4, 0.5 * 9 / 16]
    )
    with pytest.raises(OptionError, match="sawtooth"):
        rates("sawtooth")


def test_a_schedule_follows_the_queries_where_they_are_the_budget() -> None:
    view = one()
    optimizer = MeZO(
        1.0,
        num_directions=1,
        one_sided=False,
        perturbation_scale=0.05,
        normalize=True,
        schedule="linear",
    )
    result = minimize(moving(view), view, None, optimizer, max_queries=8, progress=False)
    assert [record.lr for record in result.history] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_annealing_divides_both_rates_when_the_loss_rises() -> None:
    view, calls = one(), [0]

    def rising(batch: Any) -> float:
        calls[0] += 1
        return 1.0 + 0.01 * calls[0] + float(view.tensors["x"].sum())

    optimizer = MeZOSVRG(
        1e-6,
        snapshot_lr=1e-5,
        snapshot_interval=2,
        snapshot_size="all",
        num_directions=1,
        one_sided=False,
        perturbation_scale=1e-3,
        annealing=Annealing(factor=10.0, threshold=1.0, window=2),
    )
    result = minimize(rising, view, None, optimizer, max_steps=8, progress=False)
    expected = [1e-5, 1e-6, 1e-5, 1e-7, 1e-6, 1e-8, 1e-7, 1e-9]
    assert [record.lr for record in result.history] == pytest.approx(expected)


def test_annealing_judges_each_window_once() -> None:
    annealed = Annealed(Annealing(factor=5.0, threshold=1.0, window=2))
    losses = [1, 1, 2, 2, 1, 1, 3, 3]
    assert [annealed.observe(loss) for loss in losses] == [1, 1, 1, 0.2, 0.2, 0.2, 0.2, 0.04]
    patient = Annealed(Annealing(factor=5.0, threshold=3.0, window=2))
    assert [patient.observe(loss) for loss in losses] == [1] * 8
    with pytest.raises(OptionError):
        Annealing(factor=1.0)


def seeds(seed: int, *counts: int) -> list[int]:
    optimizer = MeZO(1e-3, perturbation_scale=1e-2)
    optimizer.start(one(), seed)
    return [found for count in counts for found in optimizer.state.new_seeds(count)]


def test_every_direction_of_a_run_is_new(seed: int) -> None:
    whole = seeds(seed, 50)
    assert len(set(whole)) == 50
    assert all(0 <= found < 2**64 for found in whole)
    assert seeds(seed, 3, 1, 7, 4, 1, 34) == whole, "how many are drawn at a time does not matter"
    assert not set(whole) & set(seeds(seed ^ 1, 50))
    assert seeds(0, 2) != seeds(1, 2), "0 is a seed"


def test_the_directions_of_a_seed_are_frozen() -> None:
    assert seeds(7, 2) == [4984240537714540297, 16159351496983298522]
