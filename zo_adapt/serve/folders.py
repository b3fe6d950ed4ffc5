"""Folders in which a server on this machine finds adapters: private, short-lived, safetensors."""

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

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
