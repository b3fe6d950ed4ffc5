"""What a model writes after prompts: one configuration, randomness of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from objectives._drawing import SHAPING, Draws, Finite, Given, own_randomness
from objectives._fit import check_completion_length, is_encoder_decoder
from objectives._generation_options import (
    GREEDY,
    Ending,
    check_count,
    checked_options,
    sampling_options,
    sequences_of,
    special_tokens,
)
from objectives._served import written as written_there
from objectives._shared_text import HalfEnded, SharedText, can_go_on, rows_of_cache
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.joint.row_blocks import blocks
from zo_adapt.options import at_least_one
from zo_adapt.serve.asking import elsewhere
from zo_adapt.serve.protocol import Writing

Processor = Callable[[Tensor, Tensor], Tensor]  # the texts so far and scores in, scores out
_TRIED = 3
"""Tokens whose scores are compared."""


class Generated(NamedTuple):
    """What the model wrote.

    Args:
        texts: Without special tokens; "" where it ended at once.
        ids: Up to and with the token that ended it, or completed a stop string.
    """

    texts: list[str]
    ids: list[list[int]]


class Generator:
    """Writes completions of encoded prompts; the arguments are those of ``GenerationReward``.

    Attributes:
        independent: Whether what is drawn for a row depends on that row alone.
        beams: Texts that are followed for each prompt.
        longest: Most tokens of a completion.
        pad: A token to pad prompts with.

    Raises:
        OptionError: A number outside its range, or a model that cannot generate.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float,
        top_p: float,
        top_k: int,
        options: Mapping[str, Any],
    ) -> None:
        self._model = model
        check_completion_length(model, max_new_tokens)
        if not hasattr(model, "generate"):
            raise OptionError(
                f"{type(model).__name__} has no generate(); load it with AutoModelForCausalLM"
            )
        self._tokenizer = tokenizer
        self._sampling = (temperature, top_p, top_k) if do_sample else (0.0, 1.0, 0)
        self.longest = at_least_one("max_new_tokens", max_new_tokens)
        self._ends, self.pad = special_tokens(model, tokenizer)
        more = checked_options(options)
        self._more = {n: v for n, v in more.items() if n not in ("stop_strings", "do_sample")}
        self.beams = int(more.get("num_beams") or 1)
        # Beams are drawn by transformers, for all rows from one stream.
        self.independent = not do_sample or self.beams == 1
        sampling = sampling_options(temperature, top_p, top_k) if do_sample else GREEDY
        self._shaping: dict[str, Any] | None = None
        if do_sample and self.independent:
            self._shaping = sampling | {name: more.pop(name) for name in SHAPING if name in more}
            do_sample, sampling = False, GREEDY
        self._settings = sampling | more
        self._do_sample = do_sample
        stops = more.get("stop_strings") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        self._ending = Ending(self._ends, stops, tokenizer)
        self._in_stages = can_go_on(model, more)

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        seeds: Sequence[int],
        shared: SharedText | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> Generated:
        """Completions of padded prompts (b, t).

        Args:
            ids: Of the prompts.
            mask: Where they are not padding.
            seeds: What a row draws is a function of its seed.
            shared: Of these rows.
            more: What else the model takes, a value for every row.
        """
        there = elsewhere()
        if there is not None:
            return self._ended(written_there(there, ids, mask, self._writing(), seeds))
        draws = None
        if self._shaping is not None:
            draws = Draws(self._inherited() | self._shaping, seeds)
        with own_randomness(sum(seeds) % 2**63, ids.device):
            if self._in_stages and self._ends and len(ids) > 1 and not more:
                written = self._by_stages(ids, mask, draws, shared)
            else:
                written = self._at_once(ids, mask, draws, shared, more)
        return self._ended(written)

    def _ended(self, rows: list[list[int]]) -> Generated:
        """The texts, each up to where it ended."""
        own = [self._ending.cut(row) for row in rows]
        return Generated(self._tokenizer.batch_decode(own, skip_special_tokens=True), own)

    def _writing(self) -> Writing:
        """The same for a server."""
        temperature, top_p, top_k = self._sampling
        return Writing(
            self.longest,
            tuple(self._ends),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stops=tuple(self._ending.stops),
            more=self._more,
        )

    def scores(
        self,
        ids: Tensor,
        mask: Tensor,
        shared: SharedText | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Of the first tokens of completions whose text is given, some scores, (b, m), fp32.

        They change smoothly with the weights, and come of the forwards that completions come of:
        one of the prompts, the others with what is cached of them.
        """
        given = Given(min(set(range(len(self._ends) + 2)) - {*self._ends, self.pad}))
        config = GenerationConfig(
            max_new_tokens=min(_TRIED, self.longest),
            do_sample=False,
            pad_token_id=self.pad,
            eos_token_id=self._ends or None,
            num_beams=1,
        )
        self._generate(ids, mask, config, [given], shared, **(more or {}))
        return torch.cat(given.seen, dim=1)

    def _at_once(
        self,
        ids: Tensor,
        mask: Tensor,
        draws: Draws | None,
        shared: SharedText | None,
        more: Mapping[str, Tensor] | None = None,
    ) -> list[list[int]]:
        given: dict[str, Any] = dict(more or {})
        if self._ending.stops:  # whose tokens the tokenizer knows
            if not isinstance(self._tokenizer, PreTrainedTokenizerBase):
                raise OptionError(
                    f"stop_strings with a {type(self._tokenizer).__name__}: transformers reads the "
                    "vocabulary of a tokenizer of its own to stop there; give such a one "
                    "(PreTrainedTokenizerFast(tokenizer_object=...)), or let eos_token_id of the "
                    "model's generation_config end the texts"
                )
            given["tokenizer"] = self._tokenizer
        finite = Finite()
        processors: list[Processor] = [finite] if draws is None else [finite, draws]
        output = self._generate(ids, mask, self._config(self.longest), processors, shared, **given)
        output = sequences_of(output)
        finite.check()
        check_count(output, ids)
        return self._without_prompt(output, ids).tolist()

    def _by_stages(
        self, ids: Tensor, mask: Tensor, draws: Draws | None, shared: SharedText | None
    ) -> list[list[int]]:
        """The same, without the texts that have ended as soon as they are half of all."""
        width, written = ids.shape[1], [list[int]()] * len(ids)
        rows, now, cache = torch.arange(len(ids), device=ids.device), (ids, mask), None
        half = HalfEnded(self._ends, width)
        while True:
            finite = Finite()
            config = self._config(width + self.longest - now[0].shape[1])
            config.return_dict_in_generate = True
            processors: list[Processor] = [finite] if draws is None else [finite, draws]
            more: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            with blocks().of_rows(rows, len(ids)):
                output = self._generate(*now, config, processors, shared, half, **more)
            finite.check()
            found = sequences_of(output)
            check_count(found, rows)
            for row, text in zip(rows.tolist(), found[:, width:].tolist(), strict=True):
                written[row] = text
            kept = half.kept(found)
            if len(kept) == 0 or found.shape[1] == width + self.longest:
                return written
            known = getattr(output, "past_key_values", None)
            cache = rows_of_cache(known, kept, found.shape[1])
            if cache is None:
                self._in_stages = False
                if shared is not None:
                    shared.begin()
                return self._at_once(ids, mask, draws, shared)
            rows, longer = rows[kept], found.shape[1] - now[1].shape[1]
            now = found[kept], nn.functional.pad(now[1][kept], (0, longer), value=1)
            if draws is not None:
                draws.seeds = [draws.seeds[row] for row in kept.tolist()]
            if shared is not None:
                shared.select(kept)

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        config: GenerationConfig,
        processors: Sequence[Processor],
        *criteria: StoppingCriteria | SharedText | None,
        **more: Any,
    ) -> Any:
        shared = next((each for each in criteria if isinstance(each, SharedText)), None)
        with nullcontext() if shared is None else shared.entered():
            return self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(filter(None, criteria)),
                **more,
            )

    def _config(self, longest: int) -> GenerationConfig:
        """A new one: transformers fills in what is not set, of the model's own."""
        return GenerationConfig(
            max_new_tokens=longest,
            do_sample=self._do_sample,
            pad_token_id=self.pad,
            eos_token_id=self._ends or None,
            **self._settings,
        )

    def _inherited(self) -> dict[str, Any]:
        own = getattr(self._model, "generation_config", None)
        return {name: getattr(own, name, None) for name in SHAPING}

    def _without_prompt(self, output: Tensor, prompt: Tensor) -> Tensor:
        if is_encoder_decoder(self._model):
            return output[:, 1:]  # the token that starts the decoder
        width = prompt.shape[1]
        # peft's prompt tuning generates from embeddings, and then there is no prompt to leave out.
        begins_with_it = torch.equal(output[:, :width], prompt)
        return output[:, width:] if begins_with_it else output
