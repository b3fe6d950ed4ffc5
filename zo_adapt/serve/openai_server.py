"""A model behind any server of the OpenAI interface: it writes texts, and takes no adapters."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from zo_adapt.errors import NotServableError, ServerReplyError
from zo_adapt.serve.http import Connection
from zo_adapt.serve.protocol import BASE, Candidate, Limits, Scores, ServedModel, Texts, Writing
from zo_adapt.serve.replies import options_of

_TEXTS, _CHATS = "/v1/completions", "/v1/chat/completions"


class OpenAIServer(ServedModel):
    """Serves ``GenerationReward`` where only the prompt side is tuned: its words, the sampling.

    Texts go there and come back as texts, so that nothing but them is needed of the server; a
    tokenizer turns them into the tokens that objectives ask with. A token for the server is read
    from the environment variable ZO_ADAPT_SERVER_TOKEN.

    Args:
        tokenizer: The objective's own.
        url: As "http://127.0.0.1:8000"; only of this machine, unless ``remote``.
        model: Its name there; None: the first that the server lists.
        chat: Whether each prompt is sent as a message of the user (/v1/chat/completions).
        timeout: Seconds that one answer may take.
        concurrency: Most requests at once.
        remote: Whether the server may be on another machine, which is sent the texts.

    Raises:
        ServerLostError: There is no server.
        ServerReplyError: It lists no models.
        OptionError: The url.
        MissingPackageError: httpx is not installed.

    Example:
        >>> server = OpenAIServer(tokenizer, "http://127.0.0.1:8000")  # doctest: +SKIP
        >>> with answered_by(server):  # doctest: +SKIP
        ...     value = reward(rows).mean()
    """

    def __init__(
        self,
        tokenizer: Any,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        chat: bool = False,
        timeout: float = 120.0,
        concurrency: int = 8,
        remote: bool = False,
    ) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._connection = Connection(url, timeout=timeout, concurrency=concurrency, remote=remote)
        try:
            self.model = model or self._connection.models()[0]["id"]
        except BaseException:
            self._connection.close()
            raise

    @property
    def limits(self) -> Limits:
        """No adapters, no scores."""
        return Limits(adapters=0, scores=False)

    def load(self, candidate: Candidate, lora_config: Mapping[str, Any]) -> None:
        """See ``ServedModel``."""
        raise self._refused("takes no adapters")

    def score(
        self,
        names: Sequence[str],
        token_ids: Texts,
        *,
        starts: Sequence[int] | None = None,
        others: bool = False,
    ) -> list[Scores]:
        """See ``ServedModel``."""
        raise self._refused("gives no scores of a text's tokens")

    def choose(self, names: Sequence[str], token_ids: Texts, choices: Sequence[int]) -> np.ndarray:
        """See ``ServedModel``."""
        raise self._refused("gives no scores of given tokens")

    def generate(
        self,
        names: Sequence[str],
        token_ids: Texts,
        writing: Writing,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See ``ServedModel``."""
        if unknown := sorted(set(names) - {BASE}):
            raise ServerReplyError(f"no adapter named {unknown[0]!r} is loaded")
        asks: dict[str, Any] = {
            "model": self.model,
            "max_tokens": writing.max_new_tokens,
            "temperature": writing.temperature,
            "top_p": writing.top_p,
            **options_of(writing, {}),
        }
        if writing.stops:
            asks["stop"] = list(writing.stops)
        if writing.top_k:  # which the interface proper does not have
            asks["top_k"] = writing.top_k
        calls = []
        for row, text in enumerate(token_ids):
            seed = {} if seeds is None else {"seed": seeds[row] % 2**31}
            calls.append(partial(self._written, self._decoded(text), asks | seed, writing))
        return self._connection.together(calls)

    def unload(self, names: Sequence[str]) -> None:
        """See ``ServedModel``."""

    def close(self) -> None:
        """See ``ServedModel``."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoded(self, ids: Sequence[int]) -> str:
        """The text of a prompt; a token that begins every text is the server's to add."""
        begins = getattr(self._tokenizer, "bos_token_id", None)
        own = list(ids[1:] if ids and ids[0] == begins else ids)
        return str(self._tokenizer.decode(own, skip_special_tokens=self._chat))

    def _written(self, text: str, asks: Mapping[str, Any], writing: Writing) -> list[int]:
        if self._chat:
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        else:
            prompt = {"prompt": text}
        content = self._connection.post(_CHATS if self._chat else _TEXTS, {**asks, **prompt})
        try:
            choice = content["choices"][0]
            found = choice["message"]["content"] if self._chat else choice["text"]
            ids = self._tokenizer.encode(found or "", add_special_tokens=False)
        except (KeyError, IndexError, TypeError) as error:
            raise ServerReplyError(
                f"the server answered {str(content)[:200]}; that is not the OpenAI interface"
            ) from error
        # What ended the text is not in it; a stop string is its user's own.
        ended = choice.get("finish_reason") == "stop" and writing.ends and not writing.stops
        return [*ids, writing.ends[0]] if ended else list(ids)

    def _refused(self, what: str) -> NotServableError:
        return NotServableError(
            f"a server of the OpenAI interface {what}; tune what it reads through AskTell and "
            "GenerationReward, or give VLLMServer(url) if it is vLLM"
        )
