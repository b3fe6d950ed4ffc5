"""Names of the version before: each warns, names the new spelling, and does what it did."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, labelled, logistic, problem
from torch import Tensor

import zo_adapt
from objectives import CallableObjective
from zo_adapt import Data, EvaluationOptions, Metrics, MeZO, ParameterView, Result, minimize
from zo_adapt.evaluation.locally import Locally

SETTINGS: dict[str, Any] = {"batch_size": 6, "max_steps": 3, "progress": False}


def run(p: Problem, **options: Any) -> Result:
    objective, data = options.pop("objective", p.objective), options.pop("data", p.data)
    return minimize(objective, p.view, data, MeZO(lr=0.05), **(SETTINGS | options))


def summed(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).flip(0)


FORMER: dict[str, tuple[str, dict[str, Any], Callable[[Problem], dict[str, Any]]]] = {
    "collate": ("Data\\(", {"collate": summed}, lambda p: {"data": Data(list(p.data), summed)}),
    "stratify": ("Data\\(", {"stratify": False}, lambda p: {"data": Data(p.data, stratify=False)}),
    "micro_batch_size": (
        "EvaluationOptions",
        {"micro_batch_size": 4},
        lambda p: {"evaluation": EvaluationOptions(micro_batch_size=4)},
    ),
    "joint_rows": (
        "EvaluationOptions.*'off' for None",
        {"joint_rows": None},
        lambda p: {"evaluation": EvaluationOptions(joint_rows="off")},
    ),
    "reuse_trunk": (
        "EvaluationOptions.*'off' for False",
        {"reuse_trunk": False},
        lambda p: {"evaluation": EvaluationOptions(reuse_trunk="off")},
    ),
    "cuda_graphs": (
        "EvaluationOptions.*'on' for True",
        {"cuda_graphs": False},
        lambda p: {"evaluation": EvaluationOptions(cuda_graphs="off")},
    ),
    "workers": (
        "EvaluationOptions",
        {"workers": 1},
        lambda p: {"evaluation": EvaluationOptions(workers=1)},
    ),
    "evaluator": (
        "ServedEvaluator",
        {"evaluator": Locally()},
        lambda p: {"evaluation": Locally()},
    ),
    "maximize": (
        "CallableObjective",
        {"maximize": True},
        lambda p: {"objective": CallableObjective(p.objective, maximize=True)},
    ),
    "metrics_data": (
        "Metrics\\(",
        {"metrics": {"loss": None}, "metrics_data": labelled(8, 10, seed=2)},
        lambda p: {"metrics": Metrics({"loss": p.objective}, labelled(8, 10, seed=2))},
    ),
    "metrics_every": (
        "Metrics\\(",
        {"metrics": {"loss": None}, "metrics_every": 2},
        lambda p: {"metrics": Metrics({"loss": p.objective}, every=2)},
    ),
}


@pytest.mark.parametrize("name", FORMER)
def test_a_former_keyword_of_minimize_warns_and_acts(name: str) -> None:
    words, former, today = FORMER[name]
    before, now = problem(), problem()
    options = dict(former)
    if name == "collate":
        options["data"] = list(before.data)
    if "metrics" in options:
        options["metrics"] = {"loss": before.objective}
    with pytest.warns(DeprecationWarning, match=f"(?s){name}= is now .*{words}") as caught:
        old = run(before, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the caller"
    new = run(now, **today(now))
    assert before.view.hash() == now.view.hash()
    assert (old.history, old.metrics, old.queries) == (new.history, new.metrics, new.queries)


def test_every_former_keyword_does_something() -> None:
    """The table above would also hold if the keywords, old and new, were ignored."""
    plain = problem()
    run(plain)
    climbed = problem()
    with pytest.warns(DeprecationWarning):
        run(climbed, maximize=True)
    assert climbed.view.hash() != plain.view.hash()
    sizes: list[int] = []

    def counting(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return logistic(torch.zeros(10, dtype=torch.float64), batch)

    with pytest.warns(DeprecationWarning) as caught:
        run(problem(), objective=counting, micro_batch_size=2, joint_rows=None)
    assert max(sizes) == 2
    assert len(caught) == 2


def test_a_set_objective_and_a_metric_keep_their_form_when_turned_around() -> None:
    class Share:
        maximize = True

        def predict(self, batch: Tensor) -> Tensor:
            return batch[:, -1]

        def score(self, predictions: list[Tensor]) -> float:
            return float(torch.cat(predictions).mean())

    with pytest.warns(DeprecationWarning):
        falling = run(problem(), objective=Share(), maximize=False)
    assert falling.history[0].value == run(problem(), objective=Share()).history[0].value


def test_the_signature_shows_todays_names_alone() -> None:
    parameters = inspect.signature(minimize).parameters
    assert len(parameters) <= 16  # 14, and who evaluates: workers, evaluator
    assert not parameters.keys() & FORMER.keys()
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    with pytest.raises(TypeError, match="max_stepz"):
        minimize(lambda batch: 0.0, problem().view, max_stepz=3)  # type: ignore[call-arg]


def test_other_former_names() -> None:
    p = problem()
    result = run(p)
    with pytest.warns(DeprecationWarning, match=r"Result\.steps"):
        assert result.nit == result.steps == 3
    with pytest.warns(DeprecationWarning, match=r"ParameterView\.displacement"):
        assert p.view.reach == p.view.displacement
    with pytest.warns(DeprecationWarning, match=r"ParameterView\.norms"):
        p.view.check_finite()
    with pytest.warns(DeprecationWarning, match="groups='auto'"):
        ParameterView({"x": torch.zeros(2)}, groups=None)  # type: ignore[arg-type]


def test_former_keywords_of_diagnose() -> None:
    p = problem()
    new = zo_adapt.diagnose(
        p.objective, p.view, p.data, batch_size=8, evaluation=EvaluationOptions(3)
    )
    with pytest.warns(DeprecationWarning, match="EvaluationOptions"):
        old = zo_adapt.diagnose(  # type: ignore[call-arg]
            p.objective, p.view, p.data, batch_size=8, micro_batch_size=3
        )
    assert str(old) == str(new)
    with pytest.warns(DeprecationWarning, match="perturbation_scales='auto'"):
        again = zo_adapt.diagnose(
            p.objective,
            p.view,
            p.data,
            batch_size=8,
            perturbation_scales=None,  # type: ignore
        )
    assert again.perturbation_scale == new.perturbation_scale


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_former_keywords_of_the_trainer(tmp_path: Path) -> None:
    import transformers as hf
    from families import ENCODER

    from zo_adapt import ZOConfig, ZOTrainer

    model = hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)).eval()
    options: dict[str, Any] = {"max_steps": 2, "report_to": "none", "use_cpu": True}
    with pytest.warns(DeprecationWarning, match="reuse_trunk='off'"):
        args = ZOConfig(str(tmp_path), reuse_trunk=False, **options)
    assert args.reuse_trunk == "off"
    with pytest.warns(DeprecationWarning, match="cuda_graphs='auto'"):
        args = ZOConfig(str(tmp_path), cuda_graphs=True, **options)
    assert args.cuda_graphs == "auto"
    data = [{"input_ids": [2, 5 + i % 2, 7], "labels": i % 2} for i in range(8)]
    with pytest.warns(DeprecationWarning, match="Metrics"):
        trainer = ZOTrainer(
            model, args, train_dataset=data, metrics={"zero": lambda batch: 0.0}, metrics_data=data
        )
    assert trainer._metrics.data.examples == data


@pytest.mark.parametrize(("old", "new"), [("Record", "Step"), ("Update", "Shift")])
def test_former_exports_are_todays(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"zo_adapt.{old} is now zo_adapt.{new}"):
        assert getattr(zo_adapt, old) is getattr(zo_adapt, new)
