"""The only direction of imports, explicit names, and a light ``import zo_adapt``."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "zo_adapt").rglob("*.py"))
LIGHT = {"torch", "numpy", "tqdm", "zo_adapt", *sys.stdlib_module_names}
INTEGRATION = {"trainer.py"}
OPTIONAL = {"triton_accumulate.py": {"triton"}}
"""Loaded on the first use of a CUDA view alone."""
FILES = pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Top-level packages that the import statements among the nodes name."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add((node.module or "").split(".")[0])
    return found


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs at import: all but the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


@FILES
def test_the_engine_never_imports_objectives(path: Path) -> None:
    assert "objectives" not in imported(ast.walk(ast.parse(path.read_text())))


@FILES
def test_the_engine_is_light_at_module_level(path: Path) -> None:
    if path.name in INTEGRATION or path.name.startswith("trainer_"):
        pytest.skip("an integration module, imported on demand")
    heavy = imported(outside_functions(ast.parse(path.read_text()))) - LIGHT
    assert heavy <= OPTIONAL.get(path.name, set())


def test_the_checker_sees_imports_in_blocks_and_not_in_functions() -> None:
    source = (
        "if True:\n  import peft\n"
        "try:\n  from a.b import c\nfinally:\n  pass\n"
        "def f():\n  import z\n"
    )
    assert imported(outside_functions(ast.parse(source))) == {"peft", "a"}
    assert imported(ast.walk(ast.parse(source))) == {"peft", "a", "z"}


@pytest.mark.parametrize("package", ["zo_adapt", "objectives"])
def test_names_are_re_exported_explicitly_and_sorted(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    from_own = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module]
    names = [a for node in from_own if node.module.startswith(package) for a in node.names]  # type: ignore[union-attr]
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    public = set(listed[0]) if listed else set()
    assert all(alias.asname == alias.name or alias.name in public for alias in names)
    assert not listed or list(listed[0]) == sorted(listed[0])
    modules = [node.module for node in from_own if node.module.startswith(package)]  # type: ignore[union-attr]
    assert modules == sorted(modules)  # type: ignore[type-var]


def test_import_is_light() -> None:
    code = (
        "import sys, zo_adapt; heavy = {'transformers', 'peft', 'datasets', 'accelerate', "
        "'objectives', 'triton', 'scipy'} & set(sys.modules); sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
