"""Several processes that share a run make the very run that one process makes, or say why not."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from least_squares import Least, SlowToLoad
from rank_cases import CASES, FEW
from rank_faults import in_step
from worker_runs import found, run_worker

from zo_adapt import EvaluationOptions, StopReason, Workers, replay
from zo_adapt.errors import ArgumentTypeError, OptionError
from zo_adapt.evaluation.answers import Block, merged
from zo_adapt.ranks import launched
from zo_adapt.ranks.replicas import checksum
from zo_adapt.ranks.share import shared_out
from zo_adapt.trajectory.file import Reader

pytestmark = pytest.mark.xdist_group("ranks")  # one start of the processes for all of them
SHARED = [(size, name) for size, cases in ((2, FEW), (3, CASES)) for name in cases]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the processes have left what they found."""
    return run_worker("rank_worker.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size, name", SHARED, ids=str)
def test_several_processes_make_the_run_of_one(done: Path, size: int, name: str) -> None:
    expected = found(done, 1, 0)[name]
    assert expected
    for rank in range(size):
        own = found(done, size, rank)[name]
        assert own == {key: value for key, value in expected.items() if key in own}
        assert rank or own.keys() == expected.keys()


def said(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """What a rank has written of a fault; empty where it died before."""
    assert (folder / name).exists(), (folder / "output").read_text()[-4000:]
    paths = list((folder / name).glob(f"?-{rank}.json"))
    return json.loads(paths[0].read_text()) if paths else {}


def replayed(file: Path, steps: int) -> str:
    problem = Least()
    assert replay(problem.view, file, steps) == steps
    return problem.view.hash()


@pytest.mark.parametrize("name, others", [("killed", (0, 2)), ("hangs", (0,))])
def test_a_rank_that_dies_or_hangs_in_a_step_ends_the_run_of_all(
    done: Path, name: str, others: tuple[int, ...]
) -> None:
    file = done / name / "run.zot"
    assert sum(1 for _ in Reader(file).steps()) == 5
    for rank in others:
        own = said(done, name, rank)
        assert own["kind"] == "LostRankError" and "of rank 1 " in own["text"]
        assert own["weights"] == replayed(file, 5)
        assert own["seconds"] < 30  # of a rank that is dead, or asleep for 9
    assert said(done, name, 1).get("kind") == ("LostRankError" if name == "hangs" else None)


def test_a_run_that_a_rank_has_ended_goes_on_in_one_process(done: Path, tmp_path: Path) -> None:
    files = done / "killed" / "run.zot", tmp_path / "whole.zot"
    hashes = []
    for file in files:
        problem = Least()
        acting = in_step(problem, 0, None)
        problem.run(trajectory=file, resume=True, max_steps=40, **acting)
        hashes.append(problem.view.hash())
    assert hashes[0] == hashes[1]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "name, kind, text",
    [
        ("drifts", "ReplicaError", "'w' is the first of 1 tensors"),
        ("starts_apart", "ReplicaError", "torch.manual_seed"),
        ("other_seed", "ReplicaError", "rank 1 has seed=1, rank 0 has 0"),
        ("draws", "ReplicaError", "draws at random"),
        ("one_raises_in_its_callback", "ValueError", "no more"),
    ],
)
def test_what_differs_between_ranks_is_named_on_all(
    done: Path, name: str, kind: str, text: str
) -> None:
    for rank in (0, 1):
        own = said(done, name, rank)
        assert (own["kind"], text in own["text"]) == (kind, True), own


@pytest.mark.parametrize(
    "name, reason", [("one_stops", StopReason.CALLBACK), ("cannot_write", StopReason.CANNOT_WRITE)]
)
def test_what_ends_one_rank_ends_all_with_the_same_weights(
    done: Path, name: str, reason: StopReason
) -> None:
    expected = Least()
    expected.run(max_steps=5)
    for rank in (0, 1):
        own = said(done, name, rank)
        assert own == {"steps": 5, "weights": expected.view.hash(), "reason": reason}


def test_processes_that_a_launcher_starts_anew_go_on_by_themselves(
    done: Path, tmp_path: Path
) -> None:
    place = done / "restarted"
    assert (place / "found.json").exists(), (done / "output").read_text()[-4000:]
    whole = Least()
    whole.run(trajectory=tmp_path / "whole.zot", **in_step(whole, 0, None))
    for own in json.loads((place / "found.json").read_text()).values():
        made = {"steps": 12, "made": list(range(6, 13)), "start": "1"}
        assert own == {"weights": whole.view.hash(), **made}
    assert (place / "run.zot").read_bytes() == (tmp_path / "whole.zot").read_bytes()


def test_a_training_that_a_launcher_starts_anew_goes_on_by_itself(done: Path) -> None:
    file = done / "restarted_training" / "found.json"
    assert file.exists(), (done / "output").read_text()[-4000:]
    whole = found(done, 1, 0)["training"]
    for rank, own in json.loads(file.read_text()).items():
        assert own["weights"] == whole["weights"]
        assert rank != "0" or own["file"] == whole["file"]


def test_under_a_launcher_cuda_is_the_own_gpu_from_the_import_on_where_none_was_used_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_to: list[int] = []
    for name, answer in {
        "is_available": True, "device_count": 4, "is_initialized": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    spec = spec_from_file_location("anew", launched.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))
    assert set_to == []  # without a launcher
    for name, value in {"RANK": 6, "LOCAL_RANK": 2, "WORLD_SIZE": 8, "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, str(value))
    spec.loader.exec_module(module_from_spec(spec))
    assert set_to == [2]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    spec.loader.exec_module(module_from_spec(spec))  # the model may lie there already
    assert set_to == [2]


def test_blocks_are_shared_out_in_order_and_evenly() -> None:
    for blocks, ranks in ((7, 3), (2, 3), (64, 5)):
        owners = shared_out([4] * blocks, ranks)
        assert owners == sorted(owners)
        counts = [owners.count(rank) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1
    assert shared_out([1, 1, 10], 2) == [0, 0, 1]


def test_parts_that_were_split_are_joined_again() -> None:
    blocks = [Block((0, 1)), Block((2,), (0, 1, 2)), Block((3,), (0, 1)), Block((4,)), Block((5,))]
    assert list(merged([part for block in blocks for part in block.split()])) == blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_sees_any_bit_and_place(dtype: torch.dtype, seed: int) -> None:
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)
    other = values.clone()
    assert int(checksum(values)) == int(checksum(other))
    other[3, 4] = torch.nextafter(other[3, 4].float(), torch.tensor(9e9)).to(dtype) * 2
    assert int(checksum(values)) != int(checksum(other))
    assert int(checksum(values)) != int(checksum(values.flip(0)))
    assert int(checksum(values.mT.contiguous().mT)) == int(checksum(values))


@pytest.mark.parametrize(
    "workers, error",
    [
        ("two", ArgumentTypeError),
        (1.5, ArgumentTypeError),
        (0, OptionError),
        (True, ArgumentTypeError),
    ],
)
def test_bad_workers_are_named(workers: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="workers"):
        Least().run(evaluation=EvaluationOptions(workers=workers))


def test_what_cannot_be_pickled_is_named_before_any_work() -> None:
    problem = Least()
    with pytest.raises(OptionError, match="top level"):
        problem.run(lambda batch: problem(batch), evaluation=EvaluationOptions(workers=2))  # noqa: PLW0108


def test_processes_that_a_run_starts_itself_make_the_same_run(tmp_path: Path) -> None:
    alone, together = SlowToLoad(), SlowToLoad()
    first = alone.run(trajectory=tmp_path / "alone.zot")
    steps: list[int] = []
    second = together.run(
        trajectory=tmp_path / "together.zot",
        # To load takes longer than the timeout, which is of an evaluation.
        evaluation=EvaluationOptions(workers=Workers(2, timeout=4)),
        callback=lambda step: steps.append(step.step),
    )
    assert together.view.hash() == alone.view.hash()
    assert second.history == first.history and second.evaluation.ranks == 2
    assert steps == list(range(1, 13))
    files = [(tmp_path / f"{name}.zot").read_bytes() for name in ("alone", "together")]
    assert files[0] == files[1]
