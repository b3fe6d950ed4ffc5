"""A run leaves no trace of a step that failed, and its file has one writer and one origin."""

import json
import math
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from trajectories import OPTIMIZERS, STEPS, copies, equal, noise_of, run, tensors

from objectives import CallableObjective, CausalLMLoss, ClassificationLoss
from zo_adapt import (
    AskTell,
    Data,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Replay,
    Shift,
    StopReason,
    Term,
    TrajectoryFile,
    minimize,
    replay,
)
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import TensorRows, as_source
from zo_adapt.errors import (
    CorruptTrajectoryError,
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    StepTooLargeError,
    TrajectoryError,
    TrajectoryInUseError,
    TrajectoryWriteError,
)
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.loops.contents import contents_hash
from zo_adapt.loops.resume import check_settings
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.first_order import Adam
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import Step
from zo_adapt.trajectory.file import MAGIC, VERSION, Reader
from zo_adapt.trajectory.owned_file import OwnedFile
from zo_adapt.trajectory.safe_file import read_state, replace_file, write_state
from zo_adapt.trajectory.tools import main
from zo_adapt.trajectory.writer import Writer

QUIET: dict[str, Any] = {"progress": False}


def one() -> ParameterView:
    return ParameterView({"x": torch.zeros(2)})


# A step that failed


def failing_run(make: Callable[[], Any]) -> tuple[Run, dict[str, Tensor], list[Exception]]:
    """A run whose objective raises what is in the list."""
    live, errors = tensors(torch.float64), []
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(batch: Tensor) -> Tensor:
        if errors:
            raise errors[0]
        return (batch @ live["w"] + live["b"] - 1).square().mean(1)

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    optimizer = make()
    view = ParameterView(live, noise=noise_of(optimizer))
    evaluator = LocalEvaluator(loss, view, batch_size=8)
    return Run(optimizer, evaluator, Samples(TensorRows(rows), 8, 3), Budget(12), 3), live, errors


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS), "adam"])
@pytest.mark.parametrize("error", [NonFiniteObjectiveError("nan"), KeyboardInterrupt()], ids=str)
def test_a_failed_step_leaves_no_trace(name: str, error: BaseException) -> None:
    make = OPTIMIZERS.get(name, lambda: Adam(1e-2))
    whole, expected, _ = failing_run(make)
    parts, live, errors = failing_run(make)
    whole.step(), parts.step()  # what is not finite before the first one is too far to look
    for step in range(1, 6):
        whole.step()
        before = parts.state_dict(), copies(live)
        errors.append(error)  # type: ignore[arg-type]
        with pytest.raises(type(error)):
            parts.step()
        errors.clear()
        assert parts.state_dict() == before[0], step
        assert equal(live, before[1])
        parts.step()
    assert equal(live, expected)
    assert parts.state_dict() == whole.state_dict()


def test_a_step_that_cannot_be_applied_is_taken_back_from_the_file(tmp_path: Path) -> None:
    run(whole := tensors(), tmp_path / "whole", MeZO())
    live = tensors()
    view = ParameterView(live)
    apply, left = view.apply_in_order, [4]

    def failing(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        apply(*args)

    view.apply_in_order = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run(live, tmp_path / "f", MeZO(), view=view)
    assert replay(ParameterView(again := tensors()), tmp_path / "f") == 3
    assert equal(again, live)
    run(again := tensors(), tmp_path / "f", MeZO(), resume=True)
    assert equal(again, whole)


def test_a_stop_iteration_of_the_objective_is_no_callbacks() -> None:
    def objective(batch: Any) -> float:
        raise StopIteration

    with pytest.raises(StopIteration):
        minimize(
            objective, ParameterView({"x": torch.zeros(2)}), None, MeZO(), max_steps=2, **QUIET
        )


# One writer


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"

    def second(record: Any) -> None:
        with pytest.raises(TrajectoryInUseError, match="being written by another run"):
            run(tensors(), path, MeZO(), resume=True)
        code = (
            "import sys; from pathlib import Path\n"
            "from zo_adapt.trajectory.owned_file import OwnedFile\n"
            "OwnedFile(Path(sys.argv[1]))"
        )
        if record.step == 2:
            done = subprocess.run(
                [sys.executable, "-c", code, str(path)],
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            )
            assert "TrajectoryInUseError" in done.stderr

    assert run(tensors(), path, MeZO(), callback=second, max_steps=3).steps == 3
    run(tensors(), path, MeZO(), resume=True)  # and it is given up at the end
    assert replay(ParameterView(tensors()), path) == STEPS


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"text")
    file = OwnedFile(tmp_path / "f")
    fork = get_context("fork")
    is_up, gate = fork.Event(), fork.Event()
    child = fork.Process(target=waiting, args=(is_up, gate), daemon=True)
    child.start()  # as a loader's worker that outlives its parent
    try:
        assert is_up.wait(60)
        file.close()
        OwnedFile(tmp_path / "f").close()
    finally:
        gate.set()
        child.join()


def waiting(is_up: Any, gate: Any) -> None:
    is_up.set()
    gate.wait(60)


def replaced(path: Path) -> None:
    os.replace(path, path.with_name("elsewhere"))
    path.write_bytes(path.with_name("elsewhere").read_bytes())


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (Path.unlink, "moved, deleted or replaced"),
    "replaced": (replaced, "moved, deleted or replaced"),
    "shortened": (lambda path: os.truncate(path, 400), "changed by another program"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "changed by another"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_others_do_to_the_file_is_noticed_before_the_next_write(
    tmp_path: Path, name: str
) -> None:
    change, message = CHANGES[name]
    live, seen = tensors(), []

    def callback(record: Any) -> None:
        if record.step == 3:
            change(tmp_path / "f")
            seen.append(copies(live))

    result = run(live, tmp_path / "f", MeZO(), callback=callback)
    assert (result.stop_reason, result.steps) == (StopReason.CANNOT_WRITE, 3)
    assert message in result.message
    assert equal(live, seen[0])


def test_a_symlink_is_never_followed_and_files_of_the_user_stay(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("f.new", "f.state.new"):
        (tmp_path / name).symlink_to(precious)
    run(tensors(), tmp_path / "f", MeZO())
    assert precious.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "f", "f.new", "f.state", "f.state.new", "precious"
    ]  # fmt: skip
    (tmp_path / "g.state").write_text("mine, too")
    with pytest.raises(TrajectoryError, match=r"g\.state but no g"):
        run(tensors(), tmp_path / "g", MeZO())
    assert (tmp_path / "g.state").read_text() == "mine, too"


@pytest.mark.parametrize("resume", [False, True])
def test_a_trajectory_that_was_lost_is_not_begun_anew(tmp_path: Path, resume: bool) -> None:
    run(tensors(), tmp_path / "f", MeZO(), stop=3)
    state = (tmp_path / "f.state").read_bytes()
    (tmp_path / "f").unlink()
    with pytest.raises(TrajectoryError, match="was moved or deleted"):
        run(tensors(), tmp_path / "f", MeZO(), resume=resume)
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "f.state").read_bytes() == state


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to(tmp_path / "gone")
    with pytest.raises(TrajectoryWriteError, match="a link to what is not there"):
        run(tensors(), tmp_path / "f", MeZO())
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [("steps", 2), ("steps", "3"), ("steps", True), ("queries", 1), ("queries", math.inf)],
)
def test_a_state_that_says_something_else_than_the_records_is_named(
    tmp_path: Path, entry: str, value: Any
) -> None:
    """As that of another run may, whose records happen to be as long."""
    run(tensors(), tmp_path / "f", MeZO(), stop=3)
    state = read_state(tmp_path / "f.state")
    write_state(tmp_path / "f.state", state | {"run": state["run"] | {entry: value}})
    live = tensors()
    with pytest.raises(CorruptTrajectoryError, match=f"{entry}="):
        run(live, tmp_path / "f", MeZO(), resume=True)
    assert equal(live, tensors())


@pytest.mark.parametrize("entry", ["budget", "position", "run"])
@pytest.mark.parametrize("value", [3, "x", [], {"max_steps": "x"}])
def test_a_state_of_another_form_is_named(tmp_path: Path, entry: str, value: Any) -> None:
    run(tensors(), tmp_path / "f", MeZO(), stop=3)
    write_state(tmp_path / "f.state", read_state(tmp_path / "f.state") | {entry: value})
    with pytest.raises(CorruptTrajectoryError, match="none of this run"):
        run(tensors(), tmp_path / "f", MeZO(), resume=True)


def test_what_kills_left_is_cleared_away(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO(), stop=3)
    (tmp_path / ".f.state.0123.zo-scratch").write_text("half")
    run(tensors(), tmp_path / "f", MeZO(), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.state"]


def test_fsync_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    run(tensors(), tmp_path / "f", MeZO())
    assert not synced
    run(tensors(), TrajectoryFile(tmp_path / "g", fsync=True), MeZO())  # type: ignore[arg-type]
    assert len(synced) >= 3 * STEPS  # record, state and its name
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


def test_the_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    replace_file(tmp_path / "f", b"x")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "usual").stat().st_mode


# Files of another origin


def crafted(path: Path, header: bytes, *payloads: bytes) -> Path:
    """A file whose checksums are right, whatever is in it."""
    start = MAGIC + bytes([VERSION]) + struct.pack("<I", len(header)) + header
    checksum = zlib.crc32(start)
    data = start + struct.pack("<I", checksum)
    for payload in payloads:
        length = len(payload)
        record = struct.pack("<HB", length, (length ^ length >> 8 ^ 0xA5) & 0xFF) + payload
        checksum = zlib.crc32(record, checksum)
        data += record + struct.pack("<I", checksum)
    path.write_bytes(data)
    return path


def good_header(folder: Path) -> dict[str, Any]:
    run(tensors(), folder / "good", MeZO(), max_steps=1)
    return Reader(folder / "good").header


def a_step(flags: int = 0, numbers: tuple[float, float, float] = (1.0, 1e-3, 1.0)) -> bytes:
    return struct.pack("<IHdddB", 8, 0, *numbers, flags)


def a_block(coefficient: float, group: int | None = None) -> bytes:
    groups = b"" if group is None else bytes([group])
    head = struct.pack("<HBBI", 1, len(groups), 0, 0)
    return head + groups + struct.pack("<d", coefficient)


RECORDS = {
    "nan": a_step() + a_block(math.nan),
    "inf": a_step() + a_block(math.inf),
    "1e308": a_step() + a_block(1e308),
    "beyond fp32": a_step() + a_block(3e38) + a_block(3e38),
    "group": a_step() + a_block(0.1, 7),
    "flags": a_step(0x40) + a_block(0.1),
    "both decays": a_step(6, (1.0, 1e-3, 1.0)) + a_block(0.1),
    "decay nan": a_step(2) + struct.pack("<d", math.nan) + a_block(0.1),
    "sum of steps": a_step() + a_block(5e37),
    "decay negative": a_step(2) + struct.pack("<d", -1.0),
    "decay 1e300": a_step(2) + struct.pack("<d", 1e300),
    "value": a_step(0, (math.nan, 1e-3, 1.0)),
    "lr": a_step(0, (1.0, math.inf, 1.0)),
    "empty": b"",
    "short": a_step()[:-1],
    "cut block": a_step() + a_block(0.1)[:-1],
    "cut groups": a_step() + struct.pack("<HBBI", 1, 9, 0, 0) + b"\0",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_no_run_writes_is_named_and_nothing_is_applied(
    tmp_path: Path, name: str
) -> None:
    header = json.dumps(good_header(tmp_path)).encode()
    times = 40 if name == "sum of steps" else 1  # each for itself is in range
    path = crafted(tmp_path / "f", header, a_step() + a_block(0.1), *[RECORDS[name]] * times)
    live = tensors()
    with pytest.raises(CorruptTrajectoryError):
        replay(ParameterView(live), path)
    assert equal(live, tensors())
    assert replay(ParameterView(live), path, 1) == 1
    assert not equal(live, tensors())


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "empty": lambda header: {},
    "list": lambda header: [1],
    "no view": lambda header: {k: v for k, v in header.items() if k != "view"},
    "view": lambda header: header | {"view": [["w", [2**70], "torch.float32"]]},
    "groups": lambda header: header | {"groups": [["[", 1.0, 1.0]]},
    "groups none": lambda header: header | {"groups": []},
    "seeds": lambda header: header | {"seeds": ["philox-words-v1", -1]},
    "seeds text": lambda header: header | {"seeds": "ab"},
    "settings": lambda header: header | {"settings": 3},
    "rate": lambda header: header | {"settings": {"weight_decay": 10**400}},
    "at rest": lambda header: header | {"at_rest": [3]},
    "versions": lambda header: header | {"versions": "x"},
}


@pytest.mark.parametrize("command", ["info", "verify", "replay"])
@pytest.mark.parametrize("name", [*HEADERS, "no json", "deep", "not utf-8"])
def test_a_header_that_is_none_is_one_line(tmp_path: Path, name: str, command: str) -> None:
    raw = {"no json": b"{", "deep": b"[" * 200_000, "not utf-8": b"\xff\xfe"}
    header = raw.get(name)
    if header is None:
        header = json.dumps(HEADERS[name](good_header(tmp_path))).encode()
    path = str(crafted(tmp_path / "f", header, a_step()))
    start = ["--start", str(tmp_path / "f")] if command == "replay" else []
    with pytest.raises(SystemExit) as stopped:
        main([command, path, *start])
    message = str(stopped.value)
    assert message.startswith("CorruptTrajectoryError: ")
    assert "\n" not in message


def test_a_file_of_another_origin_sends_no_codes_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = good_header(tmp_path)
    header["settings"] = {"optimizer": "\x1b[2Jred\rSGD", "a\nb": 1}
    main(["info", str(crafted(tmp_path / "f", json.dumps(header).encode(), a_step()))])
    printed = capsys.readouterr().out
    assert r"\x1b[2Jred\rSGD" in printed
    assert "\x1b" not in printed
    assert "\nb" not in printed


def test_a_start_that_is_no_tensors_is_one_line(tmp_path: Path) -> None:
    good_header(tmp_path)
    (tmp_path / "start").write_bytes(b"no tensors")
    with pytest.raises(SystemExit, match="start"):
        main(["replay", str(tmp_path / "good"), "--start", str(tmp_path / "start")])


def test_a_file_of_the_version_before_is_replayed(tmp_path: Path) -> None:
    live = tensors()
    run(live, tmp_path / "f", MeZO())
    reader = Reader(tmp_path / "f")
    old = {name: value for name, value in reader.header.items() if name != "base"}
    settings = {k: v for k, v in old["settings"].items() if k not in ("data", "objective")}
    writer = Writer(tmp_path / "g", old | {"settings": settings})
    for step, _ in reader.steps():
        writer.append(step)
    assert replay(ParameterView(again := tensors()), tmp_path / "g") == STEPS
    assert equal(again, live)


# What a run depends on


class Two(nn.Module):
    """A frozen layer and a tuned one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.tuned = nn.Linear(6, 1)
        nn.init.zeros_(self.tuned.weight)
        nn.init.zeros_(self.tuned.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.tuned(self.frozen(x))


DATA = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


def tune(path: Path, seed: int = 0, **options: Any) -> nn.Module:
    model = Two(seed)
    factor = options.pop("factor", 1)
    stop = options.pop("stop", None)

    def once(batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean(1)

    def twice(batch: Tensor) -> Tensor:
        return 2 * (model(batch) - 1).square().mean(1)

    def stopping(step: Step) -> None:
        if step.step == stop:
            raise StopIteration

    data = options.pop("data", DATA)
    objective = CallableObjective(once if factor == 1 else twice, model=model)
    options = {"max_steps": 8, "batch_size": 8, "resume": True} | options
    view = ParameterView.trainable(model)
    minimize(objective, view, data, MeZO(), trajectory=path, callback=stopping, **QUIET, **options)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("another base model", {"seed": 1}),
        ("data=", {"data": DATA.flip(0)}),
        ("rows=32", {"data": DATA[:16]}),
        ("objective=", {"factor": 2}),
        ("max_steps=8, not 7", {"max_steps": 7}),
        ("max_queries=None, not 900", {"max_queries": 900}),
    ],
)
def test_resuming_on_something_else_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    tune(tmp_path / "f", stop=3)
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(TrajectoryError, match=name):
        tune(tmp_path / "f", **options)
    assert (tmp_path / "f").read_bytes() == before


FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "examples": lambda rows: [{"x": row, "text": f"row {row[0]}", "y": 0.5} for row in rows],
    "columns": lambda rows: {"x": torch.tensor(rows), "y": [[float(r[0])] for r in rows]},
    "arrays": lambda rows: (np.array(rows, dtype=np.float32), np.arange(len(rows))),
    "dataset": lambda rows: Dataset.from_list([{"x": r, "text": [f"{r[0]}", None]} for r in rows]),
    "shuffled": lambda rows: Dataset.from_list([{"x": r} for r in rows]).shuffle(seed=0),
    "tensor data set": lambda rows: TensorDataset(torch.tensor(rows), torch.arange(len(rows))),
    "subset": lambda rows: Subset([{"x": row} for row in rows], range(1000, 2000)),
    "images": lambda rows: [(torch.tensor(row, dtype=torch.float32), 1) for row in rows],
}


@pytest.mark.parametrize("name", FORMS)
def test_one_changed_row_of_many_is_another_data_set(name: str) -> None:
    rows = [[i, i + 1, 2] for i in range(3000)]
    changed = [row if row[0] != 1234 else [1234, 1236, 2] for row in rows]
    one, again, other = (
        contents_hash(as_source(FORMS[name](given), list)) for given in (rows, rows, changed)
    )
    assert one is not None
    assert one == again
    assert one != other


def test_other_rows_of_one_data_set_are_other_data() -> None:
    rows = [{"x": [i]} for i in range(6)]
    parts = ([0, 1], [1, 0], [0, 2])
    assert len({contents_hash(as_source(Subset(rows, part), list)) for part in parts}) == 3
    begun = {"all rows of the data": None}  # of a version that did not read them
    check_settings(Path("f"), begun, {"all rows of the data": "hash"})


def test_a_run_is_not_gone_on_with_on_a_changed_row(tmp_path: Path) -> None:
    data = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1))
    tune(tmp_path / "f", stop=3, data=data)
    data[1234, 2] += 1
    with pytest.raises(TrajectoryError, match="all rows of the data="):
        tune(tmp_path / "f", data=data)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"layer_norm_eps": 1e-3}),
        ("bert", {"hidden_act": "relu"}),
        ("llama", {"rope_theta": 500.0}),
    ],
)
def test_a_run_is_not_gone_on_with_by_another_configuration(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    head = "causal" if family == "llama" else "classification"
    rows = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(token_rows(8))]

    def run(steps: int, **options: Any) -> None:
        model = tiny_model(family, head, **options)
        loss: Any = ClassificationLoss(model)
        if head == "causal":
            loss = CausalLMLoss(model)
            rows[:] = [{"input_ids": row["input_ids"]} for row in rows]
        minimize(
            loss, ParameterView.matching(model, "score|classifier|lm_head"), rows,
            MeZO(displacement=0.1), batch_size=4, max_steps=steps, trajectory=tmp_path / "f",
            resume=True, **QUIET,
        )  # fmt: skip

    run(2)
    with pytest.raises(TrajectoryError, match=next(iter(changes))):
        run(3, **changes)
    # What a value does not depend on may be another.
    unread = {"attention_dropout": 0.3} if family == "llama" else {"hidden_dropout_prob": 0.3}
    run(3, **unread)


def test_a_configuration_is_compared_as_far_as_both_versions_have_it(tmp_path: Path) -> None:
    begun = {"config": {"eps": 1e-5, "former": 1}}
    check_settings(tmp_path, begun, {"config": {"eps": 1e-5, "new": 2}})
    check_settings(tmp_path, {}, {"config": {"eps": 1e-5}})
    with pytest.raises(TrajectoryError, match=r"config=\{'eps': 1e-05\}, not \{'eps': 0.1\}"):
        check_settings(tmp_path, begun, {"config": {"eps": 0.1, "new": 2}})


def scaled_by(factor: float, model: nn.Module) -> Any:
    return lambda batch: factor * (model(batch) - 1).square().mean(1)


def with_default(factor: float, model: nn.Module) -> Any:
    return lambda batch, factor=factor: factor * (model(batch) - 1).square().mean(1)


def counting(calls: float, model: nn.Module) -> Any:
    def loss(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (model(batch) - 1).square().mean(1)

    return loss


def first_columns(count: int) -> Any:
    return lambda rows: torch.stack(rows) * (torch.arange(6) < count)


@pytest.mark.parametrize("make", [scaled_by, with_default, counting, first_columns])
def test_what_a_function_has_from_around_it_is_a_part_of_it(tmp_path: Path, make: Any) -> None:
    """But for what it changes itself; of the collate function as of the objective."""

    def tuned(factor: Any, steps: int) -> int:
        model, data = Two(), Data(list(DATA))
        objective = make(factor, model) if make is not first_columns else scaled_by(1.0, model)
        if make is first_columns:
            data = Data(list(DATA), collate=first_columns(factor))
        return minimize(
            objective, ParameterView.trainable(model), data, MeZO(displacement=0.1), batch_size=8,
            max_steps=steps, trajectory=tmp_path / "f", resume=True, **QUIET,
        ).steps  # fmt: skip

    assert tuned(2, 2) == 2
    if make is not counting:
        with pytest.raises(TrajectoryError, match="defaults or from around"):
            tuned(3, 4)
    assert tuned(2 if make is not counting else 7, 4) == 4


def test_stratification_is_a_part_of_the_order(tmp_path: Path) -> None:
    from zo_adapt import Data

    rows = [{"x": torch.full((2,), float(i)), "label": i % 2} for i in range(16)]
    x = torch.zeros(2)

    def go(**options: Any) -> None:
        def loss(batch: Any) -> Tensor:
            return (batch["x"] - x).square().sum(1)

        minimize(
            loss, ParameterView({"x": x}), Data(rows, **options), MeZO(), batch_size=4,
            max_steps=3, trajectory=tmp_path / "f", resume=True, **QUIET,
        )  # fmt: skip

    go()
    x.zero_()
    with pytest.raises(TrajectoryError, match=r"share|classes"):
        go(stratify=False)


def test_replay_checks_the_base_and_may_be_told_not_to(tmp_path: Path) -> None:
    tuned = tune(tmp_path / "f")
    for family in (Two(), Two(1)):
        view = ParameterView.trainable(family)
        if family.frozen.weight.equal(tuned.frozen.weight):
            assert replay(view, tmp_path / "f") == 8
            continue
        with pytest.raises(TrajectoryError, match="another base model"):
            Replay(view, tmp_path / "f")
        assert replay(view, tmp_path / "f", check_base=False) == 8
        assert family.tuned.weight.equal(tuned.tuned.weight)


def test_files_of_before_scales_were_looked_at_still_have_their_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zo_adapt.view import identity

    def adapted(alpha: int) -> ParameterView:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"])
        return ParameterView.trainable(peft.get_peft_model(tiny_model("bert"), config))

    view, other = adapted(4), adapted(8)
    today = view.base_hash()
    assert today is not None and view.has_base(today) and not other.has_base(today)
    with monkeypatch.context() as before:
        before.setattr(identity, "_scalings", lambda model: ())
        former = view.base_hash()
    assert former is not None and former != today and view.has_base(former)
    assert not view.has_base("0" * 64)


@pytest.mark.parametrize("is_large", [False, True])
def test_a_base_is_told_by_all_its_numbers_or_a_large_one_by_some(
    is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zo_adapt.view import identity

    if is_large:
        monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    model = tiny_model("bert", vocab_size=200)
    view = ParameterView.last_layers(model, 1)
    before = view.base_hash()
    few, many = model.bert.embeddings.LayerNorm.weight, model.bert.embeddings.word_embeddings.weight
    for tensor, is_seen in ((few, True), (many, not is_large)):
        old = tensor.flatten()[1].item()
        with torch.no_grad():
            tensor.view(-1)[1] += 1
            assert (view.base_hash() != before) is is_seen
            tensor.view(-1)[1] = old
    with torch.no_grad():
        model.classifier.weight += 1  # tuned
    assert view.base_hash() == before


def test_a_larger_budget_is_a_longer_run(tmp_path: Path) -> None:
    short = tune(tmp_path / "short")
    long = tune(tmp_path / "long", max_steps=16)
    lives = [tune(tmp_path / "f", max_steps=8)]
    assert lives[0].tuned.weight.equal(short.tuned.weight)
    for stop in (10, 13, None):
        lives.append(tune(tmp_path / "f", max_steps=16, stop=stop))
    tune(tmp_path / "g", max_steps=8)
    at_once = tune(tmp_path / "g", max_steps=16)
    assert lives[-1].tuned.weight.equal(at_once.tuned.weight)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()
    assert not at_once.tuned.weight.equal(long.tuned.weight)  # another share of the budget
    with pytest.raises(TrajectoryError, match="max_steps=16, not 12"):
        tune(tmp_path / "f", max_steps=12)


# The range of a dtype


@pytest.mark.parametrize("coefficient", [3000.0, 1300.0])
def test_a_step_that_would_overflow_fp16_changes_nothing(coefficient: float) -> None:
    x = torch.full((1000,), 60000.0).half()
    view = ParameterView({"x": x})
    with pytest.raises(StepTooLargeError, match=r"float16 \(at most 6"):
        view.apply(Shift((Term(1, coefficient),)))
    assert bool((x == 60000.0).all())
    view.apply(Shift((Term(1, 1000.0),)))
    assert bool(x.isfinite().all())
    x.fill_(100.0)  # loaded anew: there is room again
    view.apply(Shift((Term(1, 3000.0),)))
    x.fill_(65504.0)
    with pytest.raises(StepTooLargeError):
        view.apply(Shift((Term(1, 1e-3),)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_factor_that_would_overflow_changes_nothing(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.full((10,), 0.6 * most, dtype=dtype)
    view, before = ParameterView({"x": x}), x.clone()
    with pytest.raises(StepTooLargeError):
        view.apply(Shift((), 2.0))
    assert torch.equal(x, before)
    view.apply(Shift((), 1.5))
    with pytest.raises(StepTooLargeError):
        view.apply(Shift((), 1.5))


def test_many_small_steps_reach_the_edge_and_stop_there() -> None:
    x = torch.zeros(64).half()
    view = ParameterView({"x": x}, noise="rademacher")
    with pytest.raises(StepTooLargeError):
        for _ in range(200):
            view.apply(Shift((Term(1, 1000.0),)))
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) > 55_000


# Numbers are numbers


@pytest.mark.parametrize(
    "options",
    [
        {"max_queries": math.nan},
        {"max_queries": math.inf},
        {"max_steps": 2.5},
        {"max_steps": True},
        {"max_steps": "3"},
        {"max_steps": 2, "seed": 1.5},
        {"max_steps": 2, "batch_size": 1.0},
    ],
    ids=str,
)
def test_an_integer_is_an_integer(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="integer"):
        minimize(lambda batch: 0.0, one(), None, MeZO(), **QUIET, **options)
    if "batch_size" not in options:
        with pytest.raises(OptionError, match="integer"):
            AskTell(MeZO(), np.zeros(2), **options)


def test_numpys_integers_are_integers_also_in_a_file(tmp_path: Path) -> None:
    optimizer = MeZOSVRG(
        num_directions=np.int64(2), snapshot_interval=np.int64(2), snapshot_size=np.int64(16)
    )
    options = {"max_steps": np.int64(5), "batch_size": np.int32(8), "seed": np.uint64(3)}
    run(one := tensors(), tmp_path / "f", optimizer, **options)
    plain = MeZOSVRG(num_directions=2, snapshot_interval=2, snapshot_size=16)
    run(other := tensors(), tmp_path / "g", plain, max_steps=5)
    assert equal(one, other)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


RETURNED: dict[str, Any] = {
    "text": "3.5",
    "bytes": b"3.5",
    "complex": 1 + 2j,
    "complex tensor": torch.tensor(1 + 2j),
    "not a time": np.datetime64("NaT", "s"),
    "duration": np.timedelta64(3, "s"),
    "masked": np.ma.masked_array([1.0], mask=[True]),
    "too large": 10**400,
    "sparse": torch.ones(1).to_sparse(),
    "meta": torch.ones((), device="meta"),
    "texts": ["1.0"],
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    x = torch.zeros(2)
    with pytest.raises(ObjectiveError, match="the objective returned"):
        minimize(
            lambda batch: RETURNED[name],
            ParameterView({"x": x}),
            None,
            MeZO(),
            max_steps=1,
            **QUIET,
        )
    assert not x.any()


def test_numbers_of_every_kind_are_numbers() -> None:
    from decimal import Decimal
    from fractions import Fraction

    from zo_adapt.evaluation.values import checked_values

    for value in (3, True, np.float32(3), Decimal(3), Fraction(3), 2**70, torch.tensor(3)):
        assert float(checked_values(value, 1)) == float(value)
    assert checked_values([torch.tensor(1.0), torch.tensor(2.0)], 2).tolist() == [1.0, 2.0]


def test_a_step_that_no_record_can_hold_is_refused_before_the_work(tmp_path: Path) -> None:
    calls = []

    def objective(batch: Any) -> float:
        calls.append(batch)
        return 0.0

    view = ParameterView({"x": torch.zeros(2)})
    with pytest.raises(TrajectoryWriteError, match="9000 terms"):
        minimize(
            objective, view, None, MeZO(num_directions=9000, one_sided=True), max_steps=2,
            trajectory=tmp_path / "f", **QUIET,
        )  # fmt: skip
    assert not calls
    assert not list(tmp_path.iterdir())


def test_nothing_is_warned_of_in_a_plain_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tensors(), tmp_path / "f", MeZOSVRG(snapshot_interval=2))
