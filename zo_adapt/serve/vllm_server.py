"""A served model behind vLLM's server of the OpenAI interface, with adapters loaded at run time."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import ServerReplyError
from zo_adapt.serve.adapter import REFUSED_BY_VLLM
from zo_adapt.serve.http import Connection
from zo_adapt.serve.loaded_adapters import LoadedAdapters
from zo_adapt.serve.protocol import Candidate, Limits, Scores, ServedModel, Texts, Writing
from zo_adapt.serve.replies import (
    OF_VLLM,
    in_base64,
    next_of,
    options_of,
    scores_of,
    token_ids_of,
    understood,
)
from zo_adapt.serve.soft_prompt import PROMPT

ROWS = 32
"""Most texts of one request."""
_WRITE = "/v1/completions"


class VLLMServer(ServedModel):
    """Serves a model by vLLM on this machine; ``python -m zo_adapt.serve`` prints how to start it.

    Adapters go through private folders (0700, safetensors alone) that are removed as soon as the
    server has read them. What a client of this machine that was killed has left, on disk and on the
    server, goes when the next one starts. Requests are repeated with growing pauses; a server that
    is gone for good raises with its last words. A data-parallel server loads an adapter on one
    replica alone: start one replica for every url.

    A token is read from the environment variable ZO_ADAPT_SERVER_TOKEN.

    Args:
        url: As "http://127.0.0.1:8000"; only of this machine, unless ``remote``.
        adapters: Most adapters at once: what the server was started with (--max-loras).
        rank, target_modules: As it was started with (--max-lora-rank, --lora-target-modules), so
            that an adapter which does not fit is named before any work; None: not checked.
        timeout: Seconds that one answer may take.
        concurrency: Most requests at once.
        remote: Whether the server may be on another machine. It must see the same ``place``.
        embeddings: The base's input embeddings (``embedding_table(folder)``), for soft prompts on a
            server that was started with --enable-prompt-embeds.
        place: Folder for the adapters on their way; None: /dev/shm, or that for temporary files.

    Raises:
        ServerLostError: There is no server.
        ServerReplyError: It serves no base model (when asked: an answer that cannot be right).
        OptionError: The url.
        MissingPackageError: httpx is not installed.

    Example:
        >>> server = VLLMServer("http://127.0.0.1:8000")  # doctest: +SKIP
        >>> evaluator = ServedEvaluator(server)  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        adapters: int = 8,
        rank: int | None = None,
        target_modules: Sequence[str] | None = None,
        timeout: float = 120.0,
        concurrency: int = 8,
        remote: bool = False,
        embeddings: Tensor | None = None,
        place: str | Path | None = None,
    ) -> None:
        self._connection = Connection(url, timeout=timeout, concurrency=concurrency, remote=remote)
        try:
            base = [card for card in self._connection.models() if not card.get("parent")]
            if not base:
                raise ServerReplyError(f"{url} serves adapters alone, and no base model")
            self.model: str = base[0]["id"]
            self._adapters = LoadedAdapters(self._connection, place)
        except BaseException:
            self._connection.close()
            raise
        modules = None if target_modules is None else frozenset(target_modules)
        self._limits = Limits(
            adapters,
            rank,
            modules,
            base[0].get("max_model_len"),
            prompts=embeddings is not None,
            refuses=REFUSED_BY_VLLM,
        )
        self._table, self._prompts = embeddings, dict[str, Tensor]()

    @property
    def limits(self) -> Limits:
        """As given, and the longest text that the server says it reads."""
        return self._limits

    def loaded(self) -> list[str]:
        """The adapters that the server says it has."""
        return self._adapters.on_server()

    def load(self, candidate: Candidate, lora_config: Mapping[str, Any]) -> None:
        """See ``ServedModel``."""
        if PROMPT in candidate.tensors:
            self._prompts[candidate.name] = candidate.tensors[PROMPT]
        else:
            self._adapters.load(candidate, lora_config)

    def score(
        self,
        names: Sequence[str],
        token_ids: Texts,
        *,
        starts: Sequence[int] | None = None,
        others: bool = False,
    ) -> list[Scores]:
        """See ``ServedModel``."""
        # All tokens are scored, whatever starts says.
        asks = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2 if others else 0}
        choices = zip(self._completed(names, token_ids, asks), token_ids, strict=True)
        with understood():
            return [scores_of(choice, text, others) for choice, text in choices]

    def choose(self, names: Sequence[str], token_ids: Texts, choices: Sequence[int]) -> np.ndarray:
        """See ``ServedModel``."""
        asks = {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            "logprob_token_ids": list(choices),
            "return_tokens_as_token_ids": True,
        }
        answers = self._completed(names, token_ids, asks)
        with understood():
            found = [next_of(one, choices) for one in answers]
        if None not in found or self._prompts:
            if None in found:
                raise ServerReplyError(
                    "the server did not give the log-probabilities of the tokens asked for after a "
                    "soft prompt; it takes a vLLM that knows logprob_token_ids"
                )
            return np.array(found).reshape(len(token_ids), len(choices))
        # Each choice is put after each text and scored there.
        texts = [[*text, choice] for text in token_ids for choice in choices]
        scored = self.score([name for name in names for _ in choices], texts)
        values = [float(one.log_probs[-1]) for one in scored]
        return np.array(values).reshape(len(token_ids), len(choices))

    def generate(
        self,
        names: Sequence[str],
        token_ids: Texts,
        writing: Writing,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See ``ServedModel``."""
        asks = {
            "max_tokens": writing.max_new_tokens,
            "temperature": writing.temperature,
            "top_p": writing.top_p,
            "top_k": writing.top_k or -1,
            "stop_token_ids": list(writing.ends),
            "stop": list(writing.stops),
            "include_stop_str_in_output": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **options_of(writing, OF_VLLM),
        }
        draws = writing.temperature > 0
        # A seed belongs to a request: a text that is drawn has one of its own.
        own = [0] * len(names) if seeds is None else [seed % 2**62 for seed in seeds]
        found = self._completed(
            names, token_ids, asks, 1 if draws else ROWS, seeds=own if draws else None
        )
        with understood():
            return [token_ids_of(choice) for choice in found]

    def unload(self, names: Sequence[str]) -> None:
        """See ``ServedModel``."""
        self._adapters.unload([name for name in names if self._prompts.pop(name, None) is None])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See ``ServedModel``."""
        self._adapters.close()
        self._connection.close()

    def _completed(
        self,
        names: Sequence[str],
        token_ids: Texts,
        asks: Mapping[str, Any],
        most: int = ROWS,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[dict[str, Any]]:
        """The server's choices for every text: requests of one adapter each, made at once."""
        portions: list[list[int]] = []
        for name in dict.fromkeys(names):
            mine = [row for row, other in enumerate(names) if other == name]
            portions += [mine[first : first + most] for first in range(0, len(mine), most)]
        calls = []
        for rows in portions:
            name = names[rows[0]]
            is_base = name in ("", *self._prompts)
            body = {
                "model": self.model if is_base else name,
                **self._prompted(name, [token_ids[row] for row in rows]),
                **{name: value for name, value in asks.items() if value is not None},
            }
            if seeds is not None:
                body["seed"] = seeds[rows[0]]
            calls.append(partial(self._choices, body))
        found: dict[int, dict[str, Any]] = {}
        for rows, choices in zip(portions, self._connection.together(calls), strict=True):
            found.update(zip(rows, choices, strict=True))
        return [found[row] for row in range(len(names))]

    def _prompted(self, name: str, texts: Texts) -> dict[str, Any]:
        """The texts as ids, or as embeddings after a soft prompt, in base64 of torch's format."""
        prompt = self._prompts.get(name)
        if prompt is None or self._table is None:
            return {"prompt": [list(text) for text in texts]}
        table = self._table
        rows = [torch.cat([prompt.to(table.dtype), table[list(text)]]) for text in texts]
        return {"prompt_embeds": [in_base64(row) for row in rows]}

    def _choices(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices of one request, put into the order of its texts by their own numbers."""
        try:
            content = self._connection.post(_WRITE, body)
        except ServerReplyError as error:
            if body["model"] in self._adapters.names and " answered 404" in str(error):
                raise ServerReplyError(
                    f"{error}; it was loaded a moment ago. A data-parallel server loads an adapter "
                    "on one replica alone: start one for each url, and give "
                    "ServerPool([VLLMServer(url) for url in urls])"
                ) from error
            raise
        choices, count = content.get("choices"), len(body.get("prompt") or body["prompt_embeds"])
        is_whole = isinstance(choices, list) and all(isinstance(c, dict) for c in choices)
        if not is_whole or sorted(c.get("index", -1) for c in choices) != list(range(count)):
            raise ServerReplyError(
                f"the server answered {count} texts by {json.dumps(content)[:200]}; it is not the "
                "OpenAI interface of vLLM"
            )
        return sorted(choices, key=lambda choice: int(choice["index"]))
