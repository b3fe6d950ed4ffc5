"""Rewards of generated text."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from objectives._encoded import PromptBatch, PromptEncoder, Side, columns_of, is_chat
from objectives._fit import TASK_IDS, accepted_arguments, check_prompt_length, reads, virtual_tokens
from objectives._generator import Generated, Generator
from objectives._memory import bytes_of_text
from objectives._model import device_of
from objectives._rewards import Rewarded, RewardFunction, Rewards
from objectives._served import Absent
from objectives._shared_text import SharedText
from objectives.mixture import Mixable
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.joint.row_blocks import blocks
from zo_adapt.evaluation.later import Made
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.objective import SetObjective


class GenerationReward(Mixable, SetObjective):
    r"""Reward of the text that the model writes; more is better.

    R(theta) = 1/b sum_i sum_k w_k f_k(x_i, y_i),    y_i ~ p_theta(. | x_i)

    with prompts x_i, completions y_i (the greedy ones by default) and reward functions f_k of TRL's
    signature, ``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``,
    sync or async. The other fields of the examples are the columns; a function without
    ``**columns`` is given those that it names. To prompts that are messages belong completions that
    are messages, ``[{"role": "assistant", "content": text}]``.

    **None** leaves a function out of the sum of that example. An example that all leave out is
    skipped: R is the mean over the others of the batch (however it is cut into micro-batches), and
    so is every difference of two points. The skipped one's own value is that mean; 0 where all are
    skipped. Whether a function gives None should depend on the example, not on the completion, lest
    the two points of a difference be means over different examples.

    **Sampling** (``do_sample=True``) draws for each example from a stream of its own, a function of
    ``seed``, of its prompt and columns, and of how often they came before in the batch. So it is
    answered the same whatever is beside it, and all points have common random numbers: the same
    noise at every position, also at later steps, which makes R one function of the weights. Where a
    prompt should be answered anew, a column that differs (``"id": 0, 1, ...``) gives it other
    numbers. The global random generators are never touched.

    **All candidates of a step** are written together where the view allows it (LoRA, layer norms,
    embeddings; ``Result.evaluation`` says why not): one ``generate`` of all prompts, each block of
    rows at its own point, as many as the memory holds beside the model. In fp32 on a CPU the texts
    are to the token those of one point at a time; elsewhere a tie may be rounded another way, as by
    any other size of batch. Once half of the texts have ended they are left out of the rest
    (decoders with transformers' usual cache, no stop strings or beams, no option that counts from
    the start). On a CPU, layers before the first tuned one read a prompt once for all candidates.
    The completions of a call come to the rewards in one list; each depends on its own alone.

    **Rewards that wait** (async ones; and functions that were seen to wait rather than compute, for
    a server or another process) do so in a thread of their own while the next texts are written,
    where the memory cuts a step into several ``generate``. They are called in the same order, one
    call at a time, and values and errors are the same. Such a function must not ask the model that
    is tuned; what computes stays in the caller's thread (``asyncio.to_thread`` is a way out of it).

    Args:
        model: A causal or encoder-decoder language model with ``generate``, or a peft one; None:
            only a server writes (``zo_adapt.answered_by``).
        tokenizer: Of the model; its padding side does not matter.
        reward_funcs: One reward function or several.
        reward_weights: One for each; None: 1 each.
        max_new_tokens: Longest completion.
        do_sample: Sample instead of taking the likeliest token.
        temperature, top_p, top_k: Of sampling; the model's own distribution by default. top_k=0 is
            no limit.
        seed: Of sampling, 0 <= seed < 2**64.
        prompt_field: Name of the field with the prompt: a text, or a list of messages.
        chat_template_kwargs: More for the tokenizer's chat template.
        generation_kwargs: More for ``GenerationConfig`` (``repetition_penalty``, ``num_beams``,
            ``stop_strings``); what is not given here is as ``model.generation_config`` has it.

    Raises:
        OptionError: A number outside its range; a model that cannot generate; no reward functions,
            or one that cannot be called by keywords.
        DataError: (when called) The prompt, or a column that a reward needs, is missing: named
            before anything is generated, unless it is read from ``**columns``. A prompt too long
            for the model.
        ObjectiveError: (when called) A reward function returned a list of another length, or
            something else than numbers and None; NaN is a NonFiniteObjectiveError.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[END]": 2}, unk_token="a"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]")
        >>> config = GPT2Config(vocab_size=3, n_embd=16, n_layer=1, n_head=2, n_positions=32,
        ...                     bos_token_id=2, eos_token_id=2)
        >>> def length(completion_ids, **columns):
        ...     return [float(len(ids)) for ids in completion_ids]
        >>> reward = GenerationReward(GPT2LMHeadModel(config), tokenizer, length, max_new_tokens=4)
        >>> batch = reward.collate([{"prompt": "a b"}, {"prompt": "b"}])
        >>> reward(batch).shape, reward.maximize
        ((2,), True)

    Reference: TRL, "Using a custom reward function" (GRPOTrainer).
    """

    maximize = True
    step_like = True
    min_rows = 1
    """A mean over examples: a batch may be cut over directions."""
    uneven = True

    def __init__(
        self,
        model: nn.Module | None,
        tokenizer: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        *,
        reward_weights: Sequence[float] | None = None,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        prompt_field: str = "prompt",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise OptionError(f"seed={seed} is outside 0 <= seed < 2**64")
        model = Absent() if model is None else model
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.prompt_field = prompt_field
        writing: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }
        self.made_with = writing | {
            "reward_funcs": reward_funcs,
            "reward_weights": reward_weights,
            "chat_template_kwargs": chat_template_kwargs,
            "generation_kwargs": generation_kwargs,
        }
        self._evaluating = EvaluationMode(model)
        self.reward_funcs = Rewards(reward_funcs, reward_weights)
        # An encoder reads the end token of its text; to a text that goes on there is none yet.
        continued = not reads(model).is_encoder_decoder
        self._encode = PromptEncoder(tokenizer, chat_template_kwargs, is_continued=continued)
        self._side: Side = "left" if continued else "right"
        self._generator = Generator(model, tokenizer, options=generation_kwargs or {}, **writing)
        self.independent_rows = self._generator.independent
        self.row_bytes, self.stand_in = self._row_bytes, self._stand_in
        # Of a class with a `predict` of its own, that is what counts.
        if type(self).predict is GenerationReward.predict:
            self.predict_later = self._predict_later

    def __call__(self, batch: Any) -> np.ndarray:
        """Rewards of shape (b,), float64, of a collated batch or a list of examples."""
        return self.score([self.predict(batch)])

    def predict(self, batch: Any) -> Rewarded:
        """Rewards of one micro-batch, and which of its examples have one."""
        prepared = self._prepared(batch)
        return self.reward_funcs(*self._to_reward(prepared, self.generate(prepared)))

    def _predict_later(self, batch: Any) -> Made:
        """The same; rewards that wait do so in the background."""
        prepared = self._prepared(batch)
        started = time.perf_counter()
        given = self._to_reward(prepared, self.generate(prepared))
        return self.reward_funcs.begin(*given, seconds=time.perf_counter() - started)

    def score(self, predictions: list[Rewarded]) -> np.ndarray:
        """Rewards of all micro-batches, (n,), float64; the mean of the others where skipped."""
        values, counted = (np.concatenate(part) for part in zip(*predictions, strict=True))
        mean = values[counted].mean() if counted.any() else 0.0
        return np.where(counted, values, mean)

    def evaluating(self) -> AbstractContextManager[None]:
        """Every module in evaluation mode inside; each module's own mode restored afterwards."""
        return self._evaluating()

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> PromptBatch:
        """Encoded prompts on the model's device, and the columns, from a list of examples.

        Raises:
            DataError: The prompt, or a column that a reward needs, is missing.
        """
        columns = columns_of(examples, self.prompt_field)
        prompts = columns.pop(self.prompt_field)
        self.reward_funcs.check_columns(columns)
        tokens = [self._encode(prompt) for prompt in prompts]
        device = device_of(self.model)
        batch = PromptBatch(prompts, tokens, columns, self._generator.pad, device, self._side)
        check_prompt_length(self.model, batch.width, self._generator.longest)
        return batch

    @torch.no_grad()
    def generate(self, batch: Any) -> Generated:
        """What the model writes after each prompt, where its weights are now."""
        prepared = self._prepared(batch)
        seeds = self._seeds(prepared)
        with self.evaluating():
            if virtual_tokens(self.model) and len(set(map(len, prepared.tokens))) > 1:
                return self._by_length(prepared, seeds)
            shared = self._shared(prepared)
            ids, mask = prepared.input_ids, prepared.attention_mask
            return self._generator(ids, mask, seeds, shared, self._tasks(prepared))

    def _tasks(self, batch: PromptBatch) -> dict[str, Tensor]:
        """The task of every row, where the model has a tuner of several tasks and asks for it."""
        if TASK_IDS not in batch.columns or TASK_IDS not in (accepted_arguments(self.model) or ()):
            return {}
        return {TASK_IDS: torch.tensor(batch.columns[TASK_IDS], device=batch.device)}

    def _by_length(self, batch: PromptBatch, seeds: Sequence[int]) -> Generated:
        """Prompts of one length at a time: peft's virtual tokens stand before the padding.

        With padding between, what a prompt is answered would depend on the longest beside it.
        """
        if blocks().count > 1:
            raise NotJoint("prompts with virtual tokens are written one length at a time")
        texts: list[str] = [""] * len(batch)
        written: list[list[int]] = [[]] * len(batch)
        for length in sorted(set(map(len, batch.tokens))):
            rows = [row for row, tokens in enumerate(batch.tokens) if len(tokens) == length]
            part = batch.select_rows(rows)
            of_part = [seeds[row] for row in rows]
            ids, mask = part.input_ids, part.attention_mask
            found = self._generator(ids, mask, of_part, None, self._tasks(part))
            for row, text, own in zip(rows, found.texts, found.ids, strict=True):
                texts[row], written[row] = text, own
        return Generated(texts, written)

    def rewards(self, batch: Any, generated: Generated) -> np.ndarray:
        """Rewards of given completions, (b,), float64."""
        given = self._to_reward(self._prepared(batch), generated)
        return self.score([self.reward_funcs(*given)])

    def _to_reward(self, prepared: PromptBatch, generated: Generated) -> tuple[Any, ...]:
        """What rewards are of."""
        completions = [
            [{"role": "assistant", "content": text}] if is_chat(prompt) else text
            for prompt, text in zip(prepared.prompts, generated.texts, strict=True)
        ]
        return prepared.prompts, completions, generated.ids, prepared.columns

    def _prepared(self, batch: Any) -> PromptBatch:
        return batch if isinstance(batch, PromptBatch) else self.collate(batch)

    def _seeds(self, batch: PromptBatch) -> list[int]:
        """Of every row, a function of its content alone, in any process; of equal ones, others."""
        found: list[int] = []
        block = len(batch) // blocks().count
        for row, tokens in enumerate(batch.tokens):
            own = {name: column[row] for name, column in batch.columns.items()}
            text = json.dumps([self.seed, tokens, own], default=_told, skipkeys=True)
            if row % block == 0:  # each point's rows are a batch
                before: Counter[str] = Counter()
            digest = hashlib.blake2b(f"{before[text]} {text}".encode(), digest_size=8).digest()
            found.append(int.from_bytes(digest, "big") >> 1)
            before[text] += 1
        return found

    def _stand_in(self, batch: Any) -> Tensor:
        """Smooth numbers of the rows, by which forwards of several points are checked."""
        if self._generator.beams > 1:
            raise NotJoint("several beams are followed for every prompt")
        prepared = self._prepared(batch)
        with torch.no_grad(), self.evaluating():
            ids, mask = prepared.input_ids, prepared.attention_mask
            return self._generator.scores(ids, mask, self._shared(prepared), self._tasks(prepared))

    def _shared(self, batch: PromptBatch) -> SharedText | None:
        """What frozen layers need not compute for every point; on a GPU they wait for no row."""
        # An encoder-decoder's first layers read the prompt alone.
        one_text = self._side == "left" and self._generator.beams == 1
        if not (one_text and blocks().frozen and batch.device.type == "cpu"):
            return None
        return SharedText(blocks().frozen, batch.tokens)

    def _row_bytes(self, batch: Any) -> int:
        """Memory of one row while it is written."""
        return bytes_of_text(self.model, self._prepared(batch).width, self._generator.longest)


def _told(value: Any) -> Any:
    """What tells a column's entry apart in every process: its numbers, or else its type alone."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__
