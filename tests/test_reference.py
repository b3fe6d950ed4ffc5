"""Every public name has an entry in the reference and a docstring that shows how it is used."""

import builtins
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import objectives
import zo_adapt
import zo_adapt.errors

DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "reference"
NOT_A_GUIDE = {"changelog", "architecture", "benchmarks", "evidence", "reliability"}
ENTRIES = re.findall(
    r"^\.\. auto\w+:: ([\w.]+)", "\n".join(p.read_text() for p in PAGES.glob("*.rst")), re.M
)
NAMES = [f"{module.__name__}.{n}" for module in (zo_adapt, objectives) for n in module.__all__]


def found(name: str) -> Any:
    package, attribute = name.split(".")
    return getattr({"zo_adapt": zo_adapt, "objectives": objectives}[package], attribute)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_explained(name: str) -> None:
    item, attribute = found(name), name.split(".")[1]
    assert ENTRIES.count(name) == (0 if attribute == "ZOError" else 1), "errors are a page of one"
    said = inspect.getdoc(item) or ""
    assert ">>>" in said, "an example"
    takes = inspect.signature(item).parameters if attribute not in NO_ARGUMENTS else {}
    assert not takes or re.search(r"^(Args|Attributes):", said, re.M)


NO_ARGUMENTS = {"StopReason", "ZOError", "Objective", "SetObjective"}


def test_the_reference_names_nothing_else() -> None:
    others = {entry for entry in ENTRIES if entry not in NAMES}
    assert others == {"zo_adapt.errors", "zo_adapt_cli.tune.TuneArguments"}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_on_a_page_of_the_guide(name: str) -> None:
    pages = DOCS.glob("*.md")
    word = re.compile(rf"\b{name.split('.')[1]}\b")
    guide = [p for p in pages if p.stem not in NOT_A_GUIDE and word.search(p.read_text())]
    assert guide, "say on a page of docs/ what it is for"


def described(item: Any) -> str:
    """What is said of a name: its docstring and those of its own public methods."""
    parts = [item, *(vars(item).values() if inspect.isclass(item) else ())]
    return "\n".join(doc for part in parts if (doc := inspect.getdoc(part)))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_described(name: str) -> None:
    item = found(name)
    if item in (zo_adapt.StopReason, zo_adapt.ZOError):
        return  # nobody makes one
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {"learning_rate", "num_train_epochs"} | (
        set() if name.endswith("ZOConfig") else inherited
    )
    said = inspect.getdoc(item) or ""
    section = re.search(r"^(Args|Attributes):\n(.*?)(?=^\S|\Z)", said, re.M | re.S)
    entries = re.findall(r"^    ([\w, .]+):", section[2] if section else "", re.M)
    described = {word for entry in entries for word in re.findall(r"\w+", entry)}
    taken = inspect.signature(item).parameters.values()
    wanted = {p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert wanted - (inherited - own) - described == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_error_that_it_raises_is_named(name: str) -> None:
    item = found(name)
    raised = set(re.findall(r"\braise (\w+Error)\b", inspect.getsource(item)))
    public = {
        error for error in raised if hasattr(zo_adapt.errors, error) or hasattr(builtins, error)
    }
    said = described(item)
    if re.search(r"^ *ZOError: ", said, re.M):  # it says that they are named errors, of many kinds
        public -= set(vars(zo_adapt.errors))
    assert {error for error in public if error not in said} == set()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("objectives")])
def test_an_objective_says_the_shapes_of_what_it_reads_or_returns(name: str) -> None:
    assert re.search(
        r"\([bnqdt](, \w+)*,?\)|\bshape\b|one value (for|per)", inherited_words(found(name))
    )


def inherited_words(item: Any) -> str:
    return "\n".join(described(kind) for kind in item.__mro__ if kind is not object)
