"""Arguments of another kind: the error says what to pass, before any evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zo_adapt import (
    AskTell,
    Data,
    EvaluationOptions,
    Group,
    Metrics,
    MeZO,
    ParameterView,
    ServedEvaluator,
    diagnose,
    minimize,
)
from zo_adapt.errors import ArgumentTypeError, DataError, OptionError, ViewError, ZOError


def never(batch: Any) -> float:
    raise AssertionError("evaluated before the input was checked")


MODEL = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
VIEW = ParameterView.full(MODEL)
ROWS = torch.zeros(6, 2)
TORCH = torch.optim.SGD(MODEL.parameters(), lr=0.1)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer by name": ({"optimizer": "mezo"}, r"optimizer is 'mezo'; give the object, MeZO\(\)"),
    "unknown name": ({"optimizer": "adamw"}, r"'adamw'; give MeZO\(\)"),
    "torch optimizer": ({"optimizer": TORCH}, r"SGD; a torch optimizer needs gradients"),
    "class of optimizer": ({"optimizer": MeZO}, r"class MeZO; give an instance of it, MeZO\(\)"),
    "model for a view": ({"view": MODEL}, r"Sequential; .*ParameterView\.trainable\(model\)"),
    "tensors for a view": ({"view": {"x": ROWS}}, r"dict; .*ParameterView\(tensors\)"),
    "nothing for a view": ({"view": None}, "give a ParameterView"),
    "view for an objective": ({"objective": VIEW}, r"the order is \(objective, view, data"),
    "class for an objective": ({"objective": dict}, "class dict; make one"),
    "number for an objective": (
        {"objective": 3.0},
        r"3\.0 cannot be called; give a function of a batch",
    ),
    "view for data": ({"data": VIEW}, "data is a ParameterView; the order"),
    "optimizer for data": ({"data": MeZO()}, r"data is a MeZO; the order .*data=None"),
    "options as a dict": ({"evaluation": {}}, r"dict; give EvaluationOptions\("),
    "evaluator by name": ({"evaluation": "vllm"}, r"'vllm'; .* or ServedEvaluator\(server\)"),
    "class of evaluator": ({"evaluation": ServedEvaluator}, r"class ServedEvaluator; give"),
    "evaluator by name among options": (
        {"evaluation": EvaluationOptions(evaluator="vllm")},  # type: ignore[arg-type]
        r"evaluator is 'vllm'; give ServedEvaluator\(server\)",
    ),
    "number for a file": ({"trajectory": 3}, r"trajectory is a int; give a path"),
    "words for a callback": ({"callback": "print"}, "callback is 'print'; give a function"),
    "metrics as a list": ({"metrics": [never]}, "list; give objectives by name"),
    "metric by name": ({"metrics": {"f1": "f1"}}, r"metric 'f1': .* give a function"),
}


@pytest.mark.parametrize("case", WRONG)
def test_minimize_says_what_to_pass(case: str) -> None:
    changes, words = WRONG[case]
    given: dict[str, Any] = {
        "objective": never, "view": VIEW, "data": ROWS, "optimizer": MeZO(), "max_steps": 1,
        "batch_size": 2, "progress": False,
    }  # fmt: skip
    with pytest.raises(ArgumentTypeError, match=words) as caught:
        minimize(**(given | changes))
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, OptionError)


@pytest.mark.parametrize("case", [c for c in WRONG if WRONG[c][0].keys() <= {"view", "objective"}])
def test_diagnose_says_it_too(case: str) -> None:
    changes, words = WRONG[case]
    with pytest.raises(ArgumentTypeError, match=words):
        diagnose(**({"objective": never, "view": VIEW, "data": ROWS} | changes))


@pytest.mark.parametrize("case", ["optimizer by name", "torch optimizer", "class of optimizer"])
def test_ask_tell_says_it_too(case: str) -> None:
    changes, words = WRONG[case]
    with pytest.raises(ArgumentTypeError, match=words):
        AskTell(changes["optimizer"], np.zeros(2), max_steps=1)


@pytest.mark.parametrize("x0", [MODEL, VIEW], ids=["model", "view"])
def test_ask_tell_takes_variables(x0: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"x0 is a .*minimize"):
        AskTell(MeZO(), x0, max_steps=1)


def test_the_trainer_says_it_too(tmp_path: Path) -> None:
    from zo_adapt import ZOConfig, ZOTrainer

    args = ZOConfig(str(tmp_path), report_to="none", use_cpu=True)
    for options, words in (
        ({"view": MODEL}, r"ParameterView\.trainable"),
        ({"zo_optimizer": "mezo"}, r"zo_optimizer is 'mezo'; .*MeZO\(\)"),
        ({"zo_optimizer": TORCH}, "torch optimizer"),
        ({"objective": VIEW}, "the order"),
        ({"metrics": {"f1": "f1"}}, "metric 'f1'"),
    ):
        with pytest.raises(ArgumentTypeError, match=words):
            ZOTrainer(MODEL, args, **options)


DATA: dict[str, tuple[Any, str]] = {
    "text": ("rows.json", "data is a str; give a sequence"),
    "model": (MODEL, "data is a Sequential"),
    "number": (3, "data of type int has no length"),
    "generator": (iter([1]), "has no length"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_of_a_wrong_kind(case: str) -> None:
    data, words = DATA[case]
    calls: list[Any] = [
        lambda: minimize(never, VIEW, data, batch_size=1, max_steps=1, progress=False),
        lambda: diagnose(never, VIEW, data),
        lambda: Data(data),
        lambda: minimize(
            never, VIEW, ROWS, batch_size=1, max_steps=1, progress=False,
            metrics=Metrics({"loss": never}, data),
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(DataError, match=words):
            call()


def test_data_within_data_and_a_collate_that_is_no_function() -> None:
    with pytest.raises(ArgumentTypeError, match="Data already"):
        Data(Data(ROWS))
    with pytest.raises(ArgumentTypeError, match="collate is a str"):
        Data(ROWS, collate="pad")  # type: ignore[arg-type]


def test_a_view_says_what_it_takes() -> None:
    with pytest.raises(ArgumentTypeError, match="names are texts, and one is 1"):
        ParameterView({1: torch.zeros(2)})  # type: ignore[dict-item]
    with pytest.raises(ArgumentTypeError, match=r"Sequential; .*ParameterView\.trainable\(model\)"):
        ParameterView(MODEL)  # type: ignore[arg-type]
    for make in (
        ParameterView.trainable,
        ParameterView.full,
        lambda m: ParameterView.matching(m, "x"),
        lambda m: ParameterView.last_layers(m, 1),
    ):
        with pytest.raises(ArgumentTypeError, match=r"str; give a torch\.nn\.Module"):
            make("bert-base-uncased")  # type: ignore[arg-type]
    for groups in ("head", Group("head"), ["head"]):
        with pytest.raises(ArgumentTypeError, match="give a list, as"):
            ParameterView.full(MODEL, groups=groups)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EvaluationOptions(micro_batch_size=0),
        lambda: EvaluationOptions(joint_rows=None),  # type: ignore[arg-type]
        lambda: EvaluationOptions(cuda_graphs=True),  # type: ignore[arg-type]
        lambda: EvaluationOptions(reuse_trunk=False),  # type: ignore[arg-type]
        Group,
        lambda: Group("x", names=["x"]),
        lambda: Group(names=[]),
        lambda: Group(names="head"),
        lambda: Group(3),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_named_where_they_are_given(make: Any) -> None:
    with pytest.raises(OptionError):
        make()


def test_nan_is_found_by_the_look_that_measures_the_weights() -> None:
    view = ParameterView({"fine": torch.ones(2), "culprit": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ViewError, match="'culprit'"):
        view.norms()
    huge = ParameterView({"huge": torch.full((3,), 1e200, dtype=torch.float64)})
    assert huge.norms()["huge"] > 1e200, "finite numbers whose squares overflow are fine"
    assert issubclass(ViewError, ZOError)
