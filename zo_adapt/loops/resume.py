"""What a run that goes on must have in common with the run that was begun."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import CorruptTrajectoryError, TrajectoryError
from zo_adapt.evaluation.protocol import Evaluator
from zo_adapt.loops.around import read_around
from zo_adapt.loops.contents import configured, contents_hash, set_in_modules
from zo_adapt.loops.objective_parts import made_with
from zo_adapt.loops.origin import (
    bound_values,
    collate_described,
    described,
    labels_hash,
    rows_hash,
    same_description,
)
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.optimizers.run_state import FORMER_SCHEDULE
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import Step
from zo_adapt.trajectory.file import Position, Reader
from zo_adapt.trajectory.safe_file import as_json

LIMITS = ("max_steps", "max_queries")
"""Settings that may grow."""
LEAST_SHARES = (4, 16)
"""Usual fewest rows of a share, and those of large views without factors: there the noise of a
direction costs as much as the forward of a few rows, so there are fewer directions."""
ALL_ROWS = "all rows of the data"
CONFIG = "config"
MODULES = "settings of the model's modules"
AROUND = "functions, globals and tensors that a value depends on"
MADE_WITH = "what the objective was made with"
BOUND = "values that functions have as defaults or from around them"
"""Names of settings, as an error says them."""
SHOWN = 200
"""Letters of a setting in an error: of a longer one, which begins alike, the part that differs."""


def data_settings(samples: Samples) -> dict[str, Any]:
    """What the order and the content of the batches depend on, the seed apart."""
    return {
        "rows": len(samples.source),
        "data": rows_hash(samples.source),
        ALL_ROWS: contents_hash(samples.source),
        "collate": collate_described(samples.source),
        "classes": labels_hash(samples.classes),
    }


def run_settings(evaluator: Evaluator, samples: Samples) -> dict[str, Any]:
    """All of a run's settings that are neither the optimizer's nor its budget."""
    collate = getattr(samples.source, "collate", None)
    return {
        "batch_size": samples.batch_size,
        "micro_batch_size": evaluator.micro_batch_size,
        "share": samples.share,
        "sign": evaluator.sign,
        **data_settings(samples),
        CONFIG: configured(evaluator.view.model),
        MODULES: set_in_modules(evaluator.view.model, evaluator.view.changing),
        "objective": described(evaluator.objective),
        BOUND: bound_values(evaluator.objective, collate),
        MADE_WITH: made_with(evaluator.objective),
        AROUND: read_around(evaluator.view, evaluator.objective, collate),
    }


def share_as_begun(samples: Samples, begun: Mapping[str, Any]) -> dict[str, int]:
    """Cut batches as a run has done so far, whatever is usual for its view by now.

    Returns:
        The setting as it is now.
    """
    usual = samples.least_share
    for least in (usual, *LEAST_SHARES):
        samples.least_share = least
        if samples.share == begun.get("share", samples.share):
            return {"share": samples.share}
    samples.least_share = usual
    return {"share": samples.share}


def schedule_as_begun(optimizer: Optimizer, begun: Mapping[str, Any]) -> dict[str, str]:
    """Let steps shrink as a run has let them so far, whatever is usual by now.

    Returns:
        The setting as it is now; empty where it is the optimizer's own.
    """
    if begun.get("schedule") != FORMER_SCHEDULE or not isinstance(optimizer, ZerothOrder):
        return {}
    is_former = optimizer.state.keep_former_schedule()
    return {"schedule": FORMER_SCHEDULE} if is_former else {}


def check_settings(path: Path, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a run was begun with.

    Args:
        path: The file that says how it was begun, for the message.
        begun: The settings there; one that is not there was not kept by the version that wrote it.
        settings: Those of now.
    """
    now = json.loads(as_json(settings))
    begun, now = _without_new_entries(begun, now)
    for name in settings:
        value = now[name]
        is_kept = name in begun and not (name == ALL_ROWS and begun[name] is None)
        if is_kept and not same_description(begun[name], value):
            before, after, part = begun[name], value, ""
            if f"{before!r:.{SHOWN}}" == f"{after!r:.{SHOWN}}":
                before, after, part = _first_difference(before, after)
            raise TrajectoryError(
                f"{path} was begun with {name}={before!r:.{SHOWN}}, not {after!r:.{SHOWN}}{part}; "
                "resume with the same settings, or begin another file"
            )


def _first_difference(one: Any, other: Any, part: str = "") -> tuple[Any, Any, str]:
    """What two descriptions have where they differ first, and the name of that part."""
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = [*one, *(key for key in other if key not in one)]
        pairs = [(one.get(key), other.get(key), f" (its {key})") for key in names]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(*pair, part) for pair in zip(one, other, strict=True)]
    differing = next((pair for pair in pairs if not same_description(*pair[:2])), None)
    return (one, other, part) if differing is None else _first_difference(*differing)


def _without_new_entries(
    begun: Mapping[str, Any], now: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same with parts that are mappings as far as both versions have their entries."""
    begun = dict(begun)
    for part in (CONFIG, MODULES, AROUND):
        one, other = begun.get(part), now.get(part)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            both = [name for name in one if name in other]
            differing = [name for name in both if not same_description(one[name], other[name])]
            begun[part] = {name: one[name] for name in differing}
            now = {**now, part: {name: other[name] for name in differing}}
    return begun, now


def check_budget(path: Path, begun: Mapping[str, Any], budget: Budget) -> None:
    """Refuse a smaller budget than a run has had; a larger one is a longer run.

    Args:
        path: As in ``check_settings``.
        begun: The budget so far, by the names in ``LIMITS``; None is no limit.
        budget: That of now.
    """
    for name in LIMITS:
        before, now = begun.get(name), getattr(budget, name)
        if name in begun and now is not None and (before is None or now < before):
            raise TrajectoryError(
                f"{path} was begun with {name}={before}, not {now}; resume with the same or a "
                "larger budget, or begin another file"
            )


def check_state(path: Path, state: Mapping[str, Any], steps: Sequence[Step]) -> None:
    """Refuse a state that says something else than the records it comes after."""
    least = {"steps": len(steps), "queries": steps[-1].queries if steps else 0}
    for name, expected in least.items():
        said = state[name]
        is_count = isinstance(said, int) and not isinstance(said, bool)
        # A step that was given up for want of values has made queries, too.
        is_right = is_count and (said == expected or (name == "queries" and said > expected))
        if not is_right:
            raise CorruptTrajectoryError(
                f"the state beside {path} has {name}={said!r:.40}, and the records before it "
                f"{expected}: it belongs to another file; put the two together that belong"
            )


def steps_until(reader: Reader, at: Position) -> list[Step]:
    """The records before a place; what comes after is not read.

    Raises:
        TrajectoryError: No record ends there.
        CorruptTrajectoryError: A damaged record before it.
    """
    position, steps, found = reader.start, [], reader.steps()
    while position.offset < at.offset and (entry := next(found, None)) is not None:
        step, position = entry
        steps.append(step)
    if position != at:
        raise TrajectoryError(
            f"{reader.path} has no record that ends at byte {at.offset}: the state to resume from "
            "belongs to another file, or the file was shortened; put the two together that belong"
        )
    return steps
