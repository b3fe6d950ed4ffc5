"""Every link between the built pages leads to a page, and to a place on it: `make docs`."""

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
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif name in ("href", "src") and value and tag in ("a", "img"):
                self.links.add(value)


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


if __name__ == "__main__":
    lost = broken(Path(sys.argv[1]))
    print(f"links: {len(lost)} broken", *lost, sep="\n  ")
    sys.exit(bool(lost))
