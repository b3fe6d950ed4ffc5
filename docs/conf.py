"""How the pages are built: `make docs`."""

import itertools
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from names import PublicNames

project = "zo_adapt"
author = "The zo_adapt authors"
try:
    release = metadata.version("zo_adapt")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    release = "unreleased"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "zo_adapt"
html_show_copyright = False
html_theme_options = {"sidebar_hide_name": False}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_ambiguous"]

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_custom_sections = [("Reference", "notes_style")]
napoleon_use_rtype = False
napoleon_use_ivar = True

SECTION = re.compile(
    r"(Args|Attributes|Example|Examples|Raises|Reference|Returns|Yields|Warns|Note):"
)
FORMULA = re.compile(r"<-|[^ ] = .*([|^_(/]|sum)|~ p_")
LITERAL = re.compile(r"(``[^`]*``|`[^`]+`)")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Docstrings are plain text with formulas: here these become blocks that are shown as they are.

    Blocks are separated by empty lines; the sections (Args, Raises, ...) are napoleon's.
    """
    found: list[str] = []
    section = ""
    for block in blocks(lines):
        if named := SECTION.fullmatch(block[0].strip()):
            section = named[1]
        first = block[0]
        indented = first.startswith("    ") or any(line.startswith("    ") for line in block[1:])
        listed = first.lstrip().startswith(("- ", "* ", "1. "))
        if section.startswith("Example") or first.lstrip().startswith(">>>"):
            found += block
        elif section:
            found += [escaped(line) for line in block]
        elif not listed and (indented or FORMULA.search(first)):
            found += shown(block)
        else:
            for is_formula, run in itertools.groupby(block, line_is_formula):
                part = list(run)
                found += shown(part) if is_formula else [escaped(line) for line in part]
    return found


def line_is_formula(line: str) -> bool:
    """Whether a line among prose is a formula and nothing else."""
    return bool(re.match(r"\w+ (<-|=) ", line)) and not re.search(r"\. [A-Z]", line)


def shown(lines: Iterable[str]) -> list[str]:
    """Lines as a block that is shown as it is."""
    return ["", ".. code-block:: text", "", *("    " + line for line in lines), ""]


def blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines without an empty one; the empty lines between them are blocks of none."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        else:
            found += [[""], []]
    return [block for block in found if block]


def escaped(line: str) -> str:
    """Stars, bars and underscores at ends of words mean themselves, except in literals."""
    parts = LITERAL.split(line)
    parts[::2] = [re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Any) -> None:
    """Formulas first, then napoleon's sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.add_directive("public-names", PublicNames)
