"""Metrics of interest beside the objective, in minimize and in ZOTrainer."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from problems import Problem, flat, logistic, problem
from torch import Tensor

from objectives import ROCAUC, Accuracy, CallableObjective
from zo_adapt import Data, Metrics, MeZO, ParameterView, Result, Step, StopReason, minimize
from zo_adapt.errors import ArgumentTypeError, DataError, OptionError

OPTIMIZER: dict[str, Any] = {"lr": 0.05, "perturbation_scale": 0.05, "num_directions": 1}


def run(p: Problem, **options: Any) -> Result:
    settings: dict[str, Any] = {"batch_size": 6, "max_steps": 7, "progress": False}
    return minimize(p.objective, p.view, p.data, MeZO(**OPTIMIZER), **(settings | options))


def test_metrics_are_those_of_the_weights_after_the_step() -> None:
    p = problem()
    held_out = p.data[:10]
    expected: list[float] = []

    def keep(record: Step) -> None:
        expected.append(float(logistic(flat(p.view), held_out).mean()))
        if record.step % 3:
            assert record.metrics is None
        else:
            assert record.metrics == {"loss": pytest.approx(expected[-1], rel=1e-12)}

    result = run(p, metrics=Metrics({"loss": p.objective}, held_out, every=3), callback=keep)
    assert [r.step for r in result.history if r.metrics] == [3, 6]
    assert result.metrics == {"loss": pytest.approx(expected[-1], rel=1e-12)}
    assert result.metric_queries == 30


def test_they_change_nothing_and_are_counted_apart() -> None:
    plain, watched = problem(), problem()
    sizes: list[int] = []

    def counting(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return logistic(flat(watched.view), batch)

    counting.mean_over_rows = True  # type: ignore[attr-defined]
    without = run(plain, max_steps=None, max_queries=100)
    watching = Metrics({"loss": counting}, every=1)
    with_them = run(watched, max_steps=None, max_queries=100, metrics=watching)
    assert watched.view.hash() == plain.view.hash()
    assert with_them.queries == without.queries == 96
    assert with_them.metric_queries == sum(sizes) == 8 * 24  # not measured twice at the end
    assert max(sizes) <= 6, "no larger than a minibatch"
    assert [r._replace(metrics=None) for r in with_them.history] == without.history
    assert (without.metrics, without.metric_queries) == (None, 0)


class Share:
    """A set-level metric of which more is better."""

    maximize = True

    def __init__(self, p: Problem) -> None:
        self.p = p

    def predict(self, batch: Tensor) -> Tensor:
        return logistic(flat(self.p.view), batch) < math.log(2)

    def score(self, predictions: list[Tensor]) -> float:
        return float(torch.cat(predictions).double().mean())


def test_a_metric_keeps_its_sign_and_may_need_the_whole_set() -> None:
    p = problem()
    result = run(p, metrics={"share": Share(p)})
    right = (logistic(flat(p.view), p.data) < math.log(2)).double().mean()
    assert result.metrics == {"share": pytest.approx(float(right))}
    assert result.metric_queries == 24


def test_an_undefined_metric_does_not_stop_the_run() -> None:
    p = problem()
    result = run(p, metrics={"odd": lambda batch: math.nan})
    assert result.stop_reason is StopReason.MAX_STEPS
    assert result.metrics is not None
    assert math.isnan(result.metrics["odd"])


def test_a_metric_of_one_class_does_not_stop_the_run() -> None:
    model = torch.nn.Linear(2, 2)
    rows = {"input": torch.randn(16, 2), "labels": torch.arange(16) % 2}
    one_class = {"input": rows["input"], "labels": torch.zeros(16, dtype=torch.long)}
    result = minimize(
        Accuracy(model), ParameterView.full(model), rows, MeZO(), batch_size=16, max_steps=3,
        progress=False, metrics=Metrics({"auc": ROCAUC(model)}, one_class),
    )  # fmt: skip
    assert result.steps == 3
    assert result.metrics is not None
    assert math.isnan(result.metrics["auc"])


def test_a_function_without_data_has_metrics_too() -> None:
    p = problem()
    result = minimize(
        lambda batch: float(flat(p.view).square().sum()), p.view, None, MeZO(**OPTIMIZER),
        max_steps=3, progress=False, metrics={"first": lambda batch: float(flat(p.view)[0])},
    )  # fmt: skip
    assert result.metrics == {"first": float(flat(p.view)[0])}
    assert result.metric_queries == 1


def test_bad_options_are_named_before_any_evaluation() -> None:
    p = problem()
    before = p.view.hash()
    with pytest.raises(OptionError, match="every=0"):
        Metrics({"loss": p.objective}, every=0)
    with pytest.raises(DataError):
        run(p, metrics=Metrics({"loss": p.objective}, (p.data, p.data[:3])))
    for wrong in ("loss", p.objective, {"loss": "accuracy"}, {"loss": Accuracy}):
        with pytest.raises(ArgumentTypeError, match="metric"):
            run(p, metrics=wrong)
    assert p.view.hash() == before


def test_several_sets_are_measured_each() -> None:
    p = problem()
    sets = {"seen": p.data[:10], "held_out": p.data[10:]}
    result = run(p, metrics=Metrics({"loss": p.objective}, {k: Data(v) for k, v in sets.items()}))
    expected = {f"loss_{k}": float(logistic(flat(p.view), v).mean()) for k, v in sets.items()}
    assert result.metrics == pytest.approx(expected, rel=1e-12)
    assert result.metric_queries == 24


def test_splits_and_lists_are_sets_and_columns_are_not() -> None:
    model = torch.nn.Linear(2, 2).eval()
    rows = [{"input": [float(i), 1.0], "labels": i % 2} for i in range(8)]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    for data, names in (
        (splits, {"accuracy_train"}),
        ({"a": rows, "b": rows[:3]}, {"accuracy_a", "accuracy_b"}),
        ({"input": torch.ones(4, 2), "labels": torch.ones(4).long()}, {"accuracy"}),
    ):
        result = minimize(
            Accuracy(model), ParameterView.full(model), rows, MeZO(), batch_size=8, max_steps=1,
            progress=False, metrics=Metrics({"accuracy": Accuracy(model)}, data),
        )  # fmt: skip
        assert result.metrics is not None
        assert result.metrics.keys() == names


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_trainer_measures_each_of_its_evaluation_sets(tmp_path: Path) -> None:
    import transformers as hf
    from families import ENCODER

    from zo_adapt import ZOConfig, ZOTrainer

    model = hf.BertForSequenceClassification(hf.BertConfig(**ENCODER))
    rows = [{"input_ids": [2, 5, i], "labels": i % 2} for i in range(8)]
    args = ZOConfig(
        str(tmp_path), max_steps=2, optimizer="mezo", logging_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = ZOTrainer(
        model, args, train_dataset=rows, eval_dataset={"a": rows[:3], "b": rows[3:]},
        metrics={"accuracy": Accuracy(model)},
    )  # fmt: skip
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"accuracy_a", "accuracy_b", "eval_a_loss", "eval_b_loss"} <= logged


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_trainer_logs_a_reward_with_its_own_sign(tmp_path: Path) -> None:
    import transformers as hf
    from families import ENCODER

    from zo_adapt import ZOConfig, ZOTrainer

    model = hf.BertForSequenceClassification(hf.BertConfig(**ENCODER))

    class Reward:
        maximize = True

        def __call__(self, batch: Any) -> Tensor:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            return 5.0 + model(**inputs).logits[:, 0]

    args = ZOConfig(
        str(tmp_path), max_steps=30, optimizer="mezo", learning_rate=1e-2, logging_steps=1,
        lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", num_directions=2, shaping="ranks",
    )  # fmt: skip
    data = [{"input_ids": [2, 5, i], "labels": 0} for i in range(8)]
    trainer = ZOTrainer(model.eval(), args, train_dataset=data, objective=Reward())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(5.0, abs=0.5)
    assert losses[-1] > losses[0] + 0.1, "climbed"
    assert trainer.zo_optimizer.estimate.shaping == "ranks"  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_trainer_logs_metrics_beside_its_loss(tmp_path: Path) -> None:
    import transformers as hf
    from families import ENCODER

    from zo_adapt import ZOConfig, ZOTrainer

    model = hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)).eval()
    args = ZOConfig(
        str(tmp_path), max_steps=6, num_directions=1, learning_rate=1e-2, logging_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": [2, 5 + i % 2, 7], "labels": i % 2} for i in range(24)]
    held_out, accuracy = data[:10], Accuracy(model)
    trainer = ZOTrainer(
        model, args, train_dataset=data, metrics=Metrics({"right": accuracy}, held_out)
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert all(0 <= line["right"] <= 1 for line in logged)
    with torch.no_grad():
        assert logged[-1]["right"] == pytest.approx(accuracy(accuracy.collate(held_out)))
    assert trainer.queries == 6 * 2 * 8  # the metrics' own do not count


def test_nothing_right_is_0_and_not_minus_0(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = CallableObjective(lambda batch: 0.0, maximize=True)
    result = run(problem(), metrics=Metrics({"right": wrong}, every=1), progress=True)
    assert math.copysign(1.0, result.metrics["right"]) == 1.0
    assert "right=0" in (shown := capsys.readouterr().err)
    assert "right=-0" not in shown
