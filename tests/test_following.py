"""Another process can go along with a run by the file that it writes."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zo_adapt import MeZOSVRG, ParameterView, Step, follow, minimize
from zo_adapt.errors import CorruptTrajectoryError, OptionError, TrajectoryError
from zo_adapt.trajectory.tools import main


def a_view() -> tuple[ParameterView, torch.Tensor]:
    x = torch.zeros(6)
    return ParameterView({"x": x}), x


def a_run(file: Path, steps: int = 8, **options: object) -> ParameterView:
    view, x = a_view()
    minimize(
        lambda _: float((x - 1).square().sum()), view, None, MeZOSVRG(), max_steps=steps,
        trajectory=file, progress=False, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return view


def test_a_spare_is_at_the_weights_of_the_run_after_every_step(tmp_path: Path) -> None:
    live, x = a_view()
    spare, _ = a_view()
    steps = follow(spare, tmp_path / "run.zot", interval=0.01, patience=20.0)
    seen: list[int] = []

    def compare(step: Step) -> None:
        followed = next(steps)
        assert (followed.step, followed.queries) == (step.step, step.queries)
        assert spare.hash() == live.hash()
        seen.append(step.step)

    minimize(
        lambda _: float((x - 1).square().sum()), live, None, MeZOSVRG(), max_steps=8,
        trajectory=tmp_path / "run.zot", callback=compare, progress=False,
    )  # fmt: skip
    assert seen == list(range(1, 9))


def test_a_record_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    whole, growing = tmp_path / "run.zot", tmp_path / "growing.zot"
    a_run(whole)
    data = whole.read_bytes()
    growing.write_bytes(data[:-5])
    view, _ = a_view()

    def rest() -> None:
        time.sleep(0.2)
        with growing.open("ab") as file:
            file.write(data[-5:])

    thread = threading.Thread(target=rest)
    thread.start()
    found = [step.step for step in follow(view, growing, until=8, interval=0.01, patience=20.0)]
    thread.join()
    assert found == list(range(1, 9))


def test_a_damaged_record_and_a_missing_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.zot"
    view, _ = a_view()
    with pytest.raises(TrajectoryError, match="start the run first"):
        next(follow(view, file, patience=0.05, interval=0.01))
    with pytest.raises(OptionError, match="interval"):
        next(follow(view, file, interval=0.0))
    a_run(file)
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptTrajectoryError):
        list(follow(view, file, patience=0.05, interval=0.01))


def test_the_tool_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, start = tmp_path / "run.zot", tmp_path / "start.safetensors"
    save_file({"x": torch.zeros(6)}, start)
    live = a_run(file)
    main(["replay", str(file), "--start", str(start), "--follow", "--patience", "0.1"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-1].startswith("step 8: value")
    assert json.loads(last) == {"steps": 8, "sha256": live.hash()}
