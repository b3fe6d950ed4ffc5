"""Data: every form gives the same batches, and the order is a function of the seed alone."""

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from zo_adapt import Data, EvaluationOptions, MeZO, MeZOSVRG, ParameterView, minimize
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, as_source

N = 10
NUMBERS = list(range(N))


def rows_of(batch: Any) -> list[int]:
    """The example numbers in a batch of any form."""
    if isinstance(batch, dict):
        batch = batch["x"]
    if isinstance(batch, tuple):
        batch = batch[0]
    return [int(value) for value in batch]


def recorded(data: Any, optimizer: Any = None, **options: Any) -> list[list[int]]:
    """The rows of every call of the objective."""
    x, seen = torch.zeros(2), []

    def objective(batch: Any) -> float:
        seen.append(rows_of(batch))
        return float(x.sum())

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    settings = {"batch_size": 3, "max_steps": 7, "seed": 5, "progress": False}
    optimizer = optimizer or MeZO(1e-3, one_sided=False, num_directions=1, perturbation_scale=1e-2)
    minimize(objective, ParameterView({"x": x}), data, optimizer, **(settings | options))
    return seen


FORMS = {
    "tensor": torch.arange(N),
    "array": np.arange(N),
    "mapping": {"x": torch.arange(N), "y": np.ones(N)},
    "tuple": (torch.arange(N), torch.ones(N)),
    "list": NUMBERS,
    "list of dicts": [{"x": n, "y": 1.0} for n in NUMBERS],
    "dataset": datasets.Dataset.from_dict({"x": NUMBERS, "y": ["a"] * N}),
    "torch dataset": torch.utils.data.TensorDataset(torch.arange(N)),
}


def test_data_of_any_form_gives_the_same_batches() -> None:
    expected = recorded(FORMS["tensor"])
    for name in ("array", "mapping", "tuple", "list", "list of dicts", "dataset"):
        assert recorded(FORMS[name]) == expected, name
    as_lists = recorded(Data(FORMS["torch dataset"], collate=lambda rows: [row[0] for row in rows]))
    assert as_lists == expected


def test_collate_of_the_caller_and_of_the_objective() -> None:
    seen: list[Any] = []

    class Objective:
        mean_over_rows = True

        def collate(self, examples: list[int]) -> str:
            return "objective " + "".join(map(str, examples))

        def __call__(self, batch: Any) -> float:
            seen.append(batch)
            return 0.0

    view = ParameterView({"x": torch.zeros(1)})
    options: dict[str, Any] = {"batch_size": N, "max_steps": 1, "progress": False}
    minimize(Objective(), view, NUMBERS, MeZO.paper(1e-3), **options)
    minimize(Objective(), view, Data(NUMBERS, lambda rows: "mine"), MeZO.paper(1e-3), **options)
    assert sorted(seen[0].removeprefix("objective ")) == [str(n) for n in NUMBERS]
    assert seen[-1] == "mine"


def test_no_data_is_one_row_of_none() -> None:
    seen: list[Any] = []

    def objective(batch: Any) -> float:
        seen.append(batch)
        return float(len(seen))

    view = ParameterView({"x": torch.zeros(1)})
    result = minimize(
        objective, view, None, MeZO(1e-3, num_directions=1), max_steps=2, progress=False
    )
    assert seen == [None] * 4
    assert result.queries == 4


def drawn(seed: int, count: int, size: int = 3, **options: Any) -> list[int]:
    samples = Samples(as_source(torch.arange(N)), size, seed, **options)
    return [row for _ in range(count) for row in samples.minibatch().rows]


@pytest.mark.parametrize("classes", [None, [0, 0, 0, 0, 0, 0, 1, 1, 1, 2]])
def test_every_example_comes_once_a_pass(classes: list[int] | None, seed: int) -> None:
    rows = drawn(seed, N, classes=classes)  # three passes of ten rows
    passes = [rows[start : start + N] for start in range(0, 3 * N, N)]
    assert all(sorted(part) == NUMBERS for part in passes)
    assert len({tuple(part) for part in passes}) == 3, "every pass has an order of its own"


def test_the_order_is_a_function_of_the_seed_alone(seed: int) -> None:
    torch.manual_seed(1)
    first = drawn(seed, 8)
    torch.manual_seed(2)
    assert drawn(seed, 8) == first
    assert drawn(seed ^ 1, 8) != first
    assert drawn(7, 4) == [2, 5, 7, 8, 1, 9, 3, 4, 0, 6, 9, 2], "frozen: old runs must replay"
    assert drawn(seed, 24, size=1) == first, "the batch size does not change the order"


def test_both_ends_of_a_pair_see_the_same_rows() -> None:
    seen = recorded(torch.arange(N))
    assert seen[::2] == seen[1::2]
    assert len({tuple(rows) for rows in seen}) > 1


def test_large_batches_do_not_disturb_the_minibatches() -> None:
    def make(size: Any) -> MeZOSVRG:
        return MeZOSVRG(
            1e-3, snapshot_interval=2, snapshot_size=size, num_directions=1,
            one_sided=False, perturbation_scale=1e-2,
        )  # fmt: skip

    options = {"evaluation": EvaluationOptions(micro_batch_size=N)}
    few = recorded(torch.arange(N), make(6), **options)
    whole = recorded(torch.arange(N), make("all"), **options)
    assert [len(rows) for rows in few] == ([6] * 2 + [3] * 4) * 3 + [6] * 2
    assert [r for r in few if len(r) == 3] == [r for r in whole if len(r) == 3]
    assert all(rows == NUMBERS for rows in whole if len(rows) == N)
    large = [row for rows in few[::6] for row in rows]
    assert set(Counter(large[:N]).values()) == {1}, "large batches pass through the data too"


def test_stratified_passes_hold_every_class_in_proportion(seed: int) -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    data = {"x": torch.arange(100), "labels": labels}
    for rows in recorded(data, batch_size=20, max_steps=10, seed=seed):
        count = Counter(labels[rows].tolist())
        assert abs(count[0] - 12) <= 2
        assert abs(count[1] - 6) <= 2
        assert abs(count[2] - 2) <= 1
    uniform = recorded(Data(data, stratify=False), batch_size=20, max_steps=10, seed=seed)
    assert uniform != recorded(data, batch_size=20, max_steps=10, seed=seed)


def test_parts_of_a_batch_are_consecutive_and_even() -> None:
    batch = Batch(as_source(torch.arange(N)), [3, 1, 4, 1, 5, 9, 2])
    assert [part.rows for part in batch.split(3)] == [(3, 1), (4, 1), (5, 9, 2)]
    assert [len(part) for part in batch.split(20)] == [1] * 7
    assert [len(part) for part in batch.micro_batches(3)] == [2, 2, 3]
    assert [part.rows for part in batch.micro_batches(None)] == [batch.rows]
