"""Next-token loss of causal language models."""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._head import narrow_logits
from objectives._model import Batch, ModelObjective, at_least_float32
from objectives._padding import in_rows, token_mask, with_positions
from zo_adapt.errors import DataError, OptionError

Reduction = Literal["example", "token", "sum"]


class LabelTokens(NamedTuple):
    """The label tokens of a batch, row by row.

    Args:
        logits: Where each of them is predicted, (n, V).
        ids: Which they are, (n,).
        places: True at each, (b, t - 1), without the first token of the rows.
    """

    logits: Tensor
    ids: Tensor
    places: Tensor


class CausalLMLoss(ModelObjective):
    """Negative log-likelihood of the label tokens, one value per example.

    With T_i the label tokens of example i (never the first token, which nothing predicts):
        "example"  L_i = 1/|T_i| sum_{t in T_i} -log p(x_t | x_<t)    every example counts the same
        "sum"      L_i =         sum_{t in T_i} -log p(x_t | x_<t)    every token counts the same
        "token"    L_i =  b/|T|  sum_{t in T_i} -log p(x_t | x_<t)    with T those of the batch

    "example" and "sum" are exact however a batch is split; with a normalised step the scale of
    "sum" does not matter. "token" makes the mean over one call the mean over its tokens, the figure
    that Trainer logs; over several micro-batches it is not, because |T| is each call's own.

    Only the logits that a label token needs are computed.

    Args:
        model: A causal language model. Labels of -100 are not counted; without labels every token
            under the attention mask is one.
        reduction: "example", "token" or "sum".

    Raises:
        OptionError: Another reduction.
        DataError: (when called) An example has no label token.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> loss = CausalLMLoss(GPT2LMHeadModel(config))
        >>> loss([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]).shape
        torch.Size([2])
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
        nll = F.cross_entropy(at_least_float32(tokens.logits), tokens.ids, reduction="none")
        sums = in_rows(nll, tokens.places, 0.0).sum(1)
        if self.reduction == "sum":
            return sums
        if self.reduction == "token":
            return sums * (len(sums) / tokens.places.sum())
        return sums / tokens.places.sum(1)

    def label_tokens(self, batch: object) -> LabelTokens:
        """The label tokens and the logits that predict them, computed at these places alone."""
        prepared = self.prepare(batch)
        targets = self._targets(prepared)
        places = targets != IGNORED
        return LabelTokens(self._logits(prepared, places), targets[places], places)

    def _targets(self, batch: Batch) -> Tensor:
        """The token that each position but the last has to predict, (b, t - 1)."""
        ids = batch["input_ids"]
        labels = batch.get("labels")
        if labels is None:
            labels = ids.masked_fill(~token_mask(batch), IGNORED)
        if labels.shape != ids.shape:
            raise DataError(
                f"labels of shape {tuple(labels.shape)} for input_ids of shape {tuple(ids.shape)}; "
                "give one label per token, -100 where none is to be predicted"
            )
        # With padding on the left a first token follows padding, which predicts nothing either.
        targets = labels[:, 1:].masked_fill(~token_mask(batch)[:, :-1], IGNORED)
        missing = (targets == IGNORED).all(1).nonzero().flatten().tolist()
        if missing:
            raise DataError(
                f"examples {missing} of the batch have no label token after the first token; raise "
                "the length at which texts are cut, or leave them out"
            )
        return targets

    def _logits(self, batch: Batch, places: Tensor) -> Tensor:
        """Logits that predict the tokens at ``places``, in row-major order, (n, V)."""
        steps = places.shape[1]

        def select(values: Tensor) -> Tensor:
            # From the end: peft's prompt tuning puts virtual tokens before the text.
            return values[:, -steps - 1 : -1][places][None]

        inputs = with_positions(batch, self._accepted)
        return narrow_logits(self.model, lambda: self.forward(inputs), select)[0]
