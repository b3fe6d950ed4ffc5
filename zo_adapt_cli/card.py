"""The model card of a tuned adapter: peft's own README, with budget, data and figures."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zo_adapt import Rate
from zo_adapt.optimizers.optimizer import ZerothOrder


def write_card(
    folder: Path, given: Any, trainer: Any, figures: Mapping[str, float], rows: tuple[int, int]
) -> Path:
    """Add a section to the README that ``save_pretrained`` has left, or begin one.

    Args:
        folder: Of the adapter or the model.
        given: The arguments of ``zo-adapt tune``.
        trainer: After training.
        figures: Held-out figures, by name with " before" and " after".
        rows: Examples tuned on and held out.
    """
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8") if path.exists() else f"# {folder.name}\n"
    names = [name.removesuffix(" before") for name in figures if name.endswith(" before")]
    table = "\n".join(
        f"| {name} | {figures[f'{name} before']:.3f} | {figures[f'{name} after']:.3f} |"
        for name in names
    )
    schedule = getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type)
    start = trainer.lora_start_queries
    steps = f"{trainer.state.global_step} steps"
    steps += f"; {start:,} more for the adapter's A" if start else ""
    section = f"""
## Tuned by forward passes alone

| | |
|---|---|
| base model | {given.model} |
| objective | {given.objective} |
| view | {given.view}: {trainer.view} |
| optimizer | {trainer.args.build_optimizer()}, schedule {schedule}{_displacement(trainer)} |
| budget | {trainer.queries:,} queries (forwards of one sample), {steps} |
| data | {Path(given.data).name}: {rows[0]} examples tuned on, {rows[1]} held out |
| labels | {_labels(trainer.model)} |
| seed | {trainer.args.seed} |
| made with | zo_adapt {_version()} |

| held out | before | after |
|---|---|---|
{table}
"""
    path.write_text(before.rstrip() + "\n" + section, encoding="utf-8")
    return path


def _displacement(trainer: Any) -> str:
    """How far the run was to go, where the steps have a distance and not a rate."""
    optimizer = trainer.zo_optimizer
    if not isinstance(optimizer, ZerothOrder) or isinstance(optimizer.apply, Rate):
        return ""
    how = "found by forward passes" if trainer.args.displacement is None else "given"
    return f"; displacement {optimizer.state.descent.displacement:.3g}, {how}"


def _version() -> str:
    try:
        return version("zo_adapt")
    except PackageNotFoundError:  # run from a checkout
        return "(from a checkout)"


def _labels(model: Any) -> str:
    """Names of the classes, which an adapter alone does not keep."""
    if "Classification" not in type(_base(model)).__name__:
        return "tokens of the text"
    return ", ".join(f"{index}: {name}" for index, name in model.config.id2label.items())


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
