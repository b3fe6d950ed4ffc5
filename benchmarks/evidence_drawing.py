"""What the figures of docs/evidence.md have in common."""

from pathlib import Path
from typing import Any


def scaled(axes: Any, **settings: Any) -> None:
    """Set what a diagram has; one without lines has no scale, and says that it was not run."""
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
        settings = {name: one for name, one in settings.items() if name in ("title", "ylabel")}
    axes.set(**settings)


def legend(axes: Any, **settings: Any) -> None:
    """Names of the lines, where there are any."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", frameon=False, **settings)


def save(figure: Any, path: Path) -> None:
    """The same file for the same figure."""
    figure.savefig(path, metadata={"Date": None})
