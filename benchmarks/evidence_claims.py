"""What is claimed, where it was tried and what was found: one table, written from the results."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import evidence_variance
from evidence_cells import (
    Cell,
    Results,
    Where,
    by_rows,
    by_size,
    exponents,
    growing,
    late,
    markdown,
)
from evidence_pieces import DIGITS, LARGE_BATCH, LS, ONE_SAMPLE, RECURSIVE, WHOLE_SET
from evidence_theory import bound

SVRG = "MeZO-SVRG as printed"
ONE_RATE = "MeZO-SVRG, one rate, shared direction"
EIGHT = "MeZO, 8 directions compared"
LORA = "encoder, LoRA"
PAIRS = "MeZO, mu = 0.01"
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
GROUPS = ("paper", "open questions", "project")
Claim = tuple[str, str, str, str, str]
"""Claim, setting, found, whether it holds, figure or table."""
CURVES, BATCHES, MEMORY = (
    "[figure](#least-squares-and-mnist)",
    "[figure](#batch-sizes)",
    "[figure](#memory)",
)
ENCODER = "[table](#an-encoder)"
VIEWS = ("LoRA", "last layers", "all weights")
RECOMMENDED = "MeZO(), the recommended one, does better than MeZOSVRG()"
FIRST = "Backpropagation learns more from the same forwards (README)"
THEORY, VARIANCE = "[table](#theory)", "[figure](#variance-along-a-run)"


def claims(
    found: Results, memory: Sequence[dict[str, Any]], more: Iterable[Claim] = ()
) -> dict[str, str]:
    """Those that have results, with more of other files: tables by whose claims they are."""
    rows = [*variance_reduction(found), *details(found), *evidence_variance.claims(found, VARIANCE)]
    rows += [*theory(found), *of_memory(memory), *others(found), *rows_of_a_batch(found)]
    rows += [*own(found), *more]
    groups: dict[str, list[Claim]] = {name: [] for name in GROUPS}
    for row in rows:
        groups[group(row[0])].append(row)
    header = ["claim", "setting", "found", "holds", "figure or table"]
    return {f"claims: {name}": markdown(header, of) for name, of in groups.items()}


def group(claim: str) -> str:
    """The paper's claims, its open questions, or what this project says."""
    if "README" in claim or "MeZO()" in claim:
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
    return ("yes" if ahead else "no") + ("" if clear else ", within the spread of the seeds")


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
    for view in VIEWS:
        problem, label = f"encoder, {view}", f"MiniLM, BBC topics, {view}"
        for budget in ((30_000, None), (None, 150)):
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
    for problem, queries, rows, figure, methods in (
        (LS, 4_000, 32, "training", ONE_SAMPLE[1:]),
        (LS, 100_000, 32, "training", (ONE_SAMPLE[1], LARGE_BATCH)),
        (LS, 1_000_000, 32, "training", (WHOLE_SET, LARGE_BATCH)),
        (DIGITS, 20_000, 32, "accuracy", ONE_SAMPLE[1:]),
        (LORA, 4_000, 16, "accuracy", ONE_SAMPLE[1:]),
        ("causal LM, LoRA", 2_000, 16, "accuracy", ONE_SAMPLE[1:]),
    ):
        where = Where("one sample a forward", problem, queries, None, rows)
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
    views = [Where("encoder", f"encoder, {view}", 30_000, None, 64) for view in VIEWS]
    places = [(queries[0], "training", CURVES), (queries[1], "accuracy", CURVES)]
    places += [(where, "accuracy", ENCODER) for where in views]
    ahead = "MeZO(), given no rate, learns more than MeZO with the best rate of the grid"
    for where, figure, link in places:
        yield from versus(found, ahead, where, figure, "MeZO()", "MeZO", EIGHT, link=link)
    for where, figure, link in places:
        yield from versus(found, RECOMMENDED, where, figure, "MeZO()", "MeZOSVRG()", link=link)
    for where, figure, link in places:
        yield from versus(found, FIRST, where, figure, "FO-Adam", "MeZO()", "FO-SGD", link=link)
    counted = "What has no gradient: MeZO() learns more than pairs with the best rate"
    for where, figure in (*OBJECTIVES.values(), *PRETRAINED.values()):
        a, b = found.cell(where, "MeZO()"), found.cell(where, PAIRS)
        if a.runs and b.runs:
            text = named(found, where, figure, "MeZO()", PAIRS, "MeZOSVRG()")
            setting = f"{where.problem}, equal {where.budget}, held-out {figure}"
            yield counted, setting, text, better(a, b, figure), "[table](#what-has-no-gradient)"


def theory(found: Results) -> Iterator[Claim]:
    """Lemmas and Theorem 5.3."""
    runs = found.of("moments")
    if runs:
        apart = max(abs(o["mean along the gradient"] - 1) / o["its error"] for _, o in runs)
        text = f"{len(runs)} means, the farthest {apart:.1f} standard errors from 1"
        yield ("The estimate is unbiased (Lemma 5.1)", "smooth non-convex functions", text,
               "yes" if apart < 3 else "no", THEORY)  # fmt: skip
        ratio = [o["second moment"] / o["expected"] for _, o in runs]
        text = f"E‖g‖² / ((d + 2) ‖grad f‖²) from {min(ratio):.2f} to {max(ratio):.2f}"
        yield ("Its size grows as d (Lemma 5.2)", "the same", text,
               "yes" if max(abs(r - 1) for r in ratio) < 0.1 else "no", THEORY)  # fmt: skip
    for piece, method, name in (
        ("rate of convergence", "MeZO", "MeZO, eta = 1 / 4 (d + 2)"),
        ("Theorem 5.3", "eta = rho / L (d + 2)", "MeZO-SVRG, eta = rho / L (d + 2), rho = 0.1"),
    ):
        cells = by_size(found, piece, method)
        if not cells:
            continue
        sizes = f"d in {sorted({d for d, _ in cells})}, T in {sorted({t for _, t in cells})}"
        if method == "MeZO":
            shares = [v / (bound(d) / t) for (d, t), values in cells.items() for v in values]
            text = f"{min(shares):.2f} to {max(shares):.2f} of what the descent lemma allows"
            yield ("The mean of ‖grad f‖² is below c d / T (Theorem 5.3)", f"{name}, {sizes}",
                   text, "yes" if max(shares) <= 1 else "no", THEORY)  # fmt: skip
        fitted, grow = exponents(late(cells)), growing(cells)
        if fitted:
            text = f"d^{fitted[0]:.2f} T^{fitted[1]:.2f}"
            text += f" without d = {grow[0]}" if grow else ""
            holds = "yes" if fitted[1] < -0.9 else "not reached at these T"
            holds = f"no, it grows at d = {grow[0]}" if grow else holds
            yield "The mean of ‖grad f‖² falls as 1 / T", f"{name}, T >= 10 d", text, holds, THEORY
    for steps, floors in by_rows(found).items():
        means = [statistics.mean(values) for values in floors.values()]
        text = f"{min(means):.2g} to {max(means):.2g} for b from {min(floors)} to {max(floors)}"
        yield ("A floor of O(1 / b) is left by a large batch of b < n rows (Theorem 5.3)",
               f"d = 10, n = 256, {steps:,} steps", text,
               "seen" if means[0] > 2 * means[-1] else "not seen", THEORY)  # fmt: skip
    steep = [o for run, o in found.of("Theorem 5.3") if run.method == "eta = rho / L"]
    if steep:
        squares = [o.get("of the second half") for o in steep]
        worse = sum(s is None or not math.isfinite(s) or s > 1e4 for s in squares)
        text = f"{worse} of {len(steep)} runs diverged at rho = 0.1; at eta = rho / L (d + 2) none"
        yield ("eta = rho / L is small enough (Gaussian directions)",
               "MeZO-SVRG, d in [10, 100, 1000], 100 steps", text,
               "no" if worse else "yes", THEORY)  # fmt: skip


def of_memory(memory: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """Tables 3 and 4, and Figure 3."""
    peaks = {(row["model"], row["method"]): row["GiB"] for row in memory}
    setting = "OPT, bf16, one text of 2,048 tokens, one H100 of 80 GB"

    def ratios(one: str, other: str) -> dict[str, float]:
        """Peaks of one method over another's, where both were measured and fit."""
        models = [m for m, method in peaks if method == one and peaks[m, one]]
        return {m: peaks[m, one] / peaks[m, other] for m in models if peaks.get((m, other))}

    for claim, one, other, holds in (
        ("MeZO-SVRG needs the memory of inference and little more (README)",
         "MeZO-SVRG", "forward", lambda low, high: high < 1.25),
        ("First-order SGD needs twice the memory of MeZO-SVRG, or more",
         "SGD", "MeZO-SVRG", lambda low, high: low >= 2),
        ("Adam needs twice the memory of MeZO-SVRG, or more",
         "Adam", "MeZO-SVRG", lambda low, high: low >= 2),
        ("On LoRA, AdamW with checkpoints needs hardly more memory than MeZO() (README)",
         "LoRA, Adam, checkpoints", "LoRA, MeZO()", lambda low, high: high < 1.1),
    ):  # fmt: skip
        found = ratios(one, other)
        if found:
            low, high = min(found.values()), max(found.values())
            text = f"{one} / {other}: {low:.2f} to {high:.2f} ({', '.join(found)})"
            yield claim, setting, text, "yes" if holds(low, high) else "no", MEMORY
