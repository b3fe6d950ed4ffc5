"""Damage to a trajectory, a second writer and a full disk: what is noticed, and what is left."""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from killed_runs import FORK

from objectives import CallableObjective
from zo_adapt import MeZOSVRG, ParameterView, StopReason, minimize, replay
from zo_adapt.errors import (
    TrajectoryError,
    TrajectoryInUseError,
    TrajectoryWriteError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.trajectory.file import Reader

STEPS = 4


def start() -> dict[str, torch.Tensor]:
    """The same weights every time."""
    return {"w": torch.arange(6.0).view(2, 3) / 8, "b": torch.ones(3, dtype=torch.bfloat16)}


def run(live: dict[str, torch.Tensor], path: Path, steps: int = STEPS, **options: Any) -> Any:
    """A run of a few steps with a file."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (batch @ live["w"] + live["b"].float() - 1).square().mean(1)

    data = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    return minimize(
        CallableObjective(loss),
        ParameterView(live),
        data,
        MeZOSVRG(snapshot_interval=2),
        batch_size=4,
        max_steps=steps,
        progress=False,
        trajectory=path,
        **options,
    )


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, as these weights are finite and have no negative zero."""
    return all(torch.equal(one[name], other[name]) for name in one)


def flips(folder: Path) -> Iterator[str | None]:
    """Every byte of a file changed, in one bit: an error or a notice, and no weight moved."""
    run(start(), folder / "f")
    data, path, live = (folder / "f").read_bytes(), folder / "flipped", start()
    view = ParameterView(live)
    for place in range(len(data)):
        damaged, bit = bytearray(data), place % 8  # every bit in turn
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TruncatedTrajectoryWarning)
            try:
                replay(view, path)
            except (TrajectoryError, TruncatedTrajectoryWarning):
                yield None if same(live, start()) else f"bit {bit} of {place}: half applied"
            else:
                yield f"bit {bit} of byte {place}: not noticed"


def cuts(folder: Path) -> Iterator[str | None]:
    """A file cut at every length: the steps that are whole are replayed, and no more."""
    whole = start()
    run(whole, folder / "f")
    data, path = (folder / "f").read_bytes(), folder / "cut"
    reader = Reader(folder / "f")
    ends = [reader.start.offset, *(position.offset for _, position in reader.steps())]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        steps, live, expected = sum(end <= length for end in ends) - 1, start(), start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncatedTrajectoryWarning)
            try:
                found = replay(ParameterView(live), path)
            except TrajectoryError:
                found = -1
            if found >= 0:
                replay(ParameterView(expected), folder / "f", found)
        right = found == steps and same(live, expected)
        yield None if right else f"cut at {length}: {found} steps for {steps}"


def second_writers(folder: Path, pairs: int) -> Iterator[str | None]:
    """Two processes that begin or go on with one file at once: one writes, the other is refused."""
    whole = start()
    run(whole, folder / "whole", 40)
    for pair in range(pairs):
        path = folder / f"pair{pair}"
        if pair % 2:  # there is something to go on with
            run(start(), path, 40, callback=_stop_at(5))
        children = [FORK.Process(target=_write, args=(path,)) for _ in range(2)]
        for child in children:
            child.start()
        codes = []
        for child in children:
            child.join()
            codes.append(child.exitcode)
        if not set(codes) <= {0, 3} or 0 not in codes:
            yield f"pair {pair}: exit codes {codes}"
            continue
        right = path.read_bytes() == (folder / "whole").read_bytes()
        yield None if right else f"pair {pair}: another file"


def _stop_at(step: int) -> Callable[[Any], None]:
    def stopping(made: Any) -> None:
        if made.step == step:
            raise StopIteration

    return stopping


def _write(path: Path) -> None:
    try:
        run(start(), path, 40, resume=True, callback=lambda step: time.sleep(1e-3))
    except TrajectoryInUseError:
        os._exit(3)
    except TrajectoryError:  # begun by the other in the very moment
        os._exit(3)


def full_disks(folder: Path) -> Iterator[str | None]:
    """A disk that is full at every size of the file: a named end, and a run that can go on."""
    whole = start()
    run(whole, folder / "whole")
    size = (folder / "whole").stat().st_size
    state = (folder / "whole.state").stat().st_size
    for limit in range(0, max(size, state) + 40, 17):
        path, live = folder / f"disk{limit}", start()
        with limited(limit):
            try:
                ended = run(live, path).stop_reason
            except TrajectoryWriteError:
                ended = StopReason.CANNOT_WRITE
        again = start()
        if path.exists():
            replay(ParameterView(again), path)
        if not same(live, again):
            yield f"{limit} bytes: the file and the weights are of two steps"
            continue
        done = ended is StopReason.MAX_STEPS
        if not done and ended is not StopReason.CANNOT_WRITE:
            yield f"{limit} bytes: ended with {ended}"
            continue
        live = start()
        run(live, path, resume=True)
        right = same(live, whole) and path.read_bytes() == (folder / "whole").read_bytes()
        yield None if right else f"{limit} bytes: the resumed run is another"


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond a size: as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
