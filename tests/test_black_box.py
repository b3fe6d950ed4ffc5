"""Plain functions of few variables: bounds, units, failing simulations, restarts, best points."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, minimize

from zo_adapt import AskTell, MeZO, MeZOSVRG, scipy_method
from zo_adapt.errors import NonFiniteObjectiveError, OptionError


def bowl(x: Any, at: float = 3.0) -> float:
    return float(((np.asarray(x) - at) ** 2).sum())


def drive(asker: AskTell, function: Callable[[Any], float]) -> list[Any]:
    seen = []
    while candidates := asker.ask():
        seen += candidates
        asker.tell([function(x) for x in candidates])
    return seen


class TestBounds:
    @pytest.mark.parametrize(
        "bounds",
        [(-1.0, 2.0), [(-1.0, 2.0)] * 3, np.array([[-1.0, 2.0]] * 3), Bounds(-1.0, 2.0)],
        ids=["one pair", "pairs", "array", "scipy"],
    )
    @pytest.mark.parametrize("optimizer", [MeZO(displacement=0.5), MeZOSVRG(displacement=0.5)])
    def test_every_candidate_is_within_and_the_bound_is_reached(
        self, optimizer: Any, bounds: Any
    ) -> None:
        asker = AskTell(optimizer, np.zeros(3), max_queries=3000, bounds=bounds, units=2.0)
        seen = drive(asker, bowl)  # whose best point within is the corner (2, 2, 2)
        assert all((x >= -1.0).all() and (x <= 2.0).all() for x in seen)
        assert abs(asker.x - 2.0).max() < 0.2

    @pytest.mark.parametrize("side, answer", [((0.5, None), 3.0), ((None, 1.0), 1.0)])
    def test_one_sided(self, side: Any, answer: float) -> None:
        asker = AskTell(MeZO(), np.full(2, 0.75), max_queries=3000, bounds=side, units=2.0)
        seen = drive(asker, bowl)
        low, high = (-math.inf if side[0] is None else side[0]), side[1] or math.inf
        assert all((x >= low).all() and (x <= high).all() for x in seen)
        assert abs(asker.x - answer).max() < 0.2

    def test_a_variable_between_equal_bounds_stays(self) -> None:
        bounds = [(0.0, 0.0), (-1.0, 2.0), (None, None)]
        asker = AskTell(MeZO(), np.zeros(3), max_queries=2000, bounds=bounds, units="auto")
        assert {x[0] for x in drive(asker, bowl)} == {0.0}
        assert abs(asker.x[1:] - [2.0, 3.0]).max() < 0.3

    def test_by_name_and_in_tensors(self) -> None:
        start = {"a": torch.zeros(2, dtype=torch.float64), "b": np.zeros(1)}
        asker = AskTell(MeZO(), start, max_queries=400, bounds={"a": (-1.0, 0.5)})
        seen = drive(asker, lambda x: float(((x["a"] - 3) ** 2).sum()) + bowl(x["b"]))
        assert all(float(x["a"].max()) <= 0.5 for x in seen)
        assert isinstance(asker.x["a"], torch.Tensor) and isinstance(asker.x["b"], np.ndarray)

    def test_within_them_nothing_changes(self) -> None:
        ends = []
        for bounds in (None, (-50.0, 50.0)):
            asker = AskTell(MeZO(), np.zeros(3), max_queries=200, bounds=bounds)
            drive(asker, bowl)
            ends.append(asker.x.tolist())
        assert ends[0] == ends[1]

    @pytest.mark.parametrize(
        "bounds, said",
        [
            ((1.0, -1.0), "above its high"),
            ((math.nan, 1.0), "above its high"),
            ((1.0, 2.0), "outside its bounds"),
            ([(0.0, 1.0)] * 4, "bounds of shape"),
            ("wide", "pairs"),
            ({"y": (0, 1)}, "not the name"),
        ],
    )
    def test_refused(self, bounds: Any, said: str) -> None:
        with pytest.raises(OptionError, match=said):
            AskTell(MeZO(), np.zeros(3), max_steps=1, bounds=bounds)

    def test_by_scipy(self) -> None:
        found = minimize(
            bowl,
            np.zeros(3),
            bounds=[(-1, 2)] * 3,
            method=scipy_method("mezo-svrg", maxfev=3000, units=2.0),
        )
        assert found.success and abs(found.x - 2.0).max() < 0.2 and found.nfev <= 3000


class TestUnits:
    def test_variables_of_unlike_sizes(self) -> None:
        sizes = np.array([1e-3, 1.0, 1e4])

        def function(x: np.ndarray) -> float:
            return bowl(x / sizes, 0.5)

        wide = [(0.0, float(size)) for size in sizes]
        errors = {}
        for units in (None, "auto", sizes):
            asker = AskTell(
                MeZO(displacement=0.5), 0.1 * sizes, max_queries=4000, bounds=wide, units=units
            )
            drive(asker, function)
            errors[str(units)] = float(abs(asker.x / sizes - 0.5).max())
        assert errors.pop("None") > 0.3 and max(errors.values()) < 0.15

    @pytest.mark.parametrize("units", [0.0, -1.0, [1.0, 2.0], "wide", math.inf])
    def test_refused(self, units: Any) -> None:
        with pytest.raises(OptionError, match="units"):
            AskTell(MeZO(), np.zeros(3), max_steps=1, units=units)


def fails_at_times(seed: int = 0, value: float = math.nan) -> Callable[[Any], float]:
    random = np.random.default_rng(seed)
    return lambda x: value if random.random() < 0.1 else bowl(x, 0.5)


class TestNonFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("way", ["worst", "skip"])
    @pytest.mark.parametrize(
        "optimizer",
        [MeZO(), MeZO(displacement=0.5), MeZOSVRG(displacement=0.5), MeZO(lr=1e-2)],
        ids=["measured", "mezo", "mezo-svrg", "rate"],
    )
    def test_a_failing_simulation_ends_nothing(
        self, optimizer: Any, way: Any, value: float
    ) -> None:
        asker = AskTell(optimizer, np.zeros(4), max_queries=2000, on_nonfinite=way)
        drive(asker, fails_at_times(value=value))
        assert np.isfinite(asker.x).all() and asker.queries <= 2000 and asker.steps > 20
        assert bowl(asker.x, 0.5) < 0.5 * bowl(np.zeros(4), 0.5)

    def test_stops_unless_told_otherwise(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4)
        others = [1.0] * (len(asker.ask()) - 1)
        with pytest.raises(NonFiniteObjectiveError):
            asker.tell([math.nan, *others])

    def test_a_skipped_step_counts_its_candidates_and_asks_others(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4, on_nonfinite="skip")
        first = asker.ask()
        record = asker.tell([math.nan] + [1.0] * (len(first) - 1))
        assert record.kind == "skipped" and asker.queries == len(first) and asker.steps == 0
        assert not np.array_equal(first[0], asker.ask()[0]) and (asker.x == 0).all()

    def test_a_function_without_any_value_ends(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4, on_nonfinite="skip")
        with pytest.raises(NonFiniteObjectiveError, match="100 steps in a row"):
            drive(asker, lambda _: math.nan)
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4, on_nonfinite="worst")
        with pytest.raises(NonFiniteObjectiveError):
            drive(asker, lambda _: math.nan)

    def test_by_scipy(self) -> None:
        for way, good in (("stop", False), ("skip", True), ("worst", True)):
            found = minimize(
                fails_at_times(1),
                np.zeros(3),
                method=scipy_method("mezo", maxfev=500, lr=1e-2, on_nonfinite=way),
            )
            assert found.success is (good and bool(np.isfinite(found.fun)))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("way", ["stop", "worst", "skip"])
    def test_no_value_at_all_is_no_success(self, way: str, value: float) -> None:
        method = scipy_method("mezo", maxfev=200, on_nonfinite=way)
        found = minimize(lambda x: value, np.zeros(3), method=method)
        assert not found.success and "finite" in found.message and (found.x == 0).all()

    def test_a_last_point_without_a_value_is_no_success(self) -> None:
        method = scipy_method("mezo", maxfev=200, on_nonfinite="worst")
        found = minimize(lambda x: math.nan if x[0] > -1 else 1.0, np.zeros(1), method=method)
        assert not found.success and not np.isfinite(found.fun)


class TestPoints:
    def test_the_best_and_the_averaged(self) -> None:
        random = np.random.default_rng(0)
        seen = []

        def noisy(x: np.ndarray) -> float:
            seen.append((bowl(x, 0.3) + 0.3 * random.normal(), x.copy()))
            return seen[-1][0]

        asker = AskTell(MeZO(), np.zeros(6), max_queries=4000)
        assert asker.best is None and (asker.averaged == asker.x).all()
        drive(asker, noisy)
        value, x = min(seen, key=lambda pair: pair[0])
        assert asker.best is not None and asker.best.value == value
        assert np.array_equal(asker.best.x, x)
        assert bowl(asker.averaged, 0.3) < bowl(asker.best.x, 0.3)

    def test_the_best_of_what_is_maximised(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=5, maximize=True)
        values = []

        def function(x: np.ndarray) -> float:
            values.append(-bowl(x))
            return values[-1]

        drive(asker, function)
        assert asker.best is not None and asker.best.value == max(values)

    def test_survive_copies(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=8, bounds=(-1, 1), units="auto")
        drive_some = [asker.tell([bowl(x) for x in asker.ask()]) for _ in range(4)]
        others = [copy.deepcopy(asker), pickle.loads(pickle.dumps(asker)), asker]
        ends = []
        for one in others:
            drive(one, bowl)
            assert one.best is not None
            ends.append((one.x.tolist(), one.averaged.tolist(), one.best.value))
        assert ends[0] == ends[1] == ends[2] and len(drive_some) == 4


class TestScipy:
    def test_restarts_share_the_calls(self) -> None:
        calls = []

        def function(x: np.ndarray) -> float:
            calls.append(x)
            return bowl(x, 0.5)

        found = minimize(function, np.zeros(3), method=scipy_method("mezo", maxfev=900, restarts=2))
        assert found.success and found.nfev == len(calls) <= 900 and found.fun < 0.2
        assert found.fun_best <= found.fun and found.x_mean.shape == (3,)

    def test_workers(self) -> None:
        ends = []
        for workers in (1, 2, map):
            found = minimize(
                bowl,
                np.zeros(2),
                method=scipy_method("mezo", maxfev=41, lr=1e-2, workers=workers),
            )
            ends.append((found.x.tolist(), found.nfev))
        assert ends[0] == ends[1] == ends[2]

    @pytest.mark.parametrize(
        "options", [{"workers": 0}, {"workers": "all"}, {"restarts": -1}, {"restarts": 0.5}]
    )
    def test_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            minimize(bowl, np.zeros(2), method=scipy_method("mezo", maxfev=20, **options))

    def test_a_function_that_no_process_can_be_given(self) -> None:
        with pytest.raises(OptionError, match="top of a module"):
            minimize(lambda x: 0.0, np.zeros(2), method=scipy_method(maxfev=20, workers=2))

    @pytest.mark.parametrize("maxfev", [1, 2, 8])
    def test_too_few_calls_are_no_success(self, maxfev: int) -> None:
        found = minimize(bowl, np.zeros(2), method=scipy_method("mezo", maxfev=maxfev, restarts=2))
        assert not found.success and found.nfev == 1 and found.fun == bowl(np.zeros(2))

    @pytest.mark.filterwarnings("ignore::zo_adapt.errors.FlatObjectiveWarning")
    def test_no_success_where_nothing_was_done(self) -> None:
        found = minimize(
            lambda x: 1.0, np.zeros(2), method=scipy_method("mezo", maxfev=100, lr=1e-2)
        )
        assert not found.success and "nothing moved" in found.message
        assert (found.x == 0).all()
