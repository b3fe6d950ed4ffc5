"""A fine-tune is its trajectory: replayed and resumed bit for bit."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trajectories import DTYPES, OPTIMIZERS, STEPS, copies, equal, run, tensors

from zo_adapt import (
    ZOSVRG,
    Annealing,
    Group,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Replay,
    Shift,
    Term,
    replay,
)
from zo_adapt.errors import TrajectoryError
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.trajectory.file import Reader, columns
from zo_adapt.trajectory.playback import apply_all
from zo_adapt.trajectory.tools import main


@st.composite
def optimizers(draw: Any) -> Optimizer:
    """Any optimizer, with any number of directions, schedule and decay."""
    lr = draw(st.sampled_from([None, 1e-3]))
    options: dict[str, Any] = {
        "schedule": draw(st.sampled_from(["constant", "linear", "cosine", lambda p: 1 - p**2])),
        "weight_decay": 0.0 if lr is None else draw(st.sampled_from([0.0, 0.1])),
    }
    several = {"num_directions": draw(st.integers(1, 6)), "one_sided": draw(st.booleans())}
    interval = {"snapshot_interval": draw(st.integers(1, 4))}
    kind = draw(st.sampled_from(["mezo", "svrg", "zo-svrg"]))
    if kind == "mezo":
        return MeZO(lr, **options, **several)
    if kind == "zo-svrg":
        return ZOSVRG(lr, **options, **interval)
    options["coupling"] = draw(st.sampled_from(["shared", "independent"]))
    options["snapshot_size"] = draw(st.sampled_from(["batch", 16, "all"]))
    options["annealing"] = draw(st.sampled_from([None, Annealing(window=2)]))
    return MeZOSVRG(lr, **options, **several, **interval)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    optimizer=optimizers(),
    dtype=st.sampled_from(DTYPES),
    noise=st.sampled_from(["gaussian", "rademacher", "coordinates"]),
    groups=st.sampled_from([(), (Group("b", lr=0.5, perturbation_scale=2.0),)]),
    visits=st.lists(st.integers(0, STEPS), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
def test_replay_gives_the_weights_of_any_step(
    tmp_path_factory: pytest.TempPathFactory,
    optimizer: Optimizer,
    dtype: torch.dtype,
    noise: str,
    groups: tuple[Group, ...],
    visits: list[int],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("replay") / "run.zot"
    live, again, once = tensors(dtype), tensors(dtype), tensors(dtype)
    states = [copies(live)]
    view = ParameterView(live, noise=noise, groups=groups)
    watch = {"callback": lambda record: states.append(copies(live))}
    run(live, path, optimizer, view=view, seed=seed, **watch)
    assert len(states) == STEPS + 1
    assert replay(ParameterView(once, noise=noise, groups=groups), path, visits[0]) == visits[0]
    assert equal(once, states[visits[0]])
    replayed = Replay(ParameterView(again, noise=noise, groups=groups), path)
    for step in visits:
        assert replayed.to(step) == replayed.step == step
        assert equal(again, states[step])


def test_there_is_a_way_back_only_with_a_copy_of_the_start(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZO())
    live = tensors()
    replayed = Replay(ParameterView(live), tmp_path / "f", keep_start=False)
    replayed.to(5)
    five = copies(live)
    with pytest.raises(TrajectoryError, match="keep_start=True"):
        replayed.to(4)
    with pytest.raises(TrajectoryError, match="has 12 steps, not 13"):
        replayed.to(13)
    assert replayed.step == 5
    assert equal(live, five)


def passes(dtype: torch.dtype, decay: float, steps: int) -> tuple[list[int], bool]:
    """Terms of every pass that applies so many updates of three terms; equal to one by one?"""
    updates = [
        Shift(tuple(Term(3 * i + k, 1e-3 * (k + 1)) for k in range(3)), decay) for i in range(steps)
    ]
    fused, single = tensors(dtype), tensors(dtype)
    view, counted = ParameterView(fused), []
    apply = view.apply_in_order

    def counting(terms: Sequence[Term], decay: float = 1.0) -> None:
        if terms:
            counted.append(len(terms))
        apply(terms, decay)

    view.apply_in_order = counting  # type: ignore[method-assign]
    apply_all(view, updates)
    for update in updates:
        ParameterView(single).apply(update)
    return counted, equal(fused, single)


def test_many_records_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[apply_all.__module__], "WIDTH", 20)
    for dtype in (torch.float32, torch.float64):
        assert passes(dtype, 1.0, 25) == ([20, 20, 20, 15], True)  # 75 terms: ceil(75 / 20) passes
        assert passes(dtype, 0.9, 4) == ([3, 3, 3, 3], True)
    for dtype in (torch.float16, torch.bfloat16):  # every step rounds
        assert passes(dtype, 1.0, 25) == ([3] * 25, True)
    assert passes(torch.float32, 1.0, 7)[0] == [20, 1]


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


@pytest.mark.parametrize("name", ["svrg", "zo-svrg"])
def test_the_state_does_not_grow_with_the_way_back_to_a_snapshot(tmp_path: Path, name: str) -> None:
    sizes: list[int] = []
    kind = {"svrg": MeZOSVRG, "zo-svrg": ZOSVRG}[name]
    optimizer = kind(1e-3, snapshot_interval=1000)

    def looking(record: Any) -> None:
        sizes.append((tmp_path / "f.state").stat().st_size)

    run(tensors(), tmp_path / "f", optimizer, callback=looking, max_steps=40)
    assert optimizer.steps_since == 40
    assert max(sizes) - sizes[1] < 100


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    live = tensors()
    first = run(live, tmp_path / "f", MeZO())
    live = tensors()
    second = run(live, tmp_path / "f", MeZO(), resume=True)
    assert replace(second, evaluation=first.evaluation) == first  # nothing was evaluated again


def bytes_a_step(folder: Path, optimizer: Optimizer, **options: Any) -> float:
    """Growth of the file per step, the header left out."""
    sizes = []
    for steps in (10, 20):
        path = folder / f"{steps}"
        run(tensors(), path, optimizer, max_steps=steps, **options)
        sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / 10


def test_a_step_takes_at_most_64_bytes(tmp_path: Path) -> None:
    two = [Group("b", lr=0.5, perturbation_scale=2.0)]
    decayed = MeZO(1e-3, num_directions=1, one_sided=False, weight_decay=0.1)
    assert bytes_a_step(tmp_path / "one", MeZO.paper(1e-3)) == 54
    assert bytes_a_step(tmp_path / "decay", decayed) == 54
    assert bytes_a_step(tmp_path / "groups", MeZO.paper(1e-3), groups=two) == 64
    assert bytes_a_step(tmp_path / "both", decayed, groups=two) == 64


def test_a_direction_more_takes_8_bytes(tmp_path: Path) -> None:
    # a batch of 8 is two shares of 4 rows, each with K directions
    for k in (1, 8):
        assert bytes_a_step(tmp_path / f"{k}", MeZO(num_directions=k)) == 38 + 8 + 2 * k * 8


def test_the_header_says_what_the_run_was(tmp_path: Path) -> None:
    run(tensors(), tmp_path / "f", MeZOSVRG(annealing=Annealing(window=2)))
    header = Reader(tmp_path / "f").header
    assert header["view"] == [["w", [6, 5], "torch.float32"], ["b", [1, 5], "torch.float32"]]
    assert header["initial"] == ParameterView(tensors()).hash()
    assert header["noise"] == "gaussian-philox-v1"
    assert header["seeds"] == ["philox-words-v1", 3]
    assert {"python", "torch", "numpy"} <= set(header["versions"])
    told = {"optimizer": "MeZOSVRG", "schedule": "cooldown", "num_directions": 8, "batch_size": 8}
    assert told.items() <= header["settings"].items()
    assert header["settings"]["annealing"] == [5.0, 1.0, 2]


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


def test_the_tools_are_a_command(tmp_path: Path) -> None:
    """One that ends well is called in this process by the others."""
    command = [sys.executable, "-W", "error", "-m", "zo_adapt.trajectory", "verify"]
    done = subprocess.run(
        [*command, str(tmp_path / "g")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 1
    assert "No such file" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_columns_are_a_table(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    result = run(tensors(), tmp_path / "f", MeZOSVRG(snapshot_interval=2))
    table = pandas.DataFrame(columns(tmp_path / "f"))
    assert list(table.step) == list(range(1, STEPS + 1))
    assert list(table.kind) == [record.kind for record in result.history]
    assert table.queries.iloc[-1] == result.queries


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
