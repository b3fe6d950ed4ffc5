"""Loss of encoder-decoder language models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from objectives._collate import IGNORED
from objectives._fit import check_encoder_decoder, positions, shortest, tokens_of
from objectives._head import narrow_logits
from objectives._model import Batch
from objectives._token_loss import LabelTokens, Reduction, TokenLoss, check_labelled
from zo_adapt.errors import DataError, OptionError
from zo_adapt.options import at_least_one


class Seq2SeqLoss(TokenLoss):
    """Negative log-likelihood of the target tokens given the source, one value per example.

    l_t = -log p(y_t | y_<t, x), added up as ``CausalLMLoss`` does by ``reduction``.

    The decoder reads the labels shifted to the right, as the model itself does it. Only the logits
    that a label needs are computed.

    Examples have ``input_ids`` and ``labels`` (-100 where none is to be predicted); or, with a
    tokenizer, ``prompt`` and ``completion`` as texts. The end token is put after targets that do
    not end in it.

    Args:
        model: An encoder-decoder language model (T5, BART), or a peft one.
        reduction: "example", "token" or "sum".
        tokenizer: For examples of text.
        max_length: Longest source and longest target in tokens; None: what model and tokenizer
            allow.

    Raises:
        OptionError: Another reduction, or a model that is no encoder-decoder (when called: text
            without a tokenizer).
        DataError: (when called) Labels are missing, or an example has none.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        ...                   decoder_start_token_id=0)
        >>> loss = Seq2SeqLoss(T5ForConditionalGeneration(config))
        >>> loss([{"input_ids": [7, 8, 1], "labels": [9, 1]}]).shape
        torch.Size([1])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Reduction = "example",
        tokenizer: Any = None,
        max_length: int | None = None,
    ) -> None:
        check_encoder_decoder(model, "Seq2SeqLoss")
        super().__init__(model, reduction=reduction)
        self.made_with = {"tokenizer": tokenizer, "max_length": max_length}
        self._tokenizer = tokenizer
        own = None if max_length is None else at_least_one("max_length", max_length)
        self._longest_target = positions(model, are_written=True)
        self._limit = shortest(own, self.longest, tokens_of(tokenizer))
        self._written = shortest(own, self._longest_target, tokens_of(tokenizer))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch from examples of tokens or of text."""
        return super().collate([self._encoded(example) for example in examples])

    def label_tokens(self, batch: object) -> LabelTokens:
        """The label tokens and the logits that predict them, computed at these places alone."""
        prepared = self.prepare(batch)
        labels = self.labels(prepared)
        if labels.dim() != 2:
            raise DataError(
                f"labels of shape {tuple(labels.shape)}; give the tokens of every target, (b, t)"
            )
        self._check_tokens(labels.clamp_min(0), self._longest_target)
        check_labelled(labels)
        if "decoder_input_ids" not in prepared:
            prepared = prepared | {"decoder_input_ids": shifted_right(self.model, labels)}
        places = labels != IGNORED

        def select(values: Tensor) -> Tensor:
            return values[:, -places.shape[1] :][places][None]

        logits = narrow_logits(self.model, lambda: self.forward(prepared), select)[0]
        return LabelTokens(logits, labels[places], places)

    def _encoded(self, example: Any) -> Any:
        if "input_ids" in example or not ("prompt" in example or "completion" in example):
            return example
        if self._tokenizer is None:
            raise OptionError("the examples have 'prompt', which needs tokenizer=...")
        source, target = example.get("prompt"), example.get("completion")
        if not (isinstance(source, str) and isinstance(target, str)):
            raise DataError(
                f"'prompt' and 'completion' of an example are {source!r:.40} and {target!r:.40}; "
                "give texts"
            )
        read = {"truncation": self._limit is not None, "max_length": self._limit}
        written = {"truncation": self._written is not None, "max_length": self._written}
        labels = self._tokenizer(text_target=target, **written)["input_ids"]
        return {
            "input_ids": self._tokenizer(source, **read)["input_ids"],
            "labels": self._ended(labels)[: self._written],
        }

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads where it is to write the labels, as the model's own code makes it."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        ids: Tensor = prepare(labels=labels)
        return ids
    config: Any = model.config
    fill = config.pad_token_id or 0
    start = torch.full_like(labels[:, :1], first_token(model))
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, fill)], 1)


def first_token(model: nn.Module) -> int:
    """The token that a decoder begins with.

    Raises:
        OptionError: The model's configuration has none.
    """
    token: int | None = getattr(model.config, "decoder_start_token_id", None)
    if token is None:
        raise OptionError("the model has no config.decoder_start_token_id; set it")
    return token
