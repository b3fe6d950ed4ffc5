"""The adapters of this process on a vLLM server: loaded by name, unloaded, none left behind."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zo_adapt.errors import NotServableError, ServedModelError, ServerReplyError
from zo_adapt.serve.folders import Folders
from zo_adapt.serve.http import Connection
from zo_adapt.serve.protocol import Candidate

logger = logging.getLogger(__name__)
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class LoadedAdapters:
    """Adapters pass through private folders, each removed as soon as the server has read it.

    Those of clients of this machine that were killed, or did not close, are unloaded at once.

    Args:
        connection: To the server.
        place: Where the folders lie, as for ``Folders``.

    Attributes:
        names: Of those that were loaded and not unloaded.
    """

    def __init__(self, connection: Connection, place: str | Path | None = None) -> None:
        self._connection, self._folders = connection, Folders(place)
        self.names: list[str] = []
        self._unload_left()

    def on_server(self) -> list[str]:
        """All that the server says it has, whoever loaded them."""
        return [card["id"] for card in self._connection.models() if card.get("parent")]

    def load(self, candidate: Candidate, lora_config: Mapping[str, Any]) -> None:
        """Load one.

        Raises:
            NotServableError: The server loads none at run time.
            ServerReplyError: It refuses this one.
        """
        folder = self._folders.write(candidate.name, candidate.tensors, lora_config)
        body = {"lora_name": candidate.name, "lora_path": str(folder)}
        self._note([*self.names, candidate.name])  # before the server knows it: a kill may come
        try:
            reply = self._connection.send("POST", _LOAD, body)
        finally:
            self._folders.remove(candidate.name)
        # Of a name that is ours alone, "loaded already" means that an answer was lost.
        is_there = reply.status == 400 and reply.repeated and candidate.name in self.on_server()
        if reply.status == 200 or is_there:
            return
        self._note([name for name in self.names if name != candidate.name])
        if reply.status == 404 and "lora_path" not in reply.words:
            raise NotServableError(
                f"{self._connection.url} loads no adapters at run time ({reply.words}); start it "
                "with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
            )
        raise ServerReplyError(f"the adapter was not loaded: {reply.status} {reply.words}")

    def unload(self, names: Sequence[str]) -> None:
        """Unload some; one that is not there is no error.

        Raises:
            ServerReplyError: The server keeps one; the others are unloaded.
        """
        gone, refused = set[str](), ""
        for name in names:
            reply = self._connection.send("POST", _UNLOAD, {"lora_name": name})
            if reply.status in (200, 404):
                gone.add(name)
            else:
                refused = f"{name!r} was not unloaded: {reply.status} {reply.words}"
        self._note([name for name in self.names if name not in gone])
        if refused:
            raise ServerReplyError(refused)

    def close(self) -> None:
        """Unload what is left, and remove the folders."""
        with suppress(ServedModelError):  # it is gone, and its adapters with it
            self.unload(list(self.names))
        self._folders.close()

    def _note(self, names: list[str]) -> None:
        self.names = names
        self._folders.note_loaded(self._connection.url, names)

    def _unload_left(self) -> None:
        """Unload what clients of this machine have left that were killed, or did not close."""
        for file, names in self._folders.left_on(self._connection.url).items():
            try:
                there = set(self.on_server())
                self.unload([name for name in names if name in there])
            except ServedModelError as error:  # the next client tries again
                logger.warning("what a dead client has left was not unloaded: %s", error)
                continue
            file.unlink(missing_ok=True)
