"""A server on the loopback that speaks as vLLM does, with a switch for everything that goes wrong.

The model is a toy whose scores are exact: token t after s has the log-probability of a softmax over
``VOCABULARY`` tokens of a table, moved by the adapter's B A (its sum over layers, folded).
"""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

VOCABULARY, EOS = 64, 2


@dataclass
class Faults:
    """What goes wrong; nothing by default.

    Args:
        busy: So many requests are answered by 503 before one is served.
        lost: The answers of so many requests are lost after the work was done.
        dies_after: Completions that are answered before the server is gone.
        slow: Seconds that each completion takes.
        shuffled: Choices come in another order (with their index).
        misnumbered: ... or with wrong numbers.
        ignores: Adapters are loaded and not applied.
        leaves_out: Nor is what they have for layers of this name.
        stale: An adapter answers as the first one that was ever loaded.
        sticky: Unloaded adapters still answer.
        coarse: Scores are rounded to multiples of this.
        company: Scores depend on how many texts a request has.
        swaps: Two texts of a request are answered for each other.
        lies: "tokens": other tokens are scored; "positive": numbers that are no log-probabilities;
            "short": too few; "nan"; "null": none; "words"; "long": more is written than asked for;
            "cut": half of the answer.
        refuses: Every load is refused, with these words.
        keeps: It does not unload.
        lists: Unloaded adapters are still listed.
        uneven: An adapter has so much more effect than the one loaded before it.
        of_its_own: What any adapter adds to the logits of even tokens.
        echoes: Every request is refused, by what it was sent.
        spins: After a refused load every completion takes so many seconds.
        caches: Texts of so many tokens are answered from a cache that knows no adapters; 0: none.
        replicas: Requests go to one after the other, and each knows the adapters it was sent.
        aliases: More names of the base.
        positions: Longest text.
        old: Its version does not know logprob_token_ids.
        no_runtime: There is no route to load adapters.
    """

    busy: int = 0
    lost: int = 0
    dies_after: int | None = None
    slow: float = 0.0
    shuffled: bool = False
    misnumbered: bool = False
    ignores: bool = False
    leaves_out: str = ""
    stale: bool = False
    sticky: bool = False
    coarse: float = 0.0
    company: bool = False
    swaps: bool = False
    lies: str = ""
    refuses: str = ""
    keeps: bool = False
    lists: bool = False
    uneven: float = 0.0
    of_its_own: float = 0.0
    echoes: int = 0
    spins: float = 0.0
    caches: int = 0
    replicas: int = 1
    aliases: tuple[str, ...] = ()
    positions: int = 128
    old: bool = False
    no_runtime: bool = False


@dataclass
class Fake:
    """The server's state, for tests to look at."""

    url: str
    faults: Faults
    loaded: dict[str, np.ndarray] = field(default_factory=dict)
    ever: list[str] = field(default_factory=list)
    requests: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    most: int = 0
    completions: int = 0
    forgotten: dict[str, np.ndarray] = field(default_factory=dict)
    first: np.ndarray | None = None
    was_refused: bool = False
    place: dict[str, int] = field(default_factory=dict)
    cache: dict[tuple[int, ...], Any] = field(default_factory=dict)


def table() -> np.ndarray:
    """Logits of the next token by the last one."""
    return np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY))


def embeddings() -> np.ndarray:
    """What the toy takes for its input embeddings: of (tokens, 16)."""
    return np.random.default_rng(1).normal(size=(VOCABULARY, 16))


def folded(path: Path, leaves_out: str = "") -> np.ndarray:
    """What an adapter adds to the logits: its products, scaled, folded into the table's shape."""
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    total = np.zeros((VOCABULARY, VOCABULARY))
    for name, a in sorted(tensors.items()):
        if ".lora_A." in name and name.split(".")[-3] != leaves_out:
            b = tensors[name.replace("lora_A", "lora_B")]
            product = (
                (config["lora_alpha"] / config["r"]) * b.astype(np.float64) @ a.astype(np.float64)
            )
            times = [-(-VOCABULARY // size) for size in product.shape]
            total += np.tile(product, times)[:VOCABULARY, :VOCABULARY]
    return total


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # or every answer waits 40 ms
    fake: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        listed = [*self.fake.loaded, *(self.fake.forgotten if self.fake.faults.lists else ())]
        adapters = [{"id": name, "parent": "toy"} for name in listed]
        positions = self.fake.faults.positions
        names = ("toy", *self.fake.faults.aliases)
        bases = [{"id": name, "max_model_len": positions, "parent": None} for name in names]
        self._answered(200, {"data": [*bases, *adapters]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake, faults = self.fake, self.fake.faults
        fake.requests.append((self.path, body))
        fake.headers.append(dict(self.headers))
        if faults.busy > 0:
            faults.busy -= 1
            self._reply(503, {"error": {"message": "the engine is busy"}})
            return
        answer = self._answer(body)
        if faults.lost > 0:
            faults.lost -= 1
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._answered(*answer)

    def _answered(self, status: int, content: Any) -> None:
        if refusal := self.fake.faults.echoes:
            said = f"not with {self.headers.get('Authorization')}"
            self._reply(refusal, {"error": {"message": said}})
        else:
            self._reply(status, content)

    def _answer(self, body: Any) -> tuple[int, Any]:
        if self.path.endswith("load_lora_adapter") and "unload" not in self.path:
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if self.path.endswith("unload_lora_adapter"):
            return self._unload(body["lora_name"])
        if self.path.endswith("completions"):
            return self._complete(body)
        return 404, {"error": {"message": f"no route {self.path}"}}

    def _load(self, name: str, path: Path) -> tuple[int, Any]:
        fake, faults = self.fake, self.fake.faults
        if faults.no_runtime:
            return 404, {"detail": "Not Found"}
        if faults.refuses:
            fake.was_refused = True
            return 400, {"error": {"message": faults.refuses}}
        if name in fake.loaded:
            return 400, {
                "error": {"message": f"The lora adapter '{name}' has already been loaded."}
            }
        if not path.is_dir():
            return 404, {"error": {"message": f"no lora_path {path}"}}
        fake.modes.append(path.stat().st_mode & 0o777)
        found = folded(path, faults.leaves_out) * (1 + faults.uneven * len(fake.ever))
        found[:, ::2] += faults.of_its_own
        fake.first = found if fake.first is None else fake.first
        fake.place[name] = len(fake.requests) % faults.replicas
        fake.loaded[name] = fake.first if faults.stale else found
        fake.ever.append(name)
        fake.most = max(fake.most, len(fake.loaded))
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> tuple[int, Any]:
        if self.fake.faults.keeps:
            return 500, {"error": {"message": "the adapter is in use"}}
        found = self.fake.loaded.pop(name, None)
        if found is None:
            return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}}
        self.fake.forgotten[name] = found
        return 200, "Success"

    def _complete(self, body: Any) -> tuple[int, Any]:
        fake, faults = self.fake, self.fake.faults
        if faults.dies_after is not None and fake.completions >= faults.dies_after:
            self.server.shutdown_soon()  # type: ignore[attr-defined]
            self.close_connection = True
            return 500, {"error": {"message": "EngineCore encountered an issue: out of memory"}}
        fake.completions += 1
        time.sleep(faults.slow + faults.spins * fake.was_refused)
        adapter = self._adapter(body["model"])
        if adapter is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        logits = table() + (0.0 if faults.ignores else adapter)
        if faults.company:
            logits = logits * (1 + 0.2 * len(body.get("prompt", ())))
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        if faults.coarse:
            logs = np.round(logs / faults.coarse) * faults.coarse
        if "messages" in body or isinstance(body.get("prompt"), str):
            return 200, {"choices": [self._of_text(logs, body)]}
        if "prompt_embeds" in body:
            choices = [self._of_embeddings(i, e, body) for i, e in enumerate(body["prompt_embeds"])]
        else:
            texts = enumerate(body["prompt"])
            choices = [self._kept(i, text, logs, body) for i, text in texts]
        if faults.swaps and len(choices) > 1:
            choices[0], choices[1] = (
                {**choices[1], "index": 0},
                {**choices[0], "index": 1},
            )
        if faults.shuffled:
            choices.reverse()
        if faults.misnumbered:
            choices = [{**choice, "index": 0} for choice in choices]
        return 200, {"choices": choices}

    def _of_embeddings(self, index: int, encoded: str, body: Any) -> dict[str, Any]:
        """The next token after embeddings: scored by the sum of all of them."""
        rows = torch.load(io.BytesIO(base64.b64decode(encoded)), weights_only=True).numpy()
        logits = embeddings() @ rows.mean(0)
        logs = logits - np.log(np.exp(logits).sum())
        tops = {f"token_id:{token}": float(logs[token]) for token in body["logprob_token_ids"]}
        return {"index": index, "token_ids": [0], "logprobs": {"top_logprobs": [tops]}}

    def _of_text(self, logs: np.ndarray, body: Any) -> dict[str, Any]:
        """What any server of the interface knows: words in, words out."""
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        ids = [int(word[1:]) for word in text.split()]
        found = self._choice(0, ids, logs, body | {"stop_token_ids": [EOS]})["token_ids"]
        ended = found[-1] == EOS
        words = " ".join(f"w{token}" for token in found if token > EOS)
        said = {"message": {"content": words}} if "messages" in body else {"text": words}
        return said | {"index": 0, "finish_reason": "stop" if ended else "length"}

    def _adapter(self, name: str) -> np.ndarray | None:
        if name in ("toy", *self.fake.faults.aliases):
            return np.zeros((VOCABULARY, VOCABULARY))
        replica = len(self.fake.requests) % self.fake.faults.replicas
        if self.fake.place.get(name, replica) != replica:
            return None
        found = self.fake.loaded.get(name)
        return self.fake.forgotten.get(name) if found is None and self.fake.faults.sticky else found

    def _kept(self, index: int, text: list[int], logs: np.ndarray, body: Any) -> dict[str, Any]:
        found = self._choice(index, text, logs, body)
        if 0 < self.fake.faults.caches <= len(text):
            found = {**self.fake.cache.setdefault(tuple(text), found), "index": index}
        return found

    def _choice(self, index: int, text: list[int], logs: np.ndarray, body: Any) -> dict[str, Any]:
        lies = self.fake.faults.lies
        said = {"positive": 0.5, "nan": float("nan"), "null": None, "words": "likely"}
        entries: list[Any] = [None]
        for last, token in pairwise(text):
            row = logs[last]
            tokens = {token, *np.argsort(-row)[: body.get("prompt_logprobs", 0)].tolist()}
            if lies == "tokens":
                tokens = {(token + 1) % VOCABULARY}
            entries.append(
                {str(t): {"logprob": said[lies] if lies in said else float(row[t])} for t in tokens}
            )
        entries = entries[:-1] if lies == "short" else entries
        written: list[int] = []
        draw = np.random.default_rng(body["seed"]) if body.get("temperature", 0) > 0 else None
        while len(written) < body["max_tokens"] + 3 * (lies == "long"):
            row = logs[(written or text)[-1]]
            token = int(row.argmax() if draw is None else draw.choice(VOCABULARY, p=np.exp(row)))
            written.append(token)
            if token in body.get("stop_token_ids", []):
                break
        if lies in ("words", "null"):
            written = [said[lies]]
        elif lies == "positive":  # for tokens that is a number below 0
            written = [-5]
        found: dict[str, Any] = {"index": index, "token_ids": written, "text": ""}
        if "logprob_token_ids" in body and not self.fake.faults.old:
            row = logs[text[-1]]
            tops = {
                f"token_id:{token}": said[lies] if lies in said else float(row[token])
                for token in body["logprob_token_ids"]
            }
            found["logprobs"] = {"top_logprobs": [tops]}
        if "prompt_logprobs" in body:
            found["prompt_logprobs"] = entries
        return found

    def _reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        if self.fake.faults.lies == "cut" and self.path.endswith("completions"):
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_soon(self) -> None:
        """Gone after the answers that are under way."""
        threading.Thread(target=self.gone, daemon=True).start()

    def gone(self) -> None:
        self.shutdown()
        self.server_close()


@contextmanager
def fake_server(**faults: Any) -> Iterator[Fake]:
    """A server on a port of its own, until the end."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    fake = Fake(f"http://127.0.0.1:{server.server_address[1]}", Faults(**faults))
    handler.fake = fake  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.gone()
        thread.join()
