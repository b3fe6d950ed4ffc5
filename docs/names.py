"""The table of the public names: what each is, and the pages of the guide that use it."""

import importlib
import inspect
import re
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parent
NOT_A_GUIDE = {"index", "changelog", "architecture", "benchmarks", "evidence", "reliability"}


def guide_of(name: str) -> list[str]:
    """Pages of the guide that a public name is on, in the order of the menu."""
    menu = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.M)
    pages = [page for page in menu if page not in NOT_A_GUIDE]
    return [p for p in pages if re.search(rf"\b{name}\b", (DOCS / f"{p}.md").read_text())]


def rows(package: str) -> list[tuple[str, str, str]]:
    """Name, first line of its docstring and pages, as reStructuredText."""
    module = importlib.import_module(package)
    found = []
    for name in sorted(module.__all__, key=str.lower):
        said = (inspect.getdoc(getattr(module, name)) or "").split("\n\n")[0].replace("\n", " ")
        said = re.sub(r"([*|]|_(?=\W|$))", r"\\\1", said)
        pages = ", ".join(f":doc:`/{page}`" for page in guide_of(name))
        found.append((f":py:obj:`~{package}.{name}`", said, pages))
    return found


class PublicNames(SphinxDirective):
    """``.. public-names:: PACKAGE``, a table of three columns."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 20 50 30", ""]
        for name, said, pages in (("Name", "What it is", "In the guide"), *rows(self.arguments[0])):
            lines += [f"   * - {name}", f"     - {said}", f"     - {pages}"]
        return self.parse_text_to_nodes("\n".join(lines))
