"""Every fault of a trajectory is named, and nothing is half-applied."""

import errno
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from trajectories import STEPS, copies, equal, run, tensors

from zo_adapt import (
    SGD,
    EvaluationOptions,
    Group,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Replay,
    Result,
    Shift,
    StopReason,
    Term,
    replay,
)
from zo_adapt.errors import (
    CorruptTrajectoryError,
    OptionError,
    TrajectoryError,
    TrajectoryWriteError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.trajectory.file import VERSION, Reader
from zo_adapt.trajectory.writer import Writer

SEEN = (TrajectoryError, TruncatedTrajectoryWarning)

KINDS: dict[str, Callable[[], Optimizer]] = {
    "one direction": MeZO,
    "snapshots, decay": lambda: MeZOSVRG(
        1e-3, snapshot_interval=2, num_directions=2, one_sided=False, weight_decay=0.1
    ),
}


def states_of(path: Path, steps: int) -> list[dict[str, torch.Tensor]]:
    """The weights of every step."""
    live = tensors()
    replayed = Replay(ParameterView(live), path)
    return [copies(live) for step in range(steps + 1) if replayed.to(step) == step]


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_byte_is_seen(tmp_path: Path, kind: str) -> None:
    run(tensors(), tmp_path / "f", KINDS[kind](), max_steps=3)
    data, path = (tmp_path / "f").read_bytes(), tmp_path / "damaged"
    live = tensors()
    view = ParameterView(live)
    with open(path, "w+b", buffering=0) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write(data)
        for place in range(len(data)):
            for flip in (0x01, 0x80, 0xFF):
                os.pwrite(file.fileno(), bytes([data[place] ^ flip]), place)
                with pytest.raises(SEEN):
                    replay(view, path)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert equal(live, tensors())  # nothing half-applied


def test_every_value_of_every_byte_of_the_records_is_seen(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO(num_directions=2), max_steps=2)
    data, path = (tmp_path / "f").read_bytes(), tmp_path / "damaged"
    with open(path, "w+b", buffering=0) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write(data)
        reader = Reader(path)
        for place in range(reader.start.offset, len(data)):
            for value in {*range(256)} - {data[place]}:
                os.pwrite(file.fileno(), bytes([value]), place)
                with pytest.raises(SEEN):
                    list(reader.steps())
            os.pwrite(file.fileno(), data[place : place + 1], place)
        assert len(list(reader.steps())) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_that_was_cut_off_is_dropped_with_a_notice(tmp_path: Path, kind: str) -> None:
    run(tensors(), tmp_path / "f", KINDS[kind](), max_steps=3)
    data, path = (tmp_path / "f").read_bytes(), tmp_path / "cut"
    reader, states = Reader(tmp_path / "f"), states_of(tmp_path / "f", 3)
    ends = [reader.start.offset, *(position.offset for _, position in reader.steps())]
    untouched = tensors()
    view = ParameterView(untouched)
    for length in range(ends[0]):
        path.write_bytes(data[:length])
        with pytest.raises(TrajectoryError, match=r"not a trajectory|header"):
            replay(view, path)
    assert equal(untouched, states[0])
    for length in range(ends[0], len(data)):
        path.write_bytes(data[:length])
        again = tensors()
        whole = sum(end <= length for end in ends) - 1
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert replay(ParameterView(again), path) == whole
        assert equal(again, states[whole])
        notices = [w for w in told if issubclass(w.category, TruncatedTrajectoryWarning)]
        assert len(notices) == (length not in ends)


def test_steps_before_a_damage_can_be_had(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO())
    four = states_of(tmp_path / "f", 4)[4]
    data = bytearray((tmp_path / "f").read_bytes())
    data[-10] ^= 1
    (tmp_path / "f").write_bytes(data)
    live = tensors()
    with pytest.raises(CorruptTrajectoryError, match="checksum"):
        replay(ParameterView(live), tmp_path / "f")
    assert equal(live, tensors())
    assert replay(ParameterView(live), tmp_path / "f", 4) == 4
    assert equal(live, four)


def test_records_that_were_exchanged_or_lost_are_seen(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO(), max_steps=4)
    reader = Reader(tmp_path / "f")
    ends = [reader.start.offset, *(position.offset for _, position in reader.steps())]
    data = (tmp_path / "f").read_bytes()
    one, two, three = (data[a:b] for a, b in pairwise(ends[:4]))
    for name, body in {"exchanged": two + one + three, "lost": one + three}.items():
        (tmp_path / name).write_bytes(data[: ends[0]] + body)
        view = ParameterView(tensors())
        with pytest.raises(CorruptTrajectoryError):
            replay(view, tmp_path / name)
        assert view.hash() == ParameterView(tensors()).hash()


def other(path: Path, **entries: Any) -> Path:
    """The same file with other entries in its header."""
    reader, changed = Reader(path), path.with_name("other")
    writer = Writer(changed, reader.header | entries)
    for step, _ in reader.steps():
        writer.append(step)
    return changed


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f"
    run(tensors(), path, MeZO())
    for message, live, options, file in (
        ("other weights", tensors(seed=9), {}, path),
        ("noise", tensors(), {"noise": "rademacher"}, path),
        ("noise 'gaussian-philox-v2'", tensors(), {}, other(path, noise="gaussian-philox-v2")),
        ("another view", tensors(torch.float64), {}, path),
        ("another view", {"w": tensors()["w"]}, {}, path),
        ("another view", {"v": tensors()["w"], "b": tensors()["b"]}, {}, path),
        ("groups", tensors(), {"groups": [Group("b", lr=2.0)]}, path),
    ):
        before = copies(live)
        with pytest.raises(TrajectoryError, match=message):
            replay(ParameterView(live, **options), file)
        assert equal(live, before)


def test_steps_that_are_not_there_are_named(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO())
    for until in (13, -1):
        with pytest.raises(TrajectoryError, match=f"has 12 steps, not {until}"):
            replay(view := ParameterView(tensors()), tmp_path / "f", until)
        assert view.hash() == ParameterView(tensors()).hash()


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    path = tmp_path / "f"
    run(tensors(), path, MeZO())
    data = bytearray(path.read_bytes())
    data[7] = VERSION + 1
    (tmp_path / "newer").write_bytes(data)
    (tmp_path / "text").write_bytes(b"something else altogether")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(TrajectoryError, match=f"format version {VERSION + 1}"):
        replay(ParameterView(tensors()), tmp_path / "newer")
    for name in ("text", "empty"):
        with pytest.raises(TrajectoryError, match="not a trajectory"):
            replay(ParameterView(tensors()), tmp_path / name)
        with pytest.raises(TrajectoryError, match="not a trajectory"):
            run(tensors(), tmp_path / name, MeZO(), resume=True)
    assert (tmp_path / "text").read_bytes() == b"something else altogether"
    with pytest.raises(TrajectoryError, match="draws its seeds by 'words-v9'"):
        other(path, seeds=["words-v9", 3])


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "displacement": ("displacement", {"optimizer": MeZO(displacement=0.1)}),
    "schedule": ("schedule", {"optimizer": MeZO(schedule="cosine")}),
    "callable": ("schedule", {"optimizer": MeZO(schedule=lambda progress: 1 - progress / 2)}),
    "optimizer": ("optimizer", {"optimizer": MeZOSVRG()}),
    "seed": ("seed", {"seed": 4}),
    "batch size": ("batch_size", {"batch_size": 4}),
    "micro-batches": ("micro_batch_size", {"evaluation": EvaluationOptions(micro_batch_size=2)}),
    "sign": ("sign", {"maximize": True}),
    "steps": ("max_steps", {"max_steps": 11}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    path, live = tmp_path / "f", tensors()
    run(tensors(), path, MeZO(), stop=3)
    before = path.read_bytes()
    name, options = RESUMED[case]
    options = {"optimizer": MeZO()} | options
    with pytest.raises(TrajectoryError, match=f"was begun with {name}="):
        run(live, path, resume=True, **options)
    assert equal(live, tensors())
    assert path.read_bytes() == before


def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    path, state = tmp_path / "f", tmp_path / "f.state"
    run(tensors(), path, MeZO(), stop=3)
    before = path.read_bytes()
    with pytest.raises(TrajectoryError, match="resume=True"):
        run(tensors(), path, MeZO())
    kept = state.read_bytes()
    state.unlink()
    with pytest.raises(TrajectoryError, match=r"no f\.state beside it"):
        run(tensors(), path, MeZO(), resume=True)
    state.write_bytes(kept.replace(b'"steps": 3', b'"steps": 2'))
    with pytest.raises(CorruptTrajectoryError, match="damaged"):
        run(tensors(), path, MeZO(), resume=True)
    state.write_bytes(kept[:-9])
    with pytest.raises(CorruptTrajectoryError, match="damaged"):
        run(tensors(), path, MeZO(), resume=True)
    state.write_bytes(kept)
    path.write_bytes(before[:-60])
    with (
        pytest.warns(TruncatedTrajectoryWarning),
        pytest.raises(TrajectoryError, match="no record"),
    ):
        run(tensors(), path, MeZO(), resume=True)
    with pytest.raises(OptionError, match="first-order"):
        run(tensors(), tmp_path / "g", SGD(1e-2))


def test_a_kill_before_the_first_step_leaves_a_run_to_begin(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "whole", MeZO())
    shutil.copy(tmp_path / "whole", tmp_path / "f")
    os.truncate(tmp_path / "f", Reader(tmp_path / "whole").start.offset)
    (tmp_path / "f.new").write_bytes(b"half")
    run(tensors(), tmp_path / "f", MeZO(), resume=True)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_folder_that_cannot_be_written_stops_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    live = tensors()
    with pytest.raises(TrajectoryWriteError, match="cannot write"):
        run(live, tmp_path / "file" / "run.zot", MeZO())
    assert equal(live, tensors())


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk does, by a limit of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def check_stopped_with_the_last_step_safe(path: Path, live: dict[str, Any], result: Result) -> None:
    """The weights, the file, the result and a resumed run agree."""
    assert result.stop_reason is StopReason.CANNOT_WRITE
    assert 0 < result.steps < STEPS
    assert len(result.history) == result.steps
    again = tensors()
    assert replay(ParameterView(again), path) == result.steps
    assert equal(live, again)
    whole, resumed = tensors(), tensors()
    run(whole, path.with_name("whole"), MeZO())
    run(resumed, path, MeZO(), resume=True)
    assert equal(whole, resumed)
    assert path.read_bytes() == path.with_name("whole").read_bytes()


def test_a_full_disk_stops_the_run_with_the_last_step_safe(tmp_path: Path) -> None:
    path, live = tmp_path / "f", tensors()
    run(tensors(), tmp_path / "size", MeZO(), max_steps=5)
    # Room for the state, and in the trajectory for five steps and a part of the sixth.
    with room_for((tmp_path / "size").stat().st_size + 20):
        result = run(live, path, MeZO())
    check_stopped_with_the_last_step_safe(path, live, result)


def test_a_full_disk_while_the_state_is_written_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, live, write = tmp_path / "f", tensors(), os.write

    def full(descriptor: int, data: bytes) -> int:
        if b'"steps": 4' in bytes(data):
            write(descriptor, data[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    result = run(live, path, MeZO())
    monkeypatch.undo()
    assert result.steps == 3
    assert sorted(found.name for found in tmp_path.iterdir()) == ["f", "f.state"]
    check_stopped_with_the_last_step_safe(path, live, result)


def test_a_folder_that_vanishes_stops_the_run(tmp_path: Path) -> None:
    path, live = tmp_path / "folder" / "f", tensors()

    def callback(record: Any) -> None:
        if record.step == 3:
            shutil.rmtree(path.parent)

    result = run(live, path, MeZO(), callback=callback)
    assert (result.stop_reason, result.steps) == (StopReason.CANNOT_WRITE, 3)


def test_a_record_that_is_too_large_is_named(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO(), max_steps=1)
    reader = Reader(tmp_path / "f")
    (step, at), before = next(reader.steps()), (tmp_path / "f").read_bytes()
    writer = Writer(tmp_path / "f", reader.header, at)
    for count in (8_190, 100_000):
        many = Shift(tuple(Term(seed, 1.0) for seed in range(count)))
        with pytest.raises(TrajectoryWriteError, match="fewer directions"):
            writer.append(step._replace(update=many))
    with pytest.raises(TrajectoryWriteError, match="256 groups"):
        Writer(tmp_path / "g", reader.header | {"groups": [["w", 1.0, 1.0]] * 256})
    assert (tmp_path / "f").read_bytes() == before
