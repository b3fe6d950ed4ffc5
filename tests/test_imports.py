"""The only direction of imports, explicit names, and a light ``import zo_adapt``."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "zo_adapt").rglob("*.py"))
LIGHT = {"torch", "numpy", "tqdm", "zo_adapt", *sys.stdlib_module_names}
INTEGRATION = sorted((ROOT / "zo_adapt" / "trainer").glob("*.py"))
KERNELS = ("accumulate", "factors", "gathered", "low_rank", "numbers")
OPTIONAL = {f"triton_{name}.py": {"triton"} for name in KERNELS}
"""Loaded on the first use of a CUDA view alone."""
LIGHT_FILES = [path for path in ENGINE if path not in INTEGRATION]
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
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only
        ):
            yield node
            yield from outside_functions(node)


@FILES
def test_the_engine_never_imports_objectives(path: Path) -> None:
    assert "objectives" not in imported(ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "path", [p for p in ENGINE if p not in INTEGRATION], ids=lambda path: path.name
)
def test_the_engine_is_light_at_module_level(path: Path) -> None:
    heavy = imported(outside_functions(ast.parse(path.read_text()))) - LIGHT
    assert heavy <= OPTIONAL.get(path.name, set())


def test_the_files_that_the_architecture_names_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([\w/]+\.py)`", page):
        places = (ROOT, ROOT / "zo_adapt", *(ROOT / "zo_adapt").iterdir())
        assert any((place / name).exists() for place in places), name


def test_a_room_imports_from_those_above_it_in_the_table_of_the_pages() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^\| `(\w+)/`", page, re.MULTILINE)
    assert set(rooms) == {path.parent.name for path in (ROOT / "zo_adapt").glob("*/__init__.py")}
    for path in ENGINE:
        room = path.relative_to(ROOT / "zo_adapt").parts[0]
        for node in ast.walk(ast.parse(path.read_text())) if room in rooms else ():
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            other = module.removeprefix("zo_adapt.").split(".")[0]
            if module.startswith("zo_adapt.") and other in rooms:
                assert rooms.index(other) <= rooms.index(room), f"{path}: {module}"


@FILES
def test_a_module_has_not_the_name_of_a_function_in_it(path: Path) -> None:
    defined = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    assert path.stem not in {function.name for function in defined}


def test_the_checker_sees_imports_in_blocks_and_not_in_functions() -> None:
    source = (
        "if True:\n  import peft\n"
        "try:\n  from a.b import c\nfinally:\n  pass\n"
        "def f():\n  import z\n"
    )
    assert imported(outside_functions(ast.parse(source))) == {"peft", "a"}
    assert imported(ast.walk(ast.parse(source))) == {"peft", "a", "z"}


def constants_classes_functions(name: str) -> tuple[bool, bool, str]:
    """The order of ruff's RUF022."""
    return not name.isupper(), not name[0].isupper(), name


@pytest.mark.parametrize("package", ["zo_adapt", "objectives"])
def test_names_are_re_exported_explicitly_and_sorted(package: str) -> None:
    listed = list(importlib.import_module(package).__all__)
    assert listed == sorted(set(listed), key=constants_classes_functions)
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    imported_names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
    }
    assert imported_names == set(listed)
    assert all(hasattr(importlib.import_module(package), name) for name in listed)


def test_import_is_light() -> None:
    code = (
        "import sys, zo_adapt; heavy = {'transformers', 'peft', 'datasets', 'accelerate', 'scipy', "
        "'objectives', 'triton', 'sklearn'} & {*sys.modules}; sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
