"""Tables, claims and figures of docs/evidence.md, from the results of benchmarks/evidence.py."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_exact
import evidence_language
import evidence_lemmas
import evidence_memory
import evidence_readme
import evidence_time
import evidence_variance
from evidence_cells import Results, Where, markdown, spread
from evidence_claims import OBJECTIVES, PRETRAINED, claims
from evidence_figures import draw
from evidence_language import PRECISIONS, by_queries, by_steps
from evidence_methods import ABLATIONS, COORDINATES, METHODS, OWN
from evidence_packages import PACKAGES
from evidence_plan import (
    COUNTING,
    LANGUAGE,
    ONE_SAMPLE,
    SHORT,
    STEPPED,
    VIEWS,
    WIDE,
    WRITING,
)

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results"
LARGEST = RESULTS / "largest.json"
PAGE = DOCS / "evidence.md"
BEGIN, END = "<!-- tables: {} -->", "<!-- end: {} -->"
ALL = (*METHODS, *OWN)
TIME = "[table](#seconds)"
LS, DIGITS = "least squares", "MNIST"
Columns = Mapping[str, tuple[Where, str]]


def report(results: Mapping[str, Any]) -> None:
    """Put every table into its place on the page, and draw the figures."""
    found = Results(results)
    memory = json.loads(LARGEST.read_text())["rows"] if LARGEST.exists() else []
    more = [*evidence_language.claims(found), *evidence_time.claims(found, TIME)]
    more += [*evidence_exact.claims(found), *evidence_readme.claims()]
    tables = {
        **claims(found, memory, more),
        "least squares": table(found, ALL, least_squares()),
        "MNIST": table(found, ALL, mnist()),
        "encoder": table(found, ALL, encoder("")),
        "encoder, bf16": table(found, LANGUAGE, encoder(", bf16")),
        "ablations": table(found, ABLATIONS, ablations()),
        "batch sizes": batch_sizes(found),
        "batch sizes, steps": table(found, STEPPED, by_rows_at_equal_steps()),
        "objectives": table(found, COUNTING, objectives(OBJECTIVES)),
        "objectives, pre-trained": table(
            found, ("before", *WRITING, WIDE[-1]), objectives(PRETRAINED)
        ),
        "packages": packages(found),
        "variance": evidence_variance.table(found),
        "one sample": table(found, (*ONE_SAMPLE, *COORDINATES), one_sample()),
        "bf16": precision(found),
        "time": evidence_time.table(found),
        "causal LM": table(found, LANGUAGE, language("")),
        "causal LM, bf16": table(found, LANGUAGE, language(", bf16")),
        "exactness": evidence_exact.table(found),
        **evidence_memory.tables(memory),
        "moments": evidence_lemmas.moments(found),
        "rate of convergence": evidence_lemmas.convergence(found, "rate of convergence", "MeZO"),
        "Theorem 5.3": evidence_lemmas.convergence(found, "Theorem 5.3", "eta = rho / L (d + 2)"),
        "large batch": evidence_lemmas.large_batch(found),
        "made by": origins(),
    }
    page = PAGE.read_text()
    for name, text in tables.items():
        begin, end = re.escape(BEGIN.format(name)), re.escape(END.format(name))
        pattern = f"({begin}\n).*?({end})"
        page = re.sub(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S)
    PAGE.write_text(page)
    draw(found, memory, DOCS / "figures")
    print(f"{len(results)} runs; tables in {PAGE}")


def least_squares() -> Columns:
    """Training loss by budget."""
    budgets = [Where("methods", LS, queries=q) for q in (100_000, 1_000_000)]
    budgets += [Where("methods", LS, steps=2_000)]
    return {one.budget: (one, "training") for one in budgets}


def mnist() -> Columns:
    """Loss and accuracy by budget."""
    budgets = Where("methods", DIGITS, queries=200_000), Where("methods", DIGITS, steps=1_000)
    figures = {"training": "loss", "accuracy": "accuracy"}
    return {f"{figures[f]}, {b.budget}": (b, f) for b in budgets for f in figures}


def one_sample() -> Columns:
    """What needs a forward for every sample."""
    piece = "one sample a forward"
    least = [Where(piece, LS, queries=n) for n in (4_000, 100_000, 1_000_000)]
    digits = Where(piece, DIGITS, queries=20_000)
    models = (
        Where(piece, "encoder, LoRA", 4_000, None, 16),
        Where(piece, "encoder, LoRA", None, 150, 16),
        Where(piece, "causal LM, LoRA", 2_000, None, 16),
    )
    return {
        **{f"{LS}, loss, {one.budget}": (one, "training")
           for one in (*least, Where(piece, LS, steps=300))},
        f"{DIGITS}, loss, {digits.budget}": (digits, "training"),
        f"{DIGITS}, accuracy, {digits.budget}": (digits, "accuracy"),
        **{f"{one.problem}, accuracy, {one.budget}": (one, "accuracy") for one in models},
    }  # fmt: skip


def precision(found: Results) -> str:
    """The perceptron in bf16 beside fp32."""
    columns = {
        f"{name}, {figure}": (where, key)
        for name, where in PRECISIONS.items()
        for figure, key in (("loss", "training"), ("accuracy", "accuracy"))
    }
    return table(found, SHORT[:4], columns)


def encoder(half: str) -> Columns:
    """Accuracy by what is tuned."""
    return {
        f"{view}, {where.budget}": (where, "accuracy")
        for view in VIEWS
        for where in (
            Where("encoder", f"encoder, {view}{half}", queries=30_000, batch_size=64),
            Where("encoder", f"encoder, {view}{half}", steps=150, batch_size=64),
        )
    }


def language(half: str) -> Columns:
    """Accuracy of the causal language model by what is tuned."""
    return {
        f"{view}, {where.budget}": (where, "accuracy")
        for view in VIEWS
        for where in (by_queries(view, half), by_steps(view, half))
    }


def ablations() -> Columns:
    """One thing changed at a time."""
    return {
        "least squares, loss, 1,000,000 queries": (
            Where("ablations", LS, queries=1_000_000),
            "training",
        ),
        "the same, 300 steps": (Where("ablations", LS, steps=300), "training"),
        "MNIST, accuracy, 200,000 queries": (
            Where("ablations", DIGITS, queries=200_000),
            "accuracy",
        ),
        "encoder, LoRA, accuracy, 30,000 queries": (
            Where("ablations", "encoder, LoRA", 30_000, None, 64),
            "accuracy",
        ),
    }


def batch_sizes(found: Results) -> str:
    """Accuracy by the rows of a minibatch, a line for each."""
    rows = []
    for problem, images, sizes in (
        (DIGITS, "2,048", (16, 32, 64, 128, 512)),
        ("MNIST, 16,384 images", "16,384", (32, 512, 2048, 4096)),
    ):
        for size in sizes:
            piece = "methods" if (problem, size) == (DIGITS, 32) else "batch sizes"
            where = Where(piece, problem, 200_000, None, size)
            cells = (found.cell(where, method).text("accuracy") for method in LANGUAGE)
            rows.append([f"{images} images, b = {size}", *cells])
    return markdown(["", *LANGUAGE], rows)


def by_rows_at_equal_steps() -> Columns:
    """The batches of Table 5."""
    pieces = {32: "methods", 64: "batch sizes", 128: "batch sizes"}
    return {
        f"b = {rows}, accuracy, 1,000 steps": (Where(piece, DIGITS, None, 1_000, rows), "accuracy")
        for rows, piece in pieces.items()
    }


def objectives(cells: Columns) -> Columns:
    """What is counted, on rows that are held out."""
    return {
        f"{where.problem}{'' if figure in where.problem else f' (its {figure})'}, {where.budget}": (
            where,
            figure,
        )
        for where, figure in cells.values()
    }


def table(found: Results, methods: Sequence[str] | Mapping[str, Any], columns: Columns) -> str:
    """Methods by setting; rows and columns without results are left out."""
    cells = {
        (method, name): before(found, where, figure)
        if method == "before"
        else found.cell(where, method).text(figure)
        for method in methods
        for name, (where, figure) in columns.items()
    }
    shown = [name for name in columns if any(cells[m, name] != "-" for m in methods)]
    rows = [[method, *(cells[method, name] for name in shown)] for method in methods]
    return markdown(["", *shown], (row for row in rows if set(row[1:]) - {"-"}))


def before(found: Results, where: Where, figure: str) -> str:
    """The figure before any step, on the same seeds."""
    runs = found.cell(where, "MeZO()").runs
    values = [one["before"][figure] for one in runs if "before" in one]
    return spread(values) if values else "-"


def packages(found: Results) -> str:
    """The training loss of other packages, and this library's beside them."""
    theirs, ours = (Where(p, LS, queries=100_000) for p in ("packages", "methods"))
    rows = [(name, found.cell(theirs, name)) for name in PACKAGES]
    rows += [
        (f"this library, {name}", found.cell(ours, name))
        for name in ("MeZO", "MeZO, 8 directions compared", "MeZO()")
    ]
    return markdown(
        ["", "training loss", "queries"],
        ([n, c.text(), f"{c.runs[0]['queries']:,}"] for n, c in rows if c.runs),
    )


def origins() -> str:
    """How many runs were made where, and with which versions."""
    rows, made_by = [], dict[str, str]()
    for file in sorted(RESULTS.glob("evidence*.json")):
        content = json.loads(file.read_text())
        made_by = content["made by"]
        rows.append([f"{len(content['runs'])}", *made_by.values()])
    return markdown(["runs", *made_by], rows)
