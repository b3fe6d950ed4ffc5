"""Ranking metrics: scikit-learn's and scipy's for every query, however the queries are cut."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_config, tiny_model, token_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast

from objectives import (
    MAP,
    MRR,
    NDCG,
    BiEncoder,
    CrossEncoder,
    FeatureScorer,
    KendallTau,
    RecallAt,
    Spearman,
)
from zo_adapt import MeZO, ParameterView, SetObjective, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import (
    DataError,
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    UndefinedMetricError,
)
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

QUIET: dict[str, Any] = {"progress": False}
Query = tuple[list[float], list[float]]  # relevance, scores


def ndcg(k: int | None, gain: Callable[[Any], Any] = np.asarray) -> Callable[..., float]:
    def value(relevance: np.ndarray, scores: np.ndarray) -> float:
        if len(relevance) == 1:
            return 1.0  # scikit-learn refuses; there is one order, and it is the best
        return float(reference.ndcg_score([gain(relevance)], [scores], k=k))

    return value


def over_orders(value: Callable[[list[bool]], float]) -> Callable[..., float]:
    """Slow and obvious: the mean over all orders in which tied documents may stand."""

    def mean(relevance: np.ndarray, scores: np.ndarray) -> float:
        groups = [
            sorted(set(itertools.permutations((relevance[scores == s] > 0).tolist())))
            for s in sorted(set(scores.tolist()), reverse=True)
        ]
        orders = [list(itertools.chain(*order)) for order in itertools.product(*groups)]
        return float(np.mean([value(order) for order in orders]))

    return mean


def average_precision(hits: list[bool]) -> float:
    places = [place for place, hit in enumerate(hits) if hit]
    return sum((i + 1) / (place + 1) for i, place in enumerate(places)) / len(places)


def recall(hits: list[bool], k: int = 2) -> float:
    return sum(hits[:k]) / sum(hits)


def reciprocal(hits: list[bool], k: int = 99) -> float:
    return 1 / (1 + hits.index(True)) if True in hits[:k] else 0.0


METRICS: dict[str, tuple[Callable[[Any], Any], Callable[..., float]]] = {
    "ndcg": (lambda m: NDCG(m, k=None), ndcg(None)),
    "ndcg@3": (lambda m: NDCG(m, k=3), ndcg(3)),
    "ndcg exponential": (lambda m: NDCG(m, k=3, gain="exponential"), ndcg(3, lambda r: 2**r - 1)),
    "map": (MAP, over_orders(average_precision)),
    "mrr": (MRR, over_orders(reciprocal)),
    "mrr@2": (lambda m: MRR(m, k=2), over_orders(lambda hits: reciprocal(hits, 2))),
    "recall@2": (lambda m: RecallAt(m, k=2), over_orders(recall)),
    "kendall": (KendallTau, lambda r, s: scipy.stats.kendalltau(r, s).statistic),
    "spearman": (Spearman, lambda r, s: scipy.stats.spearmanr(r, s).statistic),
}
CORRELATIONS = ("kendall", "spearman")


class Same(nn.Module):
    """Its input, which is then the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def examples(queries: list[Query]) -> list[dict[str, Any]]:
    return [
        {"features": torch.tensor(scores, dtype=torch.float64)[:, None], "relevance": relevance}
        for relevance, scores in queries
    ]


def in_parts(metric: Any, queries: list[dict[str, Any]], size: int | None) -> float:
    batch = Batch(as_source(queries, metric.collate), range(len(queries)))
    view = ParameterView.full(metric.model)
    return (
        -LocalEvaluator(metric, view, EvaluationOptions(micro_batch_size=size))
        .evaluate([Probe(HERE, batch)])[0]
        .value
    )


def a_query(documents: int) -> st.SearchStrategy[Query]:
    def column(values: list[float]) -> st.SearchStrategy[list[float]]:
        return st.lists(st.sampled_from(values), min_size=documents, max_size=documents)

    # few distinct scores, so that ties are common; two so close that a shift would merge them
    return st.tuples(column([0.0, 1.0, 2.0, 4.0]), column([-1e9, 0.0, 1e-12, 0.5, 1.0]))


QUERIES = st.lists(st.integers(1, 8).flatmap(a_query), min_size=1, max_size=7)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=25, deadline=None)
@given(queries=QUERIES, size=st.sampled_from([None, 1, 2, 3]))
def test_equal_to_the_libraries_for_every_query_however_they_are_cut(
    name: str, queries: list[Query], size: int | None
) -> None:
    make, expected = METRICS[name]
    metric = make(Same())
    pairs = [(np.array(r), np.array(s)) for r, s in queries]
    usable = [metric.has_value(r) for r, _ in pairs]
    data = [one for one, use in zip(examples(queries), usable, strict=True) if use]
    if not data:
        return
    values = [
        0.0 if name in CORRELATIONS and len(set(s)) == 1 else expected(r, s)
        for (r, s), use in zip(pairs, usable, strict=True)
        if use
    ]
    assert metric(data) == pytest.approx(values, abs=1e-12)
    assert in_parts(metric, data, size) == pytest.approx(np.mean(values), abs=1e-12)
    skipping = type(metric)(metric.model, undefined="skip")
    assert np.isnan(skipping(examples(queries))).tolist() == [not use for use in usable]


def test_three_tied_relevant_documents_are_right_in_every_order() -> None:
    (query,) = examples([([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])])
    assert MRR(Same())([query]).tolist() == [1.0]
    assert MAP(Same())([query]).tolist() == pytest.approx([1.0])
    assert RecallAt(Same(), k=2)([query]).tolist() == pytest.approx([2 / 3])


def test_without_ties_the_average_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    relevance, scores = rng.integers(0, 2, 30).astype(float), rng.permutation(30).astype(float)
    found = MAP(Same())(examples([(relevance.tolist(), scores.tolist())]))
    expected = reference.average_precision_score(relevance, scores)
    assert found.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("name", METRICS)
def test_a_better_order_is_worth_more(name: str) -> None:
    metric = METRICS[name][0](Same())
    relevance = [0.0, 2.0, 0.0, 1.0, 0.0]
    good, bad = examples([(relevance, relevance), (relevance, [-r for r in relevance])])
    assert metric([good])[0] == pytest.approx(1.0, abs=0.2)  # ties in the relevance cap rho
    assert metric([bad])[0] < metric([good])[0] - 0.5


@pytest.mark.parametrize("size", [None, 1, 2])
def test_skipped_queries_do_not_count_in_the_mean(size: int | None) -> None:
    queries = examples([([0, 0], [1, 2]), ([1, 0], [2, 1]), ([0], [1]), ([0, 1, 0], [2, 1, 0])])
    assert in_parts(MRR(Same(), undefined="skip"), queries, size) == pytest.approx(0.75)


# --- scorers ------------------------------------------------------------------------------------


def pairs_of(model_rows: list[list[int]], sizes: list[int]) -> list[dict[str, Any]]:
    """Queries with these numbers of tokenised documents."""
    rows, queries = iter(model_rows), []
    for size in sizes:
        documents = [{"input_ids": next(rows)} for _ in range(size)]
        queries.append({"documents": documents, "relevance": [float(i == 1) for i in range(size)]})
    return queries


def test_a_cross_encoder_scores_pairs_of_any_number_and_length() -> None:
    model, rows = tiny_model("bert", num_labels=1), token_rows(9)
    with torch.no_grad():
        alone = [float(model(torch.tensor([row])).logits) for row in rows]
        scorer = CrossEncoder(model, documents_per_forward=4)
        found = scorer.scores(scorer.collate(pairs_of(rows, [2, 5, 2])))
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    queries = pairs_of(rows, [2, 5, 2])
    assert NDCG(model, k=3)(queries) == pytest.approx(NDCG(scorer, k=3)(queries)), "recognised"


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_a_bi_encoder_compares_embeddings(pooling: Any, similarity: Any) -> None:
    torch.manual_seed(0)
    model, rows = AutoModel.from_config(tiny_config("bert")).eval(), token_rows(9)

    def embedding(row: list[int]) -> Tensor:
        hidden = model(torch.tensor([row])).last_hidden_state[0]
        return {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]

    sizes, queries, expected = [2, 4], [], []
    ids = iter(rows)
    with torch.no_grad():
        for size in sizes:
            query, documents = next(ids), [next(ids) for _ in range(size)]
            queries.append(
                {
                    "query": {"input_ids": query},
                    "documents": [{"input_ids": row} for row in documents],
                    "relevance": [1.0] * size,
                }
            )
            for row in documents:
                one, other = embedding(query), embedding(row)
                dot = one @ other
                expected.append(
                    float(dot / one.norm() / other.norm() if similarity == "cosine" else dot)
                )
        scorer = BiEncoder(model, pooling=pooling, similarity=similarity, documents_per_forward=3)
        assert scorer.scores(scorer.collate(queries)).tolist() == pytest.approx(expected, abs=1e-4)
        own = BiEncoder(model, pooling=lambda out, batch: out.last_hidden_state[:, 0])
        assert own.scores(own.collate(queries)).shape == (6,)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(4, VOCABULARY)} | {"[UNK]": 0, "[PAD]": 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_max_length=40
    )


def test_text_is_tokenised_as_pairs_or_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    query = {"query": "w5 w6", "documents": ["w7", "w8 w9 w10"], "relevance": [0, 1]}
    cross = CrossEncoder(tiny_model("bert", num_labels=1), tokenizer)
    assert [one["input_ids"] for one in cross.encoded(query)["documents"]] == [
        [5, 6, 7],
        [5, 6, 8, 9, 10],
    ]
    short = CrossEncoder(cross.model, tokenizer, max_length=4)
    assert len(short.encoded(query)["documents"][1]["input_ids"]) == 4
    both = BiEncoder(AutoModel.from_config(tiny_config("bert")), tokenizer).encoded(query)
    assert both["query"]["input_ids"] == [5, 6]
    assert [one["input_ids"] for one in both["documents"]] == [[7], [8, 9, 10]]
    once = cross.encoded(query)
    assert NDCG(cross)([query]) == NDCG(cross)([once])
    assert cross.encoded(once) == once


# --- in a run -----------------------------------------------------------------------------------


def graded(queries: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Documents whose relevance grows with their second feature."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(queries):
        features = torch.randn(6 + i % 5, 4, generator=generator)
        made.append({"features": features, "relevance": features[:, 1].argsort().argsort() // 3})
    return made


@pytest.mark.parametrize("metric", [NDCG, MAP, MRR, KendallTau, Spearman])
def test_a_ranking_climbs_without_being_told_to_and_the_same_seed_climbs_the_same(
    metric: Any,
) -> None:
    def run() -> tuple[float, float, list[float]]:
        model = nn.Linear(4, 1)
        nn.init.zeros_(model.weight)
        objective, data = metric(model), graded()
        before = float(objective(data).mean())
        result = minimize(
            objective, ParameterView.trainable(model), data,
            MeZO(displacement=0.5, perturbation_scale=0.2), batch_size=12, max_queries=1_200,
            **QUIET,
        )  # fmt: skip
        return before, float(objective(data).mean()), [one.value for one in result.history]

    before, after, history = run()
    assert after > before + 0.5 * (1 - before), (before, after)
    assert history[-1] > history[0]
    assert run()[2] == history


def test_the_protocol() -> None:
    metric = NDCG(nn.Linear(2, 1))
    assert isinstance(metric, SetObjective)
    assert metric.maximize is True
    assert isinstance(metric.scorer, FeatureScorer)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "relevance"),
    [("ndcg", [0, 0]), ("map", [0, 0]), ("mrr", [0, 0]), ("recall@2", [0, 0]), ("kendall", [1, 1])],
)
def test_queries_without_a_value_are_named(name: str, relevance: list[float]) -> None:
    metric = METRICS[name][0](Same())
    queries = examples([([1, 0], [1, 2]), (relevance, [1, 2])])
    for ask in (metric, lambda data: metric.score([metric.predict(data)])):
        with pytest.raises(UndefinedMetricError, match=r"query 1.*2 documents.*undefined='skip'"):
            ask(queries)
    skipping = type(metric)(metric.model, undefined="skip")
    with pytest.raises(UndefinedMetricError, match="not defined on any of the 1 queries"):
        skipping.score([skipping.predict(queries[1:])])


def test_a_gain_beyond_every_number_is_named() -> None:
    query = {"features": torch.eye(3, 2), "relevance": [2000, 0, 1]}
    with pytest.raises(DataError, match=r"relevance of 2000 .*at most 512"):
        NDCG(nn.Linear(2, 1), gain="exponential")([query])
    assert 0 < float(NDCG(nn.Linear(2, 1))([query])[0]) <= 1


def test_an_error_inside_a_probe_leaves_the_weights() -> None:
    model, data = nn.Linear(4, 1), graded()
    data[7]["relevance"] = torch.zeros(len(data[7]["features"]))
    start = model.weight.detach().clone()
    with pytest.raises(UndefinedMetricError, match="NDCG is not defined for query"):
        minimize(
            NDCG(model), ParameterView.trainable(model), data, MeZO(), batch_size=24,
            max_steps=1, **QUIET,
        )  # fmt: skip
    assert torch.equal(model.weight, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(0, 4)}, "query 1 .* has no documents; leave it out"),
        ({"relevance": [1.0]}, r"query 1 .* 3 features and relevance of shape \(1,\)"),
        ({"relevance": ["a", 0, 1]}, "query 1 .*'a'.*one number"),
        ({"relevance": [0, -1, 0]}, r"query 1 .*-1\.0.*choose finite"),
        ({"features": torch.zeros(3, 5)}, r"features of the shapes \[\(2, 4\), \(3, 5\)\]"),
        ({"features": None}, "a query needs 'features'"),
    ],
)
def test_queries_that_make_no_batch(change: dict[str, Any], message: str) -> None:
    good = {"features": torch.zeros(2, 4), "relevance": [1, 0]}
    bad = {"features": torch.zeros(3, 4), "relevance": [1, 0, 0]} | change
    bad = {name: value for name, value in bad.items() if value is not None}
    with pytest.raises(DataError, match=message):
        NDCG(nn.Linear(4, 1))([good, bad])
    with pytest.raises(DataError, match="no queries"):
        NDCG(nn.Linear(4, 1))([])


def test_models_that_do_not_give_one_score() -> None:
    query = {"features": torch.zeros(2, 4), "relevance": [1, 0]}
    with pytest.raises(ObjectiveError, match=r"\(2, 3\) for 2 documents.*one score each"):
        NDCG(nn.Linear(4, 3))([query])
    with pytest.raises(ObjectiveError, match=r"\(3, 2\) for 3 documents"):
        NDCG(tiny_model("bert", num_labels=2))(pairs_of(token_rows(3), [3]))
    with pytest.raises(ObjectiveError, match="without hidden states; load it with AutoModel"):
        text = {"input_ids": [5]}
        NDCG(BiEncoder(tiny_model("bert")))(
            [{"query": text, "documents": [text], "relevance": [1]}]
        )
    with pytest.raises(OptionError, match="need tokenizer"):
        NDCG(CrossEncoder(tiny_model("bert", num_labels=1)))(
            [{"query": "a", "documents": ["b"], "relevance": [1]}]
        )


def test_scores_that_are_no_numbers() -> None:
    with pytest.raises(NonFiniteObjectiveError, match="scores that are NaN"):
        NDCG(Same())(examples([([1, 0], [float("nan"), 1])]))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: NDCG(m, k=0),
        lambda m: NDCG(m, gain="square"),
        lambda m: MRR(m, undefined="drop"),
        lambda m: RecallAt(m, k=-1),
        lambda m: KendallTau(m, min_rows=0),
        lambda m: BiEncoder(m, pooling="max"),
        lambda m: BiEncoder(m, similarity="l2"),
        lambda m: CrossEncoder(m, documents_per_forward=0),
    ],
)
def test_options_out_of_range(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(OptionError, match="choose"):
        make(Same())
