"""The built pages: every link leads to a place, every entry to its source: `make docs`."""

import importlib
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag


class Page(HTMLParser):
    """The links of a page and the names of its places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.entries: dict[str, bool] = {}
        """Classes and functions of the reference, and whether they link their source."""
        self._entry = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif name in ("href", "src") and value and tag in ("a", "img"):
                self.links.add(value)
        found = dict(attrs)
        if tag == "dt" and "sig-object" in (found.get("class") or "") and found.get("id"):
            self._entry = str(found["id"])
            self.entries[self._entry] = False
        elif tag == "span" and found.get("class") == "viewcode-link" and self._entry:
            self.entries[self._entry] = True

    def handle_endtag(self, tag: str) -> None:
        """An entry's heading ends."""
        if tag == "dt":
            self._entry = ""


def broken(folder: Path) -> list[str]:
    """Links that lead nowhere, with the pages that have them."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            address, place = urldefrag(link)
            if ":" in address or link == "#":
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            missing = not target.exists()
            if missing or (place and target in pages and place not in pages[target].places):
                found.append(f"{path.name}: {link}")
    return found


def without_source(folder: Path) -> list[str]:
    """Public names whose entry is missing from the pages, or has no link to its source."""
    entries: dict[str, bool] = {}
    for path in sorted((folder / "reference").glob("*.html")):
        entries |= Page(path.read_text()).entries
    packages = [importlib.import_module(name) for name in ("zo_adapt", "objectives")]
    names = [f"{package.__name__}.{name}" for package in packages for name in package.__all__]
    # Errors are a page of their own module.
    names[names.index("zo_adapt.ZOError")] = "zo_adapt.errors.ZOError"
    return [name for name in names if not entries.get(name)]


if __name__ == "__main__":
    lost, bare = broken(Path(sys.argv[1])), without_source(Path(sys.argv[1]))
    print(f"links: {len(lost)} broken", *lost, sep="\n  ")
    print(f"public names without a link to their source: {len(bare)}", *bare, sep="\n  ")
    sys.exit(bool(lost or bare))
