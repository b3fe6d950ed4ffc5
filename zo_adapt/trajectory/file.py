"""The trajectory file: a whole fine-tune as the terms of its updates.

Layout, little-endian:

    magic "zo_traj" + format version (u8)
    length (u32), header as JSON in UTF-8, crc32 (u32)
    one record a step: length (u16), its check (u8), payload, crc32 (u32)

What a payload holds is in ``record``. The header says which view, noise, start and seeds the run
had, so that a file is replayed without the optimizer that wrote it.

A record's checksum starts from the one before it, so that a record which is changed, lost or moved
breaks the chain. A tail that is cut off in the middle of a record (a kill while it was written) is
dropped with a notice; everything before it is whole. A step with one direction takes 54 bytes, 62
where its decay is not the header's rate times lr; every further direction 8.
"""

import errno
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zo_adapt.errors import (
    CorruptTrajectoryError,
    TrajectoryError,
    TrajectoryWriteError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.noise.seeds import NAME, Seeds
from zo_adapt.step import Step
from zo_adapt.trajectory.record import MOST_GROUPS, decoded, encoded
from zo_adapt.trajectory.safe_file import replace_file

MAGIC = b"zo_traj"
VERSION = 2
_HEAD = struct.Struct("<HB")
_LARGEST = 0xFFFF
_U32 = struct.Struct("<I")


class Position(NamedTuple):
    """A place between two records: byte offset and the checksum that the next one starts from."""

    offset: int
    checksum: int


class Writer:
    """Appends records; what was appended survives a kill of the process.

    Args:
        path: The file.
        header: What ``replay.header_of`` gives, or the file's own with ``at``.
        at: Go on from here; what follows is cut off. None: the file is begun anew.

    Raises:
        TrajectoryWriteError: The folder cannot be written to, the disk is full, or the view has
            more groups than a record can name.
    """

    def __init__(
        self, path: str | Path, header: Mapping[str, Any], at: Position | None = None
    ) -> None:
        self.path, self._seeds = Path(path), seeds_of(header, path)
        self._rate = decay_rate(header)
        if len(header["groups"]) > MOST_GROUPS:
            raise TrajectoryWriteError(
                f"a view of {len(header['groups'])} groups; a trajectory can name {MOST_GROUPS}"
            )
        if at is None:
            text = json.dumps(header, sort_keys=True).encode()
            start = MAGIC + bytes([VERSION]) + _U32.pack(len(text)) + text
            at = Position(len(start) + _U32.size, zlib.crc32(start))
            replace_file(self.path, start + _U32.pack(at.checksum))
        self.go_back(at)

    def go_back(self, position: Position) -> None:
        """Drop every record after a position.

        Raises:
            TrajectoryWriteError: The file cannot be written to.
        """
        try:
            os.truncate(self.path, position.offset)
        except OSError as error:
            raise TrajectoryWriteError(f"cannot write {self.path}: {error.strerror}") from error
        self.position = position

    def append(self, step: Step, drawn: int = 0) -> None:
        """Write one record, whole or not at all.

        Args:
            step: What the step did.
            drawn: Seeds of the run's stream drawn so far; one that is not among the latest of them
                takes 8 bytes more.

        Raises:
            TrajectoryWriteError: The disk is full; the file ends with the record before.
        """
        fits = 8 * len(step.update.terms) <= _LARGEST
        payload = encoded(step, self._seeds, drawn, self._rate) if fits else b""
        if not fits or len(payload) > _LARGEST:
            raise TrajectoryWriteError(
                f"a step of {len(step.update.terms)} terms does not fit a record of {_LARGEST} "
                "bytes; use fewer directions a step"
            )
        head = _HEAD.pack(len(payload), _length_check(len(payload)))
        self._write(head + payload, zlib.crc32(head + payload, self.position.checksum))

    def _write(self, data: bytes, checksum: int) -> None:
        data += _U32.pack(checksum)
        offset = self.position.offset
        try:
            # Opened for every record (20 us): no handle is left behind, however a run ends.
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(offset)
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(offset)
                    raise
        except OSError as error:
            raise TrajectoryWriteError(
                f"cannot write {self.path}: {error.strerror}; the steps before are safe. Free "
                "some room and resume"
            ) from error
        self.position = Position(offset + len(data), checksum)


def seeds_of(header: Mapping[str, Any], path: str | Path) -> Seeds:
    """The stream that the records' counters refer to.

    Raises:
        TrajectoryError: Of a kind that is not known.
    """
    name, key = header["seeds"]
    if name != NAME:
        raise TrajectoryError(
            f"{path} draws its seeds by {name!r}, this package by {NAME!r}; use the version of "
            "zo_adapt that wrote it"
        )
    return Seeds(key)


def decay_rate(header: Mapping[str, Any]) -> float:
    """The weight decay of the run: a step's decay is 1 - lr * rate, or is written down."""
    return float(header.get("settings", {}).get("weight_decay", 0.0))


class Reader:
    """The header of a trajectory and its records, verified as they are read.

    Args:
        path: The file.

    Raises:
        TrajectoryError: Not a trajectory, or of a format version that is not known.
        CorruptTrajectoryError: The header is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.header, self.start = self._read_header(file)
        self._seeds = seeds_of(self.header, self.path)

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, Any], Position]:
        start = file.read(len(MAGIC) + 1 + _U32.size)
        if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 1 + _U32.size:
            raise TrajectoryError(f"{self.path} is not a trajectory file")
        if start[len(MAGIC)] != VERSION:
            raise TrajectoryError(
                f"{self.path} has format version {start[len(MAGIC)]}, this package reads "
                f"{VERSION}; use the version of zo_adapt that wrote it"
            )
        (length,) = _U32.unpack_from(start, len(MAGIC) + 1)
        text, stored = file.read(length), file.read(_U32.size)
        checksum = zlib.crc32(start + text)
        if stored != _U32.pack(checksum):
            raise CorruptTrajectoryError(f"the header of {self.path} is damaged (checksum)")
        header: dict[str, Any] = json.loads(text)
        return header, Position(file.tell(), checksum)

    def steps(self) -> Iterator[tuple[Step, Position]]:
        """Every record, and the place after it.

        Raises:
            CorruptTrajectoryError: A record is damaged, missing or out of order.
        """
        number, position, rate = 0, self.start, decay_rate(self.header)
        with open(self.path, "rb") as file:
            file.seek(position.offset)
            while (record := self._read_record(file, position)) is not None:
                payload, position = record
                number += 1
                yield decoded(number, payload, self._seeds, rate), position

    def _read_record(self, file: BinaryIO, at: Position) -> tuple[bytes, Position] | None:
        head = file.read(_HEAD.size)
        if not head:
            return None
        length = 0
        if len(head) == _HEAD.size:
            length, check = _HEAD.unpack(head)
            if _length_check(length) != check:
                raise CorruptTrajectoryError(f"{self.path}: damaged at byte {at.offset} (length)")
        rest = file.read(length + _U32.size)
        if len(head) < _HEAD.size or len(rest) < length + _U32.size:
            warnings.warn(
                f"{self.path} ends in the middle of a record; its last {len(head) + len(rest)} "
                "bytes are dropped, every step before them is whole",
                TruncatedTrajectoryWarning,
                stacklevel=4,
            )
            return None
        checksum = zlib.crc32(head + rest[:length], at.checksum)
        if rest[length:] != _U32.pack(checksum):
            raise CorruptTrajectoryError(f"{self.path}: damaged at byte {at.offset} (checksum)")
        return rest[:length], Position(file.tell(), checksum)


def _length_check(length: int) -> int:
    """A byte by which a damaged length is not taken for a tail that was cut off."""
    return (length ^ length >> 8 ^ 0xA5) & 0xFF


def columns(path: str | Path) -> dict[str, list[Any]]:
    """The records as columns, for a table or a plot: ``pandas.DataFrame(columns(path))``.

    Args:
        path: A trajectory file.

    Returns:
        step, queries, value, lr, projected_gradient, decay, kind and number of terms, one entry a
        step.
    """
    steps = [step for step, _ in Reader(path).steps()]
    return {
        "step": [s.step for s in steps],
        "queries": [s.queries for s in steps],
        "value": [s.value for s in steps],
        "lr": [s.lr for s in steps],
        "projected_gradient": [s.projected_gradient for s in steps],
        "decay": [s.update.decay for s in steps],
        "kind": [s.kind for s in steps],
        "terms": [len(s.update.terms) for s in steps],
    }
