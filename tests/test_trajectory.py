"""A fine-tune is its trajectory: replayed and resumed bit for bit, and no damage goes unseen."""

import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zo_adapt import (
    SGD,
    ZOSVRG,
    Annealing,
    Group,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Result,
    StopReason,
    minimize,
    replay,
)
from zo_adapt.errors import (
    CorruptTrajectoryError,
    OptionError,
    TrajectoryError,
    TrajectoryWriteError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.optimizer import Optimizer
from zo_adapt.trajectory import VERSION, Reader, columns
from zo_adapt.trajectory_tools import main

STEPS = 12
OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "mezo": MeZO,
    "mezo plain": lambda: MeZO(1e-3, weight_decay=0.1, schedule="cosine"),
    "mezo one-sided": lambda: MeZO(num_directions=3, one_sided=True),
    "svrg": MeZOSVRG,
    "svrg inner": lambda: MeZOSVRG(
        1e-3, snapshot_interval=3, snapshot_size=16, one_sided=False, num_directions=4
    ),
    "svrg annealed": lambda: MeZOSVRG(snapshot_interval=2, annealing=Annealing(window=2)),
    "zo-svrg": lambda: ZOSVRG(1e-3, snapshot_interval=4),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(6, 5, generator=generator).to(dtype),
        "b": torch.randn(5, generator=generator).to(dtype).view(5, 1).T,
    }


def run(
    live: dict[str, torch.Tensor],
    path: Path,
    optimizer: Optimizer,
    stop: int | None = None,
    **options: Any,
) -> Result:
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (batch @ live["w"].double() + live["b"].double() - 1).square().mean(1)

    def callback(record: Any) -> None:
        if record.step == stop:
            raise StopIteration

    options = {"max_steps": STEPS, "batch_size": 8, "seed": 3, "progress": False} | options
    view = options.pop("view", None) or ParameterView(live)
    return minimize(loss, view, data, optimizer, trajectory=path, callback=callback, **options)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    dtype=st.sampled_from(DTYPES),
    noise=st.sampled_from(["gaussian", "rademacher"]),
    until=st.integers(0, STEPS),
    seed=st.integers(0, 2**64 - 1),
)
def test_replay_gives_the_weights_of_any_step(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    dtype: torch.dtype,
    noise: str,
    until: int,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("replay") / "run.zot"
    live, again = tensors(dtype), tensors(dtype)
    view = ParameterView(live, noise=noise)
    stopped = run(live, path, OPTIMIZERS[name](), stop=until or None, view=view, seed=seed)
    if until:
        assert stopped.nit == until
        assert replay(ParameterView(again, noise=noise), path, until) == until
        assert equal(live, again)
    else:
        assert replay(ParameterView(again, noise=noise), path, 0) == 0
        assert equal(again, tensors(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    whole, parts = tensors(dtype), tensors(dtype)
    expected = run(whole, tmp_path / "whole", OPTIMIZERS[name]())
    for stop in (1, 2, 5, 7):
        run(parts, tmp_path / "parts", OPTIMIZERS[name](), stop=stop, resume=True)
        parts = tensors(dtype)  # a new process begins at the initial weights
    result = run(parts, tmp_path / "parts", OPTIMIZERS[name](), resume=True)
    assert equal(whole, parts)
    assert (result.history, result.queries) == (expected.history, expected.queries)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    live = tensors()
    first = run(live, tmp_path / "f", MeZO())
    live = tensors()
    second = run(live, tmp_path / "f", MeZO(), resume=True)
    assert second == first


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_takes_at_most_64_bytes(tmp_path: Path, decay: float) -> None:
    sizes = []
    for steps in (10, 20):
        path = tmp_path / f"{steps}"
        run(tensors(), path, MeZO(1e-3, weight_decay=decay), max_steps=steps)
        sizes.append(path.stat().st_size)
    assert 0 < (sizes[1] - sizes[0]) / 10 <= 64


def test_groups_and_columns(tmp_path: Path) -> None:
    live, again = tensors(), tensors()
    groups = [Group("b", lr=0.5, perturbation_scale=2.0)]
    result = run(live, tmp_path / "f", MeZO(), view=ParameterView(live, groups=groups))
    replay(ParameterView(again, groups=groups), tmp_path / "f")
    assert equal(live, again)
    table = columns(tmp_path / "f")
    assert table["value"] == [record.value for record in result.history]
    assert table["queries"][-1] == result.queries
    with pytest.raises(TrajectoryError, match="groups"):
        replay(ParameterView(tensors()), tmp_path / "f")


def test_every_damaged_byte_is_seen_or_harmless(tmp_path: Path) -> None:
    live = tensors()
    run(live, tmp_path / "f", MeZO(), max_steps=3)
    data = (tmp_path / "f").read_bytes()
    states = []
    for step in range(4):
        again = tensors()
        replay(ParameterView(again), tmp_path / "f", step)
        states.append(again)
    path, seen = tmp_path / "damaged", 0
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            again = tensors()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    replay(ParameterView(again), path)
            except (TrajectoryError, TruncatedTrajectoryWarning):
                seen += 1
                assert equal(again, states[0])  # nothing half-applied
            else:
                assert any(equal(again, state) for state in states)
    assert seen == 3 * len(data)


def test_a_tail_that_was_cut_off_is_dropped_with_a_notice(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO(), max_steps=3)
    data = (tmp_path / "f").read_bytes()
    two = tensors()
    replay(ParameterView(two), tmp_path / "f", 2)
    for cut in (1, 20, 54):
        (tmp_path / "cut").write_bytes(data[:-cut])
        again = tensors()
        with pytest.warns(TruncatedTrajectoryWarning, match="every step before"):
            assert replay(ParameterView(again), tmp_path / "cut") == 2
        assert equal(again, two)


def test_records_that_were_exchanged_or_lost_are_seen(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO(), max_steps=4)
    reader = Reader(tmp_path / "f")
    ends = [reader.start.offset, *(position.offset for _, position in reader.steps())]
    data = (tmp_path / "f").read_bytes()
    one, two, three = (data[a:b] for a, b in pairwise(ends[:4]))
    for name, body in {"exchanged": two + one + three, "lost": one + three}.items():
        (tmp_path / name).write_bytes(data[: ends[0]] + body)
        with pytest.raises(CorruptTrajectoryError):
            replay(ParameterView(tensors()), tmp_path / name)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f"
    run(tensors(), path, MeZO())
    with pytest.raises(TrajectoryError, match="other weights"):
        replay(ParameterView(tensors(seed=9)), path)
    with pytest.raises(TrajectoryError, match="noise"):
        replay(ParameterView(tensors(), noise="rademacher"), path)
    with pytest.raises(TrajectoryError, match="another view"):
        replay(ParameterView(tensors(torch.float64)), path)
    with pytest.raises(TrajectoryError, match="has 12 steps, not 13"):
        replay(ParameterView(tensors()), path, 13)
    with pytest.raises(TrajectoryError, match="resume=True"):
        run(tensors(), path, MeZO())
    with pytest.raises(TrajectoryError, match="displacement"):
        run(tensors(), path, MeZO(displacement=0.1), resume=True)
    with pytest.raises(OptionError, match="first-order"):
        run(tensors(), tmp_path / "g", SGD(1e-2))
    data = bytearray(path.read_bytes())
    data[7] = VERSION + 1
    path.write_bytes(data)
    with pytest.raises(TrajectoryError, match="format version"):
        replay(ParameterView(tensors()), path)
    path.write_bytes(b"something else")
    with pytest.raises(TrajectoryError, match="not a trajectory"):
        replay(ParameterView(tensors()), path)


def test_a_folder_that_cannot_be_written_stops_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    live = tensors()
    with pytest.raises(TrajectoryWriteError, match="cannot write"):
        run(live, tmp_path / "file" / "run.zot", MeZO())
    assert equal(live, tensors())


def test_a_full_disk_stops_the_run_with_the_last_step_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, live, again = tmp_path / "f", tensors(), tensors()
    run(tensors(), tmp_path / "size", MeZO(), max_steps=5)
    # Room for the state, and in the trajectory for five steps and a part of the sixth.
    limit = (tmp_path / "size").stat().st_size + 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        result = run(live, path, MeZO())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert result.stop_reason is StopReason.CANNOT_WRITE
    assert 0 < result.nit < STEPS
    assert replay(ParameterView(again), path) == result.nit
    assert equal(live, again)


def test_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    path, live = tmp_path / "f", tensors()
    start, output = tmp_path / "start.safetensors", tmp_path / "out.safetensors"
    save_file({name: t.contiguous() for name, t in live.items()}, start)
    run(live, path, MeZO())
    main(["info", str(path)])
    assert "12" in capsys.readouterr().out
    main(["verify", str(path)])
    assert "12 steps" in capsys.readouterr().out
    main(["export", str(path), "--start", str(start), "--output", str(output)])
    assert equal(load_file(output), live)
    main(["replay", str(path), "--start", str(start)])
    assert ParameterView(live).hash() in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    with pytest.raises(SystemExit, match="checksum"):
        main(["verify", str(path)])


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    soak = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    done = subprocess.run(
        [sys.executable, str(soak), "--kills", "5", "--tiny", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "5 kills" in done.stdout
