"""A record of the trajectory: what one step did, as bytes.

Payload, little-endian:

    queries (u48), value, lr, projected gradient (f64 each)
    flags (u8): 1 snapshot; 2 a decay follows; 4 the decay is 1 - lr * rate, the header's rate
    decay (f64), with its flag; 1 without either
    blocks of terms, to the end:
        directions n (u16), groups m (u8), counter of the first direction's seed (u40)
        the m groups (u8) that every direction has a term for, 255 the whole view; m = 0 is that
        where the counter is 2^40 - 1: the n seeds (u64 each)
        the coefficients (f64), direction by direction

A block's seeds are consecutive words of the stream that the header names, or are given one by one.
"""

import itertools
import struct
from collections.abc import Iterator
from typing import NamedTuple

from zo_adapt.noise.seeds import Seeds
from zo_adapt.term import Shift, Step, Term, Terms

_KINDS = ("minibatch", "snapshot")
_STEP = struct.Struct("<IHdddB")
_DECAY = struct.Struct("<d")
_BLOCK = struct.Struct("<HBBI")
_GIVEN = 2**40 - 1
_WHOLE_VIEW = 255
_SNAPSHOT, _DECAYS, _DECAYS_AT_RATE = 1, 2, 4
_FLAGS = {kind | decay for kind in (0, _SNAPSHOT) for decay in (0, _DECAYS, _DECAYS_AT_RATE)}
MOST_GROUPS = 255
"""Groups that a record can tell apart."""
LARGEST = 0xFFFF
"""Bytes of a payload."""


def encoded(step: Step, seeds: Seeds, drawn: int, rate: float = 0.0) -> bytes:
    """The payload of a step.

    Args:
        step: Its number and metrics are not stored: the number is the record's place.
        seeds: The stream that the header names.
        drawn: How many seeds of it were drawn up to this step.
        rate: The weight decay that the header names.
    """
    terms, decay = step.update
    at_rate = decay == 1.0 - step.lr * rate
    flags = _KINDS.index(step.kind) * _SNAPSHOT
    if decay != 1.0:
        flags |= _DECAYS_AT_RATE if at_rate else _DECAYS
    low, high = step.queries & 0xFFFFFFFF, step.queries >> 32
    parts = [_STEP.pack(low, high, step.value, step.lr, step.projected_gradient, flags)]
    if flags & _DECAYS:
        parts.append(_DECAY.pack(decay))
    parts += [block.to_bytes() for block in _blocks(terms, seeds, drawn)]
    return b"".join(parts)


def decoded(number: int, payload: bytes, seeds: Seeds, rate: float = 0.0) -> Step:
    """Step ``number`` from a payload whose checksum was right.

    Raises:
        struct.error: It is shorter than it says.
        ValueError: An unknown flag, a seed beyond the stream.
    """
    low, high, value, lr, projected, flags = _STEP.unpack_from(payload)
    if flags not in _FLAGS:
        raise ValueError(f"unknown flags {flags:#x}")
    offset, decay = _STEP.size, 1.0 - lr * rate if flags & _DECAYS_AT_RATE else 1.0
    if flags & _DECAYS:
        (decay,) = _DECAY.unpack_from(payload, offset)
        offset += _DECAY.size
    terms: list[Term] = []
    while offset < len(payload):
        block, offset = _Block.from_bytes(payload, offset, seeds)
        terms += block.terms()
    update = Shift(tuple(terms), decay)
    queries = high << 32 | low
    return Step(number, queries, value, lr, projected, update, _KINDS[flags & _SNAPSHOT])


class _Block(NamedTuple):
    """Directions over the same groups, with consecutive seeds of the stream (or any, given)."""

    groups: tuple[int, ...]
    first: int
    seeds: list[int]
    coefficients: list[float]

    def terms(self) -> Iterator[Term]:
        groups = [None if group == _WHOLE_VIEW else group for group in self.groups]
        places = itertools.product(self.seeds, groups)
        for (seed, group), coefficient in zip(places, self.coefficients, strict=True):
            yield Term(seed, coefficient, group)

    def to_bytes(self) -> bytes:
        count, first = len(self.seeds), self.first
        groups = b"" if self.groups == (_WHOLE_VIEW,) else bytes(self.groups)
        head = _BLOCK.pack(count, len(groups), first >> 32, first & 0xFFFFFFFF)
        given = struct.pack(f"<{count}Q", *self.seeds) if first == _GIVEN else b""
        numbers = struct.pack(f"<{len(self.coefficients)}d", *self.coefficients)
        return head + groups + given + numbers

    @classmethod
    def from_bytes(cls, payload: bytes, offset: int, seeds: Seeds) -> tuple["_Block", int]:
        count, width, high, low = _BLOCK.unpack_from(payload, offset)
        offset += _BLOCK.size
        if len(payload) < offset + width:
            raise ValueError("a block that is cut off")
        groups = tuple(payload[offset : offset + width]) or (_WHOLE_VIEW,)
        offset += width
        first = high << 32 | low
        if first == _GIVEN:
            used = list(struct.unpack_from(f"<{count}Q", payload, offset))
            offset += 8 * count
        else:
            used = seeds.take(first, count)
        total = count * len(groups)
        numbers = list(struct.unpack_from(f"<{total}d", payload, offset))
        return cls(groups, first, used, numbers), offset + 8 * total


def _blocks(terms: Terms, seeds: Seeds, drawn: int) -> list[_Block]:
    """The terms, in order, in as few blocks as their seeds and groups allow."""
    directions = list(_directions(terms))
    numbers = seeds.find([seed for seed, _, _ in directions], drawn)
    blocks: list[_Block] = []
    for (seed, groups, coefficients), number in zip(directions, numbers, strict=True):
        first = _GIVEN if number is None else number
        last = blocks[-1] if blocks else None
        if last is None or last.groups != groups or not _follows(last, first):
            last = _Block(groups, first, [], [])
            blocks.append(last)
        last.seeds.append(seed)
        last.coefficients.extend(coefficients)
    return blocks


def _follows(block: _Block, number: int) -> bool:
    if _GIVEN in (block.first, number):
        return block.first == number
    return block.first + len(block.seeds) == number


def _directions(terms: Terms) -> Iterator[tuple[int, tuple[int, ...], list[float]]]:
    """Seed, groups and coefficients of neighbouring terms that share their seed."""
    for seed, same in itertools.groupby(terms, key=lambda term: term.seed):
        parts = list(same)
        groups = tuple(_WHOLE_VIEW if part.group is None else part.group for part in parts)
        yield seed, groups, [part.coefficient for part in parts]
