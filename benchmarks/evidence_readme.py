"""What the README says, as rows of the table of claims of benchmarks/evidence.py."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import default_tables
from default_tables import COUNT, NEAR, SWEPT, TIMES, Compared, Row
from evidence_cells import Claim

RESULTS = Path(__file__).parent / "results"
LINK = "[table](black_boxes.md#where-another-method-is-better)"
CHOOSING = "[tables](choosing.md)"
Place = tuple[str, int, int]
"""Function, variables, calls for each of them."""


def claims() -> Iterator[Claim]:
    """Those that have results."""
    yield from black_boxes(RESULTS / "black_box.json")
    yield from of_the_default(default_tables.load(RESULTS / "defaults.json")["runs"])
    yield from beside_adam(RESULTS / "beside_adam.json")


def of_the_default(runs: Sequence[Row]) -> Iterator[Claim]:
    """How far steps go without being told, and what a small budget does for many weights."""
    of: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in runs:
        of[row["cell"], row["schedule"]].append(row)
    found = [
        both for cell in dict.fromkeys(cell for cell, _ in of) if (both := _compared(of, cell))
    ]
    if found:
        near = sum(one.is_near for one in found)
        text = (
            f"within {NEAR:g} of accuracy, or {TIMES:g} times the loss, in {near} of {len(found)}"
        )
        yield ("The displacement that is found is near the best of seven, nine in ten (README)",
               "pairs of a view and a task, equal queries", text,
               "yes" if near >= 0.9 * len(found) else "no", CHOOSING)  # fmt: skip
    task = "BBC 32 tokens, 7,680"
    few, many = (
        [default_tables.score(row) for row in of[f"{view} | {task}", "cooldown"]
         if row["multiple"] is None]
        for view in ("LoRA all-linear r=8, white A", "all weights")
    )  # fmt: skip
    if few and many:
        text = f"LoRA {default_tables.spread(few)}, all weights {default_tables.spread(many)}"
        holds = "yes" if statistics.mean(few) > statistics.mean(many) else "no"
        yield ("A few thousand queries: fewer weights learn more than millions (README)",
               "MiniLM, BBC topics, 32 tokens, 7,680 queries, accuracy (seeds)", text, holds,
               CHOOSING)  # fmt: skip


def _compared(of: Mapping[tuple[str, str], Sequence[Row]], cell: str) -> Compared | None:
    """The default and the best of its sweep, on seeds the choice has not seen where there are."""
    found = []
    for schedule in ("cooldown", "linear"):  # today's, and that of before
        rows = of.get((cell, schedule), ())
        multiple = default_tables.best_multiple(rows, cell, SWEPT, COUNT)
        found += [default_tables.compared(rows, multiple)] if multiple else []
    there = [one for one in found if one is not None]
    return next((one for one in there if one.is_fresh), there[0] if there else None)


def beside_adam(path: Path) -> Iterator[Claim]:
    """The figure."""
    if not path.exists():
        return
    forward, backward = json.loads(path.read_text()).values()
    ends = [[curve["accuracy"][-1] for curve in curves] for curves in (backward, forward)]
    adam, alone = (f"{statistics.mean(one):.3f} ± {statistics.stdev(one):.3f}" for one in ends)
    text = f"AdamW {adam} after 7,680 forwards, as many backward; forwards alone {alone} of 40,000"
    holds = "yes" if statistics.mean(ends[0]) > statistics.mean(ends[1]) else "no"
    setting = f"MiniLM, BBC topics, LoRA, held-out accuracy, {len(forward)} seeds"
    yield ("Backpropagation learns more from fewer forwards (README's figure)", setting, text,
           holds, "[figure](index.md)")  # fmt: skip


def black_boxes(path: Path) -> Iterator[Claim]:
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
) -> Claim:
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
