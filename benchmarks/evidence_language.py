"""What is claimed of a causal language model and of half precision, for benchmarks/evidence.py."""

from collections.abc import Iterator, Mapping, Sequence

from evidence_cells import Claim, Results, Where
from evidence_claims import (
    BEST_RATE,
    ONE_RATE,
    RECOMMENDED,
    SVRG,
    WITHIN,
    better,
    first_order,
    versus,
)
from evidence_plan import DIGITS, HALVES, LANGUAGE, SHORT, VIEWS

QUERIES, STEPS, ROWS = 10_000, 100, 16
PRECISIONS = {
    "fp32": Where("methods", DIGITS, queries=200_000),
    "bf16": Where("bf16", "MNIST, bf16", queries=200_000),
}
"""The same perceptron, data and budget."""
TABLE = "[table](#a-causal-language-model)"


def by_queries(view: str, half: str = "") -> Where:
    """The cell of a view at equal queries."""
    return Where("causal LM", f"causal LM, {view}{half}", QUERIES, None, ROWS)


def by_steps(view: str, half: str = "") -> Where:
    """The cell of a view at equal steps."""
    return Where("causal LM", f"causal LM, {view}{half}", None, STEPS, ROWS)


def claims(found: Results) -> Iterator[Claim]:
    """Those that have results."""
    for half in HALVES:
        for view in VIEWS:
            yield from _of_view(found, view, half)
    yield from in_half(found, PRECISIONS, SHORT[:4], "MNIST", "[table](#bf16)")
    for view in VIEWS:
        cells = {"fp32": by_queries(view), "bf16": by_queries(view, ", bf16")}
        yield from in_half(found, cells, LANGUAGE, f"SmolLM2-135M, {view}", TABLE)
        full, half = (Where("encoder", f"encoder, {view}{h}", 30_000, None, 64) for h in HALVES)
        yield from in_half(found, {"fp32": full, "bf16": half}, LANGUAGE, f"MiniLM, {view}",
                           "[table](#an-encoder)")  # fmt: skip


def _of_view(found: Results, view: str, half: str) -> Iterator[Claim]:
    """The paper's claim by queries and by steps, this library's, and backpropagation's."""
    label = f"SmolLM2-135M, film reviews, {view}{half}"
    ahead = "MeZO-SVRG (Algorithm 1) learns more than MeZO on a causal LM"
    for where in (by_queries(view, half), by_steps(view, half)):
        yield from versus(found, ahead, where, "accuracy", SVRG, "MeZO", ONE_RATE,
                          link=TABLE, label=label)  # fmt: skip
    where = by_queries(view, half)
    yield from versus(found, BEST_RATE, where, "accuracy", "MeZO()", "MeZO", link=TABLE,
                      label=label)  # fmt: skip
    yield from versus(found, RECOMMENDED, where, "accuracy", "MeZO()", "MeZOSVRG()", link=TABLE,
                      label=label)  # fmt: skip
    yield from first_order(found, where, "accuracy", TABLE, label)


def in_half(
    found: Results, cells: Mapping[str, Where], methods: Sequence[str], label: str, link: str
) -> Iterator[Claim]:
    """Whether half precision costs anything."""
    for method in methods:
        full, half = (found.cell(where, method) for where in cells.values())
        if full.runs and half.runs:
            text = f"bf16 {half.short('accuracy')}; fp32 {full.short('accuracy')}"
            lost = better(full, half, "accuracy")
            holds = {"yes": "no", f"yes{WITHIN}": f"yes{WITHIN}"}.get(lost, "yes")
            setting = f"{label}, equal {cells['fp32'].budget}, held-out accuracy"
            yield f"{method} learns as much in bf16 as in fp32", setting, text, holds, link
