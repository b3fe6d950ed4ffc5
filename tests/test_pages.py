"""The code of the README and of every page runs as it stands, one block after the other."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from page_models import yours

import zo_adapt

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"(?<!-->\n)^```(python|console|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""Code, but for what stands under a comment such as <!-- not run: it needs a server -->."""
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
COMMANDS = {"zo_adapt": "zo_adapt_cli", "zo_adapt.trajectory": "zo_adapt.trajectory.tools"}
# Trainer asks for pinned memory on a CPU too; blocks end where there is something to see.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory'"),
    pytest.mark.filterwarnings("default::zo_adapt.errors.UnreadTensorWarning"),
]


def run_command(line: str) -> None:
    """A command of this package, in this process; others (pip, make) are not run."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"] and words[2] in COMMANDS:
        importlib.import_module(COMMANDS[words[2]]).main(words[3:])
    elif words[0] == "zo-adapt":
        importlib.import_module("zo_adapt_cli").main(words[1:])


def run_page(page: Path, names: dict[str, Any]) -> None:
    for kind, code in FENCE.findall(page.read_text()):
        if kind == "python":
            exec(compile(code, page.name, "exec", dont_inherit=True), names)
        elif kind == "console":
            commands = re.sub(r"\\\n\s*", " ", code).splitlines()
            for line in commands:
                if line.startswith("$ "):
                    run_command(line.removeprefix("$ "))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if FENCE.search(p.read_text())], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = yours(tmp_path)
    run_page(page, names)
    if isinstance(result := names.get("result"), zo_adapt.Result):
        assert result.success, result


def test_the_code_of_the_readme_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start by itself, as it is copied. Words and the number of lines are the same; numbers
    may be those of another machine.
    """
    monkeypatch.chdir(tmp_path)
    found = FENCE.findall((ROOT / "README.md").read_text())
    said = 0
    printed = ""
    for kind, code in found:
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "README.md", "exec"), {})
            printed = out.getvalue()
        elif kind == "text":
            last = printed.strip().splitlines()[-len(code.splitlines()) :]
            assert list(map(words_of, last)) == list(map(words_of, code.splitlines()))
            said += 1
    assert said == 3, "three quickstarts with their output"
    accuracies = [float(x) for x in re.findall(r"[01]\.\d\d", printed)]
    assert accuracies[-1] > 0.9 > accuracies[0]


def words_of(line: str) -> str:
    return re.sub(r"[\d.,]+", "#", line)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_link_to_a_file_leads_to_one() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        for target in LINK.findall(page.read_text()):
            if not re.match(r"\w+:", target):
                assert (page.parent / target).exists(), f"{page.name} links {target}"


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGER = {"tune_lora", "generation_reward"}
"""The demo, and the one that takes its time to show what a reward does."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    if path.stem not in LONGER:
        assert len(path.read_text().splitlines()) <= 45


def test_the_tests_that_hold_the_faults_are_there() -> None:
    tests = ROOT / "tests"
    rows = re.findall(r"^\| (\d+) \| `(\S+)` `(\w+)`", (tests / "faults.md").read_text(), re.M)
    assert [int(number) for number, _, _ in rows] == [*range(1, 35), *range(40, 55)]
    for number, file, name in rows:
        assert f"def test_{name}(" in (tests / file).read_text(), f"{number}: {file} {name}"
