"""What tuning needs of a GPU's memory: table, claims and figure, for benchmarks/evidence.py."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evidence_cells import Claim, markdown
from evidence_drawing import legend, save, scaled

MEMORY = "[figure](#memory)"
CARD = 79.1
"""GiB that PyTorch has of an H100 of 80 GB."""
Rows = Sequence[dict[str, Any]]


def tables(memory: Rows) -> dict[str, str]:
    """GiB by method and model, a table for each kind of decoder."""
    return {f"largest, {kind}": table(rows) for kind, rows in by_kind(memory).items()}


def by_kind(memory: Rows) -> dict[str, Rows]:
    """Rows of OPT and of Llama."""
    kinds = dict.fromkeys(row["model"].split("-")[0] for row in memory)
    return {kind: [row for row in memory if row["model"].startswith(f"{kind}-")] for kind in kinds}


def table(memory: Rows) -> str:
    """GiB by method and model."""
    models = list(dict.fromkeys(row["model"] for row in memory))
    methods = list(dict.fromkeys(row["method"] for row in memory))
    cells = {(row["method"], row["model"]): row["GiB"] for row in memory}

    def text(key: tuple[str, str]) -> str:
        if key not in cells:
            return "-"
        return "does not fit" if cells[key] is None else f"{cells[key]:.1f}"

    return markdown(["", *models], ([m, *(text((m, o)) for o in models)] for m in methods))


def largest(memory: Rows) -> dict[str, dict[str, Any]]:
    """The row of the largest model that fits, by method."""
    fit = sorted((row for row in memory if row["GiB"]), key=lambda row: row["parameters"])
    return {row["method"]: row for row in fit}


def claims(memory: Rows) -> Iterator[Claim]:
    """Tables 3 and 4, and Figure 3."""
    for kind, rows in by_kind(memory).items():
        yield from _of_kind(rows, f"{kind}, bf16, one text of 2,048 tokens, one H100 of 80 GB")


def _of_kind(memory: Rows, setting: str) -> Iterator[Claim]:
    """Of one kind of decoder."""
    peaks = {(row["model"], row["method"]): row["GiB"] for row in memory}
    most = largest(memory)
    for first in ("SGD, checkpoints", "Adam, checkpoints"):
        if {first, "MeZO-SVRG"} <= set(most):
            text = "; ".join(f"{m} {most[m]['model']}" for m in ("forward", "MeZO-SVRG", first))
            larger = most["MeZO-SVRG"]["parameters"] > most[first]["parameters"]
            yield (f"MeZO-SVRG fits a larger model than {first.split(',')[0]} (Tables 3 and 4)",
                   setting, f"largest that fits: {text}", "yes" if larger else "no",
                   MEMORY)  # fmt: skip

    def ratios(one: str, other: str) -> dict[str, float]:
        """Peaks of one method over another's, where both were measured and fit."""
        models = [m for m, method in peaks if method == one and peaks[m, one]]
        return {m: peaks[m, one] / peaks[m, other] for m in models if peaks.get((m, other))}

    for claim, one, other, bounds in (
        ("MeZO-SVRG needs the memory of inference, 1.04 to 1.28 times (README)",
         "MeZO-SVRG", "forward", (0, 1.285)),
        ("First-order SGD needs twice the memory of MeZO-SVRG, or more",
         "SGD", "MeZO-SVRG", (2, math.inf)),
        ("Adam needs twice the memory of MeZO-SVRG, or more",
         "Adam", "MeZO-SVRG", (2, math.inf)),
        ("On LoRA, AdamW with checkpoints needs hardly more memory than MeZO() (README)",
         "LoRA, Adam, checkpoints", "LoRA, MeZO()", (0, 1.1)),
    ):  # fmt: skip
        found = ratios(one, other)
        if found:
            inside = {m for m, ratio in found.items() if bounds[0] <= ratio <= bounds[1]}
            others = ", ".join(m for m in found if m not in inside)
            text = f"{one} / {other}: {min(found.values()):.2f} to {max(found.values()):.2f}"
            holds = "yes" if not others else f"in part, not {others}" if inside else "no"
            yield claim, setting, f"{text} ({', '.join(found)})", holds, MEMORY


def draw(memory: Rows, path: Path) -> None:
    """Peak memory by model size."""
    from matplotlib.figure import Figure

    kinds = by_kind(memory)
    figure = Figure(figsize=(5.5 * len(kinds), 3.6), layout="constrained")
    methods = ("forward", "MeZO", "SGD", "Adam", "LoRA, Adam", "LoRA, Adam, checkpoints")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (kind, rows) in zip(panels, kinds.items(), strict=True):
        for color, method in enumerate(methods):
            points = [
                (row["parameters"] / 1e9, row["GiB"])
                for row in rows
                if row["method"] == method and row["GiB"] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{color}", marker="o", label=method)
        sizes = sorted({row["parameters"] / 1e9 for row in rows})
        axes.axhline(CARD, color="grey", linewidth=0.8, linestyle=":")
        scaled(axes, xscale="log", xlabel="parameters, billions", ylabel="GiB at the peak")
        axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{kind}, bf16, one text of 2,048 tokens", fontsize="medium")
        legend(axes)
    save(figure, path)
