"""Writes a trajectory, record by record, as the only one who does."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_adapt.errors import TrajectoryWriteError
from zo_adapt.term import Step
from zo_adapt.trajectory.file import (
    HEAD,
    MAGIC,
    U32,
    VERSION,
    Position,
    decay_rate,
    length_check,
    seeds_of,
)
from zo_adapt.trajectory.owned_file import OwnedFile
from zo_adapt.trajectory.record import LARGEST, MOST_GROUPS, encoded
from zo_adapt.trajectory.safe_file import as_json


class Writer:
    """Appends records; what was appended survives a kill of the process.

    The file is locked until ``close``. Before every record it is looked at: one that was replaced,
    shortened or deleted is an error.

    Args:
        path: The file.
        header: What ``replay.header_of`` gives, or the file's own with ``at``.
        at: Go on from here; what follows is cut off. None: the file is begun anew.
        file: The file, where the caller has locked it already.
        replace: Whether a file that is begun anew may take the place of another.
        fsync: See ``TrajectoryFile``.

    Raises:
        TrajectoryWriteError: The folder cannot be written to, the disk is full, or the view has
            more groups than a record can name.
        TrajectoryInUseError: Another run is writing it.
    """

    def __init__(
        self,
        path: str | Path,
        header: Mapping[str, Any],
        at: Position | None = None,
        *,
        file: OwnedFile | None = None,
        replace: bool = True,
        fsync: bool = False,
    ) -> None:
        self.path, self._seeds = Path(path), seeds_of(header, path)
        self._rate = decay_rate(header)
        if len(header["groups"]) > MOST_GROUPS:
            raise TrajectoryWriteError(
                f"a view of {len(header['groups'])} groups; a trajectory can name {MOST_GROUPS}"
            )
        if at is None:
            text = as_json(header)
            start = MAGIC + bytes([VERSION]) + U32.pack(len(text)) + text
            at = Position(len(start) + U32.size, zlib.crc32(start))
            data = start + U32.pack(at.checksum)
            replaced = file
            file = OwnedFile.created(self.path, data, replace=replace, fsync=fsync)
            if replaced is not None:
                replaced.close()
        self._file = file or OwnedFile(self.path, fsync=fsync)
        self.go_back(at)

    def go_back(self, position: Position) -> None:
        """Drop every record after a position.

        Raises:
            TrajectoryWriteError: The file cannot be written to.
        """
        self._file.cut(position.offset)
        self.position = position

    def append(self, step: Step, drawn: int = 0) -> None:
        """Write one record, whole or not at all.

        Args:
            step: What the step did.
            drawn: Seeds of the run's stream drawn so far; one that is not among the latest of them
                takes 8 bytes more.

        Raises:
            TrajectoryWriteError: The disk is full, another program changed the file, or the step
                has too many terms; the file ends with the record before.
        """
        check_terms_fit(len(step.update.terms))
        payload = encoded(step, self._seeds, drawn, self._rate)
        if len(payload) > LARGEST:
            raise too_large(len(step.update.terms))
        record = HEAD.pack(len(payload), length_check(len(payload))) + payload
        checksum = zlib.crc32(record, self.position.checksum)
        record += U32.pack(checksum)
        self._file.append(record, self.position.offset)
        self.position = Position(self.position.offset + len(record), checksum)

    def close(self) -> None:
        """Give the file up, for others to go on with."""
        self._file.close()


def check_terms_fit(terms: int) -> None:
    """Refuse a step of more terms than a record can hold."""
    if 8 * terms > LARGEST:
        raise too_large(terms)


def too_large(terms: int) -> TrajectoryWriteError:
    """The error for a step that no record can hold."""
    return TrajectoryWriteError(
        f"a step of {terms} terms does not fit a record of {LARGEST} bytes; use fewer directions a "
        "step, or no trajectory"
    )
