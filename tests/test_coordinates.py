"""Directions along coordinates, and ZO-SVRG by all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bits, dense, flat, reference, squares
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn

from objectives import CallableObjective, ClassificationLoss
from zo_adapt import (
    ZOSVRG,
    EvaluationOptions,
    Group,
    MeZO,
    ParameterView,
    Shift,
    StopReason,
    Term,
    ZOConfig,
    minimize,
    replay,
)
from zo_adapt.errors import OptionError, UnreadTensorWarning
from zo_adapt.noise.coordinates import MOST_COORDINATES, UPWARDS

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of awkward layouts: 6 + 1 + 4 scalars."""
    generator = torch.Generator().manual_seed(0)
    return {
        "transposed": torch.randn(2, 3, generator=generator).to(dtype).T,
        "zero_dim": torch.randn((), generator=generator).to(dtype),
        "sliced": torch.randn(8, generator=generator).to(dtype)[::2],
    }


def view_of(dtype: torch.dtype = torch.float64, **options: Any) -> ParameterView:
    return ParameterView(tensors(dtype), noise="coordinates", **options)


def test_every_scalar_has_its_turn_up_and_down() -> None:
    """E z = 0 and E z z^T = I over the seeds, as of every noise."""
    view = view_of()
    d = view.numel
    z = torch.stack([dense(view, sign + n) for sign in (0, UPWARDS) for n in range(d)])
    assert torch.allclose(z.sum(0), torch.zeros(d, dtype=torch.float64))
    assert torch.allclose(z.T @ z / len(z), torch.eye(d, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(dense(view, 5 * d + 3), dense(view, 3))
    assert float(dense(view, 3)[3]) == pytest.approx(d**0.5)


@DTYPES
def test_shifts_and_updates_are_those_of_dense_directions(dtype: torch.dtype) -> None:
    """Also where several terms move one scalar."""
    view, start = view_of(dtype), tensors(dtype)
    terms = [Term(n, 0.25 * (i + 1)) for i, n in enumerate((3, 0, 14, 3 + UPWARDS, 10, 25))]
    with view.shifted(terms, 0.9):
        for name, tensor in view.tensors.items():
            assert torch.equal(tensor, reference(view.noise, name, start[name], terms, 0.9)), name
    assert all(torch.equal(bits(view.tensors[name]), bits(t)) for name, t in start.items())
    stack = view.stack([Shift(tuple(terms)), Shift(())])
    for name, both in stack.items():
        assert torch.equal(both[0], reference(view.noise, name, start[name], terms))
        assert torch.equal(both[1], start[name])
    moved = {0, 3, 10}  # 14 is 3, and 25 is 3 as well: d = 11
    before = flat(view)
    view.apply(Shift(tuple(terms)))
    changed = (flat(view) != before).nonzero().flatten().tolist()
    assert set(changed) <= moved and {0, 10} <= set(changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_steps_in_half_precision_are_not_lost(dtype: torch.dtype) -> None:
    view = ParameterView({"x": torch.ones(4, dtype=dtype)}, noise="coordinates")
    for step in range(4_000):
        view.apply(Shift((Term(4 * step + 1, 1e-5),)))  # a tenth of a place, or less
    assert view.tensors["x"].tolist()[::2] == [1.0, 1.0]
    assert float(view.tensors["x"][1]) == pytest.approx(1.08, abs=0.03)


def least_squares() -> tuple[Tensor, Any]:
    data = torch.randn(32, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return data, lambda view: CallableObjective(lambda rows: squares(flat(view), rows))


@pytest.mark.parametrize("groups", [(), (Group("sliced", lr=0.5, perturbation_scale=3.0),)])
def test_the_estimate_is_the_gradient(groups: Any) -> None:
    """Exactly, on a quadratic, whatever the scale of a part."""
    data, objective = least_squares()
    view = view_of(groups=groups)
    x = flat(view).requires_grad_(True)
    (gradient,) = torch.autograd.grad(squares(x, data).mean(), x)
    before = flat(view)
    result = minimize(
        objective(view), view, data, ZOSVRG(0.1, perturbation_scale=0.3, coordinates=True),
        batch_size=8, max_steps=1, progress=False,
    )  # fmt: skip
    rate = torch.full((11,), 0.1, dtype=torch.float64)
    rate[7:] = 0.05 if groups else 0.1
    assert torch.allclose(flat(view) - before, -rate * gradient, rtol=1e-6)
    assert result.queries == 2 * 11 * 32


@pytest.mark.parametrize("still", [{"lr": 0.0}, {"perturbation_scale": 0.0}], ids=str)
def test_no_query_is_for_what_does_not_move(still: dict[str, float]) -> None:
    data, objective = least_squares()
    view = view_of(groups=[Group("transposed", **still)])
    before = {name: t.clone() for name, t in view.tensors.items()}
    optimizer = ZOSVRG(0.05, snapshot_size="batch", coordinates=True)
    result = minimize(
        objective(view), view, data, optimizer, batch_size=8, max_steps=2, progress=False
    )
    assert result.queries == 5 * 8 * (2 + 4)
    moved = {name: not torch.equal(t, before[name]) for name, t in view.tensors.items()}
    assert moved == {"transposed": False, "zero_dim": True, "sliced": True}


@pytest.mark.parametrize("make", [MeZO, lambda: ZOSVRG(coordinates=True)], ids=["mezo", "zo-svrg"])
def test_a_run_finds_its_own_step(make: Any) -> None:
    data, objective = least_squares()
    view = view_of()
    start = float(squares(flat(view), data).mean())
    minimize(
        objective(view), view, data, make(), batch_size=8, max_queries=20_000, seed=1,
        progress=False,
    )  # fmt: skip
    best = torch.linalg.lstsq(data[:, :-1], data[:, -1:]).solution.flatten()
    least = float(squares(best, data).mean())
    assert float(squares(flat(view), data).mean()) - least < 0.1 * (start - least)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_tuned_gone_on_with_and_replayed(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(24, 5, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(steps: int, file: str, **options: Any) -> ParameterView:
        model = small_model().to(dtype)
        view = ParameterView.full(model, noise=options.pop("noise", "coordinates"))
        minimize(
            CallableObjective(lambda x: (model(x).float() - 1).square().mean(1)), view, rows,
            ZOSVRG(0.1, perturbation_scale=0.05, coordinates=True, snapshot_interval=3),
            batch_size=8, max_steps=steps, progress=False, trajectory=tmp_path / file, **options,
        )  # fmt: skip
        return view

    whole = run(7, "whole.zot")
    run(4, "parts.zot")
    # A view of no noise of its own takes what the run goes along.
    assert run(7, "parts.zot", resume=True, noise="auto").hash() == whole.hash()
    again = ParameterView.full(small_model().to(dtype))
    assert replay(again, tmp_path / "whole.zot") == 7
    assert again.hash() == whole.hash()


def test_several_points_at_once_are_those_of_one_after_the_other() -> None:
    values = []
    for joint_rows in ("off", 64):
        model = tiny_model("bert")
        view = ParameterView.matching(model, "classifier|pooler.*bias", noise="coordinates")
        assert view.numel <= 100
        result = minimize(
            ClassificationLoss(model), view,
            [{"input_ids": ids, "label": i % 2} for i, ids in enumerate(token_rows(8))],
            ZOSVRG(0.1, perturbation_scale=0.1, snapshot_size="batch", coordinates=True),
            batch_size=4, max_steps=3, progress=False,
            evaluation=EvaluationOptions(joint_rows=joint_rows),  # type: ignore[arg-type]
        )  # fmt: skip
        values.append([step.value for step in result.history])
        assert (result.evaluation.candidates == 1) == (joint_rows == "off")
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_tensor_that_is_not_read_is_named() -> None:
    x, unread = torch.zeros(3), torch.zeros(2)
    model = nn.ParameterDict({"x": nn.Parameter(x), "unread": nn.Parameter(unread)})
    view = ParameterView.full(model, noise="coordinates")
    with pytest.warns(UnreadTensorWarning, match="'unread'"):
        minimize(
            lambda rows: (rows - model["x"]).square().sum(1), view, torch.ones(8, 3),
            ZOSVRG(0.1, coordinates=True), batch_size=4, max_steps=2, progress=False,
        )  # fmt: skip
    assert view.at_rest == {"unread"}


@pytest.mark.parametrize("element", range(3))
def test_a_tensor_of_which_one_scalar_is_read_unseen_is_not_named(element: int) -> None:
    """What numpy reads is found by a shift: of every scalar, not along one coordinate."""
    x, y = torch.zeros(3), torch.zeros(3)
    seen = y.numpy()
    view = ParameterView({"x": x, "y": y}, noise="coordinates")
    minimize(
        lambda rows: (rows - x).square().sum(1) + (float(seen[element]) - 1) ** 2, view,
        torch.ones(8, 3), ZOSVRG(0.1, coordinates=True), batch_size=4, max_steps=2, progress=False,
    )  # fmt: skip
    assert (y != 0).tolist() == [n == element for n in range(3)]


def test_trainers_arguments_describe_it(tmp_path: Path) -> None:
    args = ZOConfig(
        str(tmp_path), optimizer="zo-svrg", coordinates=True, noise="coordinates", report_to="none"
    )
    assert args.build_optimizer() == ZOSVRG(coordinates=True, schedule=None)


# --- What is refused ------------------------------------------------------------------------------


def test_a_large_view_is_refused_with_the_number_of_its_scalars() -> None:
    ParameterView({"x": torch.zeros(MOST_COORDINATES)}, noise="coordinates")
    with pytest.raises(OptionError, match=r"4,001 scalars.*at most 4,000"):
        ParameterView({"x": torch.zeros(MOST_COORDINATES + 1)}, noise="coordinates")


def test_a_view_that_is_shifted_layer_by_layer_is_refused() -> None:
    with pytest.raises(OptionError, match="scratch='layer'"):
        ParameterView.full(small_model(), noise="coordinates", scratch="layer")


@pytest.mark.parametrize(
    "view",
    [
        ParameterView(tensors()),
        ParameterView(tensors(), noise="coordinates", groups=[Group("", perturbation_scale=0.0)]),
    ],
    ids=["gaussian", "at rest"],
)
def test_other_views_are_refused_by_coordinates(view: ParameterView) -> None:
    data, objective = least_squares()
    with pytest.raises(OptionError, match="noise='coordinates'"):
        minimize(
            objective(view), view, data, ZOSVRG(0.1, coordinates=True), batch_size=8, max_steps=1,
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("groups", [(), (Group("b", lr=0.5),)], ids=["one part", "two"])
def test_a_step_of_the_largest_view_fits_a_record(groups: Any, tmp_path: Path) -> None:
    """Where two parts move each direction has two terms, and the run says that these do not."""

    def largest() -> ParameterView:
        sizes = {"a": MOST_COORDINATES - 10, "b": 10}
        live = {name: torch.zeros(size) for name, size in sizes.items()}
        return ParameterView(live, noise="coordinates", groups=groups)

    view, again = largest(), largest()
    result = minimize(
        lambda _: float((view.tensors["a"] - 1).square().mean()), view, None,
        ZOSVRG(0.1, perturbation_scale=1e-2, coordinates=True), max_steps=1, progress=False,
        trajectory=tmp_path / "run.zot",
    )  # fmt: skip
    if groups:
        assert result.stop_reason is StopReason.CANNOT_WRITE
        assert "8000 terms does not fit a record" in result.message
    else:
        assert replay(again, tmp_path / "run.zot") == 1
        assert again.hash() == view.hash() != largest().hash()
