"""Rewards of generated text."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from objectives._encoded import PromptBatch, PromptEncoder, columns_of, is_chat, left_padded
from objectives._rewards import RewardFunction, Rewards
from objectives.mixture import Mixable
from zo_adapt.errors import DataError, OptionError
from zo_adapt.objective import evaluation_mode
from zo_adapt.options import at_least_one, positive

_GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""What counts as not set: a model's own settings would be reported as unused."""


class Generated(NamedTuple):
    """What the model wrote.

    Args:
        texts: Without special tokens; "" where it ended at once.
        ids: Up to and with the token that ended it.
    """

    texts: list[str]
    ids: list[list[int]]


class GenerationReward(Mixable):
    r"""Reward of the text that the model writes; more is better.

    R(theta) = 1/b sum_i sum_k w_k f_k(x_i, y_i),    y_i ~ p_theta(. | x_i)

    with prompts x_i, completions y_i (the greedy ones by default) and reward functions f_k of TRL's
    signature, ``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``,
    sync or async. The other fields of the examples are the columns; a function without
    ``**columns`` is given those that it names. To prompts that are messages belong completions that
    are messages, ``[{"role": "assistant", "content": text}]``.

    **None** leaves a function out of the sum of that example; an example that all leave out has the
    value 0 at every point: it adds nothing to a difference, and the mean stays one over b. So
    whether a function gives None should depend on the example, not on the completion.

    **Sampling** (``do_sample=True``) draws from a seed that is a function of ``seed`` and of the
    batch's prompts, in their order. All points of an estimate have the same batch, hence common
    random numbers: the same noise at every position. The next step has other prompts, or the same
    in another order, hence fresh numbers. So a batch that recurs recurs with its numbers; data of
    one or two prompts are better repeated. The global random generators are never touched.

    Args:
        model: A causal or encoder-decoder language model with ``generate``, or a peft one.
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
        generation_kwargs: More for ``GenerationConfig`` (``repetition_penalty``, ``num_beams``);
            what is not given here is as ``model.generation_config`` has it.

    Raises:
        OptionError: A number outside its range; a model that cannot generate; no reward functions.
        DataError: (when called) The prompt, or a column that a reward needs, is missing: named
            before anything is generated. A prompt too long for the model.
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

    def __init__(
        self,
        model: nn.Module,
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
        if not hasattr(model, "generate"):
            raise OptionError(
                f"{type(model).__name__} has no generate(); load it with AutoModelForCausalLM"
            )
        if not 0 <= seed < 2**64:
            raise OptionError(f"seed={seed} is outside 0 <= seed < 2**64")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.prompt_field = prompt_field
        self.reward_funcs = Rewards(reward_funcs, reward_weights)
        self.max_new_tokens = at_least_one("max_new_tokens", max_new_tokens)
        self._encode = PromptEncoder(tokenizer, chat_template_kwargs)
        self._ends, self._pad = _special_tokens(model, tokenizer)
        sampling = _sampling(temperature, top_p, top_k) if do_sample else _GREEDY
        more = _checked_options(generation_kwargs or {})
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            pad_token_id=self._pad,
            eos_token_id=self._ends or None,
            **sampling | more,
        )
        # What is drawn for a prompt depends on the prompts beside it.
        self.joint = not self._config.do_sample

    def __call__(self, batch: Any) -> np.ndarray:
        """Rewards of shape (b,), float64, of a collated batch or a list of examples."""
        prepared = self._prepared(batch)
        return self.rewards(prepared, self.generate(prepared))

    def evaluating(self) -> AbstractContextManager[None]:
        """Every module in evaluation mode inside; each module's own mode restored afterwards."""
        return evaluation_mode(self.model)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> PromptBatch:
        """Encoded prompts on the model's device, and the columns, from a list of examples.

        Raises:
            DataError: The prompt, or a column that a reward needs, is missing.
        """
        columns = columns_of(examples, self.prompt_field)
        prompts = columns.pop(self.prompt_field)
        self.reward_funcs.check_columns(columns)
        ids, mask = left_padded([self._encode(prompt) for prompt in prompts], self._pad)
        self._check_length(ids.shape[1])
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return PromptBatch(prompts, ids.to(device), mask.to(device), columns)

    @torch.no_grad()
    def generate(self, batch: Any) -> Generated:
        """What the model writes after each prompt, where its weights are now."""
        prepared = self._prepared(batch)
        ids, mask = prepared.input_ids, prepared.attention_mask
        with self.evaluating(), _own_randomness(self._sampling_seed(prepared), self.model):
            output: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=self._config
            )
        if len(output) != len(ids):
            raise OptionError(
                f"generate returned {len(output)} texts for {len(ids)} prompts; leave "
                "num_return_sequences=1"
            )
        written = [self._until_end(row) for row in self._without_prompt(output, ids).tolist()]
        return Generated(self.tokenizer.batch_decode(written, skip_special_tokens=True), written)

    def rewards(self, batch: Any, generated: Generated) -> np.ndarray:
        """Rewards of given completions, (b,), float64."""
        prepared = self._prepared(batch)
        completions = [
            [{"role": "assistant", "content": text}] if is_chat(prompt) else text
            for prompt, text in zip(prepared.prompts, generated.texts, strict=True)
        ]
        return self.reward_funcs(prepared.prompts, completions, generated.ids, prepared.columns)

    def _prepared(self, batch: Any) -> PromptBatch:
        return batch if isinstance(batch, PromptBatch) else self.collate(batch)

    def _configured(self, name: str) -> Any:
        return getattr(getattr(self.model, "config", None), name, None)

    def _check_length(self, width: int) -> None:
        limit = self._configured("max_position_embeddings")
        used = width if self._configured("is_encoder_decoder") else width + self.max_new_tokens - 1
        if limit is not None and used > limit:
            raise DataError(
                f"a prompt has {width} tokens, and with max_new_tokens={self.max_new_tokens} that "
                f"takes {used} positions of the model's {limit}; shorten the prompts or the "
                "completions"
            )

    def _sampling_seed(self, batch: PromptBatch) -> int:
        """Of the batch's content alone: the same at all points, in any process and micro-batch."""
        text = repr((self.seed, batch.input_ids.tolist(), batch.attention_mask.tolist()))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def _without_prompt(self, output: Tensor, prompt: Tensor) -> Tensor:
        if self._configured("is_encoder_decoder"):
            return output[:, 1:]  # the token that starts the decoder
        width = prompt.shape[1]
        # peft's prompt tuning generates from embeddings, and then there is no prompt to leave out.
        begins_with_it = torch.equal(output[:, :width], prompt)
        return output[:, width:] if begins_with_it else output

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self._ends]
        return ids[: ends[0] + 1] if ends else ids


@contextmanager
def _own_randomness(seed: int, model: nn.Module) -> Iterator[None]:
    """The global generators of the CPU and of the model's GPUs seeded; put back afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it seeds every GPU, also those that are not put back.
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _special_tokens(model: nn.Module, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that end a text, and one to pad with: any will do, since the mask is read."""
    config = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    ends = [] if end is None else [end] if isinstance(end, int) else [int(token) for token in end]
    for pad in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), *ends):
        if pad is not None:
            return ends, int(pad)
    return ends, 0


def _sampling(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    positive("temperature", temperature)
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p={top_p}; choose 0 < top_p <= 1")
    if not isinstance(top_k, int) or top_k < 0:
        raise OptionError(f"top_k={top_k}; choose an integer >= 0, 0 for no limit")
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k}


_OWN = ("max_new_tokens", "do_sample", "pad_token_id", "eos_token_id")


def _checked_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """More options of the generation.

    Raises:
        OptionError: One that this class sets itself, or that ``GenerationConfig`` does not have.
    """
    known = vars(GenerationConfig())
    for name in given:
        if name in _OWN:
            raise OptionError(
                f"generation_kwargs has {name!r}, which GenerationReward sets itself: by its "
                "arguments, and by the tokens of the tokenizer and the model"
            )
        if name not in known:
            raise OptionError(f"generation_kwargs has {name!r}, which GenerationConfig has not")
    return dict(given)
