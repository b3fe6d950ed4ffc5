"""Updates of half-precision weights: rounded up or down so that the mean is kept."""

import pytest
import torch
from problems import bits
from torch import Tensor

from zo_adapt import MeZO, ParameterView, Shift, Term, minimize
from zo_adapt.noise.accumulate import Accumulation, OnCPU, Place
from zo_adapt.noise.distributions import GAUSSIAN, RADEMACHER
from zo_adapt.noise.sums import Sum, Sums
from zo_adapt.noise.torch_accumulate import OnAnyDevice

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def shrunk(tensor: Tensor, factor: float, rounding: int | None) -> Tensor:
    """factor * tensor, rounded."""
    out = torch.empty_like(tensor)
    Accumulation(RADEMACHER, [Place(out, tensor, key=5)])(Sums([Sum((), factor)], rounding))
    return out


def magnitudes(dtype: torch.dtype) -> Tensor:
    """Both signs, from subnormal numbers to large ones."""
    x = torch.logspace(-8, 4, 4001, dtype=torch.float64)
    return torch.cat((x, -x, torch.zeros(2))).to(dtype)


@HALVES
def test_a_result_is_one_of_the_two_neighbours(dtype: torch.dtype, seed: int) -> None:
    x = magnitudes(dtype)
    exact = (x.float() * 0.7).double()
    nearest = shrunk(x, 0.7, None)
    to = torch.where(nearest.double() < exact, torch.inf, -torch.inf).to(dtype)
    other = torch.where(nearest.double() == exact, nearest, torch.nextafter(nearest, to))
    rounded = shrunk(x, 0.7, seed)
    assert ((rounded == nearest) | (rounded == other)).all()
    assert (rounded != nearest).any()


@HALVES
def test_what_the_dtype_holds_exactly_stays(dtype: torch.dtype, seed: int) -> None:
    x = magnitudes(dtype)
    assert torch.equal(bits(shrunk(x, 1.0, seed)), bits(x))
    powers = torch.tensor([2.0**k for k in range(-10, 10)]).to(dtype)
    assert torch.equal(shrunk(powers, -0.5, seed), powers * -0.5)


@HALVES
@pytest.mark.parametrize("start", [1.0, -3.0, 2.0**-13])
def test_the_mean_is_kept(dtype: torch.dtype, start: float) -> None:
    x = torch.full((100_000,), start).to(dtype)
    above = torch.nextafter(x[0], torch.tensor(torch.inf * start, dtype=dtype)).double()
    factor = 1 + torch.finfo(dtype).eps / 8
    share = abs(start) * (factor - 1) / abs(float(above) - start)  # of the way to the next number
    up = (shrunk(x, factor, 11).double() - x.double()) / (above - start)
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert abs(up.mean() - share) < 5 * (share * (1 - share) / 100_000) ** 0.5


@HALVES
@pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER], ids=lambda noise: noise.name)
def test_torch_operations_round_alike(dtype: torch.dtype, noise: object, seed: int) -> None:
    x = magnitudes(dtype)
    sums = Sums([Sum([(seed, 1e-3), (2**64 - 1, -2e-3)], 0.9)], rounding=seed)
    results = []
    for runner in (OnCPU, OnAnyDevice):
        place = Place(torch.empty_like(x), x, key=3)
        runner(noise, [place])(sums, [place.out])  # type: ignore[arg-type]
        results.append(bits(place.out))
    assert torch.equal(*results)


def test_probing_rounds_to_the_nearest() -> None:
    x = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    with ParameterView({"x": x}).shifted([Term(1, 1e-5)]):
        assert (x == 1).all()


@HALVES
def test_steps_below_the_resolution_are_not_lost(dtype: torch.dtype) -> None:
    # Each step is a fiftieth of the distance between neighbours: to the nearest, none would move.
    x = torch.full((2000,), 1.0).to(dtype)
    view = ParameterView({"x": x}, noise="rademacher")
    direction = torch.zeros(2000)
    with ParameterView({"x": direction}, noise="rademacher").shifted([Term(7, 1.0)]):
        z = direction.clone()
    for _ in range(200):  # the same direction, another seed for the rounding
        step = torch.finfo(dtype).eps / 50
        view.apply(Shift((Term(_ + 100, 0.0), Term(7, step))))
    moved = ((x.double() - 1) * z / torch.finfo(dtype).eps).mean()
    assert abs(moved - 4) < 0.3


def test_bf16_weights_learn_by_steps_below_their_resolution() -> None:
    target = torch.linspace(0.9, 1.1, 50)
    x = torch.full((50,), 1.0, dtype=torch.bfloat16)
    start = float((x.float() - target).square().sum())
    result = minimize(
        lambda _: float((x.float() - target).square().sum()),
        ParameterView({"x": x}),
        None,
        MeZO(1e-4, perturbation_scale=0.05),
        max_steps=4000,
        progress=False,
    )
    largest = max(record.lr * record.projected_gradient for record in result.history[-500:])
    assert largest < torch.finfo(torch.bfloat16).eps / 2  # rounding to the nearest loses all
    assert float((x.float() - target).square().sum()) < 0.5 * start
