"""What a record holds comes back, bit for bit, whatever the seeds and groups of its terms."""

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zo_adapt import MeZO, ParameterView, Shift, Term
from zo_adapt.noise.seeds import LOOK_BACK, Seeds
from zo_adapt.term import Step
from zo_adapt.trajectory.file import Reader
from zo_adapt.trajectory.header import header_of
from zo_adapt.trajectory.record import decoded, encoded
from zo_adapt.trajectory.writer import Writer

STREAM = Seeds(11)
DRAWN = 300
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
GROUPS = st.one_of(st.none(), st.integers(0, 254))


@st.composite
def runs(draw: st.DrawFn) -> list[Term]:
    """Terms with consecutive seeds of the stream, or any seed, over one list of groups."""
    groups = draw(st.lists(GROUPS, min_size=1, max_size=3))
    first, count = draw(st.integers(0, DRAWN - 9)), draw(st.integers(1, 9))
    seeds = draw(
        st.one_of(
            st.just(STREAM.take(first, count)),
            st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
        )
    )
    return [Term(seed, draw(NUMBERS), group) for seed in seeds for group in groups]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    terms=st.lists(runs(), max_size=4),
    decay=NUMBERS,
    queries=st.integers(0, 2**48 - 1),
    numbers=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    kind=st.sampled_from(["minibatch", "snapshot"]),
    rate=st.sampled_from([0.0, 0.1]),
    at_rate=st.booleans(),
)
def test_a_step_comes_back(
    terms: list[list[Term]],
    decay: float,
    queries: int,
    numbers: tuple[float, float, float],
    kind: str,
    rate: float,
    at_rate: bool,
) -> None:
    decay = 1.0 - numbers[1] * rate if at_rate else decay
    update = Shift(tuple(term for run in terms for term in run), decay)
    step = Step(7, queries, *numbers, update, kind)
    again = decoded(7, encoded(step, STREAM, DRAWN, rate), STREAM, rate)
    assert again == step
    # -0.0 equals 0.0, and is not the same coefficient
    for one, other in zip(step.update.terms, again.update.terms, strict=True):
        assert struct.pack("<d", one.coefficient) == struct.pack("<d", other.coefficient)


def test_seeds_are_the_optimizers() -> None:
    optimizer = MeZO(num_directions=3)
    optimizer.start(ParameterView({"x": torch.zeros(2)}), 11)
    drawn = [seed for count in (1, 3, 4, 5) for seed in optimizer.state.new_seeds(count)]
    assert drawn == STREAM.take(0, 13)
    assert optimizer.drawn == 13
    assert STREAM.take(5, 0) == []


def size(seeds: list[int], drawn: int, groups: tuple[int | None, ...] = (None,)) -> int:
    terms = tuple(Term(seed, 0.1, group) for seed in seeds for group in groups)
    return len(encoded(Step(1, 1, 1.0, 1.0, 1.0, Shift(terms)), STREAM, drawn))


def test_seeds_of_the_stream_cost_nothing() -> None:
    empty = size([], 0)
    assert size(STREAM.take(40, 8), 48) == empty + 8 + 8 * 8
    assert size(STREAM.take(40, 8), 48, (0, 2)) == empty + 8 + 2 + 2 * 8 * 8
    # a step that refers to a snapshot: its own seed, and the snapshot's
    assert size(STREAM.take(5_000, 1) + STREAM.take(100, 8), 5_001) == empty + 2 * 8 + 9 * 8
    # further back than is searched, or no word of the stream: given
    far = LOOK_BACK + 10
    assert size(STREAM.take(0, 8), far) == empty + 8 + 8 * 16
    assert size([5, 6, 7], 48) == empty + 8 + 3 * 16


def test_a_file_without_counters_is_replayed_alike(tmp_path: Path) -> None:
    from zo_adapt import replay

    update = Shift(tuple(Term(seed, 0.1) for seed in STREAM.take(0, 6)))
    hashes = []
    for drawn in (0, 6):
        view = ParameterView({"x": torch.zeros(5)})
        with_path = tmp_path / str(drawn)
        writer = Writer(with_path, header_of(view, STREAM.key))
        writer.append(Step(1, 1, 1.0, 1.0, 1.0, update), drawn)
        replay(view, with_path)
        hashes.append(view.hash())
        assert next(Reader(with_path).steps())[0].update == update
    assert hashes[0] == hashes[1]
    assert (tmp_path / "0").stat().st_size == (tmp_path / "6").stat().st_size + 6 * 8


@pytest.mark.parametrize("drawn", [0, 1, 5, 100_000])
def test_find(drawn: int) -> None:
    last = STREAM.take(max(drawn - 3, 0), min(drawn, 3))
    expected: list[int | None] = list(range(max(drawn - 3, 0), drawn))
    assert STREAM.find([*last, 5], drawn) == [*expected, None]
