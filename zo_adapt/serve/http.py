"""Requests to a server: repeated with growing pauses where that is safe, its last words kept."""

import os
import random
import time
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from zo_adapt.errors import (
    MissingPackageError,
    OptionError,
    ServedModelError,
    ServerLostError,
    ServerReplyError,
)

TOKEN = "ZO_ADAPT_SERVER_TOKEN"
"""Environment variable with the token of a server that asks for one; never an argument."""
TRIES, FIRST_PAUSE, LONGEST_PAUSE = 6, 0.25, 4.0
BUSY = frozenset({408, 425, 429, 502, 503, 504})
"""Answers after which the same request may well succeed."""
DENIED = frozenset({401, 403})
FAILED = 500
"""Of a question perhaps an accident; of a load it is a refusal."""
LAST_WORDS = 300


class Reply(NamedTuple):
    """What a server answered.

    Args:
        status: Of HTTP.
        content: As JSON, or else as text.
        repeated: Whether the request had been sent before and its answer was lost.
        words: What it says, in short, without the token.
    """

    status: int
    content: Any
    repeated: bool
    words: str


class Connection:
    """A pool of connections to one server.

    Args:
        url: As "http://127.0.0.1:8000". Only this machine, unless ``remote`` says otherwise.
        timeout: Seconds that one answer may take.
        concurrency: Most requests at once.
        remote: Whether the server may be on another machine, which is sent paths and texts.

    Raises:
        OptionError: Another machine, or no http(s) address.
        MissingPackageError: httpx is not installed.
    """

    def __init__(
        self, url: str, *, timeout: float = 120.0, concurrency: int = 8, remote: bool = False
    ) -> None:
        self.url = checked_url(url, remote)
        self._library = _library()
        self._token = _token()
        self._client = self._library.Client(
            base_url=self.url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            trust_env=False,  # no proxy of the environment sees the texts
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="zo-serve")
        self._jitter = random.Random(0)

    def send(
        self, method: str, path: str, body: Any = None, *, busy: Container[int] = BUSY
    ) -> Reply:
        """The answer to one request, repeated with pauses of 0.25, 0.5, 1, 2 and 4 seconds.

        Everything this package sends may be sent twice: texts are only read, and adapters have
        names of their own, so that a second load or unload finds the first one's work.

        Raises:
            ServerLostError: No answer, or none but "busy"; with the server's last words.
        """
        words, trouble, lost = "", "", False
        for number in range(TRIES):
            if number:
                pause = min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE)
                time.sleep(pause * (0.8 + 0.4 * self._jitter.random()))
            try:
                answer = self._client.request(method, path, json=body)
            except self._library.TimeoutException as error:
                raise ServerLostError(
                    f"{self.url}{path} did not answer in time ({error!r:.120}); raise timeout, or "
                    "ask for fewer rows at once (EvaluationOptions(micro_batch_size=...))"
                ) from error
            except self._library.TransportError as error:
                trouble, lost = f"{error!r:.{LAST_WORDS}}", True
                continue
            status, content = answer.status_code, _content(answer)
            reply = Reply(status, content, lost, self._words(status, content))
            if reply.status not in busy:
                return reply
            words = f"its last words: {reply.status} {reply.words}"
        said = "; ".join(filter(None, (words, trouble)))
        raise ServerLostError(f"{self.url}{path} was asked {TRIES} times in vain; {said}")

    def post(self, path: str, body: Any) -> Any:
        """The content of a good answer.

        Raises:
            ServerReplyError: The server refused.
        """
        reply = self.send("POST", path, body, busy=BUSY | {FAILED})
        if reply.status != 200 or not isinstance(reply.content, dict):
            raise ServerReplyError(f"{self.url}{path} answered {reply.status}: {reply.words}")
        return reply.content

    def models(self) -> list[dict[str, Any]]:
        """What the server says it serves, at least one.

        Raises:
            ServerReplyError: It says nothing of the kind.
        """
        reply = self.send("GET", "/v1/models")
        data = reply.content.get("data") if isinstance(reply.content, dict) else None
        found = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
        if reply.status != 200 or not found or not all(card.get("id") for card in found):
            raise ServerReplyError(f"{self.url}/v1/models answered {reply.status}: {reply.words}")
        return found

    def together(self, calls: Iterable[Callable[[], Any]]) -> list[Any]:
        """What calls return, made at once, in their order; all have ended when one has failed."""
        futures = [self._pool.submit(call) for call in calls]
        errors: list[BaseException] = []
        found = []
        for future in futures:
            try:
                found.append(future.result())
            except ServedModelError as error:
                for other in futures:
                    other.cancel()
                errors.append(error)
            except BaseException:
                for other in futures:
                    other.cancel()
                if not future.cancelled():
                    raise
        if errors:
            raise errors[0]
        return found

    def _words(self, status: int, content: Any) -> str:
        if isinstance(content, dict):
            error = content.get("error", content)
            content = error.get("message", error) if isinstance(error, dict) else error
        said = str(content)
        # Some say back what they were sent.
        said = (said.replace(self._token, "***") if self._token else said)[:LAST_WORDS]
        hint = f"; a server's token goes into the variable {TOKEN}" if status in DENIED else ""
        return said + hint

    def close(self) -> None:
        """Close all connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()


def checked_url(url: str, remote: bool) -> str:
    """An address without a slash at its end.

    Raises:
        OptionError: It is none, holds a password or a query, or is of another machine.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except (AttributeError, TypeError, ValueError):  # brackets, or a port beyond 65535
        host = None
    if not host:
        said = "the url, with what may be a password" if "@" in str(url) else f"url={url!r}"
        raise OptionError(f"{said}, is none; give an address such as 'http://127.0.0.1:8000'")
    if parts.username or parts.password:
        raise OptionError(f"the url holds a password; put a token into the variable {TOKEN}")
    if parts.query or parts.fragment:
        raise OptionError(f"the url has more than a path; put a token into the variable {TOKEN}")
    if not remote and not _is_here(host):
        raise OptionError(
            f"url={url!r} is not of this machine; adapters and texts would be sent there: pass "
            "remote=True if that is meant"
        )
    return url.rstrip("/").removesuffix("/v1")


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _library() -> Any:
    """httpx, or its successor of the same interface, which comes with the model hub's client."""
    try:
        import httpx

        return httpx
    except ImportError:
        pass
    try:
        import httpx2

        return httpx2
    except ImportError as error:
        raise MissingPackageError(
            "httpx is not installed; pip install 'zo_adapt[serve]' brings it"
        ) from error


def _content(answer: Any) -> Any:
    try:
        return answer.json()
    except ValueError:
        return answer.text


def _token() -> str:
    """The server's token; none is "".

    Raises:
        OptionError: It cannot be sent. What it is is not said.
    """
    token = os.environ.get(TOKEN, "").strip()  # of a file there is a line's end
    if not (token.isascii() and token.isprintable()):
        raise OptionError(f"the variable {TOKEN} holds characters that no header can; set it anew")
    return token
