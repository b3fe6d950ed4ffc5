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

import json
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zo_adapt.errors import (
    CorruptTrajectoryError,
    TrajectoryError,
    TruncatedTrajectoryWarning,
)
from zo_adapt.noise.seeds import NAME, Seeds
from zo_adapt.term import Step
from zo_adapt.trajectory.header import check_header_form, check_step_form
from zo_adapt.trajectory.record import decoded

MAGIC = b"zo_traj"
VERSION = 2
HEAD = struct.Struct("<HB")
U32 = struct.Struct("<I")


class Position(NamedTuple):
    """A place between two records: byte offset and the checksum that the next one starts from."""

    offset: int
    checksum: int


@dataclass(frozen=True)
class TrajectoryFile:
    """A trajectory's file, and how safe it is to be; accepted wherever a path is.

    A step that was written survives a kill of the process at any moment, in any case. A loss of
    power, or a crash of the system, may take what the disk had not yet been given, usually the last
    seconds. What is there can then be replayed (a record cut in half is dropped), but not always
    resumed, for the state beside the file may be of another step. With ``fsync`` the disk has every
    step before its weights move, and both are there afterwards; a step takes as much longer as the
    disk needs, some milliseconds.

    Args:
        path: Where; "~" is the home folder. Beside it lies PATH.state, replaced every step.
        fsync: Wait for the disk at every step.

    Example:
        >>> TrajectoryFile("run.zot", fsync=True).state.name
        'run.zot.state'
    """

    path: str | Path
    fsync: bool = False

    @property
    def place(self) -> Path:
        """The file's path, a home folder written out."""
        return Path(self.path).expanduser()

    @property
    def state(self) -> Path:
        """The path of the state that a run goes on from."""
        return self.place.with_name(self.place.name + ".state")


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

    Raises:
        TrajectoryError: Not a trajectory, or of a format version that is not known.
        CorruptTrajectoryError: The header is damaged, or no header.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.header, self.start = self._read_header(file)
        self._seeds = seeds_of(self.header, self.path)

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, Any], Position]:
        start = file.read(len(MAGIC) + 1 + U32.size)
        if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 1 + U32.size:
            raise TrajectoryError(f"{self.path} is not a trajectory file")
        if start[len(MAGIC)] != VERSION:
            raise TrajectoryError(
                f"{self.path} has format version {start[len(MAGIC)]}, this package reads "
                f"{VERSION}; use the version of zo_adapt that wrote it"
            )
        (length,) = U32.unpack_from(start, len(MAGIC) + 1)
        text, stored = file.read(length), file.read(U32.size)
        checksum = zlib.crc32(start + text)
        if stored != U32.pack(checksum):
            raise CorruptTrajectoryError(f"the header of {self.path} is damaged (checksum)")
        try:
            header: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptTrajectoryError(
                f"the header of {self.path} is no JSON ({type(error).__name__}: {error})"
            ) from error
        check_header_form(header, self.path)
        return header, Position(file.tell(), checksum)

    def steps(
        self, start: Position | None = None, number: int = 0, *, is_growing: bool = False
    ) -> Iterator[tuple[Step, Position]]:
        """Every record, and the place after it.

        Args:
            start: A place to begin at; None: the first record.
            number: Of the step before that place.
            is_growing: A record that is cut off at the end is still being written: no warning.

        Raises:
            CorruptTrajectoryError: A record is damaged, missing or out of order, or says what no
                run writes: NaN, an unknown group.
        """
        position, rate = start or self.start, decay_rate(self.header)
        groups = len(self.header["groups"])
        with open(self.path, "rb") as file:
            file.seek(position.offset)
            while (record := self._read_record(file, position, is_growing)) is not None:
                payload, position = record
                number += 1
                yield self._decoded(number, payload, rate, groups), position

    def _decoded(self, number: int, payload: bytes, rate: float, groups: int) -> Step:
        """The step of a payload whose checksum is right, which says nothing of its sense."""
        try:
            step = decoded(number, payload, self._seeds, rate)
            check_step_form(step, groups)
        except (struct.error, ValueError, OverflowError) as error:
            raise CorruptTrajectoryError(
                f"{self.path}: the record of step {number} makes no sense ({error}); nothing was "
                "applied"
            ) from error
        return step

    def _read_record(
        self, file: BinaryIO, at: Position, is_growing: bool
    ) -> tuple[bytes, Position] | None:
        head = file.read(HEAD.size)
        if not head:
            return None
        length = 0
        if len(head) == HEAD.size:
            length, check = HEAD.unpack(head)
            if length_check(length) != check:
                raise CorruptTrajectoryError(f"{self.path}: damaged at byte {at.offset} (length)")
        rest = file.read(length + U32.size)
        if len(head) < HEAD.size or len(rest) < length + U32.size:
            if is_growing:
                return None
            warnings.warn(
                f"{self.path} ends in the middle of a record; its last {len(head) + len(rest)} "
                "bytes are dropped, every step before them is whole",
                TruncatedTrajectoryWarning,
                stacklevel=4,
            )
            return None
        checksum = zlib.crc32(head + rest[:length], at.checksum)
        if rest[length:] != U32.pack(checksum):
            raise CorruptTrajectoryError(f"{self.path}: damaged at byte {at.offset} (checksum)")
        return rest[:length], Position(file.tell(), checksum)


def length_check(length: int) -> int:
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
