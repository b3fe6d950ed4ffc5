"""Sentences of movie reviews as instructions with answers, for a small chat model."""

from typing import Any

from support import real_data

QUESTION = "Is this sentence of a film review positive or negative? Answer with one word.\n\n"


def review_instructions(
    train: int = 256, test: int = 64, seed: int = 0
) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Folder of SmolLM2-135M-Instruct, and examples of `prompt` and `completion` as messages."""
    corpus = real_data.movie_reviews(min_rating=1.5)
    split = real_data.balanced_split(corpus.texts, corpus.labels, train, test, seed)

    def example(text: str, label: int) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": QUESTION + text}],
            "completion": [{"role": "assistant", "content": corpus.names[label]}],
        }

    return (
        str(real_data.smollm2_folder()),
        list(map(example, split.train_texts, split.train_labels)),
        list(map(example, split.test_texts, split.test_labels)),
    )
