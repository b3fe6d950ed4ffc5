"""All examples are looked at before the first query: what their fields hold, in every form."""

import math
from collections.abc import Callable
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from test_spans import asked, reader
from torch import nn
from torch.utils.data import DataLoader, Subset

from objectives import (
    MAP,
    MRR,
    NDCG,
    KendallTau,
    QuestionAnsweringLoss,
    RecallAt,
    SpanExactMatch,
    SpanF1,
    Spearman,
)
from zo_adapt import Data, Metrics, MeZO, ParameterView, ZOConfig, ZOTrainer, minimize
from zo_adapt.errors import DataError, UndefinedMetricError

BUDGET: dict[str, Any] = {"batch_size": 1, "max_steps": 1, "progress": False}
FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "table": pd.DataFrame,
    "stored": datasets.Dataset.from_list,
    "subset": lambda rows: Subset(rows, range(len(rows))),  # type: ignore[arg-type]
    "loader": lambda rows: DataLoader(rows, batch_size=2),  # type: ignore[arg-type]
}


class Never:
    def __call__(self, *args: Any, **kwargs: Any) -> float:
        raise AssertionError("evaluated before the examples were looked at")


def mezo() -> MeZO:
    return MeZO(displacement=0.1)


def refused_at_once(of: Any, data: Any, words: str, objective: Any = None) -> None:
    """A run on the data and one that watches them: both end before anything is evaluated."""
    never, view = Never(), ParameterView.full(of.model)
    of.model.forward = never
    objective = objective or of
    with pytest.raises(DataError, match=words):
        minimize(objective, view, data, mezo(), **BUDGET)
    watched = Metrics({"watched": objective}, data=data)
    with pytest.raises(DataError, match=words):
        minimize(never, view, [1, 2], mezo(), metrics=watched, **BUDGET)


def runs(objective: Any, data: Any, **options: Any) -> None:
    view = ParameterView.full(objective.model)
    assert minimize(objective, view, data, mezo(), **BUDGET | options).steps == 1


POSITIONS = [({"end_positions": 9}, r"1\.\.9 in a text of"), ({"start_positions": -1}, r"-1\.\.2")]
POSITIONS += [({"start_positions": one}, f"position {one!r}") for one in (None, "1", 1.5, True)]
ANSWERED = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}
ANSWERED |= {"start_positions": 1, "end_positions": 2}  # type: ignore[dict-item]


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("make", [QuestionAnsweringLoss, SpanF1, SpanExactMatch])
def test_a_position_outside_its_text(make: Any, position: Any) -> None:
    wrong, words = position
    row = {"input_ids": [5, 6, 7, 8], "start_positions": 1, "end_positions": 2}
    data = [row, *asked(), row | wrong]
    refused_at_once(make(reader("distilbert")), data, f"example {len(data) - 1} .*{words}")


@pytest.mark.parametrize("form", FORMS)
def test_positions_in_every_form_of_data(form: str) -> None:
    loss = QuestionAnsweringLoss(reader())
    runs(loss, FORMS[form]([ANSWERED] * 5))
    data = FORMS[form]([*[ANSWERED] * 4, ANSWERED | {"end_positions": 3}])
    words = r"example 4 of the data is 1\.\.3 in a text of 3 tokens"
    refused_at_once(loss, data, words, objective=loss + 2 * loss)


def test_positions_of_a_collate_function_of_ones_own_are_its_own() -> None:
    """It may cut the texts and move the answers."""
    loss, moved = QuestionAnsweringLoss(reader()), {"start_positions": 0, "end_positions": 1}
    data = [row | {"start_positions": 90, "end_positions": 91} for row in asked()]
    runs(loss, Data(data, collate=lambda rows: loss.collate([row | moved for row in rows])))


def test_a_trainer_looks_as_minimize_does(tmp_path: Any) -> None:
    model = reader()
    model.forward = Never()
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = ZOConfig(str(tmp_path), max_steps=1, displacement=0.1, **options)
    data = [*[ANSWERED] * 8, ANSWERED | {"end_positions": 3}]
    trainer = ZOTrainer(model, args, train_dataset=data, objective=QuestionAnsweringLoss(model))
    with pytest.raises(DataError, match="example 8 of the data"):
        trainer.train()


RANKED = {"features": [[1.0, 2.0], [0.5, 0.1], [0.0, 3.0]], "relevance": [0, 1, 2]}
RELEVANCE: dict[str, tuple[Any, str]] = {
    "nan": ([0, float("nan"), 1], "nan"),
    "negative": ([0, -1, 1], "-1"),
    "words": (["low", "high", "low"], "'low'"),
    "one word": ("high", "'high'"),
    "missing": (None, r"shape \(\)"),
    "none": ([], r"shape \(0,\)"),
}


@pytest.mark.parametrize("case", RELEVANCE)
@pytest.mark.parametrize(
    "make", [NDCG, MAP, MRR, RecallAt, Spearman, KendallTau], ids=lambda m: m.__name__
)
def test_relevance_that_ranks_nothing(make: Any, case: str) -> None:
    wrong, words = RELEVANCE[case]
    data = [*[RANKED] * 7, RANKED | {"relevance": wrong}]
    refused_at_once(make(nn.Linear(2, 1)), data, f"query 7 of the data.*{words}")


@pytest.mark.parametrize("form", FORMS)
def test_relevance_in_every_form_of_data(form: str) -> None:
    metric = NDCG(nn.Linear(2, 1))
    runs(metric, FORMS[form]([RANKED] * 5))
    data = FORMS[form]([*[RANKED] * 4, RANKED | {"relevance": [0.0, -1.0, 1.0]}])
    refused_at_once(metric, data, r"query 4 of the data has the relevance \[0.0, -1.0, 1.0\]")


def test_a_query_without_a_value_is_refused_skipped_or_watched_as_nan() -> None:
    data = [*[RANKED] * 7, RANKED | {"relevance": torch.zeros(3)}]
    runs(MAP(nn.Linear(2, 1), undefined="skip", min_rows="all"), data, batch_size=4)
    strict = MAP(nn.Linear(2, 1))
    result = minimize(
        lambda batch: 0.0, ParameterView.full(strict.model), None, mezo(), max_steps=1,
        progress=False, metrics=Metrics({"map": strict}, data=data),
    )  # fmt: skip
    assert math.isnan(result.metrics["map"])
    strict.model.forward = Never()
    with pytest.raises(UndefinedMetricError, match="query 7 of the data"):
        minimize(strict, ParameterView.full(strict.model), data, mezo(), **BUDGET)


def test_a_gain_may_be_too_large() -> None:
    large = [*[RANKED] * 7, RANKED | {"relevance": [0, 600, 1]}]
    refused_at_once(NDCG(nn.Linear(2, 1), gain="exponential"), large, "relevance of 600")


def test_labels_of_watched_data() -> None:
    """A bad one would end the run at the first measurement."""
    from tiny_models import tiny_model

    from objectives import Accuracy

    metric = Accuracy(tiny_model("bert"))
    rows = [{"input_ids": [5, 6], "labels": label} for label in (0, 1, 2)]
    refused_at_once(metric, rows, r"labels lie in 0\.\.2")
