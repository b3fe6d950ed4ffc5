"""Tune a document scorer on NDCG@10 itself, which is flat almost everywhere and has no gradient.

Web search queries of MSLR-WEB with about a hundred documents each, 136 features and relevance 0..4.
A linear scorer starts at zero, where all documents are tied, and sees nothing but the metric.

    python examples/ranking_ndcg.py    # seconds, once the data are fetched
"""

import argparse
import io
import sys
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_svmlight_file
from torch import nn

from support import real_data
from objectives import NDCG
from support.registry import FetchError
from zo_adapt import MeZOSVRG, ParameterView, minimize
from zo_adapt.errors import ZOError

BM25 = 109  # the column of its score for the whole document
Query = dict[str, Any]  # features (n, 136), relevance (n,)


def queries(split: str) -> list[Query]:
    """The queries of a split that have a relevant document."""
    table, relevance, names = load_svmlight_file(
        io.BytesIO(real_data.ranking_file(split)), query_id=True
    )
    # Counts and lengths of heavy tails: their logarithms.
    features = table.toarray().astype(np.float32)
    features = np.sign(features) * np.log1p(np.abs(features))
    found = [
        {
            "features": torch.from_numpy(features[names == name]),
            "relevance": relevance[names == name],
        }
        for name in np.unique(names)
    ]
    return [one for one in found if one["relevance"].any()]


def standardised(data: list[Query], like: list[Query]) -> list[Query]:
    """Features with mean 0 and deviation 1 over the documents of ``like``."""
    documents = torch.cat([one["features"] for one in like])
    mean, deviation = documents.mean(0), documents.std(0)
    deviation[deviation == 0] = 1.0
    return [one | {"features": ((one["features"] - mean) / deviation).clamp(-5, 5)} for one in data]


def main() -> None:
    """Fetch, tune, report."""
    parser = argparse.ArgumentParser(description="Tune a scorer on NDCG@10 itself.")
    parser.add_argument("--steps", type=int, default=500, help="steps of 8 evaluations")
    parser.add_argument("--seed", type=int, default=0, help="of the directions")
    args = parser.parse_args()
    raw = queries("train")
    train, test = standardised(raw, like=raw), standardised(queries("test"), like=raw)
    scorer = nn.Linear(train[0]["features"].shape[1], 1, bias=False)
    nn.init.zeros_(scorer.weight)

    ndcg = NDCG(scorer, k=10, gain="exponential", min_rows="all")  # the batch whole: less noise
    bm25 = NDCG(Column(BM25), k=10, gain="exponential")
    before = ndcg(train).mean(), ndcg(test).mean()
    started = time.perf_counter()
    result = minimize(
        ndcg,
        ParameterView.full(scorer),
        train,
        MeZO(),
        batch_size=16,
        max_steps=args.steps,
        seed=args.seed,
    )
    after = ndcg(train).mean(), ndcg(test).mean()
    seconds = time.perf_counter() - started
    print(f"\nNDCG@10 of {len(test)} held-out queries ({len(train)} to train with)")
    print(f"  random order {before[1]:.3f}   BM25 {bm25(queries('test')).mean():.3f}")
    print(f"  tuned on NDCG {after[1]:.3f}   (training queries {before[0]:.3f} -> {after[0]:.3f})")
    print(f"  {result.queries} queries ranked, {seconds:.0f} s; {result.message}")


class Column(nn.Module):
    """A scorer that reads one feature."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores (n,) of features (n, d)."""
        return features[:, self.column]


if __name__ == "__main__":
    try:
        main()
    except (FetchError, ZOError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
