"""A search task made of BBC news: a few words from the middle of a text, and how texts begin."""

import random
from typing import Any

from support import real_data

WORDS = 40
"""Words of a text's beginning, which is the document."""
ASKED = slice(100, 108)
"""Words of the same text that are the query."""
Query = dict[str, Any]


def passage_queries(
    train: int = 192, test: int = 128, documents: int = 8, seed: int = 0
) -> tuple[str, list[Query], list[Query]]:
    """Folder of the encoder all-MiniLM-L6-v2, and queries to train and to test with.

    Every query has `documents` texts of its own topic, of which one is the text it was cut from.
    """
    corpus = real_data.bbc()
    rows = [i for i, text in enumerate(corpus.texts) if len(text.split()) >= ASKED.stop]
    split = real_data.balanced_split(
        [corpus.texts[i] for i in rows], [corpus.labels[i] for i in rows], train, test, seed
    )
    rng = random.Random(seed)
    return (
        str(real_data.minilm_folder()),
        _queries(split.train_texts, split.train_labels, documents, rng),
        _queries(split.test_texts, split.test_labels, documents, rng),
    )


def _queries(
    texts: list[str], labels: list[int], documents: int, rng: random.Random
) -> list[Query]:
    words = [text.split() for text in texts]
    found = []
    for index, label in enumerate(labels):
        others = [i for i, one in enumerate(labels) if one == label and i != index]
        shown = [index, *rng.sample(others, min(documents - 1, len(others)))]
        rng.shuffle(shown)
        found.append(
            {
                "query": " ".join(words[index][ASKED]),
                "documents": [" ".join(words[i][:WORDS]) for i in shown],
                "relevance": [int(i == index) for i in shown],
            }
        )
    return found
