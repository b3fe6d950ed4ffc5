"""Prompted classification: the label is a word that the language model is asked to write."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives._fit import check_head, reads, shortest
from objectives._head import narrow_logits
from objectives._model import Batch, ModelObjective, at_least_float32, check_range
from objectives._padding import last_positions, right_padded, token_mask
from objectives._prompt import Prompt, label_word_ids
from objectives._served import rows_of
from objectives.seq2seq import first_token
from zo_adapt.errors import DataError, OptionError
from zo_adapt.serve.asking import Elsewhere, elsewhere


class VerbalizerLoss(ModelObjective):
    r"""Cross-entropy over the label words at the place where the model writes the answer.

    L_i = -log softmax_k( logit(w_k | prompt_i) )_{y_i}

    with the label words w_1..w_C, at the last token of the prompt, for a masked language model at
    the mask token, for an encoder-decoder (T5) at the first token that is written. Where the model
    allows it only these C logits are computed, not the vocabulary's; padding may be on either side.

    Args:
        model: A causal, masked or encoder-decoder language model.
        label_words: One for every class, each a single token (" negative", " positive"), or ids.
        tokenizer: Needed for words and for a template.
        template: The prompt, fields of an example in braces: "Review: {text}\nSentiment:". With
            ``{mask}`` in it the answer is read at the mask token. None: the examples carry the
            ``input_ids`` of whole prompts.
        max_length: Longest prompt in tokens; longer ones lose the end of their longest field, never
            a part of the template. None: what model and tokenizer allow.
        mask_token_id: For prompts given as ``input_ids`` to a masked language model.

    Raises:
        OptionError: A label word is not one token, the tokenizer is missing, a masked language
            model without a mask, or a model without a head for tokens.
        DataError: (when called) A field or the labels are missing; no place to answer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> loss = VerbalizerLoss(GPT2LMHeadModel(config), [7, 9])
        >>> examples = [{"input_ids": [1, 2, 3], "label": 0}, {"input_ids": [4], "label": 1}]
        >>> batch = loss.collate(examples)
        >>> loss(batch).shape, loss.logits(batch).shape
        (torch.Size([2]), torch.Size([2, 2]))
    """

    capturable = True

    def __init__(
        self,
        model: nn.Module,
        label_words: Sequence[str] | Sequence[int],
        *,
        tokenizer: Any = None,
        template: str | None = None,
        max_length: int | None = None,
        mask_token_id: int | None = None,
    ) -> None:
        check_head(model, "VerbalizerLoss")
        super().__init__(model)
        self.made_with = {
            "label_words": label_words,
            "template": template,
            "max_length": max_length,
            "tokenizer": tokenizer,
        }
        self.label_ids = label_word_ids(tokenizer, label_words)
        self.prompt: Prompt | None = None
        kind = reads(model)
        if template is not None:
            limit = shortest(max_length, self.longest)
            continued = kind.is_causal and "{mask}" not in template
            self.prompt = Prompt(tokenizer, template, limit, is_continued=continued)
            mask_token_id = self.prompt.mask_token_id
        self.mask_token_id = mask_token_id
        if kind.is_masked and mask_token_id is None:
            raise OptionError(
                f"{type(model).__name__} is a masked language model, which answers at a mask; "
                "write {mask} into the template, or give mask_token_id for prompts as input_ids"
            )
        self._is_written = kind.is_encoder_decoder and mask_token_id is None
        # Some encoder-decoders add a bias for the whole vocabulary after their output layer.
        self._narrows = not kind.is_encoder_decoder
        self._ids = torch.tensor(self.label_ids)
        self._check_vocabulary()

    def __call__(self, batch: object) -> Tensor:
        """Losses of shape (b,), fp32, of a collated batch or a list of examples."""
        prepared = self.prepare(batch)
        labels = self.labels(prepared)
        return F.cross_entropy(self._logits(prepared), labels.long(), reduction="none")

    def logits(self, batch: object) -> Tensor:
        """Logits of the label words, (b, C), fp32; labels are not needed."""
        return self._logits(self.prepare(batch))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch from examples with the template's fields, or with ``input_ids``."""
        if self.prompt is not None and not all("input_ids" in example for example in examples):
            examples = [self.prompt.encoded(example) for example in examples]
        return super().collate(examples)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse classes that have no word."""
        check_range(labels, len(self.label_ids))

    def _logits(self, batch: Batch) -> Tensor:
        if "input_ids" not in batch:
            raise DataError(f"the batch has no input_ids, only {sorted(batch)}; give a template")
        batch = right_padded(batch)
        positions, length = self._positions(batch), batch["input_ids"].shape[1]
        there = elsewhere()
        if there is not None:
            return self._chosen(there, batch)
        if self._is_written:
            batch, positions, length = self._begun(batch)
        rows = torch.arange(len(positions), device=positions.device)

        def select(values: Tensor) -> Tensor:
            # From the end: peft's prompt tuning puts virtual tokens before the text.
            return values[:, -length:][rows.to(values.device), positions.to(values.device)][:, None]

        ids = self._ids = self._ids.to(positions.device)
        only = ids if self._narrows else None
        logits = narrow_logits(self.model, lambda: self.forward(batch), select, only)[:, 0]
        return at_least_float32(logits if self._narrows else logits[:, ids.to(logits.device)])

    def _chosen(self, there: Elsewhere, batch: Batch) -> Tensor:
        """Log-probabilities of the label words after each prompt, which differ from the logits by
        a constant.
        """
        if self.mask_token_id is not None or self._is_written:
            raise OptionError(
                f"{type(self.model).__name__} does not go on with its prompt; on a server run a "
                "causal language model, and a template without {mask}"
            )
        return torch.from_numpy(there.choose(rows_of(batch), self.label_ids)).float()

    def _begun(self, batch: Batch) -> tuple[Batch, Tensor, int]:
        """The batch with what the decoder has read before the answer: where it ends, how long."""
        generation = getattr(self.model, "generation_config", None)
        forced = getattr(generation, "forced_bos_token_id", None)
        begun = [first_token(self.model)] + ([] if forced is None else [int(forced)])
        ids = batch["input_ids"]
        read = torch.tensor([begun], device=ids.device).expand(len(ids), -1)
        last = torch.full((len(ids),), len(begun) - 1, device=ids.device)
        return batch | {"decoder_input_ids": read}, last, len(begun)

    def _positions(self, batch: Batch) -> Tensor:
        """Where each row's answer is, (b,)."""
        if self.mask_token_id is None:
            return last_positions(token_mask(batch))
        found = batch["input_ids"] == self.mask_token_id
        if not (found.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._check_masks(found)
        return found.long().argmax(1)

    def _checked(self, batch: Batch) -> Batch:
        """As for every model; what a captured call cannot look at is looked at before."""
        ids = batch.get("input_ids")
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.mask_token_id is not None and ids is not None and not ids.is_cuda:
            self._check_masks(ids == self.mask_token_id)
        return super()._checked(batch)

    def _check_masks(self, found: Tensor) -> None:
        count = found.sum(1)
        if not bool((count == 1).all()):
            raise DataError(
                f"the prompts of the batch have {count.tolist()} mask tokens (id "
                f"{self.mask_token_id}); each needs exactly one"
            )

    def _check_vocabulary(self) -> None:
        size = self.configured("vocab_size")
        outside = [i for i in self.label_ids if i < 0 or (size is not None and i >= size)]
        if outside:
            raise OptionError(
                f"label word ids {outside} are outside the vocabulary 0..{size} (excl.)"
            )
