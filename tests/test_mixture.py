"""Sums of objectives: their values, which way they go, and what they refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn

from objectives import (
    F1,
    Accuracy,
    CallableObjective,
    CausalLMLoss,
    ClassificationLoss,
    MatthewsCorrelation,
    Mixture,
    VerbalizerLoss,
)
from zo_adapt import Adam, MeZO, ParameterView, SetObjective, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import ObjectiveError, OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

QUIET: dict[str, Any] = {"progress": False}
ROWS = torch.tensor([1.0, 2.0, 4.0])


def squares(x: Tensor) -> Tensor:
    return x.square()


def twice(x: Tensor) -> list[float]:
    return (2 * x).tolist()


LOSS = CallableObjective(squares)
REWARD = CallableObjective(twice, maximize=True)
MEAN = CallableObjective(lambda x: float(x.mean()))


def examples(rows: int = 10) -> list[dict[str, Any]]:
    return [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(rows))]


@pytest.mark.parametrize(
    ("mixed", "expected", "maximize"),
    [
        (0.7 * LOSS - 0.3 * REWARD, lambda x: 0.7 * x**2 - 0.6 * x, False),
        (LOSS * 2 + LOSS, lambda x: 3 * x**2, False),
        (REWARD - LOSS, lambda x: 2 * x - x**2, True),
        (-REWARD, lambda x: -2 * x, False),
        (-(REWARD - LOSS) / 2, lambda x: (x**2 - 2 * x) / 2, False),
        (-LOSS, lambda x: -(x**2), True),
        (sum([LOSS, LOSS]), lambda x: 2 * x**2, False),
        (LOSS + squares, lambda x: 2 * x**2, False),
        (squares - REWARD, lambda x: x**2 - 2 * x, False),
        (np.float64(0.5) * LOSS, lambda x: x**2 / 2, False),
        (LOSS + 0.0 * REWARD, lambda x: x**2, False),
    ],
)
def test_a_sum_of_values_per_example(mixed: Any, expected: Any, maximize: bool) -> None:
    assert isinstance(mixed, Mixture)
    assert torch.allclose(mixed(ROWS), expected(ROWS).double())
    assert mixed.maximize is maximize
    assert not isinstance(mixed, SetObjective), "nothing in it needs the whole set"


def test_means_where_a_part_gives_one_number() -> None:
    assert float((LOSS + MEAN)(ROWS)) == pytest.approx(7 + 7 / 3)


def test_parts_that_pull_in_opposite_ways_are_refused() -> None:
    message = r"less is better.*more is better.*opposite ways.*loss - 0\.3 \* reward"
    with pytest.raises(OptionError, match=message):
        LOSS + 0.3 * REWARD
    with pytest.raises(OptionError, match="opposite ways"):
        REWARD - 0.5 * REWARD
    with pytest.raises(OptionError, match="squares"):
        REWARD + squares


@pytest.mark.parametrize(
    "bad",
    [
        lambda: LOSS * float("nan"),
        lambda: LOSS * "2",
        lambda: True * LOSS,
        lambda: LOSS * LOSS,
        lambda: LOSS + 3.0,
        lambda: LOSS - "reward",
        lambda: Mixture([]),
    ],
)
def test_what_is_no_weight_and_no_objective(bad: Any) -> None:
    with pytest.raises(OptionError, match=r"choose a finite number|cannot be called|no objectives"):
        bad()


@pytest.mark.parametrize("size", [None, 1, 3, 4])
def test_a_set_level_part_is_scored_once_and_the_rest_is_weighted_by_rows(
    size: int | None,
) -> None:
    model = tiny_model("bert")
    loss, f1, data = ClassificationLoss(model), F1(model), examples()
    mean = CallableObjective(
        lambda batch: float(loss(batch).mean()), model=model, mean_over_rows=True
    )
    scored: list[int] = []
    score = f1.score
    f1.score = lambda parts: scored.append(len(parts)) or score(parts)  # type: ignore[method-assign]
    mixed = 0.7 * loss - 0.3 * f1 + 2.0 * mean
    assert isinstance(mixed, SetObjective)
    batch = Batch(as_source(data, mixed.collate), range(10))
    evaluator = LocalEvaluator(
        mixed, ParameterView.full(model), EvaluationOptions(micro_batch_size=size)
    )
    value = evaluator.evaluate([Probe(HERE, batch)])[0].value
    with torch.no_grad():
        expected = 2.7 * float(loss(data).double().mean()) - 0.3 * score([f1.predict(data)])
    assert value == pytest.approx(expected, rel=1e-6)
    assert scored == [-(-10 // size) if size else 1]


def test_parts_of_one_model_share_the_forward() -> None:
    model, calls = tiny_model("bert"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    mixed = ClassificationLoss(model) - Accuracy(model) - MatthewsCorrelation(model)
    batch = mixed.collate(examples())
    first = mixed(batch)
    assert len(calls) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert float(mixed(batch)) != float(first), "nothing is kept from one call to the next"
    assert len(calls) == 2


def test_a_narrowed_head_is_not_shared() -> None:
    model = tiny_model("gpt2", "causal")
    loss, words = CausalLMLoss(model), VerbalizerLoss(model, [7, 30])
    batch = [{"input_ids": row} for row in token_rows(6)]
    both = (loss + words)._collate([one | {"label": 1} for one in batch])
    labels = torch.ones(6, dtype=torch.long)
    inputs = {k: v for k, v in both.of_part[1].items() if k != "labels"}
    mixed = 0.5 * CallableObjective(lambda b: loss(inputs)) + 0.5 * CallableObjective(
        lambda b: words(inputs | {"labels": labels})
    )
    expected = 0.5 * loss(inputs) + 0.5 * words(inputs | {"labels": labels})
    assert torch.allclose(mixed(inputs), expected.double())


def test_every_part_has_its_own_batch() -> None:
    words = CallableObjective(lambda b: [float(len(t)) for t in b], collate=lambda e: e)
    firsts = CallableObjective(lambda b: b[:, 0], collate=torch.tensor)
    mixed = words + firsts
    rows = [[1.0, 0.0], [5.0, 1.0]]
    assert mixed(mixed.collate(rows)).tolist() == [3.0, 7.0]


def test_a_run_follows_the_orientation_and_the_seed() -> None:
    def run(make: Any) -> tuple[Tensor, list[float]]:
        x = torch.zeros(2)
        loss = CallableObjective(lambda batch: float((x - 3).square().sum()))
        result = minimize(
            make(loss), ParameterView({"x": x}), None, MeZO(lr=1e-2), max_steps=500, **QUIET
        )
        return x, [record.value for record in result.history]

    down, values = run(lambda loss: 2.0 * loss)
    up, rising = run(lambda loss: -2.0 * loss)
    assert (down - 3).abs().max() < 0.05
    assert torch.equal(down, up)
    assert rising == [-value for value in values]
    assert run(lambda loss: 2.0 * loss)[1] == values


def test_loss_and_metric_together_in_a_run() -> None:
    model = nn.Linear(4, 2)
    labels = torch.arange(64) % 2
    data = {"input": torch.randn(64, 4) + 2 * labels[:, None], "labels": labels}
    loss, accuracy = ClassificationLoss(model), Accuracy(model)
    mixed = loss - 0.5 * accuracy
    before = float(mixed(data))
    minimize(
        mixed, ParameterView.trainable(model), data, MeZO(displacement=1.0), batch_size=32,
        max_queries=5_000,        **QUIET,
    )  # fmt: skip
    assert float(mixed(data)) < before - 0.3
    assert mixed.min_rows == accuracy.min_rows == 32  # what the part that counts needs
    assert (loss - 0.5 * Accuracy(model, softness=1.0)).min_rows == 1
    assert (loss - F1(model)).min_rows == "all"


def test_a_sum_of_losses_has_a_gradient() -> None:
    model = nn.Linear(4, 2)
    data = {"input": torch.randn(32, 4), "labels": torch.arange(32) % 2}
    loss = ClassificationLoss(model)
    result = minimize(
        0.5 * loss + 0.5 * loss, ParameterView.trainable(model), data, Adam(1e-2), batch_size=32,
        max_steps=20, **QUIET,
    )  # fmt: skip
    assert result.history[-1].value < result.history[0].value
    with pytest.raises(ObjectiveError, match="without a gradient"):
        minimize(
            loss - Accuracy(model), ParameterView.trainable(model), data, Adam(1e-2), batch_size=32,
            max_steps=1, **QUIET,
        )  # fmt: skip


def test_a_part_that_returns_nothing_is_named() -> None:
    with pytest.raises(ObjectiveError, match="returned NoneType"):
        (LOSS + CallableObjective(lambda x: None))(ROWS)
