"""Scorers of text: a cross-encoder or a bi-encoder."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives._fit import shortest, tokens_of
from objectives._lists import as_list
from objectives._model import Batch, ModelRunner, at_least_float32
from objectives._padding import last_positions, of_whole_texts, token_mask
from objectives.scorers import DOCUMENTS, FeatureScorer, QueryBatch, Scorer, field, one_each
from zo_adapt.errors import DataError, ObjectiveError, OptionError
from zo_adapt.options import at_least_one

Pooling = Literal["mean", "first", "last"] | Callable[[Any, Batch], Tensor]


class TextScorer(Scorer):
    """Base of the scorers of text.

    Args:
        model: A transformers model.
        tokenizer: For queries and documents given as text.
        max_length: Tokens that are read; None: what the tokenizer and the model allow.
        documents_per_forward: Most texts in one forward pass, for the memory's sake.

    Raises:
        OptionError: A number below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        documents_per_forward: int = 128,
    ) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self.max_length = None if max_length is None else at_least_one("max_length", max_length)
        self.documents_per_forward = at_least_one("documents_per_forward", documents_per_forward)
        self._limit = shortest(self.max_length, self.longest, tokens_of(tokenizer))

    def encoded(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with tokens in place of text; encode once what is used often.

        Raises:
            OptionError: There is text and no tokenizer.
        """
        documents = as_list(field(example, DOCUMENTS))
        if documents is None:
            raise DataError(
                f"{DOCUMENTS!r} of a query is {example[DOCUMENTS]!r:.80}; give a list of texts"
            )
        if not any(isinstance(document, str) for document in documents):
            return dict(example)
        wrong = next((one for one in documents if not isinstance(one, str)), "")
        if wrong != "":
            raise DataError(f"a document of a query is {wrong!r:.80} among texts; give a text")
        return self.tokenized(dict(example) | {DOCUMENTS: documents})

    @abstractmethod
    def tokenized(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with tokens in place of text."""

    def tokens(self, *texts: Any) -> list[dict[str, Any]]:
        """Tokens of texts, or of pairs of them, not padded.

        Raises:
            OptionError: No tokenizer.
        """
        if self.tokenizer is None:
            raise OptionError("queries and documents given as text need tokenizer=...")
        columns = self.tokenizer(*texts, truncation=self._limit is not None, max_length=self._limit)
        names = list(columns)
        return [
            dict(zip(names, row, strict=True))
            for row in zip(*(columns[name] for name in names), strict=True)
        ]

    def collated(self, texts: Sequence[Any]) -> Batch:
        """Tokens of all texts, padded."""
        return ModelRunner.collate(self, texts)

    def in_parts(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
        """What ``run`` gives for the rows of a batch, some at a time."""
        rows, size = len(batch["input_ids"]), self.documents_per_forward
        parts = (
            {name: value[start : start + size] for name, value in batch.items()}
            for start in range(0, rows, size)
        )
        return torch.cat([at_least_float32(run(part)) for part in parts])


class CrossEncoder(TextScorer):
    """A sequence classifier with one logit that reads a query and a document together.

    Examples have ``query``, a text, ``documents``, a list of texts, and ``relevance``; or, when
    tokenised, ``documents`` as a list of mappings with the ``input_ids`` of each pair.

    Args:
        model: ``AutoModelForSequenceClassification`` with ``num_labels=1``.
        tokenizer: For text.
        max_length: Tokens of a pair; the longer of the two loses its end.
        documents_per_forward: Most pairs in one forward pass.

    Raises:
        OptionError: Text without a tokenizer (when called), a number below 1.
        ObjectiveError: (when called) The model has more than one logit.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_labels=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> scorer = CrossEncoder(BertForSequenceClassification(config))
        >>> pairs = [{"input_ids": [2, 7, 3]}, {"input_ids": [2, 9]}]
        >>> scorer.scores(scorer.collate([{"documents": pairs, "relevance": [0, 1]}])).shape
        torch.Size([2])
    """

    def tokenized(self, example: dict[str, Any]) -> dict[str, Any]:
        """Pairs of the query and each document."""
        documents = list(example[DOCUMENTS])
        query = [_text(example, "query")] * len(documents)
        return example | {DOCUMENTS: self.tokens(query, documents)}

    def inputs(self, examples: Sequence[Any]) -> Batch:
        """All pairs, padded."""
        return self.collated([pair for one in examples for pair in self.encoded(one)[DOCUMENTS]])

    def scores(self, batch: QueryBatch) -> Tensor:
        """The logits."""
        rows = len(batch.inputs["input_ids"])
        return one_each(self.in_parts(batch.inputs, self._logits), rows)

    def _logits(self, batch: Batch) -> Tensor:
        return of_whole_texts(self.model, batch, self.forward)


class BiEncoder(TextScorer):
    """An embedding model that reads queries and documents apart.

    s(q, d) = cos(e(q), e(d)), or their inner product

    Examples have ``query``, a text, ``documents``, a list of texts, and ``relevance``; or, when
    tokenised, mappings with ``input_ids`` in place of the texts.

    Args:
        model: ``AutoModel``, or anything that returns hidden states (b, t, h) or embeddings (b, h).
        tokenizer: For text.
        pooling: What makes one embedding of the hidden states: "mean" over the tokens, the "first"
            or the "last" token, or a function of the model's output and the batch.
        similarity: "cosine" or "dot".
        max_length: Tokens of a text.
        documents_per_forward: Most texts in one forward pass.

    Raises:
        OptionError: Text without a tokenizer (when called), another pooling or similarity.
        ObjectiveError: (when called) The model returns no hidden states.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> scorer = BiEncoder(BertModel(config))
        >>> query = {"query": {"input_ids": [2, 7]}, "relevance": [0, 1],
        ...          "documents": [{"input_ids": [5]}, {"input_ids": [7, 8, 9]}]}
        >>> bool((scorer.scores(scorer.collate([query])).abs() <= 1.001).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        pooling: Pooling = "mean",
        similarity: Literal["cosine", "dot"] = "cosine",
        max_length: int | None = None,
        documents_per_forward: int = 128,
    ) -> None:
        super().__init__(
            model, tokenizer, max_length=max_length, documents_per_forward=documents_per_forward
        )
        if not callable(pooling) and pooling not in ("mean", "first", "last"):
            raise OptionError(
                f"pooling={pooling!r}; choose 'mean', 'first', 'last' or a function of the model's "
                "output and the batch"
            )
        if similarity not in ("cosine", "dot"):
            raise OptionError(f"similarity={similarity!r}; choose 'cosine' or 'dot'")
        self.pooling, self.similarity = pooling, similarity

    def tokenized(self, example: dict[str, Any]) -> dict[str, Any]:
        """The query and each document."""
        query, *documents = self.tokens([_text(example, "query"), *example[DOCUMENTS]])
        return example | {"query": query, DOCUMENTS: documents}

    def inputs(self, examples: Sequence[Any]) -> Batch:
        """The queries, then all documents, padded."""
        encoded = [self.encoded(one) for one in examples]
        queries = [field(one, "query") for one in encoded]
        return self.collated(queries + [text for one in encoded for text in one[DOCUMENTS]])

    def scores(self, batch: QueryBatch) -> Tensor:
        """Similarities."""
        embeddings = self.in_parts(batch.inputs, self.embeddings)
        if self.similarity == "cosine":
            embeddings = F.normalize(embeddings, dim=-1)
        queries, documents = embeddings[: len(batch)], embeddings[len(batch) :]
        sizes = torch.tensor([len(one) for one in batch.relevance], device=embeddings.device)
        return (queries.repeat_interleave(sizes, dim=0) * documents).sum(-1)

    def embeddings(self, batch: Batch) -> Tensor:
        """Embeddings (b, h) of a padded batch."""
        outputs = self.outputs(batch)
        if callable(self.pooling):
            return self.pooling(outputs, batch)
        hidden = getattr(outputs, "last_hidden_state", outputs)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        if not isinstance(hidden, Tensor):
            raise ObjectiveError(
                f"the model returned {type(outputs).__name__} without hidden states; load it with "
                "AutoModel, or give pooling=function"
            )
        if hidden.dim() == 2:
            return hidden
        mask = token_mask(batch)
        # From the end: peft's prompt tuning puts virtual tokens before the text.
        return self._pooled(hidden[:, -mask.shape[1] :], mask)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "mean":
            weights = mask[..., None].to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)
        at = mask.long().argmax(1) if self.pooling == "first" else last_positions(mask)
        return hidden[torch.arange(len(hidden), device=hidden.device), at]


def scorer_of(model: nn.Module | Scorer) -> Scorer:
    """The scorer itself; of a module, by whether its forward takes tokens or features."""
    if not isinstance(model, nn.Module):
        return model
    cross = CrossEncoder(model)
    takes_tokens = cross._accepted is not None and "input_ids" in cross._accepted
    return cross if takes_tokens else FeatureScorer(model)


def _text(example: Mapping[str, Any], name: str) -> str:
    text = field(example, name)
    if not isinstance(text, str):
        raise DataError(f"{name!r} is a {type(text).__name__} and the documents are text")
    return text
