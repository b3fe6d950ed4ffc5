"""Small files that a kill leaves old or new, never half, and whose damage is seen."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_adapt.errors import CorruptTrajectoryError, TrajectoryWriteError


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place, whole or not at all.

    Raises:
        TrajectoryWriteError: The folder cannot be written to, or the disk is full; what was there
            is there still.
    """
    scratch = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(data)
            os.replace(scratch, path)  # renaming is atomic
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TrajectoryWriteError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written and has "
            "room"
        ) from error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Keep a state, as JSON with its checksum.

    Raises:
        TrajectoryWriteError: See ``replace_file``.
    """
    checksum = zlib.crc32(json.dumps(state).encode())
    replace_file(path, json.dumps({"crc32": checksum, "state": state}).encode())


def read_state(path: Path) -> dict[str, Any]:
    """The state that ``write_state`` kept.

    Raises:
        CorruptTrajectoryError: It is damaged.
    """
    try:
        kept = json.loads(path.read_bytes())
        state: dict[str, Any] = kept["state"]
        whole = zlib.crc32(json.dumps(state).encode()) == kept["crc32"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CorruptTrajectoryError(f"{path} is damaged (checksum); resume from another copy")
    return state
