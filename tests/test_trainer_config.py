"""ZOConfig says everything that minimize can, also on a command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from zo_adapt import ZOPAGE, EvaluationOptions, FrozenTrunk, ParameterView, ZOConfig
from zo_adapt.data.samples import Samples
from zo_adapt.errors import OptionError
from zo_adapt.optimizers.keywords import keywords_of
from zo_adapt.optimizers.named import OPTIMIZERS
from zo_adapt.trainer.checks import OPTIONS
from zo_adapt.trainer.data import InputRows, TrainerSamples, TrainingRows


def parsed(folder: Path, *words: str) -> ZOConfig:
    fixed = ["--output_dir", str(folder), "--report_to", "none", "--use_cpu", "True"]
    (config,) = HfArgumentParser(ZOConfig).parse_args_into_dataclasses([*fixed, *words])
    assert isinstance(config, ZOConfig)
    return config


def test_a_command_line_without_options_gives_the_defaults(tmp_path: Path) -> None:
    by_hand = ZOConfig(str(tmp_path), report_to="none", use_cpu=True)
    for name in (
        "optimizer", "shaping", "snapshot_size", "noise", "stratify", "joint_rows", "reuse_trunk",
        "trunk_storage", "trunk_bytes", "cuda_graphs", "micro_batch_size", "max_queries",
    ):  # fmt: skip
        assert getattr(parsed(tmp_path), name) == getattr(by_hand, name), name


def test_words_and_numbers_of_a_command_line(tmp_path: Path) -> None:
    args = parsed(
        tmp_path, "--optimizer", "mezo-svrg", "--snapshot_size", "all", "--joint_rows", "off",
        "--reuse_trunk", "on", "--cuda_graphs", "off",
        "--trunk_storage", "host", "--trunk_bytes", "1000",
        "--no_stratify", "--shaping", "base", "--micro_batch_size", "8", "--noise", "rademacher",
    )  # fmt: skip
    assert (args.joint_rows, args.snapshot_size, args.stratify) == ("off", "all", False)
    assert (args.trunk_storage, args.trunk_bytes) == ("host", 1000)
    optimizer: Any = args.build_optimizer()
    assert optimizer.snapshot_size == "all"
    assert optimizer.estimate.baseline == "base"
    svrg = ("--optimizer", "mezo-svrg")
    numbers = parsed(tmp_path, *svrg, "--joint_rows", "64", "--snapshot_size", "256")
    assert (numbers.joint_rows, numbers.snapshot_size) == (64, 256)
    assert ZOConfig(str(tmp_path), joint_rows=64, report_to="none", use_cpu=True).joint_rows == 64


def test_every_keyword_of_an_optimizer_is_an_argument() -> None:
    """But those that Trainer has by other names, and objects, which ``zo_optimizer`` takes."""
    elsewhere = {"lr", "schedule", "weight_decay", "estimate", "apply", "annealing"}
    for make in OPTIMIZERS.values():
        assert keywords_of(make) - elsewhere <= {*OPTIONS}


def test_arguments_of_one_optimizer_on_a_command_line(tmp_path: Path) -> None:
    page = parsed(
        tmp_path, "--optimizer", "zo-page", "--restart_probability", "0.5", "--one_sided", "False"
    ).build_optimizer()
    assert page == ZOPAGE(restart_probability=0.5, one_sided=False, weight_decay=0.0)
    with pytest.raises(OptionError, match="momentum"):
        parsed(tmp_path, "--momentum", "0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint_rows": "some"}, "joint_rows='some'"),
        ({"joint_rows": "-3"}, "joint_rows=-3"),
        ({"snapshot_size": "most"}, "snapshot_size"),
        ({"reuse_trunk": "yes"}, "reuse_trunk='yes'"),
        ({"cuda_graphs": "yes"}, "cuda_graphs='yes'"),
        ({"trunk_storage": "tape"}, "trunk_storage='tape'"),
        ({"trunk_bytes": 0}, "trunk_bytes=0"),
    ],
)
def test_words_that_are_none_are_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        ZOConfig(str(tmp_path), report_to="none", use_cpu=True, **options)


def test_a_trunk_is_kept_where_the_arguments_say(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**ENCODER))
    last, full = ParameterView.last_layers(model, 1), ParameterView.full(model)

    def options(view: ParameterView, **given: Any) -> EvaluationOptions:
        args = ZOConfig(str(tmp_path), report_to="none", use_cpu=True, **given)
        return args.evaluation_options(view)

    trunk = options(last, trunk_storage="host", trunk_bytes=4096).reuse_trunk
    assert isinstance(trunk, FrozenTrunk)
    assert trunk.view is last
    assert options(last).reuse_trunk == "auto"
    assert options(last, reuse_trunk="off", trunk_bytes=4096).reuse_trunk == "off"
    assert options(full, trunk_bytes=4096).reuse_trunk == "auto"
    assert options(last, joint_rows="off", micro_batch_size=2) == EvaluationOptions(2, "off")


def test_without_stratification_rows_come_as_the_trainer_gives_them() -> None:
    rows = [{"x": torch.tensor(float(i)), "labels": int(i >= 8)} for i in range(16)]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([float(one[name]) for one in examples]) for name in examples[0]}

    def order(stratify: bool) -> tuple[int, ...]:
        samples = TrainerSamples(TrainingRows(rows, collate), 0, stratify=stratify)
        labels = torch.tensor([row["labels"] for row in rows])
        samples.receive(InputRows({"x": torch.arange(16.0), "labels": labels}))
        return samples.minibatch().rows

    assert order(stratify=False) == tuple(range(16))
    assert order(stratify=True) != tuple(range(16))
    assert sorted(order(stratify=True)) == list(range(16))
    assert isinstance(TrainerSamples(TrainingRows(rows, collate), 0), Samples)
