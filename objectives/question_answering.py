"""Loss and span metrics of models that mark an answer in a text."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives._model import Batch, ModelObjective, at_least_float32
from objectives._padding import token_mask
from objectives._set_metric import array, check_finite
from objectives.matches import ROWS_OF_A_COUNT
from objectives.mixture import Mixable
from zo_adapt.errors import DataError, ObjectiveError
from zo_adapt.evaluation.objective import ColumnOf, SetObjective, checked_min_rows
from zo_adapt.options import at_least_one

START, END = "start_positions", "end_positions"


class SpanLogits(NamedTuple):
    """How likely each token is the first and the last of the answer, (b, t); -inf at padding."""

    start: Tensor
    end: Tensor


class QuestionAnsweringLoss(ModelObjective):
    """Cross-entropy of the first and the last token of the answer, one value per example.

    L_i = (-log softmax(s_i)_{a_i} - log softmax(e_i)_{b_i}) / 2

    over the tokens of example i alone: unlike the loss of the model itself, that of an example does
    not depend on how far it is padded.

    Examples have ``input_ids`` of question and text, ``start_positions`` and ``end_positions``; for
    a question without an answer both are those of the first token.

    Args:
        model: ``AutoModelForQuestionAnswering``.

    Raises:
        DataError: (when called) Positions missing, outside the text, or the end before the start.
        ObjectiveError: (when called) The model has no logits of starts and ends.

    Example:
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> loss = QuestionAnsweringLoss(BertForQuestionAnswering(config))
        >>> loss([{"input_ids": [2, 7, 8, 9], "start_positions": 2, "end_positions": 3}]).shape
        torch.Size([1])
    """

    capturable = True

    def __call__(self, batch: object) -> Tensor:
        """Losses of shape (b,), fp32, of a collated batch or a list of examples."""
        prepared = self.prepare(batch)
        logits = self.span_logits(prepared)
        start = F.cross_entropy(logits.start, prepared[START], reduction="none")
        return (start + F.cross_entropy(logits.end, prepared[END], reduction="none")) / 2

    def span_logits(self, batch: Batch) -> SpanLogits:
        """Logits of a prepared batch, fp32."""
        outputs = self.outputs(batch, hidden=(START, END, "labels"))
        start, end = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
        if start is None or end is None:
            raise ObjectiveError(
                f"the model returned {type(outputs).__name__} without start_logits and end_logits; "
                "load it with AutoModelForQuestionAnswering"
            )
        mask = token_mask(batch)
        tokens = mask.shape[1]
        # From the end: peft's prompt tuning puts virtual tokens before the text.
        start, end = start[:, -tokens:], end[:, -tokens:]
        return SpanLogits(
            *(at_least_float32(one).masked_fill(~mask, -torch.inf) for one in (start, end))
        )

    def prepare(self, batch: Any) -> Batch:
        """What ``collate`` makes, after a check of the positions.

        Raises:
            DataError: They are missing, or mark no span of the text.
        """
        prepared = super().prepare(batch)
        missing = [name for name in ("input_ids", START, END) if name not in prepared]
        if missing:
            raise DataError(f"the batch has no {missing}, only {sorted(prepared)}; name them so")
        return prepared

    def check_columns(self, column: ColumnOf) -> None:
        """Refuse answers that are no spans of their texts.

        Raises:
            DataError: Gives the first of them.
        """
        starts, ends, texts = column(START), column(END), column("attention_mask")
        if texts is None and (texts := column("input_ids")) is not None:
            texts = [[1] * len(tokens) for tokens in texts]
        if starts is None or ends is None or texts is None:
            return
        for row, (start, end, mask) in enumerate(zip(starts, ends, texts, strict=True)):
            first, last = (_position(row, one) for one in (start, end))
            if not (0 <= first <= last < len(mask) and mask[first] and mask[last]):
                raise _no_span(f"example {row} of the data", first, last, int(sum(mask)))

    def _checked(self, batch: Batch) -> Batch:
        start, end = batch.get(START), batch.get(END)
        # On the host this is free; on a GPU every look at a value would wait for the queue.
        if start is not None and end is not None and start.device.type == "cpu":
            _check_spans(start, end, token_mask(batch).cpu())
        return super()._checked(batch)


class SpanMetric(Mixable, SetObjective):
    """Base of the metrics of an answer's span: one value per example, more is better.

    The predicted span is the likeliest one: the largest s_a + e_b with a <= b < a + m.

    Args:
        model: A model that marks answers, or ``QuestionAnsweringLoss``.
        max_answer_length: m, the longest answer that is considered, in tokens.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Raises:
        OptionError: A number below 1.
    """

    maximize = True
    step_like = True

    def __init__(
        self,
        model: nn.Module | QuestionAnsweringLoss,
        *,
        max_answer_length: int = 30,
        min_rows: int | Literal["all"] = ROWS_OF_A_COUNT,
    ) -> None:
        self.loss = (
            model if isinstance(model, QuestionAnsweringLoss) else QuestionAnsweringLoss(model)
        )
        self.made_with = {"model": self.loss}
        self.max_answer_length = at_least_one("max_answer_length", max_answer_length)
        self.min_rows = checked_min_rows(min_rows)
        self.check_columns = self.loss.check_columns

    @property
    def model(self) -> nn.Module:
        """The model behind the logits."""
        return self.loss.model

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch of a list of examples, as the loss of the same model makes it."""
        return self.loss.collate(examples)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode of the model."""
        return self.loss.evaluating()

    def predict(self, batch: Any) -> np.ndarray:
        """The value of every example, (b,)."""
        prepared = self.loss.prepare(batch)
        said = self.spans(prepared)
        meant = array(torch.stack([prepared[START], prepared[END]], 1))
        return self.values(said, meant)

    def score(self, predictions: list[np.ndarray]) -> np.ndarray:
        """One value per example."""
        return np.concatenate(predictions)

    def spans(self, batch: Any) -> np.ndarray:
        """The first and the last token of each predicted answer, (b, 2)."""
        logits = self.loss.span_logits(self.loss.prepare(batch))
        for one in logits:
            check_finite(array(one.amax(1)))
        tokens = logits.start.shape[1]
        sums = logits.start[:, :, None] + logits.end[:, None, :]
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=sums.device)
        allowed = ones.triu() & ones.tril(self.max_answer_length - 1)
        best = sums.masked_fill(~allowed, -torch.inf).flatten(1).argmax(1)
        return array(torch.stack([best // tokens, best % tokens], 1))

    @abstractmethod
    def values(self, said: np.ndarray, meant: np.ndarray) -> np.ndarray:
        """The value of every example from the spans, (b, 2) each."""


class SpanExactMatch(SpanMetric):
    """The share of examples whose answer is marked from its first to its last token.

    Args:
        model: A model with logits of start and end, such as ``AutoModelForQuestionAnswering``.
        max_answer_length: Longest answer that is considered, in tokens.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Example:
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> match = SpanExactMatch(BertForQuestionAnswering(config))
        >>> row = {"input_ids": [2, 7, 8, 9], "start_positions": 2, "end_positions": 3}
        >>> match([row]).tolist() in ([0.0], [1.0])
        True

    Reference: Rajpurkar et al. (2016), SQuAD, there on normalised words.
    """

    def values(self, said: np.ndarray, meant: np.ndarray) -> np.ndarray:
        """1.0 where both ends are right."""
        right: np.ndarray = (said == meant).all(1).astype(np.float64)
        return right


class SpanF1(SpanMetric):
    """How much the marked answer and the right one have in common, in tokens.

    F1_i = 2 |said & meant| / (|said| + |meant|)

    Args:
        model: A model with logits of start and end, such as ``AutoModelForQuestionAnswering``.
        max_answer_length: Longest answer that is considered, in tokens.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it.

    Example:
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> f1 = SpanF1(BertForQuestionAnswering(config))
        >>> row = {"input_ids": [2, 7, 8, 9], "start_positions": 2, "end_positions": 3}
        >>> bool(0.0 <= f1([row])[0] <= 1.0)
        True

    Reference: Rajpurkar et al. (2016), SQuAD, there on normalised words.
    """

    def values(self, said: np.ndarray, meant: np.ndarray) -> np.ndarray:
        """The overlap of the spans."""
        first, last = np.maximum(said[:, 0], meant[:, 0]), np.minimum(said[:, 1], meant[:, 1])
        common = np.maximum(last - first + 1, 0)
        lengths = (said[:, 1] - said[:, 0] + 1) + (meant[:, 1] - meant[:, 0] + 1)
        values: np.ndarray = 2.0 * common / lengths
        return values


def _check_spans(start: Tensor, end: Tensor, mask: Tensor) -> None:
    """Refuse answers that are no span of the text's own tokens."""
    tokens = mask.shape[1]
    if start.is_floating_point() or end.is_floating_point():
        raise DataError(f"{START!r} and {END!r} are of type {start.dtype}; give integers")
    inside = (start >= 0) & (start <= end) & (end < tokens)
    at = torch.arange(len(mask))
    inside &= mask[at, start.clamp(0, tokens - 1)] & mask[at, end.clamp(0, tokens - 1)]
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        where = f"example {row} of the batch"
        raise _no_span(where, int(start[row]), int(end[row]), int(mask[row].sum()))


def _position(row: int, value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DataError(
            f"example {row} of the data has the position {value!r:.80}; give {START!r} and {END!r} "
            "as integers"
        )
    return int(value)


def _no_span(where: str, start: int, end: int, tokens: int) -> DataError:
    return DataError(
        f"the answer of {where} is {start}..{end} in a text of {tokens} tokens; mark a span of it, "
        "or the first token where the answer was cut off"
    )
