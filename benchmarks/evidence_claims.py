"""What is claimed, where it was tried and what was found: one table, written from the results."""

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import evidence_lemmas
import evidence_memory
import evidence_variance
from evidence_cells import Cell, Claim, Results, Where, markdown
from evidence_plan import (
    DIGITS,
    FIRST_ORDER,
    HALVES,
    LARGE_BATCH,
    LS,
    ONE_SAMPLE,
    RECURSIVE,
    VIEWS,
    WHOLE_SET,
)

SVRG = "MeZO-SVRG as printed"
ONE_RATE = "MeZO-SVRG, one rate, shared direction"
EIGHT = "MeZO, 8 directions compared"
LORA = "encoder, LoRA"
PAIRS = tuple(f"MeZO, mu = {mu:g}" for mu in (0.01, 0.05, 0.1))
OBJECTIVES = {
    "accuracy": (Where("objectives", "MNIST, accuracy", 50_000), "accuracy"),
    "F1": (Where("objectives", "MNIST, F1", 50_000, None, 128), "accuracy"),
    "NDCG": (Where("objectives", "ranking, NDCG", 4_000, None, 16), "NDCG"),
    "reward": (Where("objectives", "generation, reward", 1_000, None, 16), "reward"),
}
PRETRAINED = {
    "accuracy": (Where("objectives", "encoder, accuracy", 30_000, None, 128), "accuracy"),
    "F1": (Where("objectives", "encoder, F1", 30_000, None, 128), "F1"),
    "NDCG": (Where("objectives", "passages, NDCG", 4_000, None, 16), "NDCG"),
    "reward": (Where("objectives", "headlines, reward", 1_920, None, 16), "reward"),
}
"""The same metrics on pre-trained models and real texts."""
SETTING_IN_CLAIM = r" \((Figure|MNIST|README)[^)]*\)| on an encoder| on a causal LM|: with.*"
GROUPS = ("paper", "open questions", "project")
CURVES, BATCHES = "[figure](#least-squares-and-mnist)", "[figure](#batch-sizes)"
ENCODER = "[table](#an-encoder)"
BEST_RATE = "MeZO(), given no rate, learns more than MeZO with the best rate of the grid"
RECOMMENDED = "MeZO(), the recommended one, does better than MeZOSVRG()"
FIRST = "Backpropagation learns more from the same forwards (README)"
VARIANCE = "[figure](#variance-along-a-run)"
WITHIN = ", within the spread of the seeds"
"""Added to what holds on average, and not in each of the seeds."""


def claims(
    found: Results, memory: Sequence[dict[str, Any]], more: Iterable[Claim] = ()
) -> dict[str, str]:
    """Those that have results, with more of other files: tables by whose claims they are."""
    rows = [*variance_reduction(found), *details(found), *evidence_variance.claims(found, VARIANCE)]
    rows += [*evidence_lemmas.claims(found), *evidence_memory.claims(memory)]
    rows += [*others(found), *rows_of_a_batch(found)]
    rows += [*own(found), *more]
    groups: dict[str, list[Claim]] = {name: [] for name in GROUPS}
    for row in rows:
        groups[group(row[0])].append(row)
    header = ["claim", "setting", "found", "holds", "figure or table"]
    tables = {f"claims: {name}": markdown(header, of) for name, of in groups.items()}
    return tables | {"summary": summary(rows)}


def summary(rows: Iterable[Claim]) -> str:
    """In how many of its settings a claim holds, where it has several."""
    of: dict[str, list[str]] = {}
    for claim, setting, _, holds, _ in rows:
        name = re.sub(SETTING_IN_CLAIM, "", claim)
        budget = re.search(r"equal [\d,]+ (queries|steps)", setting)
        name += f", at equal {budget[1]}" if budget else ""
        of.setdefault(name, []).append(holds)
    lines = []
    for name, found in of.items():
        if len(found) > 2:
            clear = [one for one in found if WITHIN not in one]
            yes, no = (sum(one.startswith(word) for one in clear) for word in ("yes", "no"))
            lines.append([name, f"{len(found)}", f"{yes}", f"{len(found) - yes - no}", f"{no}"])
    return markdown(["claim", "settings", "holds", "within the spread, or in part", "does not"],
                    lines)  # fmt: skip


def group(claim: str) -> str:
    """The paper's claims, its open questions, or what this project says."""
    if "README" in claim or "MeZO()" in claim or "MeZOSVRG()" in claim:
        return GROUPS[2]
    return GROUPS[1] if claim.startswith(("ZO-", "Very large")) else GROUPS[0]


def better(one: Cell, other: Cell, figure: str) -> str:
    """Whether one cell is ahead of the other, in each of the seeds or on average."""
    if one.values(figure) == other.values(figure):
        return "no difference"
    sign = -1 if figure == "training" else 1
    ahead = sign * (one.mean(figure) - other.mean(figure)) > 0
    pairs = zip(one.values(figure), other.values(figure), strict=True)
    lead = [sign * (a - b) > 0 for a, b in pairs if a is not None and b is not None]
    winner = one if ahead else other
    clear = None not in winner.values(figure) and all(each == ahead for each in lead)
    return ("yes" if ahead else "no") + ("" if clear else WITHIN)


def named(found: Results, where: Where, figure: str, *methods: str) -> str:
    """The means of methods that have results, by name."""
    cells = ((name, found.cell(where, name)) for name in methods)
    return "; ".join(f"{name} {cell.short(figure)}" for name, cell in cells if cell.runs)


def versus(
    found: Results, claim: str, where: Where, figure: str, one: str, other: str, *more: str,
    link: str, label: str = "",
) -> Iterator[Claim]:  # fmt: skip
    """The claim that one method is ahead of another."""
    a, b = found.cell(where, one), found.cell(where, other)
    if a.runs and b.runs:
        what = "training loss" if figure == "training" else "held-out accuracy"
        setting = f"{label or where.problem}, equal {where.budget}, {what}"
        yield (
            claim,
            setting,
            named(found, where, figure, one, other, *more),
            better(a, b, figure),
            link,
        )


def first_order(
    found: Results, where: Where, figure: str, link: str, label: str = ""
) -> Iterator[Claim]:
    """Backpropagation at its better, beside this library's default."""
    sign = -1 if figure == "training" else 1
    tried = [name for name in FIRST_ORDER if found.cell(where, name).runs]
    tried.sort(key=lambda name: -sign * found.cell(where, name).mean(figure))
    if tried:
        yield from versus(found, FIRST, where, figure, tried[0], "MeZO()", *tried[1:], link=link,
                          label=label)  # fmt: skip


def variance_reduction(found: Results) -> Iterator[Claim]:
    """The paper's main claims."""
    ahead = "MeZO-SVRG (Algorithm 1) learns more than MeZO"
    for queries in (100_000, 1_000_000):
        where = Where("methods", LS, queries=queries)
        yield from versus(found, f"{ahead} (Figure 1a)", where, "training", SVRG, "MeZO", ONE_RATE,
                          link=CURVES)  # fmt: skip
    where = Where("methods", LS, steps=2_000)
    yield from versus(found, f"{ahead} (Figure 1a)", where, "training", SVRG, "MeZO", ONE_RATE,
                      link=CURVES)  # fmt: skip
    yield from versus(found, f"{ahead} (MNIST, Table 5)", Where("methods", DIGITS, 200_000),
                      "accuracy", SVRG, "MeZO", ONE_RATE, link=CURVES)  # fmt: skip
    digits = Where("methods", DIGITS, steps=1_000)
    yield from versus(found, f"{ahead} (MNIST, Table 5)", digits, "accuracy", SVRG, "MeZO",
                      ONE_RATE, link=CURVES)  # fmt: skip
    control = "More so than MeZO on all rows at every step, which needs twice the queries"
    yield from versus(found, control, where, "training", SVRG, "MeZO, all rows", link=CURVES)
    yield from versus(found, control, digits, "accuracy", SVRG, "MeZO, all rows", link=CURVES)
    for half, view, budget in itertools.product(HALVES, VIEWS, ((30_000, None), (None, 150))):
        problem, label = f"encoder, {view}{half}", f"MiniLM, BBC topics, {view}{half}"
        where = Where("encoder", problem, *budget, 64)
        yield from versus(found, f"{ahead} on an encoder", where, "accuracy", SVRG, "MeZO",
                              ONE_RATE, link=ENCODER, label=label)  # fmt: skip


def others(found: Results) -> Iterator[Claim]:
    """Open question 3: other variance reduction, at equal queries."""
    link = "[table](#least-squares-and-mnist)"
    for where, figure in (
        (Where("methods", LS, queries=100_000), "training"),
        (Where("methods", LS, queries=1_000_000), "training"),
        (Where("methods", DIGITS, queries=200_000), "accuracy"),
        (Where("encoder", LORA, 30_000, None, 64), "accuracy"),
    ):
        for method in RECURSIVE:
            yield from versus(found, f"{method} learns more than MeZO", where, figure, method,
                              "MeZO", link=ENCODER if where.problem == LORA else link)  # fmt: skip
    for problem, queries, steps, rows, figure, methods in (
        (LS, 4_000, None, 32, "training", ONE_SAMPLE[1:]),
        (LS, 100_000, None, 32, "training", (ONE_SAMPLE[1], LARGE_BATCH)),
        (LS, 1_000_000, None, 32, "training", (WHOLE_SET, LARGE_BATCH)),
        (LS, None, 300, 32, "training", ONE_SAMPLE[1:]),
        (DIGITS, 20_000, None, 32, "accuracy", ONE_SAMPLE[1:]),
        (LORA, 4_000, None, 16, "accuracy", ONE_SAMPLE[1:]),
        (LORA, None, 150, 16, "accuracy", ONE_SAMPLE[1:]),
        ("causal LM, LoRA", 2_000, None, 16, "accuracy", ONE_SAMPLE[1:]),
    ):
        where = Where("one sample a forward", problem, queries, steps, rows)
        for method in methods:
            yield from versus(found, f"{method} learns more than MeZO", where, figure, method,
                              "MeZO", link="[table](#one-sample-a-forward)")  # fmt: skip


def details(found: Results) -> Iterator[Claim]:
    """Ablations, Appendix E."""
    table = "[table](#ablations)"
    settings = (
        (Where("ablations", LS, queries=1_000_000), "training"),
        (Where("ablations", DIGITS, queries=200_000), "accuracy"),
        (Where("ablations", LORA, 30_000, None, 64), "accuracy"),
    )
    questions = (
        ("One direction for both estimates is better than two (the proof's, the text's)",
         ("base", "two directions")),
        ("Two rates are better than one (with a shared direction)",
         ("second rate 1/100", "base", "second rate 1/10")),
        ("A snapshot every second step is better than every step", ("base", "q = 1")),
        ("... than every fifth step", ("base", "q = 5", "q = 10")),
        ("A large batch does as well as the whole set (Table 10)",
         ("large batch 64", "large batch all", "large batch 256")),
        ("The large batch is better split over 16 directions",
         ("16 directions a large batch", "base", "4 directions a large batch")),
        ("Annealing helps (Algorithm 4)", ("annealing", "base")),
    )  # fmt: skip
    for claim, methods in questions:
        for where, figure in settings:
            yield from versus(found, claim, where, figure, *methods, link=table)
    for where, figure in settings[1:]:
        scales = "mu = 0.0001", "base", "mu = 0.01", "mu = 0.1"
        means = [found.cell(where, scale).mean(figure) for scale in scales]
        if any(math.isnan(mean) for mean in means):
            continue
        text = named(found, where, figure, *scales).replace("base", "mu = 0.001")
        apart = [abs(mean - means[1]) >= 0.05 for mean in means]
        holds = "no" if any(apart[:3]) else "yes up to 0.01" if apart[3] else "yes"
        setting = f"{where.problem}, {where.budget}"
        yield "mu does not matter from 1e-4 to 1e-1", setting, text, holds, table


def rows_of_a_batch(found: Results) -> Iterator[Claim]:
    """Open question 2."""
    many = "MNIST, 16,384 images"
    for problem, small, large in ((DIGITS, 32, 512), (many, 32, 4096)):
        for method in ("MeZO", "MeZO()"):
            piece = "methods" if problem == DIGITS else "batch sizes"
            cells = [found.cell(Where(piece, problem, 200_000, None, small), method)]
            cells.append(found.cell(Where("batch sizes", problem, 200_000, None, large), method))
            if all(cell.runs for cell in cells):
                sizes = zip((small, large), cells, strict=True)
                text = "; ".join(f"b = {b}: {c.short('accuracy')}" for b, c in sizes)
                setting = f"{problem}, {method}, equal 200,000 queries, accuracy"
                holds = better(cells[1], cells[0], "accuracy")
                yield "Very large batches help", setting, text, holds, BATCHES


def own(found: Results) -> Iterator[Claim]:
    """What this project says of itself, and of backpropagation."""
    queries = Where("methods", LS, queries=100_000), Where("methods", DIGITS, queries=200_000)
    views = [Where("encoder", f"encoder, {view}{half}", 30_000, None, 64)
             for half in HALVES for view in VIEWS]  # fmt: skip
    places = [(queries[0], "training", CURVES), (queries[1], "accuracy", CURVES)]
    places += [(where, "accuracy", ENCODER) for where in views]
    for where, figure, link in places:
        yield from versus(found, BEST_RATE, where, figure, "MeZO()", "MeZO", EIGHT, link=link)
    for where, figure, link in places:
        yield from versus(found, RECOMMENDED, where, figure, "MeZO()", "MeZOSVRG()", link=link)
    for where, figure, link in places:
        yield from first_order(found, where, figure, link)
    counted = "What has no gradient: MeZO() learns more than pairs with the best rate"
    for where, figure in (*OBJECTIVES.values(), *PRETRAINED.values()):
        ours = found.cell(where, "MeZO()")
        for pairs in PAIRS:
            theirs = found.cell(where, pairs)
            if ours.runs and theirs.runs:
                text = named(found, where, figure, "MeZO()", pairs, "MeZOSVRG()")
                setting = f"{where.problem}, equal {where.budget}, held-out {figure}"
                yield (counted, setting, text, better(ours, theirs, figure),
                       "[table](#what-has-no-gradient)")  # fmt: skip
    where, figure = PRETRAINED["NDCG"]
    runs = [one for one in found.cell(where, "MeZO()").runs if "before" in one]
    if runs:
        first, last = (
            statistics.mean(one[figure] for one in rows)
            for rows in ([one["before"] for one in runs], runs)
        )
        yield ("A ranking metric of a pretrained scorer and a few thousand lists: little is gained "
               "(README)", f"{where.problem}, {where.budget}, held-out NDCG@10",
               f"before {first:.3f}; MeZO() {last:.3f}", "yes" if last - first < 0.05 else "no",
               "[table](#what-has-no-gradient)")  # fmt: skip
