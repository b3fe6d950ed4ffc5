"""Data as torch, numpy, pandas and Hugging Face users hold them: all forms make one run."""

from multiprocessing import get_context
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from objectives import Accuracy, ClassificationLoss
from zo_adapt import Data, MeZO, ParameterView, Result, Shift, Term, minimize
from zo_adapt.data.examples import class_labels, labels_to_check
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.errors import DataError

ROWS = 24
X = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
XN, YN = X.double().numpy(), Y.numpy()
PAIRS = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
BY_NAME = [{"input": x.tolist(), "label": y} for x, y in PAIRS]
SET = TensorDataset(X, Y)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def tuned(data: Any, **options: Any) -> Result:
    model = net()
    settings: dict[str, Any] = {"batch_size": 8, "max_steps": 2, "progress": False}
    settings["metrics"] = {"accuracy": Accuracy(model)}
    return minimize(
        ClassificationLoss(model), ParameterView.full(model), data,
        MeZO(lr=0.02, perturbation_scale=1e-2), **(settings | options),
    )  # fmt: skip


FORMS: dict[str, Any] = {
    "arrays": (XN, YN),
    "small integers": (XN, YN.astype(np.int8)),
    "table and column": (pd.DataFrame(XN), pd.Series(YN, index=range(100, 100 + ROWS))),
    "array and list": (X.numpy(), YN.tolist()),
    "pairs": PAIRS,
    "pairs of lists": [(x.tolist(), y) for x, y in PAIRS],
    "TensorDataset": SET,
    "Subset": Subset(SET, range(ROWS)),
    "DataLoader": DataLoader(SET, batch_size=4, shuffle=True, drop_last=True),
    "DataLoader of rows": DataLoader(SET, batch_size=None),
    "mapping of arrays": {"input": XN, "labels": YN},
    "lists by name": {"input": X.tolist(), "label": YN.tolist()},
    "structured": np.array(
        [(tuple(x), y) for x, y in zip(XN, YN, strict=True)],
        dtype=[("input", "f8", 3), ("label", "i4")],
    ),
    "objects": np.array(BY_NAME, dtype=object),
    "DataFrame": pd.DataFrame(BY_NAME, index=range(7, 7 + ROWS)),
    "Dataset": datasets.Dataset.from_list(BY_NAME),
}


@pytest.fixture(scope="module")
def expected() -> Result:
    return tuned((X, Y))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_makes_the_same_run(form: str, expected: Result) -> None:
    found = tuned(FORMS[form])
    assert found.history == expected.history, "values, rows and stratification alike"
    assert found.metrics == expected.metrics
    assert class_labels(Data(FORMS[form]).examples) == YN.tolist()


def test_pairs_of_named_inputs_and_batches_made_by_torch() -> None:
    loss = ClassificationLoss(net())
    whole = loss((X, Y))
    assert torch.equal(loss([({"input": x}, y) for x, y in PAIRS]), whole)
    (batch,) = DataLoader(SET, batch_size=ROWS)
    assert isinstance(batch, list)
    assert torch.equal(loss(batch), whole)


def test_labels_of_a_ready_batch_may_be_a_list_and_must_be_numbers() -> None:
    loss = ClassificationLoss(net())
    assert torch.equal(loss({"input": X, "label": YN.tolist()}), loss((X, Y)))
    for labels in (["yes"] * ROWS, np.array(["yes"] * ROWS), np.array(["yes"] * ROWS, object)):
        for batch in ({"input": X, "label": labels}, (X, np.asarray(labels))):
            with pytest.raises(DataError, match=r"'yes'.*; map the names to integers"):
                loss(batch)
    with pytest.raises(DataError, match="has no labels"):
        loss({"input": X, "labels": None})


def test_a_bare_function_gets_the_pair_as_it_is() -> None:
    x, seen = torch.zeros(1), []

    def function(batch: Any) -> float:
        seen.append(batch)
        return 0.0

    options: dict[str, Any] = {"batch_size": 2, "max_steps": 1, "progress": False}
    minimize(function, ParameterView({"x": x}), (XN, YN), MeZO(lr=0.1), **options)
    assert [type(part) for part in seen[-1]] == [np.ndarray, np.ndarray]


def test_the_collate_function_of_a_loader_is_used_unless_there_is_another() -> None:
    loader = DataLoader([1, 2, 3], collate_fn=sum)
    assert Data(loader).source().take([0, 2]) == 4
    assert Data(loader, collate=max).source().take([0, 2]) == 3
    assert Data(DataLoader([1, 2, 3])).source(min).take([0, 2]) == 1, "torch's own is no choice"


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Any:
        return iter(PAIRS)


SPLITS = datasets.DatasetDict({"train": FORMS["Dataset"], "test": FORMS["Dataset"]})
REFUSED: dict[str, tuple[Any, str]] = {
    "DatasetDict": (SPLITS, r"DatasetDict of the data sets \['test', 'train'\]; choose one"),
    "lists of examples": ({"a": BY_NAME, "b": BY_NAME}, r"data sets \['a', 'b'\]; choose one"),
    "stream": (FORMS["Dataset"].to_iterable_dataset(), r"no length; make a list of it"),
    "loader of a stream": (DataLoader(Stream()), "has no length"),
    "weighted loader": (
        DataLoader(SET, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
        "WeightedRandomSampler, which chooses rows",
    ),
    "part of a loader": (
        DataLoader(SET, sampler=RandomSampler(SET, num_samples=3)),
        "RandomSampler, which chooses rows",
    ),
    "generator": ((row for row in PAIRS), "generator has no length; make a list of it"),
    "set": ({1, 2}, "set, which has no order"),
    "nothing": ([], "hold no examples"),
    "no rows": (torch.zeros(0, 3), "hold no examples"),
    "empty table": (pd.DataFrame({"x": []}), "hold no examples"),
    "empty mapping": ({}, "empty mapping"),
    "lists of other lengths": ({"x": [1, 2], "y": [1]}, r"\{'x': 2, 'y': 1\} rows"),
    "text in a mapping": ({"x": "abc", "y": [1]}, r"\{'x': 'str'\}, which are no columns"),
    "a column and text": ((X, "labels"), r"tuple of \['Tensor', 'str'\]"),
    "sparse matrix": ((csr_matrix(XN), YN), r"csr_matrix of scipy; give it dense"),
    "sparse tensor": (X.to_sparse(), "sparse_coo tensor"),
    "meta tensor": (X.to("meta"), "meta device"),
    "masked": (np.ma.masked_less(XN, 0), "masked entries"),
    "columns twice": (
        pd.DataFrame([[1, 2]], columns=["x", "x"]),
        r"\['x'\] of the table are there",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_rows_is_named_with_the_way_out(case: str) -> None:
    data, words = REFUSED[case]
    with pytest.raises(DataError, match=words):
        Data(data)


def test_a_forward_may_call_its_object_as_it_likes() -> None:
    class Odd(nn.Module):
        def __init__(this) -> None:
            super().__init__()
            this.layer = nn.Linear(4, 3)

        def forward(this, x: Tensor) -> Tensor:
            return this.layer(x)  # type: ignore[no-any-return]

    pairs = (torch.randn(8, 4), torch.arange(8) % 3)
    assert ClassificationLoss(Odd())(pairs).shape == (8,)


def test_a_module_that_names_no_argument() -> None:
    class Any_(nn.Module):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return args[0]

    with pytest.raises(DataError, match="names no argument to take x of"):
        ClassificationLoss(Any_())((X, Y))


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "text among numbers": ([0] * 20 + ["one"], r"example 20 is 'one', .*1 of 21"),
    "none among numbers": ([0, None] * 5, r"example 1 is (None|nan), .*5 of 10"),
    "missing in a table": ([0.0, 1.0, float("nan")], "example 2 is nan"),
    "out of range": ([0, 1, 2], r"labels lie in 0\.\.2, the model has 2 classes"),
    "marked to be ignored": ([0, 1, -100], "-100, which marks what no loss counts"),
}


@pytest.mark.parametrize("kind", ["rows", "columns", "pairs", "table"])
@pytest.mark.parametrize("case", BAD_LABELS)
def test_one_bad_label_is_found_before_any_evaluation(case: str, kind: str) -> None:
    labels, words = BAD_LABELS[case]
    inputs = [[1.0, 2.0]] * len(labels)
    rows = [{"input": x, "label": y} for x, y in zip(inputs, labels, strict=True)]
    data = {
        "rows": rows,
        "columns": {"input": inputs, "label": labels},
        "pairs": list(zip(inputs, labels, strict=True)),
        "table": pd.DataFrame(rows).astype({"label": object}),
    }[kind]
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"num_labels": 2})()  # type: ignore[assignment]
    model.forward = None  # type: ignore[assignment]
    with pytest.raises(DataError, match=words):
        minimize(
            ClassificationLoss(model), ParameterView.full(model), data,
            batch_size=1, max_steps=1, progress=False,
        )  # fmt: skip


def test_labels_are_read_without_making_the_rows() -> None:
    made: list[int] = []

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made.extend(range(len(rows["input"])))
        return {"input": rows["input"], "label": [label % 2 for label in rows["label"]]}

    stored = [row | {"label": row["label"] + 2} for row in BY_NAME]
    data = datasets.Dataset.from_list(stored).with_transform(transform)
    assert class_labels(data) == [row["label"] for row in stored]
    assert labels_to_check(data) is None, "the transform may give other labels"
    assert not made
    tuned(data, max_steps=1, metrics=None)
    once = len(made)
    assert once < ROWS, "the rows of a step, and those of the looks before the first"
    tuned(data, max_steps=3, metrics=None)
    assert len(made) == once + once + 2 * 8, "a step makes its own rows, once"


def test_a_large_batch_of_all_rows_is_named_all() -> None:
    samples = Samples(as_source(X), 4, 0)
    assert samples.large("all").rows == tuple(range(ROWS))
    assert len(samples.large(5)) == 5


def test_a_forked_child_runs_a_large_view() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.zeros(3 << 20)
        view = ParameterView({"x": x})
        with view.shifted([Term(5, 0.5)]):
            expected = view.hash()
        context = get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=lambda: answers.put(stepped_hash(view)))
        child.start()
        child.join(20)
        is_hanging = child.is_alive()
        child.kill()
        assert not is_hanging, "the child waits for threads that it does not have"
        assert answers.get() == expected == stepped_hash(view), "and in the parent as well"
    finally:
        torch.set_num_threads(threads)


def stepped_hash(view: ParameterView) -> str:
    """The hash of the weights after a probe and a step."""
    with view.shifted([Term(6, 0.5)]):
        pass
    view.apply(Shift((Term(5, 0.5),)))
    return view.hash()
