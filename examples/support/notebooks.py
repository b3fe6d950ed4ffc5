"""Run a notebook in this process, without Jupyter, and keep what its cells print and draw.

cd examples && python -m support.notebooks notebooks/*.ipynb    # writes the outputs into them
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of a run from top to bottom; an error in a cell is raised."""
    notebook: dict[str, Any] = json.loads(path.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            shown = _run_cell("".join(cell["source"]), names)
        cell["execution_count"] = count
        cell["outputs"] = []
        if text := printed.getvalue():
            cell["outputs"].append(
                {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            )
        if shown is not None:
            cell["outputs"].append(
                {
                    "data": _data(shown),
                    "execution_count": count,
                    "metadata": {},
                    "output_type": "execute_result",
                }
            )
    return notebook


def _run_cell(source: str, names: dict[str, Any]) -> Any:
    """The value of a last expression, as Jupyter shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def _data(shown: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"text/plain": repr(shown).splitlines(keepends=True)}
    if hasattr(shown, "savefig"):
        picture = io.BytesIO()
        shown.savefig(picture, format="png", dpi=80)
        found["image/png"] = base64.b64encode(picture.getvalue()).decode()
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        done = run(Path(name))
        Path(name).write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        print(name)
