"""Ask and tell: minimize step for step, picklable between any two calls, state safe from errors."""

import math
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from problems import bits, labelled, logistic
from table import ZEROTH_ORDER, Row

from zo_adapt import (
    SGD,
    AskTell,
    Group,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Step,
    StopReason,
    minimize,
)
from zo_adapt.errors import (
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    StepTooLargeError,
    ViewError,
)

EVERY = pytest.mark.parametrize("row", ZEROTH_ORDER.values(), ids=ZEROTH_ORDER)
DATA = labelled(24, 10)
Values = dict[str, Any]


def mezo(**options: Any) -> MeZO:
    """With pairs: two candidates a step."""
    return MeZO(**({"num_directions": 1, "one_sided": False} | options))


def start(dtype: Any = np.float64) -> Values:
    return {"w": np.full((2, 4), 0.3, dtype), "b": np.full(2, -0.2, dtype)}


def loss(x: Values) -> float:
    theta = torch.cat([torch.as_tensor(value).flatten().double() for value in x.values()])
    return float(logistic(theta, DATA).mean())


def made(row: Row) -> Any:
    """The row's optimizer for a function without data, whose one row is its largest batch."""
    return row.make(**({"snapshot_size": "all"} if "snapshot_size" in row.options else {}))


def talk(
    asker: AskTell, value: Callable[[Any], Any], between: Callable[[AskTell], AskTell] | None = None
) -> tuple[AskTell, list[Step], list[Any]]:
    """The whole dialogue, with ``between`` applied after every call."""
    records, places = [], []
    keep = between or (lambda same: same)
    while candidates := asker.ask():
        asker = keep(asker)
        records.append(asker.tell([value(candidate) for candidate in candidates]))
        asker = keep(asker)
        places.append(asker.x)
    return asker, records, places


def same(a: Values, b: Values) -> bool:
    return all(np.array_equal(a[name].view(np.uint8), b[name].view(np.uint8)) for name in a)


@EVERY
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_it_is_minimize_step_for_step(dtype: Any, row: Row) -> None:
    live, places = start(dtype), []

    def keep(record: Step) -> None:
        places.append({name: value.copy() for name, value in live.items()})

    result = minimize(
        lambda batch: loss(live), ParameterView(live, noise=row.noise), None, made(row),
        max_steps=8, seed=7, callback=keep, progress=False,
    )  # fmt: skip
    asker, records, told = talk(
        AskTell(made(row), start(dtype), max_steps=8, seed=7, noise=row.noise), loss
    )
    assert records == result.history
    assert (asker.queries, asker.steps) == (result.queries, 8)
    assert all(same(a, b) for a, b in zip(told, places, strict=True))
    assert not same(told[-1], start(dtype)), "nothing moved"


@EVERY
def test_a_pickle_between_any_two_calls_changes_nothing(row: Row) -> None:
    whole = talk(AskTell(made(row), start(), max_steps=8, seed=7, noise=row.noise), loss)
    cut = talk(
        AskTell(made(row), start(), max_steps=8, seed=7, noise=row.noise),
        loss,
        lambda asker: pickle.loads(pickle.dumps(asker)),
    )
    assert cut[1] == whole[1]
    assert all(same(a, b) for a, b in zip(cut[2], whole[2], strict=True))


def test_a_pickle_is_a_branch_of_its_own() -> None:
    asker = AskTell(mezo(lr=0.1), start(), max_steps=4)
    asker.tell([loss(x) for x in asker.ask()])
    branch, here = pickle.loads(pickle.dumps(asker)), asker.x
    talk(branch, loss)
    assert same(asker.x, here)
    assert (asker.steps, branch.steps) == (1, 4)


def test_asked_again_the_candidates_are_the_same() -> None:
    asker = AskTell(MeZO(displacement=0.5), start(), max_steps=2)
    first, again = asker.ask(), asker.ask()
    assert len(first) == 8
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_candidates_and_x_are_copies() -> None:
    x0 = start()
    asker = AskTell(mezo(lr=0.1), x0, max_steps=2)
    for candidate in (*asker.ask(), asker.x):
        candidate["w"][:] = 99.0
    assert same(asker.x, start())
    asker.tell([1.0, 0.0])
    assert same(x0, start())


def test_candidates_lie_around_x_by_mu() -> None:
    asker = AskTell(mezo(lr=0.1, perturbation_scale=0.5), np.ones(50), max_steps=1)
    up, down = asker.ask()
    assert np.allclose(up + down, 2.0)
    assert 0.3 < (up - 1).std() < 0.7


@pytest.mark.parametrize(
    ("x0", "kind", "dtype"),
    [
        ([0, 1], np.ndarray, np.float64),
        (np.array([0, 1]), np.ndarray, np.float64),
        (np.array([0.5, 1.0], dtype=">f8")[::-1], np.ndarray, np.float64),
        (np.float32(0.5), np.ndarray, np.float32),
        (torch.ones(2, dtype=torch.bfloat16), torch.Tensor, torch.bfloat16),
    ],
)
def test_candidates_have_the_form_of_x0(x0: Any, kind: type, dtype: Any) -> None:
    asker = AskTell(mezo(lr=0.1, perturbation_scale=0.5), x0, max_steps=1)
    for given in (*asker.ask(), asker.x):
        assert isinstance(given, kind)
        assert given.dtype == dtype  # type: ignore[attr-defined]
        assert given.shape == np.shape(x0)  # type: ignore[attr-defined]
    assert asker.x.tolist() == (x0 if isinstance(x0, list) else x0.tolist())


def test_a_mapping_may_mix_tensors_and_arrays() -> None:
    asker = AskTell(mezo(lr=0.1), {"t": torch.ones(2), "a": np.ones(2)}, max_steps=1)
    kinds = {name: type(value) for name, value in asker.ask()[0].items()}
    assert kinds == {"t": torch.Tensor, "a": np.ndarray}


@pytest.mark.parametrize(
    ("budget", "steps", "reason"),
    [
        ({"max_steps": 3}, 3, StopReason.MAX_STEPS),
        ({"max_steps": 0}, 0, StopReason.MAX_STEPS),
        ({"max_queries": 7}, 3, StopReason.MAX_QUERIES),
        ({"max_queries": 0}, 0, StopReason.MAX_QUERIES),
        ({"max_queries": 100, "max_steps": 4}, 4, StopReason.MAX_STEPS),
    ],
)
def test_budgets(budget: dict[str, int], steps: int, reason: StopReason) -> None:
    asker, records, _ = talk(AskTell(mezo(lr=0.1), start(), **budget), loss)
    assert (len(records), asker.queries, asker.stop_reason) == (steps, 2 * steps, reason)
    assert asker.ask() == []
    with pytest.raises(ObjectiveError, match="tell without ask"):
        asker.tell([])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0], ObjectiveError, "1 values for 2 candidates"),
        ([1.0, 2.0, 3.0], ObjectiveError, "3 values for 2"),
        ([1.0, None], ObjectiveError, "NoneType; that is not one number"),
        ([1.0, [1.0, 2.0]], ObjectiveError, "not one number"),
        ([1.0, "a"], ObjectiveError, "not one number"),
        ([1.0, math.nan], NonFiniteObjectiveError, "value 1 is nan"),
        ([-math.inf, 1.0], NonFiniteObjectiveError, "value 0 is -inf"),
    ],
)
def test_after_bad_values_the_same_candidates_can_be_told(
    values: list[Any], error: type[Exception], message: str
) -> None:
    expected = talk(AskTell(mezo(lr=0.1), start(), max_steps=3), loss)[1]
    asker = AskTell(mezo(lr=0.1), start(), max_steps=3)
    candidates = asker.ask()
    with pytest.raises(error, match=message):
        asker.tell(values)
    assert asker.queries == 0
    first = asker.tell(np.array([[loss(x)] for x in candidates]))  # arrays of one number do
    assert [first, *talk(asker, loss)[1]] == expected


@pytest.mark.parametrize("row", ["MeZO", "MeZOSVRG"])
@pytest.mark.parametrize("huge", [1e200, 1.7e308])
def test_a_step_beyond_every_number_ends_the_run_where_it_was(row: str, huge: float) -> None:
    """The coefficient overflows, or already the estimate does: 1e200 squared."""
    optimizer = mezo(lr=1e200) if row == "MeZO" else MeZOSVRG(lr=1e200)
    asker = AskTell(optimizer, start(), max_steps=9)
    while asker.steps < 2:
        asker.tell([0.0] * len(asker.ask()))
    before = asker.x
    with pytest.raises(StepTooLargeError):
        for _ in range(7):
            count = len(asker.ask())
            asker.tell([huge * (-1) ** k / (k + 1) for k in range(count)])
    assert asker.stop_reason is StopReason.STEP_TOO_LARGE
    assert same(asker.x, before)
    assert asker.steps == 2
    assert asker.ask() == []


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", ["ask", "tell", "apply"])
def test_ctrl_c_comes_after_what_was_begun(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    asker, twin = (AskTell(mezo(lr=0.1), np.ones(3), max_steps=4) for _ in range(2))
    owner = asker._view if moment == "apply" else type(asker._optimizer)
    method = getattr(owner, moment)

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return method(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, moment, interrupted)
        asker.tell([(x**2).sum() for x in asker.ask()])
    for one in (asker, twin):
        while candidates := one.ask():
            one.tell([(x**2).sum() for x in candidates])
    assert (asker.x.tolist(), asker.queries) == (twin.x.tolist(), twin.queries)


def test_tell_needs_ask() -> None:
    with pytest.raises(ObjectiveError, match="tell without ask"):
        AskTell(mezo(lr=0.1), start(), max_steps=3).tell([1.0, 2.0])


def test_maximize_is_the_negative() -> None:
    down = talk(AskTell(MeZOSVRG(), start(), max_steps=5), loss)
    up = talk(AskTell(MeZOSVRG(), start(), max_steps=5, maximize=True), lambda x: -loss(x))
    assert same(up[2][-1], down[2][-1])
    assert [r.value for r in up[1]] == [-r.value for r in down[1]]


def test_groups_and_noise_are_the_views() -> None:
    asker = AskTell(
        mezo(lr=0.1, perturbation_scale=0.5), start(), max_steps=1,
        noise="rademacher", groups=[Group("b", perturbation_scale=0.0)],
    )  # fmt: skip
    up = asker.ask()[0]
    assert np.array_equal(up["b"], start()["b"])
    assert np.allclose(np.abs(up["w"] - 0.3), 0.5)


def test_the_optimizer_given_is_copied() -> None:
    shared = MeZOSVRG()
    one = AskTell(shared, start(), max_steps=6)
    other = AskTell(shared, start(), max_steps=6, seed=1)
    one.ask()
    other.ask()
    assert talk(one, loss)[1] == talk(AskTell(MeZOSVRG(), start(), max_steps=6), loss)[1]
    assert shared.steps == 0


def test_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore  # noqa: NPY002
    talk(AskTell(MeZOSVRG(), start(), max_steps=3), loss)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # type: ignore  # noqa: NPY002


@pytest.mark.parametrize(
    ("x0", "options", "error", "message"),
    [
        (np.zeros(2), {}, OptionError, "give a budget"),
        (np.zeros(2), {"max_steps": -1}, OptionError, "max_steps=-1"),
        (np.zeros(2), {"max_steps": 1, "seed": -1}, OptionError, "seed=-1"),
        (np.array([1.0, math.nan]), {"max_steps": 1}, ViewError, "finite"),
        (np.array(["a"]), {"max_steps": 1}, ViewError, "not numbers"),
        (np.array([None]), {"max_steps": 1}, ViewError, "not numbers"),
        (np.array([1j]), {"max_steps": 1}, ViewError, "complex"),
        (np.array([True]), {"max_steps": 1}, ViewError, "bool"),
        (np.zeros(0), {"max_steps": 1}, ViewError, "no elements"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), {"max_steps": 1}, ViewError, "masked"),
        (torch.zeros(2, device="meta"), {"max_steps": 1}, ViewError, "meta"),
        ({}, {"max_steps": 1}, ViewError, "no tensors"),
    ],
)
def test_bad_input_is_named(
    x0: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AskTell(mezo(lr=0.1), x0, **options)


def test_a_first_order_optimizer_is_refused() -> None:
    with pytest.raises(OptionError, match="SGD needs more than values"):
        AskTell(SGD(lr=0.1), np.zeros(2), max_steps=1)  # type: ignore[arg-type]


def test_a_view_of_arrays_is_live() -> None:
    x = np.zeros(3)
    view = ParameterView({"x": x})
    minimize(
        lambda batch: float(((x - 3) ** 2).sum()), view, None, mezo(lr=1e-2),
        max_steps=500, progress=False,
    )  # fmt: skip
    assert (abs(x - 3) < 0.1).all()
    assert torch.equal(bits(view.tensors["x"]), bits(torch.from_numpy(x)))


def test_arrays_that_cannot_be_shared_are_named() -> None:
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    with pytest.raises(ViewError, match="'x' is read-only"):
        ParameterView({"x": frozen})
    with pytest.raises(ViewError, match="cannot be shared with torch"):
        ParameterView({"x": np.zeros(3)[::-1]})


@pytest.mark.parametrize(
    "told",
    [
        1.0, None, {0: 1.0}, np.array(1.0), "12", b"12", bytearray(2), {1.0, 2.0},
        (value for value in (1.0, 2.0)), {1.0: 0, 2.0: 0}.keys(), torch.tensor(1.0),
    ],
)  # fmt: skip
def test_what_is_no_list_of_values_is_named(told: Any) -> None:
    asker = AskTell(mezo(lr=0.1), {"x": np.zeros(2)}, max_steps=3)
    candidates = asker.ask()
    with pytest.raises(ObjectiveError, match="one number for each candidate"):
        asker.tell(told)
    asker.tell([0.0] * len(candidates))


@pytest.mark.parametrize(
    "value",
    [
        "3.5",
        b"3",
        1 + 2j,
        np.datetime64("NaT", "s"),
        np.timedelta64(5, "s"),
        np.ma.masked,
        10**400,
        object(),
    ],
    ids=lambda value: type(value).__name__,  # an address would differ from worker to worker
)
def test_what_only_looks_like_a_number_is_named(value: Any) -> None:
    asker = AskTell(mezo(lr=0.1), np.zeros(2), max_steps=3)
    count = len(asker.ask())
    with pytest.raises(ObjectiveError, match=r"the value is .*that is not one number"):
        asker.tell([0.0] * (count - 1) + [value])
    asker.tell([0.0] * count)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda k: k.__name__)
def test_values_may_come_in_any_sequence_of_numbers(kind: Any) -> None:
    asker = AskTell(mezo(lr=0.1), np.zeros(2), max_steps=3)
    values = [float(x.sum()) for x in asker.ask()]
    assert asker.tell(kind(values)).value == pytest.approx(np.mean(values), abs=1e-6)
