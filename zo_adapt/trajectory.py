"""The trajectory file: a whole fine-tune as the terms of its updates.

Layout, little-endian:

    magic "zo_traj" + format version (u8)
    length (u32), header as JSON in UTF-8, crc32 (u32)
    one record a step: length (u16), its check (u8), payload, crc32 (u32)

A record's checksum starts from the one before it, so that a record which is changed, lost or moved
breaks the chain. A tail that is cut off in the middle of a record (a kill while it was written) is
dropped with a notice; everything before it is whole. A step of one term takes 55 bytes, with a
weight decay 63.
"""

import errno
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zo_adapt.errors import (
    CorruptTrajectoryError,
    TrajectoryError,
    TrajectoryWriteError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.term import Term, Update

MAGIC = b"zo_traj"
VERSION = 1
_KINDS = ("minibatch", "snapshot")
_WHOLE_VIEW = 255  # stands for a term without a group
_HEAD = struct.Struct("<HB")
_STEP = struct.Struct("<IHdddB")  # queries in 48 bits; the number of the step is its place
_DECAY = struct.Struct("<d")
_TERM = struct.Struct("<QdB")
_U32 = struct.Struct("<I")


class Step(NamedTuple):
    """One record: what one step did.

    Args:
        step: Number of the step, from 1.
        queries: Forwards of one sample so far.
        value: Mean loss of the step's batch.
        lr: Learning rate applied.
        projected_gradient: Root mean square of the step's projected gradients.
        update: The terms applied, and the decay.
        kind: "minibatch" or "snapshot".
    """

    step: int
    queries: int
    value: float
    lr: float
    projected_gradient: float
    update: Update
    kind: str = "minibatch"

    def to_bytes(self) -> bytes:
        """The payload of the record."""
        terms, decay = self.update
        flags = _KINDS.index(self.kind) | (2 if decay != 1.0 else 0)
        low, high = self.queries & 0xFFFFFFFF, self.queries >> 32
        parts = [_STEP.pack(low, high, self.value, self.lr, self.projected_gradient, flags)]
        if decay != 1.0:
            parts.append(_DECAY.pack(decay))
        for seed, coefficient, group in terms:
            parts.append(_TERM.pack(seed, coefficient, _WHOLE_VIEW if group is None else group))
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, number: int, payload: bytes) -> "Step":
        """Step ``number`` from a payload whose checksum was right."""
        low, high, value, lr, projected, flags = _STEP.unpack_from(payload)
        offset, decay = _STEP.size, 1.0
        if flags & 2:
            (decay,) = _DECAY.unpack_from(payload, offset)
            offset += _DECAY.size
        terms = tuple(
            Term(seed, coefficient, None if group == _WHOLE_VIEW else group)
            for seed, coefficient, group in _TERM.iter_unpack(payload[offset:])
        )
        update = Update(terms, decay)
        queries = high << 32 | low
        return cls(number, queries, value, lr, projected, update, _KINDS[flags & 1])


class Position(NamedTuple):
    """A place between two records: byte offset and the checksum that the next one starts from."""

    offset: int
    checksum: int


class Writer:
    """Appends records; what was appended survives a kill of the process.

    Args:
        path: The file.
        header: Written if ``at`` is None; the file is begun anew.
        at: Go on from here; what follows is cut off.

    Raises:
        TrajectoryWriteError: The folder cannot be written to, or the disk is full.
    """

    def __init__(
        self, path: str | Path, header: dict[str, Any], at: Position | None = None
    ) -> None:
        self.path = Path(path)
        self.position = at or Position(0, 0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "r+b" if at else "wb") as file:
                file.truncate(self.position.offset)
        except OSError as error:
            raise TrajectoryWriteError(
                f"cannot write {self.path}: {error.strerror}; choose a folder that can be written"
            ) from error
        if at is None:
            text = json.dumps(header, sort_keys=True).encode()
            start = MAGIC + bytes([VERSION]) + _U32.pack(len(text)) + text
            self._write(start, zlib.crc32(start))

    def append(self, step: Step) -> None:
        """Write one record, whole or not at all.

        Raises:
            TrajectoryWriteError: The disk is full; the file ends with the record before.
        """
        payload = step.to_bytes()
        if len(payload) > 0xFFFF:
            raise TrajectoryWriteError(
                f"a step of {len(step.update.terms)} terms does not fit a record; use fewer than "
                f"{0xFFFF // _TERM.size} directions a step"
            )
        head = _HEAD.pack(len(payload), _length_check(len(payload)))
        self._write(head + payload, zlib.crc32(head + payload, self.position.checksum))

    def _write(self, data: bytes, checksum: int) -> None:
        data += _U32.pack(checksum)
        offset = self.position.offset
        # Opened for every record (20 us): no handle is left behind, however a run ends.
        with open(self.path, "r+b", buffering=0) as file:
            try:
                file.seek(offset)
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                file.truncate(offset)
                raise TrajectoryWriteError(
                    f"cannot write {self.path}: {error.strerror}; the steps before are safe. Free "
                    "some room and resume"
                ) from error
        self.position = Position(offset + len(data), checksum)


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
        number, position = 0, self.start
        with open(self.path, "rb") as file:
            file.seek(position.offset)
            while (record := self._read_record(file, position)) is not None:
                payload, position = record
                number += 1
                yield Step.from_bytes(number, payload), position

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


if __name__ == "__main__":
    from zo_adapt.trajectory_tools import main

    main()
