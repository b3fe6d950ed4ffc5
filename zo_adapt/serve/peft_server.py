"""A served model in this process: peft runs a batch whose rows have adapters of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_adapt.errors import NotServableError, ServerReplyError
from zo_adapt.evaluation.start_checks import randomness_kept
from zo_adapt.interrupt import gradients_off
from zo_adapt.serve.adapter import REFUSED_BY_PEFT
from zo_adapt.serve.forwards import (
    configuration_of,
    log_probs,
    narrowing,
    padded,
    placed_from,
    portions_of,
    sharing_weights,
    until_end,
)
from zo_adapt.serve.protocol import BASE, Candidate, Limits, Scores, ServedModel, Texts, Writing
from zo_adapt.serve.slots import Slots
from zo_adapt.serve.soft_prompt import PROMPT

TOKENS = {"cpu": 2048, "cuda": 16384}
"""Most tokens of one forward, by the kind of device."""


class PeftServer(ServedModel):
    """Serves a model in this process: exact, and with no other program to start.

    The adapters lie in a few slots of a copy of the module tree that shares all weights with the
    model, which is left as it is. Rows of one forward have adapters of their own (peft's
    ``adapter_names``), so that the frozen layers run once for all candidates.

    Args:
        model: A causal language model of transformers, with a peft adapter or without.
        adapters: Most candidates loaded at once.
        tokens: Most tokens of one forward, padding included; None: 2048 on a CPU, 16384 on a GPU.

    Raises:
        NotServableError: The model cannot be copied, or is an encoder-decoder.
        ServerReplyError: (when asked) An adapter loaded twice, not loaded, or that does not fit.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> server = PeftServer(GPT2LMHeadModel(config).eval())
        >>> server.score([""], [[1, 2, 3]])[0].log_probs.shape
        (3,)
    """

    def __init__(self, model: nn.Module, *, adapters: int = 16, tokens: int | None = None) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise NotServableError(
                f"{type(model).__name__} is an encoder-decoder; a served model goes on with a text"
            )
        self._slots = Slots(sharing_weights(model))
        parameter = next(model.parameters())
        self._device = parameter.device
        self._tokens = tokens or TOKENS.get(self._device.type, TOKENS["cuda"])
        self._prompts: dict[str, Tensor] = {}
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self._limits = Limits(
            adapters,
            positions=positions,
            dtype=str(parameter.dtype),
            prompts=True,
            refuses=REFUSED_BY_PEFT,
        )

    @property
    def limits(self) -> Limits:
        """As given; any rank and any layer."""
        return self._limits

    def loaded(self) -> list[str]:
        """Names of the candidates."""
        return [*self._slots.names(), *self._prompts]

    def load(self, candidate: Candidate, lora_config: Mapping[str, Any]) -> None:
        """See ``ServedModel``."""
        if candidate.name in self.loaded() or candidate.name == BASE:
            raise ServerReplyError(f"an adapter named {candidate.name!r} is loaded already")
        if len(self.loaded()) == self._limits.adapters:
            raise ServerReplyError(f"{len(self.loaded())} adapters are loaded, and no more may be")
        if PROMPT in candidate.tensors:
            prompt = candidate.tensors[PROMPT]
            self._prompts[candidate.name] = prompt.to(self._device, copy=True)
            return
        self._slots.write(candidate.name, candidate.tensors, lora_config)

    def score(
        self,
        names: Sequence[str],
        token_ids: Texts,
        *,
        starts: Sequence[int] | None = None,
        others: bool = False,
    ) -> list[Scores]:
        """See ``ServedModel``."""
        first = [1] * len(token_ids) if starts is None else list(starts)
        found: dict[int, Scores] = {}
        for rows in portions_of(token_ids, self._tokens):
            texts = [token_ids[row] for row in rows]
            places = [range(first[row] - 1, len(token_ids[row]) - 1) for row in rows]
            logits = self._logits([names[row] for row in rows], texts, places)
            targets = torch.tensor(
                [text[p + 1] for text, of in zip(texts, places, strict=True) for p in of],
                device=logits.device,
            )
            own, other = log_probs(logits, targets, others)
            at = 0
            for row, of in zip(rows, places, strict=True):
                part = slice(at, at := at + len(of))
                length = len(token_ids[row])
                found[row] = Scores(
                    placed_from(of, length, own[part]),
                    None if other is None else placed_from(of, length, other[part]),
                )
        return [found[row] for row in range(len(token_ids))]

    def choose(self, names: Sequence[str], token_ids: Texts, choices: Sequence[int]) -> np.ndarray:
        """See ``ServedModel``."""
        found = np.zeros((len(token_ids), len(choices)))
        ids = torch.tensor(choices, device=self._device)
        for rows in portions_of(token_ids, self._tokens):
            texts = [token_ids[row] for row in rows]
            places = [range(len(text) - 1, len(text)) for text in texts]
            logits = self._logits([names[row] for row in rows], texts, places)
            found[rows] = logits.log_softmax(-1)[:, ids].cpu().numpy()
        return found

    def generate(
        self,
        names: Sequence[str],
        token_ids: Texts,
        writing: Writing,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See ``ServedModel``."""
        # Sampled texts are written one by one, each by its own seed.
        found: dict[int, list[int]] = {}
        draws = writing.temperature > 0
        portions = portions_of(token_ids, self._tokens, writing.max_new_tokens)
        for rows in [[row] for row in range(len(names))] if draws else portions:
            own, texts = [names[row] for row in rows], [token_ids[row] for row in rows]
            seed = 0 if seeds is None else seeds[rows[0]]
            found.update(zip(rows, self._written(own, texts, writing, seed), strict=True))
        return [found[row] for row in range(len(names))]

    def unload(self, names: Sequence[str]) -> None:
        """See ``ServedModel``."""
        for name in names:
            self._prompts.pop(name, None)
        self._slots.free(names)

    def close(self) -> None:
        """See ``ServedModel``."""
        self.unload(self.loaded())

    def _read_under(self, names: Sequence[str]) -> None:
        """Say under which adapter each row of the next forwards is read."""
        if unknown := sorted(set(names) - {*self.loaded(), BASE}):
            raise ServerReplyError(f"no adapter named {unknown[0]!r} is loaded")
        self._slots.rows = names
        self._slots.hook_layers()

    def _inputs(
        self, names: Sequence[str], texts: Texts, *, left: bool = False
    ) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """Ids, or embeddings where prompts stand before; the mask; how far texts are moved."""
        self._read_under(names)
        if not self._prompts:
            ids, mask = padded(texts, self._device, left=left)
            return {"input_ids": ids}, mask, [0] * len(texts)
        table = self._slots.model.get_input_embeddings()
        rows, shifts = [], []
        for name, text in zip(names, texts, strict=True):
            embedded = table(torch.tensor([text], device=self._device))[0]
            prompt = self._prompts.get(name, embedded[:0]).to(embedded.dtype)
            rows.append(torch.cat([prompt, embedded]))
            shifts.append(len(prompt))
        _, mask = padded([range(len(row)) for row in rows], self._device, left=left)
        embeddings = rows[0].new_zeros(*mask.shape, rows[0].shape[1])
        embeddings[mask] = torch.cat(rows)
        return {"inputs_embeds": embeddings}, mask, shifts

    def _logits(self, names: Sequence[str], texts: Texts, places: Sequence[range]) -> Tensor:
        """Logits at the places of every text, one after the other, (n, V), in at least fp32."""
        inputs, mask, shifts = self._inputs(names, texts)
        chosen = torch.zeros_like(mask)
        for row, (of, shift) in enumerate(zip(places, shifts, strict=True)):
            chosen[row, of.start + shift : of.stop + shift] = True
        with (
            gradients_off(),
            self._slots.evaluating(),
            narrowing(self._slots.model, chosen) as calls,
        ):
            logits: Tensor = self._slots.model(
                **inputs, attention_mask=mask.long(), use_cache=False
            ).logits
        logits = logits[0] if calls else logits[chosen]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _written(
        self, names: Sequence[str], texts: Texts, writing: Writing, seed: int
    ) -> list[list[int]]:
        inputs, mask, _ = self._inputs(names, texts, left=True)
        config = configuration_of(writing)
        with gradients_off(), self._slots.evaluating(), randomness_kept(self._slots.model):
            torch.default_generator.manual_seed(seed)
            if self._device.type == "cuda":
                index = self._device.index or 0
                torch.cuda.default_generators[index].manual_seed(seed)
            output = self._slots.model.generate(
                **inputs,
                attention_mask=mask.long(),
                generation_config=config,
            )
        output = getattr(output, "sequences", output)  # the model's own settings may ask for more
        # Of embeddings, generate returns the new tokens alone.
        before = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return [until_end(row, writing.ends) for row in output[:, before:].tolist()]
