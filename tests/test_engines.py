"""Ask and tell with an engine of the caller's own is step for step the plain loop."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from joblib import Parallel, delayed

from zo_adapt import AskTell, MeZOSVRG

Map = Callable[[Callable[[Any], float], list[Any]], list[float]]


def simulate(x: np.ndarray) -> float:
    return float(((x - 3.0) ** 2).sum())


@contextmanager
def plain() -> Iterator[Map]:
    yield lambda function, candidates: [function(x) for x in candidates]


@contextmanager
def threads() -> Iterator[Map]:
    with ThreadPoolExecutor(2) as pool:
        yield lambda function, candidates: list(pool.map(function, candidates))


@contextmanager
def processes() -> Iterator[Map]:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        yield lambda function, candidates: list(pool.map(function, candidates))


@contextmanager
def by_joblib() -> Iterator[Map]:
    with Parallel(n_jobs=2, backend="threading") as parallel:
        yield lambda function, candidates: parallel(delayed(function)(x) for x in candidates)


def run(engine: Any, *, pickled: bool = False) -> np.ndarray:
    asker = AskTell(MeZOSVRG(), np.zeros(5), max_queries=400)
    with engine() as evaluated:
        while candidates := asker.ask():
            asker = pickle.loads(pickle.dumps(asker)) if pickled else asker
            asker.tell(evaluated(simulate, candidates))
    found: np.ndarray = asker.x
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", [threads, processes, by_joblib], ids=lambda e: e.__name__)
def test_an_engine_of_the_callers_own_makes_the_same_run(engine: Any) -> None:
    assert np.array_equal(run(engine), run(plain))


def test_a_dialogue_may_be_pickled_while_candidates_are_out() -> None:
    assert np.array_equal(run(plain, pickled=True), run(plain))
