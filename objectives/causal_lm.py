"""Next-token loss of causal language models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from objectives._collate import IGNORED
from objectives._fit import check_causal
from objectives._head import narrow_logits
from objectives._model import Batch
from objectives._padding import right_padded, token_mask
from objectives._served import scored
from objectives._texts import TextEncoder
from objectives._token_loss import (
    LabelTokens,
    Reduction,
    TokenLoss,
    check_labelled,
    negative_log_likelihood,
)
from zo_adapt.errors import DataError
from zo_adapt.serve.asking import elsewhere

PLACES = "label_places"
"""Field of a batch that was made for a GPU: where in each row labels are predicted, then -1."""
NOT_FIRST = " after the first token"


class CausalLMLoss(TokenLoss):
    """Negative log-likelihood of the label tokens, one value per example.

    With T_i the label tokens of example i (never the first token, which nothing predicts):
        "example"  L_i = 1/|T_i| sum_{t in T_i} -log p(x_t | x_<t)    every example counts the same
        "sum"      L_i =         sum_{t in T_i} -log p(x_t | x_<t)    every token counts the same
        "token"    L_i =  b/|T|  sum_{t in T_i} -log p(x_t | x_<t)    with T those of the batch

    "example" and "sum" are exact however a batch is split; with a normalised step the scale of
    "sum" does not matter. "token" makes the mean over a batch the mean over its tokens, the figure
    that Trainer logs; as |T| is the batch's own, the batch stays in one call.

    Only the logits that a label token needs are computed; on a GPU as many for every row of a
    batch, so that the loss waits for none of them and can be captured in a CUDA graph.

    Examples have ``input_ids`` and, if not every token is one, ``labels``, -100 where none is to be
    predicted. With a tokenizer they may be what TRL's data sets hold, encoded as TRL does:

    - ``text``: every token is a label;
    - ``prompt`` and ``completion``, texts or lists of messages: the completion's tokens are;
    - ``messages``: every token of the chat template is, or only the assistant's.

    The end token is put after texts and completions that do not end in it.

    Args:
        model: A causal language model. Labels of -100 are not counted; without labels every token
            under the attention mask is one.
        reduction: "example", "token" or "sum".
        tokenizer: For examples of text.
        max_length: Longest text in tokens, the rest is cut off; None: what model and tokenizer
            allow.
        completion_only: Whether prompts are left out of the labels.
        assistant_only: Whether only what the assistant says is a label; the chat template has to
            mark it ({% generation %}).
        chat_template_kwargs: More for the tokenizer's chat template.

    Raises:
        OptionError: Another reduction, or a model that is not causal (when called: text without a
            tokenizer).
        DataError: (when called) An example has no label token.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> loss = CausalLMLoss(GPT2LMHeadModel(config))
        >>> loss([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]).shape
        torch.Size([2])

    Reference: TRL, "Dataset formats and types" (SFTTrainer).
    """

    capturable = True

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Reduction = "example",
        tokenizer: Any = None,
        max_length: int | None = None,
        completion_only: bool = True,
        assistant_only: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_causal(model, "CausalLMLoss")
        super().__init__(model, reduction=reduction)
        options: dict[str, Any] = {
            "max_length": max_length,
            "completion_only": completion_only,
            "assistant_only": assistant_only,
            "chat_template_kwargs": chat_template_kwargs,
        }
        self.made_with = options | {"tokenizer": tokenizer}
        self.texts = TextEncoder(tokenizer, longest=self.longest, **options)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch from examples of tokens or of text."""
        return super().collate([self.texts.encoded(example) for example in examples])

    def __call__(self, batch: object) -> Tensor:
        """Losses of shape (b,), fp32, of a collated batch or a list of examples.

        Raises:
            RuntimeError: While a CUDA graph is captured, of a batch that ``collate`` has not made.
        """
        prepared = self.prepare(batch)
        is_fixed = PLACES in prepared or (self._is_on_gpu and "labels" not in prepared)
        if elsewhere() is None and is_fixed:
            return self._of_fixed_places(right_padded(prepared))
        if self._is_on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("labels of a batch that collate() has not made; give examples")
        return super().__call__(prepared)

    @property
    def _is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _checked(self, batch: Batch) -> Batch:
        """As for every model; for a GPU the places of the labels are found while it is free."""
        ids = batch.get("input_ids")
        if self._is_on_gpu and ids is not None and not ids.is_cuda and "labels" in batch:
            batch = right_padded(batch)
            targets = self._targets(batch)
            check_labelled(targets, NOT_FIRST)
            rows = [(row != IGNORED).nonzero()[:, 0] for row in targets]
            places = pad_sequence(rows, batch_first=True, padding_value=-1)
            more = min(self._padded_length(places.shape[1]), targets.shape[1]) - places.shape[1]
            batch = {**batch, PLACES: F.pad(places, (0, more), value=-1)}
        return super()._checked(batch)

    def _of_fixed_places(self, batch: Batch) -> Tensor:
        """By kernels that depend on the batch's shapes alone; a row without labels has NaN."""
        targets, places = self._targets(batch), batch.get(PLACES)
        steps = targets.shape[1]
        if places is not None:
            at = places.clamp_min(0)
            targets = targets.gather(1, at).masked_fill(places < 0, IGNORED)

        def select(values: Tensor) -> Tensor:
            values = values[:, -steps - 1 : -1]
            if places is None:
                return values
            index = at.to(values.device)[..., None].expand(-1, -1, values.shape[-1])
            return values.gather(1, index)

        shown = {name: value for name, value in batch.items() if name != PLACES}
        logits = narrow_logits(self.model, lambda: self.forward(shown), select)
        targets = targets.to(logits.device)
        counted = targets != IGNORED
        ids = targets.masked_fill(~counted, 0)
        losses = negative_log_likelihood(logits.flatten(0, 1), ids.flatten()).view_as(ids)
        losses = losses.masked_fill(~counted, 0.0)
        return self._reduced(losses, counted).masked_fill(~counted.any(1), torch.nan)

    def label_tokens(self, batch: object) -> LabelTokens:
        """The label tokens and the logits that predict them, computed at these places alone."""
        prepared = right_padded(self.prepare(batch))
        prepared.pop(PLACES, None)
        targets = self._targets(prepared)
        check_labelled(targets, NOT_FIRST)
        places = targets != IGNORED
        there = elsewhere()
        if there is not None:
            own, others = scored(there, prepared, places)
            return LabelTokens.of_two(own, others, places)
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
        # What follows padding is predicted by nothing.
        return labels[:, 1:].masked_fill(~token_mask(batch)[:, :-1], IGNORED)

    def _logits(self, batch: Batch, places: Tensor) -> Tensor:
        """Logits that predict the tokens at ``places``, in row-major order, (n, V)."""
        steps = places.shape[1]

        def select(values: Tensor) -> Tensor:
            # From the end: peft's prompt tuning puts virtual tokens before the text.
            return values[:, -steps - 1 : -1][places][None]

        return narrow_logits(self.model, lambda: self.forward(batch), select)[0]
