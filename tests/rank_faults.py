"""What can go wrong between processes, and what each of them then says."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from least_squares import Least
from torch import Tensor

from zo_adapt import EvaluationOptions, Workers
from zo_adapt.errors import ZOError

QUICK = EvaluationOptions(workers=Workers(timeout=30, check_every=4))
IMPATIENT = EvaluationOptions(workers=Workers(timeout=4, check_every=4))


class Fault(NamedTuple):
    """A fault.

    Args:
        size: How many processes it needs.
        run: What each of them does.
    """

    size: int
    run: Callable[[Path, int], dict[str, Any]]


def ended(problem: Least, began: float, error: BaseException) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "weights": problem.view.hash(),
        "seconds": time.monotonic() - began,
    }


def _run(problem: Least, **options: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        problem.run(**{"evaluation": QUICK, "max_steps": 40} | options)
    except (ZOError, ValueError) as error:
        return ended(problem, began, error)
    return {}


def in_step(problem: Least, step: int, act: Callable[[], None] | None) -> dict[str, Any]:
    """What a run needs to act in the middle of a step."""
    seen: list[Any] = []
    due: dict[int, Any] = {} if act is None else {step: act}  # no plain value: resumed without it

    def loss(batch: Tensor) -> Tensor:
        due.get(len(seen), lambda: None)()
        return problem(batch)

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    return {"objective": loss, "callback": seen.append}


def killed(folder: Path, rank: int) -> dict[str, Any]:
    problem = Least()
    acting = in_step(problem, 5, None if rank != 1 else lambda: os.kill(os.getpid(), 9))
    return _run(problem, trajectory=folder / "run.zot", **acting)


def hangs(folder: Path, rank: int) -> dict[str, Any]:
    problem = Least()
    naps = iter([9.0])  # once: the step's other blocks come after it
    acting = in_step(problem, 5, None if rank != 1 else lambda: time.sleep(next(naps, 0.0)))
    return _run(problem, trajectory=folder / "run.zot", evaluation=IMPATIENT, **acting)


def restarted(folder: str) -> dict[str, Any]:
    """Of a launcher that starts the processes anew: one dies in a step, the first time."""
    problem, count = Least(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    dies = (os.environ["RANK"], count) == ("1", "0")
    acting = in_step(problem, 5, (lambda: os.kill(os.getpid(), 9)) if dies else None)
    result = problem.run(trajectory=Path(folder) / "run.zot", evaluation=QUICK, **acting)
    made = [step.step for step in acting["callback"].__self__]
    return {"weights": problem.view.hash(), "steps": result.steps, "made": made, "start": count}


def drifts(folder: Path, rank: int) -> dict[str, Any]:
    """Somebody writes to the weights of one rank."""
    problem = Least()

    def write(step: Any) -> None:
        if rank == 1 and step.step == 5:
            problem.w[2] += 1e-9

    return _run(problem, callback=write)


def starts_apart(folder: Path, rank: int) -> dict[str, Any]:
    problem = Least()
    problem.w[0] = float(rank)
    return _run(problem)


def other_seed(folder: Path, rank: int) -> dict[str, Any]:
    return _run(Least(), seed=rank)


def draws(folder: Path, rank: int) -> dict[str, Any]:
    """A collate function whose noise nobody has seeded."""
    problem = Least()
    torch.manual_seed(rank)

    def loss(batch: Tensor) -> Tensor:
        return problem(batch + torch.randn_like(batch))

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    return _run(problem, objective=loss)


def one_raises_in_its_callback(folder: Path, rank: int) -> dict[str, Any]:
    problem = Least()

    def callback(step: Any) -> None:
        if rank == 1 and step.step == 5:
            raise ValueError("no more")

    return _run(problem, callback=callback)


def one_stops(folder: Path, rank: int) -> dict[str, Any]:
    problem = Least()

    def callback(step: Any) -> None:
        if rank == 1 and step.step == 5:
            raise StopIteration

    result = problem.run(callback=callback, evaluation=QUICK)
    return {"steps": result.steps, "weights": problem.view.hash(), "reason": result.stop_reason}


def cannot_write(folder: Path, rank: int) -> dict[str, Any]:
    problem, file = Least(), folder / "run.zot"

    def move(step: Any) -> None:
        if rank == 0 and step.step == 5:
            file.rename(folder / "elsewhere.zot")

    result = problem.run(callback=move, trajectory=file, evaluation=QUICK)
    return {"steps": result.steps, "weights": problem.view.hash(), "reason": result.stop_reason}


FAULTS = {
    work.__name__: Fault(size, work)
    for work, size in (
        (killed, 3), (hangs, 2), (drifts, 2), (starts_apart, 2), (other_seed, 2), (draws, 2),
        (one_raises_in_its_callback, 2), (one_stops, 2), (cannot_write, 2),
    )
}  # fmt: skip
