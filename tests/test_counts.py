"""How far a run goes by a count: over trained weights no further than they can take."""

from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn

from objectives import F1, NDCG, Accuracy, ClassificationLoss
from zo_adapt import MeZO, MeZOSVRG, ParameterView, diagnose, minimize
from zo_adapt.optimizers.calibration import COUNT_RATIO, Calibration
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.responses import Response
from zo_adapt.optimizers.search import COUNT_SHARE


def rows() -> list[dict[str, Any]]:
    """Texts of a class each: whether tokens above the middle are more."""
    return [
        {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": int(2 * sum(i > 34 for i in ids) > len(ids)),
        }
        for ids in token_rows(128)
    ]


@cache
def trained_weights() -> dict[str, Tensor]:
    """Of a classifier that gradients have tuned: it is right nine times in ten."""
    model, data = tiny_model("bert", num_labels=2), rows()
    loss = ClassificationLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = loss.collate(data)
        error = nn.functional.cross_entropy(loss.logits(batch), batch["labels"])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return model.state_dict()


def trained(adapter: bool) -> nn.Module:
    model = tiny_model("bert", num_labels=2)
    model.load_state_dict(trained_weights())
    if not adapter:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=128, target_modules="all-linear")
        return get_peft_model(model, config).eval()


def right(model: nn.Module) -> float:
    """Share of right answers on the rows that are tuned on."""
    accuracy = Accuracy(model)
    return float(accuracy(accuracy.collate(rows())))


@pytest.mark.parametrize("metric", [Accuracy, F1])
@pytest.mark.parametrize("make", [MeZO, MeZOSVRG])
def test_a_trained_classifier_is_not_harmed(make: type[ZerothOrder], metric: type[Any]) -> None:
    model = trained(adapter=True)
    at_first, optimizer = right(model), make()
    assert at_first > 0.85
    minimize(
        metric(model), ParameterView.trainable(model), rows(), optimizer,
        batch_size=16, max_queries=3_000, progress=False,
    )  # fmt: skip
    assert optimizer.measuring_queries > 0
    assert right(model) >= at_first - 0.02


@pytest.mark.parametrize("max_queries", [700, 3_000])
def test_a_run_that_is_kept_near_says_what_goes_further(max_queries: int) -> None:
    model = trained(adapter=True)
    view, optimizer = ParameterView.trainable(model), MeZO()
    result = minimize(
        Accuracy(model), view, rows(), optimizer, batch_size=16, max_queries=max_queries,
        progress=False,
    )  # fmt: skip
    found = optimizer.state.descent.displacement
    assert found < view.displacement / 2
    assert f"set displacement={view.displacement:.3g} to go as far" in result.advice
    assert f"{found:.3g} was measured" in result.advice


def test_as_far_as_the_view_assumes_it_would_be() -> None:
    model = trained(adapter=True)
    view = ParameterView.trainable(model)
    at_first = right(model)
    minimize(
        Accuracy(model), view, rows(), MeZO(displacement=view.displacement),
        batch_size=16, max_queries=3_000, progress=False,
    )  # fmt: skip
    assert right(model) < at_first - 0.1


def test_a_new_head_has_no_search() -> None:
    """It is right by chance alone, and nothing harms that."""
    model, optimizer = tiny_model("bert", num_labels=2), MeZO()
    view = ParameterView.full(model)
    minimize(Accuracy(model), view, rows(), optimizer, batch_size=16, max_steps=2, progress=False)
    assert optimizer.measuring_queries == 0
    assert optimizer.settings()["displacement"] == view.displacement


def test_diagnose_searches_as_a_run_does() -> None:
    model = trained(adapter=True)
    view = ParameterView.trainable(model)
    found = diagnose(Accuracy(model), view, rows(), batch_size=16)
    assert found.displacement < view.displacement / 2
    assert "a third of" in str(found)


@pytest.mark.parametrize("start", [0.01, 0.25, 8.0])
def test_the_search_ends_at_a_third_of_where_damage_is_half_of_the_signal(start: float) -> None:
    search = Calibration(start, target=COUNT_RATIO, counts=True)
    while not search.finished and search.rounds < 12:
        rho = search.displacement
        search.narrow(Response(even=COUNT_RATIO * rho**2 / 0.3, odd=rho))
    assert search.finished
    assert search.found == pytest.approx(0.3 * COUNT_SHARE, rel=0.3)


def test_where_no_value_changes_a_count_goes_as_far_as_the_view_assumes() -> None:
    search = Calibration(0.25, target=COUNT_RATIO, counts=True)
    while not search.finished:
        search.narrow(Response(even=0.0, odd=0.0))
    assert search.found == pytest.approx(0.25)


def test_a_module_that_may_be_new_goes_no_nearer_in_diagnose_than_in_a_run() -> None:
    """Right by chance alone, it shows damage by chance, which shrinks no step below the usual."""
    search = Calibration(1.0, target=COUNT_RATIO, counts=True, least=0.1)
    for _ in range(4):
        search.narrow(Response(even=1.0, odd=0.1))
    assert search.found == 0.1


def test_a_scorer_that_nobody_has_trained_goes_as_far_as_its_weights_are_large() -> None:
    """A tenth of that, which the view assumes, is too little to learn anything in few queries."""

    def ranked(multiple: float | None) -> float:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            scorer = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
        features = torch.randn(64, 10, 10, generator=generator)
        grades = (features @ torch.arange(10.0)).argsort().argsort() // 2
        lists = [
            {"features": one, "relevance": relevance}
            for one, relevance in zip(features, grades, strict=True)
        ]
        ndcg, view = NDCG(scorer, k=3), ParameterView.full(scorer)
        minimize(
            ndcg, view, lists, MeZO(displacement=multiple and multiple * view.displacement),
            batch_size=16, max_queries=1_500, progress=False,
        )  # fmt: skip
        return float(torch.as_tensor(ndcg(lists)).mean())

    assert ranked(None) > ranked(1.0) + 0.1
