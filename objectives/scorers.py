"""What gives the documents of a query their scores.

One example is one query with all its documents. The documents of a batch go through the model
together, whatever their number per query.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from objectives._model import Batch, ModelRunner, at_least_float32
from zo_adapt.errors import DataError, ObjectiveError

RELEVANCE = "relevance"
DOCUMENTS = "documents"


class QueryBatch(NamedTuple):
    """The documents of several queries, one after the other.

    Args:
        inputs: What the model takes.
        relevance: Of every query the relevance of its documents, (n_i,).
    """

    inputs: Batch
    relevance: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.relevance)

    def split(self, scores: Tensor) -> list[np.ndarray]:
        """Scores of all documents (n,) as those of every query."""
        ends = np.cumsum([len(one) for one in self.relevance])[:-1]
        return np.split(scores.detach().to("cpu", torch.float64).numpy(), ends)


class Scorer(ModelRunner, ABC):
    """Base of the scorers: examples with their documents in, one score for every document out."""

    def collate(self, examples: Sequence[Any]) -> QueryBatch:  # type: ignore[override]
        """The documents of the queries, one after the other, on the model's device.

        Raises:
            DataError: No documents, no relevance, or not one for every document.
        """
        if len(examples) == 0:
            raise DataError("a batch of no queries; give at least one")
        relevance = tuple(_relevance(i, one, self.documents) for i, one in enumerate(examples))
        return QueryBatch(self.inputs(examples), relevance)

    documents: str = DOCUMENTS
    """The field that holds the documents."""

    @abstractmethod
    def inputs(self, examples: Sequence[Any]) -> Batch:
        """What the model takes for all documents of the examples."""

    @abstractmethod
    def scores(self, batch: QueryBatch) -> Tensor:
        """Scores of all documents, (n,), at least fp32."""


class FeatureScorer(Scorer):
    """A module from features to scores, (n, d) -> (n,) or (n, 1).

    Args:
        model: Called with the features of all documents of a batch.

    Raises:
        DataError: (when called) Queries without documents, features of unequal width.
        ObjectiveError: (when called) The module returned something else than one score each.

    Example:
        >>> import torch
        >>> scorer = FeatureScorer(torch.nn.Linear(3, 1))
        >>> query = {"features": torch.zeros(5, 3), "relevance": [0, 2, 1, 0, 0]}
        >>> scorer.scores(scorer.collate([query, query])).shape
        torch.Size([10])
    """

    documents = "features"

    def inputs(self, examples: Sequence[Any]) -> Batch:
        """All features, (n, d), in the model's dtype."""
        columns = [torch.as_tensor(one["features"]) for one in examples]
        shapes = {tuple(column.shape[1:]) for column in columns}
        if len(shapes) > 1 or any(column.dim() != 2 for column in columns):
            raise DataError(
                f"features of the shapes {sorted({tuple(c.shape) for c in columns})}; give "
                "(documents, d), with one d for all queries"
            )
        like = next(iter(self.model.parameters()), torch.empty(0))
        return {"features": torch.cat(columns).to(like.device, like.dtype)}

    def scores(self, batch: QueryBatch) -> Tensor:
        """What the module returns."""
        features = batch.inputs["features"]
        with self.evaluating():
            return one_each(self.model(features), len(features))


def _relevance(index: int, example: Any, documents: str) -> np.ndarray:
    """The relevance of an example's documents, after a check that there is one for each."""
    where = f"query {index} of the batch"
    if not isinstance(example, Mapping):
        raise DataError(f"{where} is a {type(example).__name__}; give a mapping")
    if isinstance(given := field(example, documents), str | bytes):
        raise DataError(f"{documents!r} of a query is {given!r:.80}; give a list, one a document")
    count = len(given)
    if count == 0:
        raise DataError(f"{where} has no documents; leave it out")
    relevance = checked_relevance(field(example, RELEVANCE), where)
    if len(relevance) != count:
        raise DataError(
            f"{where} has {count} {documents} and relevance of shape {relevance.shape}; give one "
            "number for every document"
        )
    return relevance


def checked_relevance(given: Any, where: str) -> np.ndarray:
    """The relevance of the documents of a query, (n,).

    Args:
        given: A list of numbers.
        where: Which query it is, for the message.

    Raises:
        DataError: It is something else.
    """
    try:
        relevance = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} has the relevance {given!r:.80}; give one number for every document"
        ) from error
    if relevance.ndim != 1 or relevance.size == 0:
        raise DataError(
            f"{where} has relevance of shape {relevance.shape}; give one number for every document"
        )
    if not (np.isfinite(relevance).all() and (relevance >= 0).all()):
        raise DataError(
            f"{where} has the relevance {relevance[:8].tolist()}; choose finite numbers >= 0"
        )
    return relevance


def field(example: Mapping[str, Any], name: str) -> Any:
    """A field of an example.

    Raises:
        DataError: There is none of that name.
    """
    if name not in example:
        raise DataError(f"a query needs {name!r}, the example has {sorted(example)}")
    return example[name]


def one_each(outputs: Any, rows: int) -> Tensor:
    """Scores (n,), at least fp32, of what a model returned.

    Raises:
        ObjectiveError: It is not one number for every document.
    """
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor) or outputs.shape not in ((rows,), (rows, 1)):
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ObjectiveError(
            f"the model returned {shape} for {rows} documents; it must give one score each "
            "(num_labels=1)"
        )
    return at_least_float32(outputs).reshape(rows)
