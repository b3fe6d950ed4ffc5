"""The notebooks run from top to bottom."""

from pathlib import Path
from typing import Any

import pytest

from support.notebooks import run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells: list[Any] = [cell for cell in run(path)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert cells[-1]["outputs"], "the last cell shows something"


def test_there_are_two() -> None:
    assert len(NOTEBOOKS) == 2
