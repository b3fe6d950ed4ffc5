"""The plan of benchmarks/evidence.py: problems, methods, budgets and grids of rates."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evidence_methods import ABLATIONS, COORDINATES
from evidence_packages import installed

SEEDS, TUNING = (0, 1, 2), 9
"""Rates are chosen on a seed, that is other data, weights and directions, that no table counts."""
THEORY = ("moments", "rate of convergence", "Theorem 5.3")
EQUAL = (
    "MeZO",
    "MeZO-SVRG as printed",
    "MeZO-SVRG, one rate, shared direction",
    "MeZO-SVRG, one rate, two directions",
    "FO-SGD",
    "FO-Adam",
    "MeZO()",
    "MeZOSVRG()",
    "MeZO, 8 directions compared",
)
RECURSIVE = ("ZO-SPIDER", "ZO-PAGE", "ZO-STORM")
SHORT = (*EQUAL[:3], "MeZO()", "MeZOSVRG()")
COUNTING = ("MeZO()", "MeZOSVRG()", "MeZO, mu = 0.01",
            "MeZO-SVRG, one rate, shared direction, mu = 0.01")  # fmt: skip
WRITING = (*COUNTING, "MeZO, mu = 0.05")
"""A pair of 0.01 leaves most texts as they are; examples/generation_reward.py has 0.05."""
WIDE = (*COUNTING, "MeZO, mu = 0.1")
"""As far as ``MeZO()`` perturbs an adapter for a metric."""
FITTING = tuple(name for name in ABLATIONS if name != "large batch 1024")
FIRST_ORDER = ("FO-SGD", "FO-Adam")
ONE_SAMPLE = ("MeZO", "ZO-SVRG (Algorithm 2)", "ZO-SAGA")
WHOLE_SET, LARGE_BATCH = COORDINATES
TIMED = ("MeZO", *EQUAL[1:3], *EQUAL[4:])
LANGUAGE = (*EQUAL[:3], *FIRST_ORDER, "MeZO()", "MeZOSVRG()")
STEPPED = (*EQUAL[:3], *FIRST_ORDER)
WATCHED = ("MeZO", "MeZO-SVRG as printed", "MeZO-SVRG, one rate, shared direction")


class Run(NamedTuple):
    """One run of a method.

    Args:
        piece: Which question it belongs to.
        problem, method: By name.
        lr: The rate; None: the method finds its own step.
        batch_size: Rows of a minibatch.
        queries, steps: The budget, one of the two.
        seed: Of data, weights and directions.
    """

    piece: str
    problem: str
    method: str
    lr: float | None
    batch_size: int
    queries: int | None
    steps: int | None
    seed: int

    @property
    def key(self) -> str:
        """What tells runs apart."""
        return json.dumps(self)


class Cell(NamedTuple):
    """Methods at one budget; ``quick``: also in the reduced form."""

    piece: str
    problem: str
    methods: Sequence[str]
    queries: int | None = None
    steps: int | None = None
    batch_size: int = 32
    quick: bool = False


LS, DIGITS = "least squares", "MNIST"
VIEWS = ("LoRA", "last layers", "all weights")
HALVES = ("", ", bf16")
"""What is tuned, in fp32 and in bf16."""


def of_model(piece: str, queries: int, steps: int, rows: int) -> Iterator[Cell]:
    """A pre-trained model by what is tuned and in which precision, at equal queries and steps."""
    for half, view in itertools.product(HALVES, VIEWS):
        yield Cell(piece, f"{piece}, {view}{half}", LANGUAGE, queries, None, rows)
        yield Cell(piece, f"{piece}, {view}{half}", STEPPED, None, steps, rows)


PLAN = (
    Cell("methods", LS, (*EQUAL, *RECURSIVE), queries=100_000, quick=True),
    Cell("methods", DIGITS, EQUAL, queries=200_000, quick=True),
    Cell("methods", LS, (*EQUAL, "MeZO, all rows", *RECURSIVE), steps=2_000, quick=True),
    Cell("methods", DIGITS, ("MeZO", "MeZO, all rows", *EQUAL[1:], *RECURSIVE), steps=1_000),
    Cell("ablations", DIGITS, tuple(ABLATIONS), queries=200_000),
    Cell("ablations", LS, FITTING, queries=1_000_000),
    *(Cell("batch sizes", DIGITS, LANGUAGE, queries=200_000, batch_size=b)
      for b in (64, 128, 512, 16)),
    *(Cell("batch sizes", "MNIST, 16,384 images", ("MeZO", "MeZO()"), queries=200_000, batch_size=b)
      for b in (32, 512, 2048, 4096)),
    Cell("methods", LS, EQUAL[:3], queries=1_000_000),
    Cell("methods", DIGITS, RECURSIVE, queries=200_000),
    Cell("objectives", "MNIST, accuracy", COUNTING, queries=50_000),
    Cell("ablations", LS, FITTING, steps=300),
    Cell("objectives", "ranking, NDCG", COUNTING, queries=4_000, batch_size=16),
    Cell("objectives", "MNIST, F1", COUNTING, queries=50_000, batch_size=128),
    Cell("objectives", "generation, reward", COUNTING, queries=1_000, batch_size=16),
    Cell("objectives", "passages, NDCG", COUNTING, queries=4_000, batch_size=16),
    Cell("objectives", "headlines, reward", WRITING, queries=1_920, batch_size=16),
    *(Cell("objectives", f"encoder, {metric}", WIDE, queries=30_000, batch_size=128)
      for metric in ("accuracy", "F1")),
    Cell("one sample a forward", LS, ONE_SAMPLE, queries=4_000),
    Cell("one sample a forward", LS, ("MeZO", LARGE_BATCH), queries=100_000),
    Cell("one sample a forward", LS, ("MeZO", WHOLE_SET, LARGE_BATCH), queries=1_000_000),
    Cell("one sample a forward", LS, ONE_SAMPLE[1:2], queries=100_000),
    Cell("one sample a forward", DIGITS, ONE_SAMPLE, queries=20_000),
    Cell("bf16", "MNIST, bf16", (*EQUAL[:3], "MeZO()"), queries=200_000),
    Cell("packages", LS, tuple(installed()), queries=100_000),
    *of_model("encoder", queries=30_000, steps=150, rows=64),
    Cell("encoder", "encoder, LoRA", RECURSIVE, queries=30_000, batch_size=64),
    Cell("ablations", "encoder, LoRA", FITTING, queries=30_000, batch_size=64),
    *of_model("causal LM", queries=10_000, steps=100, rows=16),
    Cell("one sample a forward", "encoder, LoRA", ONE_SAMPLE, queries=4_000, batch_size=16),
    Cell("one sample a forward", "encoder, LoRA", ONE_SAMPLE, steps=150, batch_size=16),
    Cell("one sample a forward", LS, ONE_SAMPLE, steps=300),
    *(Cell("batch sizes", DIGITS, STEPPED, steps=1_000, batch_size=b) for b in (64, 128)),
    Cell("methods", LS, RECURSIVE, queries=1_000_000),
    Cell("one sample a forward", "causal LM, LoRA", ONE_SAMPLE, queries=2_000, batch_size=16),
)  # fmt: skip
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TENFOLD = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
GRIDS = {
    LS: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "ablations: encoder, LoRA": (1e-2, 3e-2, 1e-1, 3e-1),
    "ranking, NDCG": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "generation, reward": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    **dict.fromkeys(("encoder, accuracy", "encoder, F1"), (1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
    **dict.fromkeys(("passages, NDCG", "headlines, reward"), (1e-3, 1e-2, 1e-1, 1.0, 10.0)),
    **{f"{model}, {view}{half}": rates for half in HALVES for model, view, rates in (
        ("encoder", "LoRA", TENFOLD[1:]), ("causal LM", "LoRA", TENFOLD[1:]),
        ("encoder", "last layers", TENFOLD[:5]), ("causal LM", "last layers", TENFOLD[:5]),
        ("encoder", "all weights", TENFOLD[:5]), ("causal LM", "all weights", TENFOLD[:3]))},
}  # fmt: skip
