"""BBC news of five topics as tokens, and the encoder that reads them."""

from typing import Any, NamedTuple

from support import real_data
from support.text_classifier import Example, load_tokenizer, tokenize


class Topics(NamedTuple):
    """A pretrained encoder and labelled texts for it.

    Args:
        folder: Of the encoder, for `from_pretrained`.
        tokenizer: The encoder's.
        names: What the labels stand for.
        train, test: Disjoint and balanced; `input_ids`, `attention_mask` and `labels` each.
    """

    folder: str
    tokenizer: Any
    names: list[str]
    train: list[Example]
    test: list[Example]


def bbc_topics(max_length: int = 32, train: int = 512, test: int = 256, seed: int = 0) -> Topics:
    """all-MiniLM-L6-v2 and BBC news, fetched once; of a text the first `max_length` tokens."""
    folder, corpus = str(real_data.minilm_folder()), real_data.bbc()
    tokenizer = load_tokenizer(folder)
    split = real_data.balanced_split(corpus.texts, corpus.labels, train, test, seed)
    return Topics(
        folder,
        tokenizer,
        corpus.names,
        tokenize(tokenizer, split.train_texts, split.train_labels, max_length),
        tokenize(tokenizer, split.test_texts, split.test_labels, max_length),
    )
