"""What the losses of label tokens share: where the labels are, and how their losses are added."""

from abc import abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._model import ModelObjective, at_least_float32, check_range
from objectives._padding import in_rows
from zo_adapt.errors import DataError, OptionError

Reduction = Literal["example", "token", "sum"]


MOST_LOGITS = 2**27
"""So many are held in fp32 at a time: of half precision all together would be the peak of a run."""


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of tokens (n,) by their logits (n, V), in at least fp32."""
    count = max(1, MOST_LOGITS // logits.shape[-1])
    parts = [
        F.cross_entropy(at_least_float32(of), token, reduction="none")
        for of, token in zip(logits.split(count), ids.split(count), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class LabelTokens(NamedTuple):
    """The label tokens of a batch, row by row.

    Args:
        logits: Where each of them is predicted, (n, V).
        ids: Which they are, (n,).
        places: True at each, (b, t).
        losses: -log p of each, (n,), where the logits do not say it.
    """

    logits: Tensor
    ids: Tensor
    places: Tensor
    losses: Tensor | None = None

    @classmethod
    def of_two(cls, log_probs: Tensor, others: Tensor, places: Tensor) -> "LabelTokens":
        """Of a model that gives no logits: those of two tokens, the label first, are enough.

        Args:
            log_probs: Of the labels, (n,).
            others: Of the likeliest other token, (n,).
            places: True at each label, (b, t).
        """
        logits, ids = torch.stack([log_probs, others], 1), torch.zeros(len(log_probs)).long()
        return cls(logits, ids, places, -log_probs)

    def nll(self) -> Tensor:
        """-log p of each token, (n,), in at least fp32."""
        if self.losses is not None:
            return self.losses
        return negative_log_likelihood(self.logits, self.ids)


class TokenLoss(ModelObjective):
    """Base of the losses of label tokens: one value per example.

    With T_i the label tokens of example i and l_t the loss of one:
        "example"  L_i = 1/|T_i| sum_{t in T_i} l_t    every example counts the same
        "sum"      L_i =         sum_{t in T_i} l_t    every token counts the same
        "token"    L_i =  b/|T|  sum_{t in T_i} l_t    with T those of the batch

    Args:
        model: A transformers model, or a peft one.
        reduction: "example", "token" or "sum".

    Raises:
        OptionError: Another reduction.
    """

    def __init__(self, model: nn.Module, *, reduction: Reduction = "example") -> None:
        if reduction not in ("example", "token", "sum"):
            raise OptionError(f"reduction={reduction!r}; choose 'example', 'token' or 'sum'")
        super().__init__(model)
        self.reduction = reduction
        # Whose tokens are counted together changes every value.
        self.independent_rows = self.mean_over_rows = reduction != "token"

    def __call__(self, batch: object) -> Tensor:
        """Losses of shape (b,), fp32, of a collated batch or a list of examples."""
        tokens = self.label_tokens(batch)
        return self._reduced(in_rows(tokens.nll(), tokens.places, 0.0), tokens.places)

    def _reduced(self, losses: Tensor, places: Tensor) -> Tensor:
        """Those of the tokens at ``places``, zero elsewhere, as one for every example."""
        sums = losses.sum(1)
        if self.reduction == "sum":
            return sums
        if self.reduction == "token":
            return sums * (len(sums) / places.sum())
        return sums / places.sum(1)

    @abstractmethod
    def label_tokens(self, batch: object) -> LabelTokens:
        """The label tokens and the logits that predict them, computed at these places alone."""

    @property
    def classes(self) -> int | None:
        """How many labels there are to choose from; None where the model does not say."""
        return self._vocabulary

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that the model has no logit for, and rows without any that counts."""
        if labels.dim() == 2:
            check_labelled(labels)
        counted = labels[labels != IGNORED]
        if self.classes is not None:
            check_range(counted, self.classes)


def check_labelled(targets: Tensor, why: str = "") -> None:
    """Refuse rows without a label token."""
    missing = (targets == IGNORED).all(1).nonzero().flatten().tolist()
    if missing:
        raise DataError(
            f"examples {missing[:8]} have no label token{why}; raise the length at which texts are "
            "cut, or leave them out"
        )
