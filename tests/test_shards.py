"""A model in parts on several processes (FSDP2, tensor parallel) is tuned as the whole one is."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_cases import CASES, MORE, run_halves
from worker_runs import found, run_worker

from zo_adapt import replay
from zo_adapt.noise.accumulate import Accumulation, OnCPU, Place
from zo_adapt.noise.distributions import noise_named
from zo_adapt.noise.parts import slice_along
from zo_adapt.noise.sums import Sum, Sums
from zo_adapt.noise.torch_accumulate import OnAnyDevice

pytestmark = pytest.mark.xdist_group("shards")  # one start of the processes for all of them
NEAR = {"fsdp_last_layers": 1e-4}
"""Relative difference of values: the whole model is computed along factors there."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the processes have left what they found."""
    return run_worker("shard_worker.py", tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", CASES)
def test_parts_have_the_noise_and_the_identity_of_the_whole(done: Path, name: str) -> None:
    whole, parts = found(done, 1, 0)[name], found(done, 2, 0)[name]
    for what in ("start", "fingerprint", "base"):
        assert parts[what] == whole[what], what
    assert parts["shifted"] == whole["shifted"] != whole["start"]  # in every bit
    assert parts["restored"] == whole["start"]
    np.testing.assert_allclose(parts["norms"], whole["norms"], rtol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_run_of_the_whole(done: Path, name: str) -> None:
    whole, parts = found(done, 1, 0)[name], found(done, 2, 0)[name]
    assert parts == found(done, 2, 1)[name]
    assert parts["queries"] == whole["queries"]
    np.testing.assert_allclose(parts["values"], whole["values"], rtol=NEAR.get(name, 1e-5))
    mine, theirs = (torch.load(done / f"{name}-{kind}.pt") for kind in ("parts", "whole"))
    for tensor, weight in mine.items():
        assert weight.shape == theirs[tensor].shape
        torch.testing.assert_close(weight, theirs[tensor], rtol=1e-3, atol=1e-3)
    assert {"joint", "trunk", "graphs"} <= parts["why_not"].keys()


@pytest.mark.parametrize("name", CASES)
def test_the_file_of_a_run_in_parts_replays_on_the_whole(done: Path, name: str) -> None:
    make, _ = CASES[name]
    view = make(done)
    assert replay(view, done / f"{name}.zot") == 3
    assert view.hash() == found(done, 2, 0)[name]["weights"]


def test_a_run_in_parts_goes_on_as_if_never_stopped(done: Path) -> None:
    for rank in (0, 1):
        own = found(done, 2, rank)["resumed"]
        assert own["weights"] == own["uninterrupted"]


def test_a_run_in_parts_goes_on_in_one_process(done: Path, tmp_path: Path) -> None:
    assert found(done, 2, 0)
    for name in ("resumed.zot", "resumed.zot.state"):
        shutil.copy(done / name, tmp_path)
    result = run_halves(tmp_path, 4)
    assert result.steps == 4
    again = CASES["fsdp_full"][0](done)
    assert replay(again, tmp_path / "resumed.zot", 3) == 3
    assert again.hash() == found(done, 2, 0)["resumed"]["weights"]


def test_a_forward_that_is_cut_off_leaves_no_trace(done: Path) -> None:
    for rank in (0, 1):
        assert found(done, 2, rank)["cut_off"] == {"same": True, "moves": True}


@pytest.mark.parametrize(
    "name, text",
    [
        ("two dimensions", "ViewError: 'weight' is spread over DeviceMesh"),
        ("other processes", "ViewError: 'weight' is spread over DeviceMesh"),
        ("partial", "ViewError: 'weight' is placed as P"),
        ("strided", "ViewError: 'weight' is placed as _S"),
        ("flat", "ViewError: the model is a FullyShardedDataParallel"),
        ("pipeline", "ViewError: the model is pipeline-parallel (pp_size=2)"),
        ("LoHa", "AdapterError: the peft.tuners.loha.layer.Linear at"),
        ("IA3", "AdapterError: the peft.tuners.ia3.layer.Linear at"),
        ("VeRA", "AdapterError: the peft.tuners.vera.layer.Linear at"),
        ("copy", "AdapterError: the peft.utils.other.ModulesToSaveWrapper at"),
        ("prefix", "AdapterError: the PREFIX_TUNING of adapter 'default'"),
        ("whole factors", "AdapterError: the peft.tuners.lora.layer.Linear at"),
        ("plain parts", "ViewError: the model is tensor-parallel, and its parts are plain"),
        ("written to", "ChangingBufferError: the objective changes 'model.norm.weight' in place"),
        ("dtypes", "ViewError: FSDP2 cannot gather the weights of a FSDPLlamaForCausalLM"),
        ("no model", "DTensor; give the view the model"),
        ("by layer", "OptionError: scratch='layer'"),
        ("first order", "OptionError: SGD with a model that lies in parts"),
        ("trainer", "OptionError: ZOTrainer with a model that lies in parts"),
    ],
)
def test_what_cannot_be_is_named(done: Path, name: str, text: str) -> None:
    for rank in (0, 1):
        assert text in found(done, 2, rank)["refused"][name]


def test_what_differs_between_ranks_is_named(done: Path) -> None:
    assert found(done, 2, 0).keys() == {*CASES, *MORE}
    for rank in (0, 1):
        own = found(done, 2, rank)["other_rows"]
        assert own["values"].startswith("ReplicaError: the same probe has other values on rank 1")
        assert own["weights"].startswith("ReplicaError: the weights of rank 1")


@pytest.mark.parametrize("kind", [OnCPU, OnAnyDevice])
@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank", "lowrank-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slice_along_any_axis_has_its_elements_of_the_whole(
    name: str, dtype: torch.dtype, kind: Any, seed: int
) -> None:
    noise, sums = noise_named(name), Sums([Sum([(1, 0.5), (9, -0.25)], 0.9)], rounding=4)
    for shape in ((33,), (5, 37), (64, 48), (3, 9, 11), (6, 2, 3, 3), (700, 300)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        whole = weight.clone()
        Accumulation(noise, [Place(whole, whole, 7)])(sums)
        for axis, size in enumerate(shape):
            for start, stop in ((0, size // 2), (size // 2, size), (1, size - 1)):
                if start < stop:
                    own = weight.narrow(axis, start, stop - start).clone()
                    place = Place(own, own, 7, part=slice_along(axis, shape, start, stop))
                    kind(noise, [place])(sums, [own])
                    assert torch.equal(own, whole.narrow(axis, start, stop - start))


def test_a_process_may_hold_nothing_of_a_tensor() -> None:
    noise, nothing = noise_named("gaussian"), torch.empty(0, 4)
    part = slice_along(0, (1, 4), 1, 1)
    Accumulation(noise, [Place(nothing, nothing, 7, part=part)])(Sums([Sum([(1, 0.5)])]))


def test_the_import_knows_nothing_of_parts() -> None:
    code = "import sys, zo_adapt; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
