"""Metrics that count right examples: 1 or 0 for each, or something between near a tie.

A count stands still as long as no example flips, and at a small ``perturbation_scale`` hardly any
does. Softened, every example says how far it is from flipping.
"""

from copy import copy
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._fit import reads
from objectives._model import at_least_float32, check_range
from objectives._padding import in_rows
from objectives._set_metric import (
    AnyLabels,
    Classifier,
    SetMetric,
    array,
    check_finite,
    check_labels,
    check_shape,
    joined,
    predicted,
)
from objectives._token_loss import TokenLoss
from objectives.causal_lm import CausalLMLoss
from objectives.seq2seq import Seq2SeqLoss
from zo_adapt.options import positive_or_none

ROWS_OF_A_COUNT = 32
"""Fewest rows on which a hard count is asked for: on four, hardly any difference is not zero."""
_WIDE = 10.0
"""Softness at which an example far from right still says how far."""
MinRows = int | Literal["auto", "all"]


class Accuracy(SetMetric):
    r"""The share of examples whose label is predicted; with several labels at once, all of them.

    A = 1/n sum_i [m_i > 0],    m_i = f(x_i)_{y_i} - max_{c != y_i} f(x_i)_c

    ``softness`` tau puts sigmoid(m_i / tau) for [m_i > 0], which it becomes as tau -> 0: 1/2 at a
    tie, and not flat beside it. With two classes and tau = 1 that is the probability of the label.
    Of several labels, each with the margin +-f(x_i)_c, the least right one counts. One value per
    example, so that micro-batches are weighted exactly; no gradient is taken of it. What is
    reported in the end should be the accuracy itself.

    Args:
        model: A model with a classification head, or an objective with logits, ``VerbalizerLoss``.
        softness: tau, in units of the logits; about as large as most margins is a good choice.
            None: the accuracy itself.
        min_rows: Fewest rows of the part of a batch that one direction sees; "all": all of it. Any
            number is right for a mean over examples; "auto" is 32, and 1 where it is soft.

    Raises:
        OptionError: softness <= 0.
        DataError: (when called) Labels missing, of a wrong shape or, if soft, out of range.

    Example:
        >>> import torch
        >>> model, logits = torch.nn.Identity(), torch.tensor([[2.0, 1.9], [0.0, 5.0]])
        >>> batch = {"input": logits, "labels": torch.tensor([1, 1])}
        >>> Accuracy(model)(batch), Accuracy(model, softness=0.1)(batch).round(3).tolist()
        (0.5, [0.269, 1.0])
    """

    def __init__(
        self,
        model: nn.Module | Classifier,
        *,
        softness: float | None = None,
        min_rows: MinRows = "auto",
    ) -> None:
        super().__init__(model, min_rows=_rows(min_rows, softness))
        self.softness = positive_or_none("softness", softness)
        self.step_like = softness is None

    def score(self, predictions: list[Any]) -> Any:
        """The share of right rows; soft, one value per example."""
        if self.softness is None:
            return super().score(predictions)
        logits, labels = map(torch.from_numpy, joined(predictions))
        return _of_examples(_rightness(logits, labels, self.softness))

    def metric(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The share of right rows; with several labels an example, all of them."""
        right: np.ndarray = predicted(logits, labels) == labels
        return float(right.reshape(len(right), -1).all(axis=1).mean())


class ExactMatch(SetMetric):
    r"""The share of examples all of whose labels are predicted.

    E = 1/n sum_i min_t [m_it > 0],    m_it = f(x_i)_{t, y_it} - max_{c != y_it} f(x_i)_{t, c}

    The labels t of an example are

    - the tokens of a completion, for a language model: each must be the likeliest after the
      prompt and the label tokens before it, which holds of all of them exactly if greedy decoding
      writes the completion. One forward pass instead of one for every token. ``input_ids`` hold
      prompt and completion, ``labels`` -100 at the prompt (of an encoder-decoder the source, and
      the target); with the end token among the labels the text must end there, too. Only the
      logits that predict a label are computed;
    - the labels of the tokens (logits (b, t, C), labels (b, t), -100 where none counts);
    - several labels at once (logits and labels (b, C)); with one it is the accuracy.

    ``softness`` tau puts sigmoid(m_it / tau) for [m_it > 0]: the label furthest from right counts.

    Args:
        model: A language model, a model with a classification head for texts or tokens, or
            an objective with logits (``VerbalizerLoss``, ``CausalLMLoss``, ``Seq2SeqLoss``).
        softness: As in ``Accuracy``; None: the exact match itself.
        min_rows: As in ``Accuracy``.

    Raises:
        OptionError: softness <= 0.
        DataError: (when called) Labels missing, of a wrong shape or, if soft, out of range; a
            completion without tokens.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> match = ExactMatch(GPT2LMHeadModel(config), softness=1.0)
        >>> prompt, completion = [7, 8, 9], [4, 2]
        >>> text = {"input_ids": prompt + completion, "labels": [-100] * 3 + completion}
        >>> 0.0 < float(match([text])[0]) < 1.0
        True
    """

    def __init__(
        self,
        model: nn.Module | Classifier | TokenLoss,
        *,
        softness: float | None = None,
        min_rows: MinRows = "auto",
    ) -> None:
        super().__init__(_classifier(model), min_rows=_rows(min_rows, softness))
        self.softness = positive_or_none("softness", softness)
        self.step_like = softness is None
        self.stand_in = self._margins_of_rows

    def predict(self, batch: Any) -> np.ndarray:
        """One value for every example: 1.0 if it is right throughout, else 0.0, or between them."""
        if isinstance(self.classifier, TokenLoss):
            tokens = self.classifier.label_tokens(batch)
            return self._of_tokens(tokens.logits, tokens.ids, tokens.places)
        found = super().predict(batch)
        check_finite(found.logits)
        logits, labels = map(torch.from_numpy, found)
        if labels.dim() == 2 and logits.dim() == 3 and labels.shape == logits.shape[:2]:
            counted = labels != IGNORED
            return self._of_tokens(logits[counted], labels[counted], counted)
        check_shape(*found)
        return _of_examples(_rightness(logits, labels, self.softness))

    def _margins_of_rows(self, batch: Any) -> np.ndarray:
        """A soft match, so wide that none is flat: the match itself may be 0 wherever one looks."""
        soft = copy(self)
        soft.softness = _WIDE
        return soft.predict(batch)

    def score(self, predictions: list[Any]) -> np.ndarray:
        """One value per example."""
        return np.concatenate(predictions)

    def metric(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The share of right rows."""
        right = _rightness(torch.from_numpy(logits), torch.from_numpy(labels), self.softness)
        return float(_of_examples(right).mean())

    def _of_tokens(self, logits: Tensor, ids: Tensor, places: Tensor) -> np.ndarray:
        right = _rightness(logits, ids, self.softness)
        return _of_examples(in_rows(right, places.cpu(), 1.0))


def _classifier(model: Any) -> Any:
    """What makes batches and logits: for labels of any kind, or for the tokens of a text."""
    if not isinstance(model, nn.Module):
        return model
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return AnyLabels(model)
    return Seq2SeqLoss(model) if reads(model).is_encoder_decoder else CausalLMLoss(model)


def _rightness(logits: Tensor, labels: Tensor, softness: float | None) -> Tensor:
    """How right each label is, of the labels' shape, 0..1, float64 on the CPU.

    Args:
        logits: (n, C), of labels (n,); or as many as labels, each for a yes or no.
        labels: Of either shape.
        softness: tau, or None for 0 and 1 alone.
    """
    from scipy.special import expit

    logits = logits.detach()
    shape = tuple(logits.shape)
    if shape == (*labels.shape, 1):
        logits = logits[..., 0]
    yes_or_no = logits.shape == labels.shape
    if yes_or_no or labels.is_floating_point():
        check_labels(array(labels), shape)
    else:
        check_range(labels, shape[-1])
    if softness is None:
        said = (logits > 0).to(labels.dtype) if yes_or_no else _likeliest(logits)
        return (said == labels).cpu().double()
    margins = torch.where(labels > 0, logits, -logits) if yes_or_no else _margins(logits, labels)
    # Not torch.sigmoid: its last bit depends on where in a batch an example is.
    return torch.from_numpy(expit(array(margins).astype(np.float64) / softness))


def _likeliest(logits: Tensor) -> Tensor:
    top = logits.max(-1)
    check_finite(array(top.values))
    return top.indices


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the label's logit is above the largest other one, at least fp32, (n,)."""
    index = labels.long()[..., None]
    # The two largest rather than a copy without the label's: that would be another vocabulary wide.
    top = logits.topk(2)
    check_finite(array(top.values[..., 0]))
    other = torch.where(top.indices[..., :1] == index, top.values[..., 1:], top.values[..., :1])
    return (at_least_float32(logits.gather(-1, index)) - at_least_float32(other))[..., 0]


def _of_examples(right: Tensor) -> np.ndarray:
    """Of the labels of an example, (n,) or (n, ...), the least right one, (n,)."""
    return array(right.reshape(len(right), -1).amin(1))


def _rows(given: MinRows, softness: float | None) -> int | Literal["all"]:
    """Fewest rows of a direction."""
    if given == "auto":
        return ROWS_OF_A_COUNT if softness is None else 1
    return given
