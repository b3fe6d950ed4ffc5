"""Every public name has an entry in the reference and a docstring that shows how it is used."""

import inspect
import re
from pathlib import Path

import pytest

import objectives
import zo_adapt

PAGES = Path(__file__).parents[1] / "docs" / "reference"
ENTRIES = re.findall(
    r"^\.\. auto\w+:: ([\w.]+)", "\n".join(p.read_text() for p in PAGES.glob("*.rst")), re.M
)
NAMES = [f"{module.__name__}.{n}" for module in (zo_adapt, objectives) for n in module.__all__]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_explained(name: str) -> None:
    module, attribute = name.split(".")
    item = getattr({"zo_adapt": zo_adapt, "objectives": objectives}[module], attribute)
    assert ENTRIES.count(name) == (0 if attribute == "ZOError" else 1), "errors are a page of one"
    said = inspect.getdoc(item) or ""
    assert ">>>" in said, "an example"
    takes = inspect.signature(item).parameters if attribute not in NO_ARGUMENTS else {}
    assert not takes or re.search(r"^(Args|Attributes):", said, re.M)


NO_ARGUMENTS = {"StopReason", "ZOError", "Objective", "SetObjective"}


def test_the_reference_names_nothing_else() -> None:
    others = {entry for entry in ENTRIES if entry not in NAMES}
    assert others == {"zo_adapt.errors", "zo_adapt_cli.tune.TuneArguments"}


def test_the_table_of_names_is_whole() -> None:
    table = (PAGES / "index.rst").read_text()
    for module in (zo_adapt, objectives):
        part = re.search(
            rf"^\.\. currentmodule:: {module.__name__}$(.*?)(?=^\.\. curr|\Z)", table, re.M | re.S
        )
        assert part is not None
        listed = re.findall(r"^   (\w+)$", part[1], re.M)
        assert sorted(listed) == sorted(module.__all__)
