"""A search task made of BBC news: the headline is the query, the text under it the answer."""

import random
from typing import Any

from support import real_data

WORDS = 40
"""Words of a text that are a document."""
Query = dict[str, Any]


def headline_queries(
    train: int = 192, test: int = 128, documents: int = 20, seed: int = 0
) -> tuple[str, list[Query], list[Query]]:
    """Folder of the encoder all-MiniLM-L6-v2, and queries to train and to test with.

    Every query has `documents` texts of its own topic, of which one is its own.
    """
    corpus = real_data.bbc()
    split = real_data.balanced_split(corpus.texts, corpus.labels, train, test, seed)
    rng = random.Random(seed)
    parts = [
        _queries(texts, labels, documents, rng)
        for texts, labels in (
            (split.train_texts, split.train_labels),
            (split.test_texts, split.test_labels),
        )
    ]
    return str(real_data.minilm_folder()), parts[0], parts[1]


def _queries(
    texts: list[str], labels: list[int], documents: int, rng: random.Random
) -> list[Query]:
    found = []
    headlines, bodies = zip(*(text.split("\n", 1) for text in texts), strict=True)
    # Headlines are easy to find: what is searched for is the last sentence, which names less.
    bodies = [" ".join(body.split()[:WORDS]) for body in bodies]
    for index, label in enumerate(labels):
        others = [i for i, one in enumerate(labels) if one == label and i != index]
        shown = [index, *rng.sample(others, documents - 1)]
        rng.shuffle(shown)
        found.append(
            {
                "query": headlines[index],
                "documents": [bodies[i] for i in shown],
                "relevance": [int(i == index) for i in shown],
            }
        )
    return found
