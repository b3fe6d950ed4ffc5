"""Next-token loss of causal language models."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._head import narrow_logits
from objectives._model import Batch, ModelObjective, at_least_float32
from objectives._padding import token_mask, with_positions
from zo_adapt.errors import DataError, OptionError

Reduction = Literal["example", "token", "sum"]


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

    def __call__(self, batch: object) -> Tensor:
        """Losses of shape (b,), fp32, of a collated batch or a list of examples."""
        prepared = self.prepare(batch)
        targets = self._targets(prepared)
        counted = targets != IGNORED
        nll = -self._log_likelihood(prepared, targets, counted)
        # Not index_add: its order, and so the last bit, differs from call to call on a GPU.
        sums = nll.new_zeros(counted.shape).masked_scatter(counted, nll).sum(1)
        if self.reduction == "sum":
            return sums
        if self.reduction == "token":
            return sums * (len(sums) / counted.sum())
        return sums / counted.sum(1)

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

    def _log_likelihood(self, batch: Batch, targets: Tensor, counted: Tensor) -> Tensor:
        """Log-likelihoods of the counted tokens, in row-major order, (n,)."""
        steps = targets.shape[1]

        def select(values: Tensor) -> Tensor:
            # From the end: peft's prompt tuning puts virtual tokens before the text.
            return values[:, -steps - 1 : -1][counted][None]

        inputs = with_positions(batch, self._accepted)
        logits = narrow_logits(self.model, lambda: self.forward(inputs), select)
        return -F.cross_entropy(at_least_float32(logits[0]), targets[counted], reduction="none")
