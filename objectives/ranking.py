"""Ranking metrics as objectives, over queries with any number of documents.

One example is one query with its documents. Tied scores have no order: every metric is the mean
over all orders of the ties. scikit-learn computes NDCG so; the others are computed here.
"""

from typing import Literal, NamedTuple

import numpy as np
from torch import nn

from objectives._ranking import RankingMetric, Undefined
from objectives.metrics import check_scikit_learn
from objectives.scorers import Scorer
from zo_adapt.errors import DataError, OptionError
from zo_adapt.options import at_least_one

LARGEST_EXPONENT = 512
"""Of a gain 2^relevance: sums of these are exact enough in fp64, and finite."""


class NDCG(RankingMetric):
    """Normalised discounted cumulative gain.

    NDCG@k = DCG@k / max DCG@k,  DCG@k = sum_{r <= k} gain(document at rank r) / log2(r + 1)

    Args:
        model: A scorer, or a module (see ``RankingMetric``).
        k: Ranks that count; None: all.
        gain: "linear", the relevance itself, as scikit-learn has it, or "exponential",
            2^relevance - 1, as in the literature on learning to rank.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        OptionError: k below 1, another gain or rule.
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> query = {"features": torch.randn(4, 2), "relevance": [0, 3, 1, 0]}
        >>> NDCG(model, k=3)([query, query]).shape
        (2,)
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        k: int | None = 10,
        *,
        gain: Literal["linear", "exponential"] = "linear",
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        check_scikit_learn()
        super().__init__(model, undefined=undefined, min_rows=min_rows)
        if gain not in ("linear", "exponential"):
            raise OptionError(f"gain={gain!r}; choose 'linear' or 'exponential'")
        self.k, self.gain = None if k is None else at_least_one("k", k), gain

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """One call of scikit-learn for every query."""
        pairs = zip(relevance, scores, strict=True)
        return np.array([self.mean([one], [score]) for one, score in pairs])

    def mean(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> float:
        """One call of scikit-learn for all: ten times faster."""
        from sklearn.metrics import ndcg_score

        gains = [one if self.gain == "linear" else np.exp2(one) - 1 for one in relevance]
        return float(ndcg_score(*_padded(gains, scores), k=self.k))

    def _check_gains(self, relevance: list[np.ndarray]) -> None:
        largest = max((float(one.max()) for one in relevance), default=0.0)
        if self.gain == "exponential" and largest > LARGEST_EXPONENT:
            raise DataError(
                f"a relevance of {largest:g} with gain='exponential', which is 2^relevance; choose "
                f"at most {LARGEST_EXPONENT}, or gain='linear'"
            )

    def _used(self, relevance: list[np.ndarray], where: str = "batch") -> np.ndarray:
        self._check_gains(relevance)
        return super()._used(relevance, where)


class MAP(RankingMetric):
    """Mean average precision.

    AP = 1/R sum_{relevant d} (relevant documents at or above d) / (documents at or above d)

    Args:
        model: A scorer, or a module (see ``RankingMetric``). Documents of relevance > 0 are
            relevant.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [0, 1, 1]}
        >>> MAP(torch.nn.Identity())([query]).round(4).tolist()
        [0.5833]
    """

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """Average precision of every query."""
        return np.array([_average_precision(ranks) for ranks in map(_ranked, relevance, scores)])


class MRR(RankingMetric):
    """Mean reciprocal rank: 1 / rank of the first relevant document.

    Args:
        model: A scorer, or a module (see ``RankingMetric``). Documents of relevance > 0 are
            relevant.
        k: Ranks that count, beyond them the value is 0; None: all.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        OptionError: k below 1.
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [0, 1, 1]}
        >>> MRR(torch.nn.Identity())([query]).tolist()
        [0.5]
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        k: int | None = None,
        *,
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        super().__init__(model, undefined=undefined, min_rows=min_rows)
        self.k = None if k is None else at_least_one("k", k)

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """1 / rank, 0 beyond k."""
        each = map(_ranked, relevance, scores)
        return np.array([_reciprocal_rank(ranks, self.k or np.inf) for ranks in each])


class RecallAt(RankingMetric):
    """The share of the relevant documents that stand among the first k.

    Args:
        model: A scorer, or a module (see ``RankingMetric``). Documents of relevance > 0 are
            relevant.
        k: Ranks that count.
        undefined: What becomes of a query without a relevant document: "error" or "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        OptionError: k below 1.
        UndefinedMetricError: (when called) A query has no relevant document.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [0, 1, 1]}
        >>> RecallAt(torch.nn.Identity(), k=2)([query]).tolist()
        [0.5]
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        k: int = 10,
        *,
        undefined: Undefined = "error",
        min_rows: int | Literal["all"] = 1,
    ) -> None:
        super().__init__(model, undefined=undefined, min_rows=min_rows)
        self.k = at_least_one("k", k)

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """Relevant documents within k, of all relevant ones."""
        return np.array([_recall(ranks, self.k) for ranks in map(_ranked, relevance, scores)])


def _padded(gains: list[np.ndarray], scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All queries as one matrix: a document without gain, ranked last, changes no metric."""
    # A column more than the longest has: scikit-learn does not rank a single document.
    shape = len(gains), 1 + max(len(one) for one in gains)
    matrix, ranked = np.zeros(shape), np.zeros(shape)
    for row, (gain, score) in enumerate(zip(gains, scores, strict=True)):
        matrix[row, : len(gain)] = gain
        ranked[row, : len(score)] = score
        ranked[row, len(score) :] = np.nextafter(score.min(), -np.inf)
    return matrix, ranked


class _Ranks(NamedTuple):
    """One query, its documents in descending order of score; entries are those of the ranks.

    Args:
        rank: 1..n.
        above: Documents above the group of equal scores that a rank belongs to.
        tied: Documents of the group.
        hits_above: Relevant documents above the group.
        hits: Relevant documents of the group.
    """

    rank: np.ndarray
    above: np.ndarray
    tied: np.ndarray
    hits_above: np.ndarray
    hits: np.ndarray


def _ranked(relevance: np.ndarray, scores: np.ndarray) -> _Ranks:
    """What is known of the document at each rank, whatever the order of the ties."""
    order = np.argsort(-scores, kind="stable")
    _, group, tied = np.unique(-scores[order], return_inverse=True, return_counts=True)
    hits = np.bincount(group, weights=(relevance[order] > 0).astype(float))
    above, hits_above = np.cumsum(tied) - tied, np.cumsum(hits) - hits
    rank = np.arange(1, len(scores) + 1)
    return _Ranks(rank, above[group], tied[group], hits_above[group], hits[group])


def _average_precision(ranks: _Ranks) -> float:
    """Its expectation over the orders of the ties.

    A rank holds a relevant document with probability hits / tied; of the ranks of its group before
    it, (hits - 1) / (tied - 1) then do.
    """
    before = ranks.rank - ranks.above - 1
    share = np.maximum(ranks.hits - 1, 0) / np.maximum(ranks.tied - 1, 1)
    precision = (ranks.hits_above + 1 + before * share) / ranks.rank
    likely = ranks.hits / ranks.tied
    return float((likely * precision).sum() / likely.sum())


def _reciprocal_rank(ranks: _Ranks, k: float) -> float:
    """Its expectation over the orders of the ties: the first group with a relevant document."""
    first = (ranks.hits > 0) & (ranks.hits_above == 0)
    rank, tied, hits = ranks.rank[first], ranks.tied[first], ranks.hits[first]
    left = tied - np.arange(len(rank))  # documents of the group that have no place yet
    missed = np.cumprod(np.maximum(1 - hits / left, 0.0))
    likely = np.concatenate([[1.0], missed[:-1]]) * np.minimum(hits / left, 1.0)
    return float((likely / rank)[rank <= k].sum())


def _recall(ranks: _Ranks, k: int) -> float:
    """Its expectation over the orders of the ties."""
    likely = ranks.hits / ranks.tied
    return float(likely[:k].sum() / likely.sum())
