"""Metrics of a classifier: scikit-learn's on the whole set, however it is cut, and climbed."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import tiny_config, tiny_model, token_rows
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, EvalPrediction, TrainingArguments

from objectives import (
    F1,
    NDCG,
    ROCAUC,
    Accuracy,
    ExactMatch,
    MatthewsCorrelation,
    MetricObjective,
    VerbalizerLoss,
)
from objectives._set_metric import SetMetric
from zo_adapt import (
    ZOSVRG,
    MeZO,
    ParameterView,
    SetObjective,
    ZOConfig,
    ZOTrainer,
    minimize,
)
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import (
    DataError,
    MissingPackageError,
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    UndefinedMetricError,
)
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

QUIET: dict[str, Any] = {"progress": False}


class Table(nn.Module):
    """A model whose logits are its input: what the metrics make of them is all there is to see."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def whole(logits: np.ndarray, labels: np.ndarray, **scores: Any) -> dict[str, Tensor]:
    return {"x": torch.as_tensor(logits), "labels": torch.as_tensor(labels)}


def in_parts(metric: Any, logits: np.ndarray, labels: np.ndarray, size: int | None) -> float:
    """The metric as the engine evaluates it, in micro-batches."""
    batch = Batch(as_source(whole(logits, labels)), range(len(labels)))
    view = ParameterView.full(metric.model)
    return (
        -LocalEvaluator(metric, view, EvaluationOptions(micro_batch_size=size))
        .evaluate([Probe(HERE, batch)])[0]
        .value
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(1).numpy()


SINGLE: dict[str, tuple[Callable[[nn.Module], Any], Callable[..., float]]] = {
    "accuracy": (Accuracy, lambda y, f: reference.accuracy_score(y, f.argmax(1))),
    "exact match": (ExactMatch, lambda y, f: reference.accuracy_score(y, f.argmax(1))),
    "matthews": (MatthewsCorrelation, lambda y, f: reference.matthews_corrcoef(y, f.argmax(1))),
} | {
    f"f1 {average}": (
        lambda model, average=average: F1(model, average=average),
        lambda y, f, average=average: reference.f1_score(
            y, f.argmax(1), average=average, zero_division=0.0
        ),
    )
    for average in ("macro", "micro", "weighted")
}
CUTS = (None, 1, 3, 7)


@pytest.mark.parametrize("name", SINGLE)
@settings(max_examples=15, deadline=None)
@given(
    data=st.integers(1, 24).flatmap(
        lambda n: st.tuples(
            # few distinct values, so that ties and absent classes are common
            arrays(np.float32, (n, 3), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
            arrays(np.int64, (n,), elements=st.integers(0, 2)),
        )
    ),
    size=st.sampled_from(CUTS),
)
def test_equal_to_scikit_learn_on_the_whole_set_however_it_is_cut(
    name: str, data: tuple[np.ndarray, np.ndarray], size: int | None
) -> None:
    logits, labels = data
    make, expected = SINGLE[name]
    found = in_parts(make(Table()), logits, labels, size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")
        assert found == pytest.approx(expected(labels, logits), abs=1e-12)


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("seed", range(3))
def test_roc_auc_of_two_and_of_more_classes(seed: int, size: int | None) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(20) % 2
    two = rng.integers(-2, 3, (20, 2)).astype(np.float32)
    expected = reference.roc_auc_score(labels, softmax(two)[:, 1])
    assert in_parts(ROCAUC(Table()), two, labels, size) == pytest.approx(expected)
    one = two[:, :1]
    assert in_parts(ROCAUC(Table()), one, labels, size) == pytest.approx(
        reference.roc_auc_score(labels, one[:, 0])
    )
    labels, four = np.arange(20) % 4, rng.standard_normal((20, 4)).astype(np.float32)
    for multi_class in ("ovr", "ovo"):
        metric = ROCAUC(Table(), multi_class=multi_class, average="weighted")
        assert in_parts(metric, four, labels, size) == pytest.approx(
            reference.roc_auc_score(
                labels, softmax(four), multi_class=multi_class, average="weighted"
            )
        )


def test_the_area_is_one_for_a_perfect_order_and_none_for_the_reverse() -> None:
    labels, logits = np.array([0, 1, 1]), np.array([[0.0], [1.0], [2.0]], dtype=np.float32)
    assert in_parts(ROCAUC(Table()), logits, labels, None) == 1.0
    assert in_parts(ROCAUC(Table()), -logits, labels, None) == 0.0


@pytest.mark.parametrize("size", CUTS)
def test_several_labels_at_once(size: int | None) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, 3)).astype(np.float32)
    labels = (rng.random((20, 3)) < 0.5).astype(np.float32)
    said = (logits > 0).astype(int)
    for metric, expected in (
        (Accuracy, reference.accuracy_score(labels, said)),
        (ExactMatch, reference.accuracy_score(labels, said)),
        (F1, reference.f1_score(labels, said, average="macro")),
        (ROCAUC, reference.roc_auc_score(labels, logits)),
    ):
        assert in_parts(metric(Table()), logits, labels, size) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [Accuracy, ExactMatch, F1, MatthewsCorrelation, ROCAUC])
@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (1, [0, 2, 1, -1], r"labels \[-1, 2\] .*0 and 1, for one logit"),
        (1, [0.0, 0.5, 1.0, 1.0], r"labels \[0.5\]"),
        (3, [0.0, 0.5, 1.0, 1.0], r"labels \[0.5\] .*classes 0"),
    ],
)
def test_labels_that_are_no_classes_are_named(
    metric: Any, columns: int, labels: list[float], message: str
) -> None:
    logits = np.zeros((4, columns), np.float32)
    size = None if metric is ExactMatch else 3  # it judges each part apart
    with pytest.raises(DataError, match=message):
        in_parts(metric(Table()), logits, np.array(labels), size)


def test_labels_of_one_logit_may_be_floats_and_truth_values() -> None:
    logits = np.array([[1.0], [-1.0], [2.0]], np.float32)
    for labels in ([1.0, 0.0, 0.0], [True, False, False], [1, 0, 0]):
        assert in_parts(Accuracy(Table()), logits, np.array(labels), 2) == pytest.approx(2 / 3)
        assert in_parts(F1(Table(), average="binary"), logits, np.array(labels), None) > 0.6


def test_binary_f1_is_that_of_class_one() -> None:
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    labels = np.array([1, 0, 1, 0])
    metric = F1(Table(), average="binary")
    assert in_parts(metric, logits, labels, 3) == pytest.approx(0.5)
    assert in_parts(metric, logits[:, 1:] - 0.5, labels, 3) == pytest.approx(0.5)
    with pytest.raises(OptionError, match=r"average='binary' with 3 classes; choose 'macro'"):
        in_parts(metric, np.zeros((4, 3), np.float32), labels, None)


def test_exact_match_of_token_labels_whatever_the_padding() -> None:
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(tiny_config("bert", num_labels=3)).eval()
    rows = token_rows(6)
    with torch.no_grad():
        said = [model(torch.tensor([row])).logits[0].argmax(-1).tolist() for row in rows]
    labels = [list(one) for one in said]
    labels[1][0] = (labels[1][0] + 1) % 3  # wrong
    labels[2][1] = -100  # not counted
    labels[4][-1] = (labels[4][-1] + 1) % 3  # wrong
    examples = [{"input_ids": i, "labels": y} for i, y in zip(rows, labels, strict=True)]
    metric = ExactMatch(model)
    expected = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert metric(examples).tolist() == expected
    batch = Batch(as_source(examples, metric.collate), range(6))
    evaluator = LocalEvaluator(
        metric, ParameterView.full(model), EvaluationOptions(micro_batch_size=2)
    )
    per_example = evaluator.evaluate([Probe(HERE, batch)])[0].per_example
    assert (-per_example).tolist() == expected


def test_a_prompted_classifier_has_metrics_too() -> None:
    loss = VerbalizerLoss(tiny_model("gpt2", "causal"), [7, 30])
    examples = [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(9))]
    labels = [i % 2 for i in range(9)]
    said = loss.logits(examples).argmax(-1)
    assert Accuracy(loss)(examples) == pytest.approx(reference.accuracy_score(labels, said))
    assert F1(loss)(examples) == pytest.approx(reference.f1_score(labels, said, average="macro"))


# --- compute_metrics ----------------------------------------------------------------------------


def compute(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction
    return {"eval_f1": reference.f1_score(labels, logits.argmax(-1)), "loss": 3.0, "mae": 2.0}


def metric_of(name: str, **options: Any) -> MetricObjective:
    options = {"compute_metrics": compute} | options
    return MetricObjective(Table(), metric_for_best_model=name, **options)


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("name", ["f1", "eval_f1"])
def test_compute_metrics_is_called_once_on_the_whole_set(name: str, size: int | None) -> None:
    calls: list[int] = []

    def counted(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(len(prediction.label_ids))
        assert isinstance(prediction.predictions, np.ndarray)
        return compute(prediction)

    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((11, 2)).astype(np.float32), np.arange(11) % 2
    metric = metric_of(name, compute_metrics=counted)
    expected = reference.f1_score(labels, logits.argmax(1))
    assert in_parts(metric, logits, labels, size) == pytest.approx(expected)
    assert calls == [11]


@pytest.mark.parametrize("name", ["f1", "eval_f1", "loss", "eval_loss", "mae"])
def test_the_default_orientation_is_that_of_training_arguments(name: str, tmp_path: Any) -> None:
    arguments = TrainingArguments(str(tmp_path), metric_for_best_model=name, use_cpu=True)
    assert metric_of(name).maximize is arguments.greater_is_better
    assert metric_of(name, greater_is_better=False).maximize is False


def test_token_labels_of_any_length_are_padded_as_trainer_does() -> None:
    seen: list[EvalPrediction] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"a": 0.0}

    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(tiny_config("bert", num_labels=3)).eval()
    metric = MetricObjective(model, compute_metrics=keep, metric_for_best_model="a")
    examples = [{"input_ids": row, "labels": [0] * len(row)} for row in token_rows(5)]
    metric.score([metric.predict(examples[:2]), metric.predict(examples[2:])])
    assert seen[0].predictions.shape == (5, 7, 3)
    assert (seen[0].label_ids[0] == [0, 0, 0, -100, -100, -100, -100]).all()


def test_preprocess_logits_for_metrics() -> None:
    metric = metric_of(
        "share",
        compute_metrics=lambda p: {"share": (p.predictions == p.label_ids).mean()},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    logits, labels = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 3])
    assert in_parts(metric, logits, labels, 3) == pytest.approx(0.75)


# --- in a run -----------------------------------------------------------------------------------


def blobs(n: int = 96, classes: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    x = torch.randn(n, 4, generator=generator)
    x[torch.arange(n), labels] += 2.0
    return {"input": x, "labels": labels}


def linear(classes: int = 2) -> nn.Module:
    layer = nn.Linear(4, classes)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[torch.arange(classes), torch.arange(classes)] = -0.3
    return layer


@pytest.mark.parametrize("metric", [Accuracy, F1, MatthewsCorrelation, ROCAUC, ExactMatch])
def test_a_metric_climbs_without_being_told_to_and_the_same_seed_climbs_the_same(
    metric: Any,
) -> None:
    def run() -> tuple[float, float, list[float], Tensor]:
        model, data = linear(), blobs()
        objective = metric(model)
        before = float(np.mean(objective(data)))
        result = minimize(
            objective, ParameterView.trainable(model), data,
            MeZO(displacement=1.0, perturbation_scale=0.2), batch_size=48,
            max_queries=3_000, seed=3, **QUIET,
        )  # fmt: skip
        after = float(np.mean(objective(data)))
        return before, after, [record.value for record in result.history], model.weight.detach()

    before, after, history, weight = run()
    assert before < 0.35
    assert after > max(0.8, before + 0.3), (before, after)
    assert all(-1 <= value <= 1 for value in history), "the history shows the metric, not its sign"
    again = run()
    assert again[2] == history
    assert torch.equal(again[3], weight)


def test_a_loss_among_the_metrics_falls() -> None:
    model, data = linear(), blobs()
    x, labels = data.values()
    objective = MetricObjective(
        model,
        compute_metrics=lambda p: {
            "loss": reference.log_loss(p.label_ids, softmax(p.predictions), labels=[0, 1])
        },
        metric_for_best_model="eval_loss",
    )
    before = objective({"input": x, "labels": labels})
    minimize(
        objective, ParameterView.trainable(model), data, MeZO(displacement=1.0), batch_size=48,
        max_queries=10_000, **QUIET,
    )  # fmt: skip
    assert objective({"input": x, "labels": labels}) < 0.7 * before


class Recorded(F1):
    """Keeps the number of rows of every evaluation."""

    rows: list[int]

    def score(self, predictions: list[Any]) -> Any:
        self.rows.append(sum(len(part.labels) for part in predictions))
        return super().score(predictions)


@pytest.mark.parametrize(
    ("optimizer", "min_rows", "expected"),
    [
        (MeZO(displacement=0.25), "all", [48] * 8),
        (MeZO(displacement=0.25, num_directions=2), 16, [16] * 6),
        (MeZO(displacement=0.25, one_sided=False), "all", [48] * 16),
        (MeZO(displacement=0.25, one_sided=False, num_directions=2), 16, [24] * 4),
        (MeZO(displacement=0.25, one_sided=False, num_directions=4), "all", [48] * 8),
        (MeZO(displacement=0.25, num_directions=3, one_sided=True), "all", [48] * 3),
        (
            MeZO(displacement=0.25, num_directions=3, one_sided=True, shaping="base"),
            "all",
            [48] * 4,
        ),
        (MeZO(displacement=0.25, one_sided=False, num_directions=4), 8, [12] * 8),
    ],
)
def test_a_batch_is_not_cut_below_what_the_metric_needs(
    optimizer: Any, min_rows: Any, expected: list[int]
) -> None:
    model = linear()
    objective = Recorded(model, min_rows=min_rows)
    objective.rows = []
    view = ParameterView.trainable(model)
    minimize(
        objective,
        view,
        blobs(),
        optimizer,
        batch_size=48,
        max_steps=1,
        evaluation=EvaluationOptions(micro_batch_size=7),
        **QUIET,
    )
    assert objective.rows == expected


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # Trainer asks for it on a CPU too
def test_the_batch_of_a_trainer_is_not_cut_either(tmp_path: Any) -> None:
    model = tiny_model("bert")
    objective = Recorded(model)
    objective.rows, objective.independent_rows = [], False  # one call a point
    args = ZOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, report_to="none", use_cpu=True,
        disable_tqdm=True, displacement=0.25,
    )  # fmt: skip
    data = [{"input_ids": [5, 6 + i], "labels": i % 2} for i in range(16)]
    ZOTrainer(model, args, train_dataset=data, objective=objective).train()
    assert objective.rows == [8] * 8


def test_a_direction_for_every_sample_is_refused_for_a_set() -> None:
    model = linear()
    with pytest.raises(OptionError, match=r"one sample at a time.*MeZO or MeZOSVRG"):
        minimize(
            F1(model), ParameterView.trainable(model), blobs(), ZOSVRG(), batch_size=8,
            max_steps=1, **QUIET,
        )  # fmt: skip


@pytest.mark.parametrize("metric", [Accuracy, F1, MatthewsCorrelation, ROCAUC, ExactMatch])
def test_evaluation_mode_and_the_protocol(metric: Any) -> None:
    model = tiny_model("bert").train()
    objective = metric(model)
    assert isinstance(objective, SetMetric)
    assert isinstance(objective, SetObjective)
    assert objective.maximize is True
    examples = [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(8))]
    assert np.array_equal(objective(examples), objective(examples)), "dropout is off"
    assert model.training, "and on again afterwards"


# --- bad input ----------------------------------------------------------------------------------


def test_one_class_only_is_named_and_leaves_the_weights() -> None:
    model, data = linear(), blobs()
    data["labels"] = torch.ones(96, dtype=torch.long)
    start = model.weight.detach().clone()
    # In the search for a displacement, and in the first step.
    for optimizer, rows in ((MeZO(), 64), (MeZO(displacement=0.25), 48)):
        message = rf"classes \[0, 1\].*{rows} rows.*raise batch_size"
        with pytest.raises(UndefinedMetricError, match=message):
            minimize(
                ROCAUC(model), ParameterView.trainable(model), data, optimizer, batch_size=48,
                max_steps=2, **QUIET,
            )  # fmt: skip
    assert torch.equal(model.weight, start)


def test_a_class_that_is_absent_is_named() -> None:
    labels = np.array([0, 1, 1, 0])
    with pytest.raises(UndefinedMetricError, match=r"classes \[2\]"):
        in_parts(ROCAUC(Table()), np.zeros((4, 3), np.float32), labels, None)


@pytest.mark.parametrize("metric", [Accuracy, F1, MatthewsCorrelation, ROCAUC, ExactMatch])
def test_labels_that_are_missing_or_of_another_shape(metric: Any) -> None:
    with pytest.raises(DataError, match=r"no labels, only \['x'\]"):
        metric(Table())({"x": torch.zeros(2, 2)})
    with pytest.raises(DataError, match=r"labels of shape \(3,\) for logits of shape \(2, 2\)"):
        metric(Table())({"x": torch.zeros(2, 2), "labels": torch.zeros(3)})


@pytest.mark.parametrize("metric", [Accuracy, F1, MatthewsCorrelation, ExactMatch])
def test_nan_logits_are_an_error_although_they_have_a_largest_one(metric: Any) -> None:
    logits = torch.tensor([[0.0, torch.nan], [0.0, 1.0]])
    with pytest.raises(NonFiniteObjectiveError, match="1 of 4 outputs"):
        metric(Table())({"x": logits, "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ({"accuracy": 1.0, "f2": 1.0}, ObjectiveError, r"'f1' is not among.*\['accuracy', 'f2'\]"),
        ({"f1": float("nan")}, UndefinedMetricError, r"NaN for 'f1' on 2 rows.*\[0, 1\]"),
        ({"f1": "high"}, ObjectiveError, "gave str for 'f1'"),
        (None, ObjectiveError, "returned NoneType"),
    ],
)
def test_what_compute_metrics_must_not_return(returned: Any, error: Any, message: str) -> None:
    metric = metric_of("f1", compute_metrics=lambda prediction: returned)
    with pytest.raises(error, match=message):
        metric({"x": torch.zeros(2, 2), "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize(
    "make",
    [
        lambda: F1(Table(), average="samples"),
        lambda: F1(Table(), min_rows=0),
        lambda: ROCAUC(Table(), multi_class="all"),
        lambda: ROCAUC(Table(), average="micro"),
        lambda: metric_of("f1", compute_metrics={"f1": 1.0}),
    ],
)
def test_options_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match=r"choose|cannot be called"):
        make()


@pytest.mark.parametrize("metric", [F1, ROCAUC, MatthewsCorrelation, NDCG])
def test_without_its_package_a_metric_is_refused_when_it_is_made(
    metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn .*'zo_adapt\[metrics\]'"):
        metric(nn.Identity())
    assert Accuracy(nn.Identity())({"input": torch.eye(2), "labels": torch.tensor([0, 0])}) == 0.5
