"""Results of benchmarks/defaults.py, kept, and tables: the default against the best of a sweep."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
NEAR, TIMES, HARMLESS = 0.03, 1.5, 0.15
"""Within: accuracy below the best, times the best's loss above the optimum; a rise that is none."""
SWEPT, COUNT = 2, 7
"""The seed of the sweeps, and their displacements."""
SOLVED = 1e-6
"""Of the loss at the start: below it one is as good as another."""


def load(path: Path) -> dict[str, Any]:
    """What has been run so far."""
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    return {"machines": [], "runs": []}


def save(kept: dict[str, Any], path: Path) -> None:
    """One run a line; a kill leaves the former file or this one."""
    lines = ",\n".join(json.dumps(row) for row in sorted(kept["runs"], key=_order))
    aside = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(f'{{"machines": {json.dumps(kept["machines"])},\n"runs": [\n{lines}\n]}}\n')
    os.replace(aside, path)


def _order(row: dict[str, Any]) -> tuple[str, int, float, str]:
    return row["cell"], row["seed"], row["multiple"] or 0.0, row["schedule"]


def score(row: Row) -> float:
    """What is compared; more is better: accuracy, or minus the loss (above the optimum)."""
    after = row["after"]
    if "accuracy" in after:
        return float(after["accuracy"])
    if "excess" in after:
        return -max(after["excess"], SOLVED * row["before"]["excess"])
    return -float(after["loss"])


def is_harmed(row: Row) -> bool:
    """Whether the loss rose, or a fault ended the run."""
    rise = row["after"]["loss"] - row["before"]["loss"]
    return not rise <= HARMLESS or row["stop"] not in ("MAX_QUERIES", "MAX_STEPS")


def best_multiple(rows: Iterable[Row], cell: str, seed: int, count: int) -> float | None:
    """The best of a sweep on one seed; None before all of it is there."""
    swept = [r for r in rows if (r["cell"], r["seed"]) == (cell, seed) and r["multiple"]]
    finite = [r for r in swept if math.isfinite(score(r))]
    if len(swept) < count or not finite:
        return None
    return float(max(finite, key=score)["multiple"])


class Compared(NamedTuple):
    """The default and the best displacement of a sweep, on the same seeds.

    Args:
        default, best: Scores.
        is_fresh: Whether the displacement was chosen on another seed.
    """

    default: list[float]
    best: list[float]
    is_fresh: bool

    @property
    def gap(self) -> float:
        """Accuracy lost by the default; or how many times the best's loss its own is."""
        ours, theirs = statistics.fmean(self.default), statistics.fmean(self.best)
        return theirs - ours if ours >= 0 else ours / theirs

    @property
    def is_near(self) -> bool:
        """Within the bounds."""
        return self.gap <= (NEAR if statistics.fmean(self.default) >= 0 else TIMES)

    def __str__(self) -> str:
        unit = f"{self.gap:+.3f}" if statistics.fmean(self.default) >= 0 else f"x {self.gap:.2g}"
        return unit + ("" if self.is_fresh else "*") + ("" if self.is_near else " (no)")


def compared(rows: Sequence[Row], multiple: float) -> Compared | None:
    """A cell's default and best, on seeds that the choice has not seen where there are any."""
    ours = {r["seed"]: score(r) for r in rows if not r["multiple"]}
    theirs = {r["seed"]: score(r) for r in rows if r["multiple"] == multiple}
    both = sorted(ours.keys() & theirs.keys())
    fresh = [seed for seed in both if seed != SWEPT]
    seeds = fresh or both
    if not seeds:
        return None
    return Compared([ours[s] for s in seeds], [theirs[s] for s in seeds], bool(fresh))


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and how many."""
    if not values:
        return "-"
    if min(values) < 0:  # losses
        low = f"{-statistics.fmean(values):.3g}"
        return low + (f" ± {statistics.stdev(values):.2g} ({len(values)})" if values[1:] else "")
    text = f"{statistics.fmean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f} ({len(values)})" if values[1:] else " (1)")


def report(
    kept: dict[str, Any], cells: Sequence[tuple[str, bool, int | None]], schedule: str
) -> str:
    """All tables, as Markdown: of the runs by one schedule, and against the others."""
    of: dict[str, list[Row]] = {}
    for row in kept["runs"]:
        if row["schedule"] == schedule:
            of.setdefault(row["cell"], []).append(row)
    parts = [
        _machines(kept),
        _sweeps(of, [name for name, sweep, _ in cells if sweep]),
        _alone(of, [name for name, sweep, steps in cells if not sweep and not steps]),
        _stays(of, [name for name, _, steps in cells if steps]),
        _schedules(kept["runs"], {name.split(" | ")[1]: name for name, _, _ in cells}),
    ]
    return "\n\n".join(part for part in parts if part)


def _machines(kept: dict[str, Any]) -> str:
    return "\n".join(
        f"machine {index}: {', '.join(f'{name} {value}' for name, value in machine.items())}"
        for index, machine in enumerate(kept["machines"])
    )


def _sweeps(of: dict[str, list[Row]], names: Sequence[str]) -> str:
    lines = [
        "| view | task | default | found | best x | best | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts: list[Compared] = []
    for name in names:
        rows = of.get(name, [])
        if not any(r["multiple"] is None for r in rows):
            continue
        multiple = best_multiple(rows, name, SWEPT, COUNT)
        both = compared(rows, multiple) if multiple else None
        verdicts += [both] if both else []
        swept = sum(r["seed"] == SWEPT and bool(r["multiple"]) for r in rows)
        best = [score(r) for r in rows if multiple and r["multiple"] == multiple]
        lines.append(
            f"{_of_cell(rows, name)} | {f'{multiple:g}' if multiple else f'{swept} of {COUNT} run'}"
            f" | {spread(best)} | {both or ''} |"
        )
    if len(lines) == 2:
        return ""
    return "\n".join([*lines, "", _counted(verdicts), _harm(of, names)])


def _of_cell(rows: Sequence[Row], name: str) -> str:
    """What a line of a table begins with."""
    ours = [r for r in rows if r["multiple"] is None]
    found = "/".join(f"{r['found']:.2g}" + _growth(r) for r in ours)
    view, task = name.split(" | ")
    return f"| {view} | {task} | {spread([score(r) for r in ours])} | {found}"


def _growth(row: Row) -> str:
    """What looks along the updates made of it."""
    return "" if row["growth"] == 1 else f"·{row['growth']:.2g}"


def _counted(verdicts: Sequence[Compared]) -> str:
    fresh = [both for both in verdicts if both.is_fresh]
    return (
        f"The default: {sum(b.is_near for b in verdicts)} of "
        f"{len(verdicts)} cells within {NEAR} accuracy, or {TIMES} times the loss above the "
        f"optimum, of the best of their sweep ({sum(b.is_near for b in fresh)} of the {len(fresh)} "
        f"whose displacement was chosen on another seed; *: on the same)."
    )


def _schedules(rows: Iterable[Row], tasks: dict[str, str]) -> str:
    """Default runs by "cooldown" beside those by "linear", of a cell, seed and displacement."""
    of: dict[str, dict[tuple[str, int, float], float]] = {"linear": {}, "cooldown": {}}
    for row in rows:
        if row["multiple"] is None and "accuracy" in row["after"] and row["schedule"] in of:
            of[row["schedule"]][row["cell"], row["seed"], row["found"]] = score(row)
    lines = ["| task | pairs | by cooldown, less by linear | better |", "|---|---|---|---|"]
    for task in tasks:
        gains = [
            value - of["linear"][key]
            for key, value in of["cooldown"].items()
            if key in of["linear"] and key[0].endswith(f"| {task}")
        ]
        if gains:
            better = sum(gain > 0 for gain in gains)
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if gains[1:] else math.nan
            mean = f"{statistics.fmean(gains):+.3f} ± {error:.3f}"
            lines.append(f"| {task} | {len(gains)} | {mean} | {better} |")
    return "\n".join(lines) if lines[2:] else ""


def _harm(of: dict[str, list[Row]], names: Sequence[str]) -> str:
    rows = [r for name in names for r in of.get(name, []) if r["multiple"] is None]
    harmed = sorted({r["cell"] for r in rows if is_harmed(r)})
    missing = [name for name in names if name not in of]
    return (
        f"Loss risen by the default: {', '.join(harmed) or 'nowhere'}. "
        f"Not run: {', '.join(missing) or 'none'}."
    )


def _alone(of: dict[str, list[Row]], names: Sequence[str]) -> str:
    lines = ["| view | task | default | found |", "|---|---|---|---|"]
    for name in names:
        if name in of:
            lines.append(f"{_of_cell(of[name], name)} |")
    return "\n".join(lines) if lines[2:] else ""


def _stays(of: dict[str, list[Row]], names: Sequence[str]) -> str:
    """Rise of the loss after a few steps."""
    rises: dict[str, dict[int, float]] = {}
    for name in names:
        view, task, steps = name.split(" | ")
        for row in of.get(name, []):
            rise = row["after"]["loss"] - row["before"]["loss"]
            found = rises.setdefault(f"{view} | {task}", {})
            number = int(steps.split()[0])
            found[number] = max(rise, found.get(number, -math.inf))
    if not rises:
        return ""
    columns = sorted({number for found in rises.values() for number in found})
    lines = [
        f"| view | task | {' | '.join(f'{number} steps' for number in columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for name, found in rises.items():
        cells = [f"{found[n]:+.3f}" if n in found else "-" for n in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    largest = max(max(found.values()) for found in rises.values())
    lines += ["", f"Largest rise of the loss: {largest:+.3f} (bound {HARMLESS})."]
    return "\n".join(lines)
