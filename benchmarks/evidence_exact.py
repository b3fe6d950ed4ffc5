"""Whether a run is its file: repeated, replayed and resumed to the bit, for evidence.py."""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_cells import Claim, Results, markdown
from evidence_lm import AT_ONCE
from evidence_methods import optimizer_of
from evidence_plan import Run
from evidence_problems import PROBLEMS, Problem
from torch import Tensor

from zo_adapt import EvaluationOptions, Result, minimize, replay

PIECE = "exactness"
LINK = "[table](#exactness)"


class Stopped(Exception):
    """Half of the queries are made."""


def exactness(run: Run) -> dict[str, Any]:
    """Make a run; make it again, replay it, and stop it half way and resume it, each anew."""
    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder, "whole.zot"), Path(folder, "half.zot")
        problem = PROBLEMS[run.problem](run.seed)
        before = _generators()
        result = _tune(run, problem, whole)
        untouched = _same(before, _generators())
        end = _weights(problem)

        repeated = PROBLEMS[run.problem](run.seed)
        _tune(run, repeated)
        replayed = PROBLEMS[run.problem](run.seed)
        replay(replayed.view, whole)
        try:
            _tune(run, PROBLEMS[run.problem](run.seed), half, stop_at=result.queries // 2)
            raise AssertionError("the run was to be stopped half way")
        except Stopped:
            resumed = PROBLEMS[run.problem](run.seed)
            _tune(run, resumed, half, resume=True)
        return {
            "repeated": _same(end, _weights(repeated)),
            "replayed": _same(end, _weights(replayed)),
            "resumed": _same(end, _weights(resumed)),
            "generators untouched": untouched,
            "file": whole.stat().st_size,
            "view": sum(one.nbytes for one in problem.view.tensors.values()),
            "steps": result.steps,
            "queries": result.queries,
            "stopped": result.stop_reason.name,
        }


def _tune(
    run: Run, problem: Problem, file: Path | None = None, stop_at: int = 0, resume: bool = False
) -> Result:
    def stop(step: Any) -> None:
        if step.queries >= stop_at:
            raise Stopped

    return minimize(
        problem.objective,
        problem.view,
        problem.data,
        optimizer_of(run.method, run.problem, run.lr),
        batch_size=run.batch_size,
        max_queries=run.queries,
        seed=run.seed,
        callback=stop if stop_at else None,
        evaluation=EvaluationOptions(
            micro_batch_size=AT_ONCE if run.problem.startswith("causal LM") else None
        ),
        trajectory=file,
        resume=resume,
        progress=False,
    )


def _weights(problem: Problem) -> list[Tensor]:
    return [one.detach().clone() for one in problem.view.tensors.values()]


def _generators() -> list[Tensor]:
    """The states of the global random generators."""
    states = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]  # noqa: NPY002
    states.append(torch.tensor(random.getstate()[1]))
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    """To the bit."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def table(found: Results) -> str:
    """Sizes and checks of every run."""
    rows = [
        [
            run.problem,
            run.method,
            f"{one['queries']:,}",
            f"{one['steps']:,}",
            f"{one['file'] / 1000:,.1f}",
            f"{one['view'] / 1000:,.1f}",
            *("yes" if one[check] else "no" for check in ("repeated", "replayed", "resumed")),
        ]
        for run, one in sorted(found.of(PIECE))
        if "file" in one
    ]
    header = ["", "method", "queries", "steps", "file, kB", "weights, kB", "repeated", "replayed",
              "resumed"]  # fmt: skip
    return markdown(header, rows)


def claims(found: Results) -> Iterator[Claim]:
    """What the README promises, over all runs that were made."""
    runs = [one for _, one in found.of(PIECE) if "file" in one]
    if not runs:
        return
    problems = list(dict.fromkeys(run.problem for run, _ in sorted(found.of(PIECE))))
    setting = f"{'; '.join(problems)}: {len(runs)} runs, each on one machine"
    sizes = [one["file"] / 1000 for one in runs]
    extra = f", {min(sizes):.1f} to {max(sizes):.1f} kB"
    for claim, checks, more in (
        ("The same seed gives the same run, and no global generator is touched (README)",
         ("repeated", "generators untouched"), ""),
        ("A fine-tune is a file of kilobytes, replayed to the bit (README)", ("replayed",), extra),
        ("A run that was stopped resumes as if it had not been (README)", ("resumed",), ""),
    ):  # fmt: skip
        held = sum(all(one[check] for check in checks) for one in runs)
        text = f"{held} of {len(runs)} runs equal in every bit{more}"
        yield claim, setting, text, "yes" if held == len(runs) else "no", LINK
