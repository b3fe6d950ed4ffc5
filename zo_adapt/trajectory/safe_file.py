"""Small files that a kill leaves old or new, never half, and whose damage is seen.

A new content is written under a name that nobody can guess, in the same folder, and renamed into
place: no link that lies there is followed, no file of the user's is written over. What a killed
process left of that kind is removed by ``remove_scratch``.
"""

import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from zo_adapt.errors import CorruptTrajectoryError, TrajectoryWriteError

_SUFFIX = ".zo-scratch"
_NEW = (
    os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Name what the system says about a file that cannot be written.

    Raises:
        TrajectoryWriteError: In place of an ``OSError``.
    """
    try:
        yield
    except TrajectoryWriteError:
        raise
    except OSError as error:
        raise TrajectoryWriteError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written "
            "and has room"
        ) from error


def new_scratch(path: Path) -> tuple[int, Path]:
    """A new, empty file beside another, open for writing; its descriptor and its name."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
    return os.open(scratch, _NEW, 0o666), scratch


def remove_scratch(path: Path) -> None:
    """Remove what killed processes left of ``new_scratch``; for the only writer of a file."""
    for scratch in path.parent.glob(f".{_escaped(path.name)}.*{_SUFFIX}"):
        scratch.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte where the descriptor stands; a full disk is an ``OSError``."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """Put a file in place, whole or not at all.

    Args:
        path: The file; its folder is made.
        data: What is to be in it.
        fsync: Also after a loss of power: waits for the disk.

    Raises:
        TrajectoryWriteError: The folder cannot be written to, or the disk is full; what was there
            is there still.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = new_scratch(path)
        try:
            try:
                write_all(descriptor, data)
                if fsync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(scratch, path)  # renaming is atomic
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        if fsync:
            sync_folder(path.parent)


def as_json(value: Any) -> bytes:
    """A value as JSON, numpy's numbers as Python's."""
    return json.dumps(value, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r:.80} of type {type(value).__name__} has no form in JSON")


def write_state(path: Path, state: Mapping[str, Any], *, fsync: bool = False) -> None:
    """Keep a state, as JSON with its checksum.

    Raises:
        TrajectoryWriteError: See ``replace_file``.
    """
    text = as_json(state)
    replace_file(path, b'{"crc32": %d, "state": %s}' % (zlib.crc32(text), text), fsync=fsync)


def read_state(path: Path) -> dict[str, Any]:
    """The state that ``write_state`` kept.

    Raises:
        CorruptTrajectoryError: It is damaged.
    """
    try:
        kept = json.loads(path.read_bytes())
        state = kept["state"]
        # Files of the version before were summed in the order in which they were written.
        texts = (as_json(state), json.dumps(state).encode())
        whole = isinstance(state, dict) and kept["crc32"] in map(zlib.crc32, texts)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CorruptTrajectoryError(f"{path} is damaged (checksum); resume from another copy")
    found: dict[str, Any] = state
    return found
