"""Rank correlations of scores and relevance as objectives. scipy computes them."""

from abc import abstractmethod

import numpy as np

from objectives._ranking import RankingMetric


class RankCorrelation(RankingMetric):
    """Base of the correlations of scores and relevance; 0 where all scores are equal."""

    def has_value(self, relevance: np.ndarray) -> bool:
        """Whether the relevance varies."""
        return bool((relevance != relevance[0]).any())

    def values(self, relevance: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
        """One call of scipy for every query."""
        return np.array(
            [
                self.correlation(one, score) if (score != score[0]).any() else 0.0
                for one, score in zip(relevance, scores, strict=True)
            ]
        )

    @abstractmethod
    def correlation(self, relevance: np.ndarray, scores: np.ndarray) -> float:
        """Of one query."""


class KendallTau(RankCorrelation):
    """Kendall's rank correlation (tau-b) of scores and relevance, the mean over queries.

    Args:
        model: A scorer, or a module (see ``RankingMetric``).
        undefined: What becomes of a query whose documents are all equally relevant: "error" or
            "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        UndefinedMetricError: (when called) A query's documents are all equally relevant.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [2, 0, 1]}
        >>> KendallTau(torch.nn.Identity())([query]).round(4).tolist()
        [0.3333]
    """

    def correlation(self, relevance: np.ndarray, scores: np.ndarray) -> float:
        """Tau-b by scipy."""
        from scipy.stats import kendalltau

        return float(kendalltau(relevance, scores).statistic)


class Spearman(RankCorrelation):
    """Spearman's rank correlation of scores and relevance, the mean over queries.

    Args:
        model: A scorer, or a module (see ``RankingMetric``).
        undefined: What becomes of a query whose documents are all equally relevant: "error" or
            "skip".
        min_rows: Fewest queries that one direction sees; "all": the whole batch.

    Raises:
        UndefinedMetricError: (when called) A query's documents are all equally relevant.
        DataError: (when called) A query has no documents, or not one relevance for each.

    Example:
        >>> import torch
        >>> query = {"features": torch.tensor([[3.0], [2.0], [1.0]]), "relevance": [2, 0, 1]}
        >>> Spearman(torch.nn.Identity())([query]).round(4).tolist()
        [0.5]
    """

    def correlation(self, relevance: np.ndarray, scores: np.ndarray) -> float:
        """Rho by scipy."""
        from scipy.stats import spearmanr

        return float(spearmanr(relevance, scores).statistic)
