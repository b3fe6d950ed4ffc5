"""What the README says of black boxes, as rows of the table of claims of benchmarks/evidence.py."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

BLACK_BOXES = Path(__file__).parent / "results" / "black_box.json"
LINK = "[table](black_boxes.md#where-another-method-is-better)"
Place = tuple[str, int, int]
"""Function, variables, calls for each of them."""


def claims(path: Path = BLACK_BOXES) -> Iterator[tuple[str, str, str, str, str]]:
    """Where it names another method as the better one, and whether that one ended nearer."""
    if not path.exists():
        return
    found = medians(json.loads(path.read_text()))
    smooth = [place for place in found if place[0] in ("valley", "ill")]
    noisy = [place for place in found if place[0] == "noisy" and place[1] > 5]
    for claim, other, places in (
        ("Smooth and exact, 5 to 100 variables: COBYQA ends nearer (README)", "COBYQA", smooth),
        ("The same: NGOpt at times (README)", "NGOpt", smooth),
        ("The same: Powell at times (README)", "Powell", smooth),
        ("Noise, 20 and 100 variables: CMA-ES ends nearer (README)", "CMA-ES", noisy),
    ):
        yield _claim(claim, other, found, places)


def _claim(
    claim: str, other: str, found: Mapping[Place, Mapping[str, float]], places: Sequence[Place]
) -> tuple[str, str, str, str, str]:
    both = [place for place in sorted(places) if {other, "mezo"} <= set(found[place])]
    won = [place for place in both if found[place][other] < found[place]["mezo"]]
    lost = [f"{kind}, d = {d}, {calls} calls each" for kind, d, calls in both if
            (kind, d, calls) not in won]  # fmt: skip
    text = f"{other} nearer than MeZO() in {len(won)} of {len(both)} problems"
    text += f"; not on {'; '.join(lost)}" if 0 < len(lost) < 4 else ""
    at_times = "at times" in claim
    holds = "yes" if len(won) == len(both) or (at_times and won) else "in part" if won else "no"
    return claim, "functions in a box, 20 and 200 calls a variable, medians", text, holds, LINK


def medians(runs: Mapping[str, float]) -> dict[Place, dict[str, float]]:
    """Of the seeds, by problem and method."""
    seeds: dict[tuple[Place, str], list[float]] = defaultdict(list)
    for key, share in runs.items():
        if share < 0:  # stopped: it took too long
            continue
        method, kind, size, calls, _ = key.split("|")
        seeds[(kind, int(size), int(calls)), method].append(share)
    found: dict[Place, dict[str, float]] = defaultdict(dict)
    for (place, method), shares in seeds.items():
        found[place][method] = statistics.median(shares)
    return found
