"""Optimizers from their parts: keywords, values that compare and print, state apart, old names."""

import copy
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from problems import labelled, logistic, problem, steps

from zo_adapt import (
    SGD,
    ZOSVRG,
    Adam,
    Annealing,
    ByDistance,
    MeZO,
    MeZOSVRG,
    OneSided,
    ParameterView,
    Rate,
    TwoSided,
    minimize,
)
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import NoData
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluation

SAME: dict[str, tuple[Any, Any]] = {
    "default": (MeZO(), MeZO(estimate=OneSided(8), apply=ByDistance())),
    "rate": (MeZO(1e-2), MeZO(apply=Rate(1e-2))),
    "rate and estimate": (
        MeZO(1e-2, one_sided=True, num_directions=4, shaping="base", perturbation_scale=0.1),
        MeZO(1e-2, estimate=OneSided(4, baseline="base", perturbation_scale=0.1)),
    ),
    "distance": (
        MeZO(displacement=0.25, schedule="cosine", one_sided=False, shaping="ranks"),
        MeZO(estimate=TwoSided(8, shaping="ranks"), apply=ByDistance(0.25, schedule="cosine")),
    ),
    "normalised": (
        MeZO(1e-2, normalize=True, weight_decay=0.1, scale_memory=0.9),
        MeZO(apply=Rate(1e-2, normalize=True, weight_decay=0.1, scale_memory=0.9)),
    ),
    "svrg default": (MeZOSVRG(), MeZOSVRG(estimate=OneSided(8, baseline="others"))),
    "svrg": (
        MeZOSVRG(1e-2, one_sided=False, annealing=Annealing(window=9), snapshot_interval=2),
        MeZOSVRG(
            estimate=TwoSided(8),
            apply=Rate(1e-2, annealing=Annealing(window=9)),
            snapshot_interval=2,
        ),
    ),
    "None is left out": (
        MeZO(None, displacement=None, normalize=None, schedule=None, perturbation_scale=None),
        MeZO(),
    ),
    "zo-svrg": (ZOSVRG(1e-2, schedule="linear"), ZOSVRG(apply=Rate(1e-2, schedule="linear"))),
    "adam": (Adam(1), Adam(lr=1.0)),
}


@pytest.mark.parametrize("case", SAME)
def test_keywords_are_short_for_the_parts(case: str) -> None:
    short, composed = SAME[case]
    assert short == composed
    assert hash(short) == hash(composed)
    assert repr(short) == repr(composed)


def test_what_differs_is_not_equal() -> None:
    different = [MeZO(), MeZO(1e-2), MeZO(2e-2), MeZO(num_directions=2), MeZOSVRG(), SGD(1.0)]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "optimizer",
    [short for name, (short, _) in SAME.items() if name != "zo-svrg"]
    + [MeZOSVRG.paper(1e-6, 1e-4), MeZO.paper(1e-6)],
    ids=repr,
)
def test_it_prints_as_the_call_that_makes_it(optimizer: Any) -> None:
    assert eval(repr(optimizer)) == optimizer


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (MeZO(), "apply"),
        (MeZOSVRG(), "snapshot_interval"),
        (OneSided(), "num_directions"),
        (Rate(1e-3), "lr"),
        (Annealing(), "window"),
        (Adam(1e-3), "lr"),
    ],
)
def test_hyper_parameters_cannot_change_in_a_run(part: Any, name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(part, name, 3)


def run(optimizer: Any, count: int = 6) -> list[Any]:
    p = problem(logistic, labelled(24, 10))
    return list(steps(optimizer, *p, batch_size=6, seed=7, count=count))


@pytest.mark.parametrize(
    "make",
    [
        lambda parts: MeZO(estimate=parts[0], apply=parts[1]),
        lambda parts: MeZOSVRG(estimate=parts[0], apply=parts[1], snapshot_interval=2),
    ],
    ids=["mezo", "svrg"],
)
def test_runs_that_share_their_parts_do_not_disturb_each_other(make: Callable[..., Any]) -> None:
    annealing = Annealing(window=1, threshold=0.5)
    parts = OneSided(3), Rate(1e-2, normalize=True, annealing=annealing)
    alone = run(make(parts))
    one, other = make(parts), make(parts)
    p, q = (problem(logistic, labelled(24, 10)) for _ in range(2))
    first = steps(one, *p, batch_size=6, seed=7, count=6)
    second = steps(other, *q, batch_size=6, seed=7, count=6)
    both = list(zip(first, second, strict=True))
    assert [a for a, _ in both] == [b for _, b in both] == alone
    assert len({step.lr for step in alone}) > 2, "the annealing did nothing"


def test_a_copy_in_the_middle_of_a_run_goes_on_by_itself() -> None:
    optimizer = MeZOSVRG(snapshot_interval=2)
    run(optimizer, count=3)
    twin = copy.deepcopy(optimizer)
    run(optimizer, count=4)
    assert (optimizer.steps, twin.steps) == (4, 3)
    assert twin == optimizer, "hyper-parameters alone are compared"


@pytest.mark.parametrize("make", [MeZO, MeZOSVRG, ZOSVRG, lambda: MeZOSVRG.paper(1e-3, 1e-2)])
def test_settings_are_json_and_say_what_is_in_force(make: Callable[[], Any]) -> None:
    optimizer = make()
    optimizer.start(ParameterView({"x": torch.zeros(2)}), 0)
    settings = optimizer.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert {"optimizer", "weight_decay", "schedule", "num_directions"} <= settings.keys()
    assert settings["perturbation_scale"] == optimizer.perturbation_scale > 0
    assert settings["displacement"] > 0


def test_mezo_svrg_corrects_by_a_large_batch_unless_told_otherwise() -> None:
    found = run(MeZOSVRG(displacement=0.5))
    assert [step.kind for step in found] == ["snapshot", "minibatch"] * 3
    # A large batch of four times 6 rows is 6 shares, with 8 directions on each; the correction is
    # one direction more.
    assert [len(step.update.terms) for step in found[:2]] == [6 * 8, 6 * 8 + 1]
    few = run(MeZOSVRG(displacement=0.5, snapshot_size=8), count=1)
    assert len(few[0].update.terms) == 2 * 8
    p = problem(logistic, labelled(10, 10))
    (all_rows,) = steps(MeZOSVRG(displacement=0.5), *p, batch_size=6, seed=7, count=1)
    assert len(all_rows.update.terms) == 2 * 8


def test_the_papers_settings() -> None:
    assert MeZO.paper(1e-3) == MeZO(1e-3, estimate=TwoSided(perturbation_scale=1e-3))
    sample_by_sample = ZOSVRG.paper(1e-3, snapshot_interval=3, perturbation_scale=1e-2)
    assert sample_by_sample == ZOSVRG(1e-3, snapshot_interval=3, perturbation_scale=1e-2)
    paper = MeZOSVRG.paper(1e-3, 1e-2, epoch_steps=4, perturbation_scale=1e-2)
    assert paper == MeZOSVRG(
        1e-3,
        snapshot_lr=1e-2,
        snapshot_interval=2,
        snapshot_size="all",
        coupling="independent",
        one_sided=False,
        num_directions=1,
        perturbation_scale=1e-2,
        annealing=Annealing(factor=5.0, threshold=1.05, window=4),
    )
    found = run(paper)
    assert [step.kind for step in found] == ["snapshot", "minibatch"] * 3
    assert [step.lr for step in found[:2]] == [1e-2, 1e-3]
    assert [len(step.update.terms) for step in found[:2]] == [1, 3]
    shared = run(MeZOSVRG.paper(1e-3, 1e-2, coupling="shared"))
    assert [len(step.update.terms) for step in shared[:2]] == [1, 2]


OLD: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "base": (
        lambda: MeZOSVRG(shaping=None),  # type: ignore[arg-type]
        MeZOSVRG(shaping="base"),
        "shaping=None is now shaping='base'",
    ),
    "one-sided": (
        lambda: MeZO(one_sided=True, num_directions=2, shaping=None),  # type: ignore[arg-type]
        MeZO(estimate=OneSided(2, baseline="base")),
        "shaping=None is now shaping='base'",
    ),
    "pairs": (
        lambda: MeZO(one_sided=False, shaping=None),  # type: ignore[arg-type]
        MeZO(one_sided=False),
        "shaping=None is now shaping='auto'",
    ),
    "loo": (
        lambda: MeZOSVRG(shaping="loo"),  # type: ignore[arg-type]
        MeZOSVRG(),
        "shaping='loo' is now shaping='others'",
    ),
    "whole set": (
        lambda: MeZOSVRG(snapshot_size=None),
        MeZOSVRG(snapshot_size="all"),
        "snapshot_size=None is now snapshot_size='all'",
    ),
    "whole set, zo-svrg": (
        lambda: ZOSVRG(snapshot_size=None),
        ZOSVRG(),
        "snapshot_size=None is now snapshot_size='all'",
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_old_spellings_work_and_name_the_new_ones(case: str) -> None:
    make, now, message = OLD[case]
    with pytest.warns(DeprecationWarning, match=message) as caught:
        assert make() == now
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeZO(estimate=TwoSided(), num_directions=2), "give them to TwoSided"),
        (lambda: MeZO(1e-3, apply=ByDistance()), r"\['lr'\]; give them to ByDistance"),
        (lambda: MeZOSVRG(apply=Rate(1e-3), schedule="linear"), "give them to Rate"),
        (lambda: MeZO(1e-3, displacement=0.5), "give one"),
        (lambda: MeZO(normalize=False), "needs a learning rate"),
        (lambda: MeZO(estimate="two-sided"), r"give TwoSided\(...\)"),  # type: ignore[arg-type]
        (lambda: MeZO(apply=1e-3), r"give ByDistance\(...\)"),  # type: ignore[arg-type]
        (lambda: MeZOSVRG(snapshot_size="half"), "'batch' or 'all'"),  # type: ignore[arg-type]
    ],
)
def test_what_contradicts_itself_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_a_keyword_that_no_optimizer_has_is_named() -> None:
    with pytest.raises(TypeError, match="momentum"):
        MeZO(momentum=0.9)  # type: ignore[call-arg]


def test_out_of_turn_is_refused() -> None:
    optimizer, samples = MeZO(), Samples(NoData(), None, 0)
    with pytest.raises(OptionError, match=r"call start\(view, seed\) first"):
        optimizer.ask(samples)
    optimizer.start(ParameterView({"x": torch.zeros(2)}), 0)
    with pytest.raises(OptionError, match="tell without ask"):
        optimizer.tell([Evaluation(1.0), Evaluation(2.0)])


def test_composed_parts_reach_an_optimum() -> None:
    x = torch.zeros(2)
    optimizer = MeZO(estimate=OneSided(8), apply=ByDistance(3.0))
    result = minimize(
        lambda batch: float(((x - 3) ** 2).sum()), ParameterView({"x": x}), None, optimizer,
        max_steps=300, progress=False,
    )  # fmt: skip
    assert result.queries == 2400
    assert bool(((x - 3).abs() < 0.15).all())
