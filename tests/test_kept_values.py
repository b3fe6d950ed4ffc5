"""Far from a snapshot its weights are kept by value, where there is room: a step costs as much."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_candidates import examples
from tiny_models import tiny_model
from torch import Tensor

from objectives import ClassificationLoss
from zo_adapt import ZOSPIDER, AskTell, MeZOSVRG, ParameterView, Shift, Term, minimize
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import TensorRows
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.places import OnePoint
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.view.kept import KeptPlace, KeptValues

ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def run_of(x: Tensor, optimizer: MeZOSVRG, **options: Any) -> Run:
    view = ParameterView({"x": x}, **options)

    def loss(batch: Tensor) -> Tensor:
        return (batch - x.float()).square().mean(1)

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    evaluator = LocalEvaluator(loss, view, batch_size=4)
    return Run(optimizer, evaluator, Samples(TensorRows(ROWS), 4, 0), Budget(1000), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_probe_at_a_far_snapshot_draws_its_own_directions_only(dtype: torch.dtype) -> None:
    x = torch.ones(6, dtype=dtype)
    optimizer = MeZOSVRG(displacement=0.1, snapshot_interval=1000, weight_decay=0.1)
    run = run_of(x, optimizer)
    before = x.clone()
    for _ in range(60):
        run.step()
    assert not torch.equal(x, before)
    for probe in optimizer.propose(run.samples):
        assert len(probe.at.terms) <= 1
    here = x.clone()
    with OnePoint(run.evaluator.view, optimizer.snapshot.place).entered():
        assert torch.equal(x, before)  # where the snapshot was, bit for bit
    assert torch.equal(x, here)


def test_a_near_snapshot_and_a_view_without_room_go_back_by_terms() -> None:
    near = MeZOSVRG(displacement=0.1, snapshot_interval=16)
    run = run_of(torch.ones(6), near)
    spider = ZOSPIDER(1e-3, snapshot_interval=1000)
    spider.start(run.evaluator.view, 0)
    model = tiny_model("bert")
    far = MeZOSVRG(snapshot_interval=1000)
    far.start(ParameterView.full(model, scratch="layer"), 0)
    assert (near.snapshot.kept, spider.snapshot.kept, far.snapshot.kept) == (None, None, None)


def test_a_run_that_was_begun_by_terms_goes_on_by_terms() -> None:
    optimizer = MeZOSVRG(displacement=0.1, snapshot_interval=1000)
    run = run_of(torch.ones(6), optimizer)
    state = run.state_dict()
    del state["optimizer"]["keeps"]  # as versions before wrote it
    run.load_state_dict(state)
    for _ in range(20):
        run.step()
    assert optimizer.snapshot.kept is None
    assert len(optimizer.snapshot.since.terms) > 16


@pytest.mark.parametrize("scratch", ["copy", "layer"])
@pytest.mark.parametrize("noise", ["gaussian", "lowrank"])
def test_a_place_seen_from_kept_values_has_the_same_bits_everywhere(
    scratch: Any, noise: str
) -> None:
    model = tiny_model("bert")
    view = ParameterView.full(model, scratch=scratch, noise=noise)
    kept = KeptValues(view.tensors)
    kept.keep()
    start = view.snapshot()
    terms = (Term(3, 0.1),)
    with ParameterView.full(model, scratch="copy", noise=noise).shifted(terms):
        expected = view.snapshot()
    view.apply(Shift((Term(9, 0.5),)))
    here = view.snapshot()
    with OnePoint(view, kept.at(terms)).entered():
        assert all(torch.equal(t, expected[name]) for name, t in view.tensors.items())
    stacks = view.stack([Shift(terms), kept.at(terms), kept.at()])
    for name in view.tensors:
        assert torch.equal(stacks[name][1], expected[name])
        assert torch.equal(stacks[name][2], start[name])
    again = view.stack([kept.at(), Shift(terms), kept.at(terms)])
    for name in view.tensors:
        assert torch.equal(again[name][0], start[name])
        assert again[name].data_ptr() == stacks[name].data_ptr()  # a graph reads it there
    assert all(torch.equal(t, here[name]) for name, t in view.tensors.items())


def test_places_from_different_values_are_different() -> None:
    one, other = KeptValues({"x": torch.zeros(2)}), KeptValues({"x": torch.zeros(2)})
    terms = (Term(1, 0.5),)
    assert one.at(terms) == KeptPlace(one, terms)
    assert len({one.at(terms), other.at(terms), Shift(terms), one.at(terms)}) == 3
    assert Shift(terms) != one.at(terms) != other.at(terms)
    one.keep()
    assert one.distance() == 0.0


def test_a_run_above_a_trunk_with_kept_values_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    def tuned(file: Path, stop: int | None = None) -> dict[str, Tensor]:
        model = tiny_model("bert")
        view = ParameterView.last_layers(model, 1)

        def stopping(step: Any) -> None:
            if step.step == stop:
                raise StopIteration

        minimize(
            ClassificationLoss(model), view, examples(24), MeZOSVRG(snapshot_interval=17),
            batch_size=4, max_steps=20, progress=False, trajectory=file, resume=True,
            callback=stopping,
        )  # fmt: skip
        return view.snapshot()

    whole = tuned(tmp_path / "whole")
    for stop in (5, 18):
        tuned(tmp_path / "parts", stop)
    parts = tuned(tmp_path / "parts")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_ask_and_tell_goes_on_from_a_pickle_far_from_its_snapshot() -> None:
    def value(x: np.ndarray) -> float:
        return float(((x - 3) ** 2).sum())

    def begun() -> AskTell:
        return AskTell(MeZOSVRG(displacement=0.5, snapshot_interval=50), np.zeros(4), max_steps=30)

    whole, parts = begun(), begun()
    while candidates := whole.ask():
        whole.tell([value(x) for x in candidates])
    while candidates := parts.ask():
        parts = pickle.loads(pickle.dumps(parts))
        parts.tell([value(x) for x in candidates])
    assert (whole.x == parts.x).all()
