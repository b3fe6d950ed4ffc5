"""The adapters of this process on a vLLM server: loaded by name, unloaded, none left behind.

They get there by way of folders on this machine: private, short-lived, safetensors.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_adapt.errors import NotServableError, ServedModelError, ServerReplyError
from zo_adapt.serve.http import Connection
from zo_adapt.serve.protocol import Candidate

_ROOT, _LIST = "zo_adapt-{user}", ".loaded"
_OWNED = re.compile(r"(\d+)-(\d+)-[0-9a-z_]+")


class Folders:
    """One private folder of this process, in memory (/dev/shm) where there is such a place.

    What a killed process has left behind is removed when the next one begins, and what it has left
    on a server is known: beside the folder lies a list of what was loaded there.

    Args:
        place: Where; None: /dev/shm, or else the folder for temporary files.
    """

    def __init__(self, place: str | Path | None = None) -> None:
        root = Path(place) if place is not None else _usual_place()
        self._root = root / _ROOT.format(user=os.getuid() if hasattr(os, "getuid") else "user")
        _make_private(self._root)
        remove_orphans(self._root)
        prefix = f"{os.getpid()}-{_started(os.getpid())}-"
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self._root))  # 0700
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._list = self.path.with_suffix(_LIST)

    def write(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
        """An adapter as peft saves it, in a new folder of 0700."""
        from safetensors.torch import save_file

        folder = self.path / name
        folder.mkdir(mode=0o700)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def remove(self, name: str) -> None:
        """Remove one adapter; servers have read it whole when they say that it is loaded."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def note_loaded(self, url: str, names: Sequence[str]) -> None:
        """Write down what is on a server, in place of what was: for the next client, after a kill.

        Args:
            url: Of the server.
            names: Of the adapters; none: the list is removed.
        """
        if not names:
            self._list.unlink(missing_ok=True)
            return
        scratch = self._list.with_suffix(".new")
        scratch.write_text("\n".join((url, *names)))  # in a folder of 0700
        scratch.replace(self._list)  # a kill leaves the old list or the new one

    def left_on(self, url: str) -> dict[Path, list[str]]:
        """Names that processes which are gone have left on a server, by the file they are in."""
        left = {}
        for file in self._root.glob(f"*{_LIST}"):
            try:
                there, *names = file.read_text().splitlines()
            except (OSError, ValueError):  # another client has just removed it
                continue
            if there == url and _is_orphan(file.stem):
                left[file] = names
        return left

    def close(self) -> None:
        """Remove all of them; at the latest when this process ends."""
        self._remove()


def remove_orphans(root: Path) -> list[str]:
    """Remove folders whose process is gone; their names."""
    gone = []
    for folder in root.iterdir():
        if _is_orphan(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder.name)
    return gone


def _is_orphan(name: str) -> bool:
    """Whether a folder's process is gone."""
    found = _OWNED.fullmatch(name)
    # A number may belong to another process by now: that began at another time.
    return found is not None and _started(int(found[1])) != int(found[2])


def _usual_place() -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _make_private(folder: Path) -> None:
    """A folder that is ours alone.

    Raises:
        PermissionError: Another user has made it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user; remove it, or set TMPDIR")
    folder.chmod(0o700)


def _started(process: int) -> int:
    """When a process began, in ticks since the machine did; 0 where it is gone or not known."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0 if not _runs(process) else 1
    return int(text.rpartition(")")[2].split()[19])


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
