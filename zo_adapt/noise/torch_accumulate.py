"""``accumulate`` in torch operations, for devices without a kernel of their own, and its reference.

Small tensors share one evaluation of the generator. Extra memory: at most ``BUCKET`` elements.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from zo_adapt.noise import philox
from zo_adapt.noise.accumulate import Place, Row, Runner, arithmetic, finish, flat, rows_of
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.entries import DIRECTION_STREAM
from zo_adapt.noise.low_rank import torch_factors, torch_products, torch_values
from zo_adapt.noise.rounding import PER_BLOCK, ROUNDING_STREAM
from zo_adapt.noise.sums import Sums

BUCKET = 1 << 22
"""Elements of noise made at a time."""


class OnAnyDevice(Runner):
    """The same numbers from torch operations, on any device that has 64-bit integers."""

    def __init__(self, noise: Noise, places: Sequence[Place]) -> None:
        self._noise, self._places = noise, places

    def __call__(self, sums: Sums, outs: Sequence[Tensor]) -> None:
        """Add and round."""
        flats = [flat(out, place.source) for out, place in zip(outs, self._places, strict=True)]
        rows = rows_of(self._noise, self._places, flats, sums)
        single = [row.matrices is not None or row.part is not None for row in rows]
        alone = [[row] for row, apart in zip(rows, single, strict=True) if apart]
        together = [row for row, apart in zip(rows, single, strict=True) if not apart]
        for bucket in (*alone, *_buckets(together)):
            longest = max(row.out.numel() for row in bucket)
            for start in range(0, longest, BUCKET):
                stop = min(start + BUCKET, longest)
                _run_slices(self._noise, bucket, sums.rounding, start, stop)
        for out, (result, _) in zip(outs, flats, strict=True):
            finish(out, result)


def _buckets(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows with at most ``BUCKET`` elements together (or one larger row alone)."""
    bucket: list[Row] = []
    for row in rows:
        if bucket and sum(r.out.numel() for r in bucket) + row.out.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket


def _run_slices(
    noise: Noise, bucket: Sequence[Row], rounding: int | None, start: int, stop: int
) -> None:
    outs = [row.out[start:stop] for row in bucket]
    dtype = outs[0].dtype
    totals = [row.source[start:stop].to(arithmetic(dtype), copy=True) for row in bucket]
    if any(row.decay != 1.0 for row in bucket):
        torch._foreach_mul_(totals, [row.decay for row in bucket])
    for seed, members in _in_order(bucket):
        z = _directions(noise, bucket, seed, members, totals, start)
        parts = [part.to(totals[i].dtype) for part, (i, _) in zip(z, members, strict=True)]
        torch._foreach_mul_(parts, [coefficient for _, coefficient in members])
        torch._foreach_add_([totals[i] for i, _ in members], parts)
    if rounding is not None and dtype in (torch.float16, torch.bfloat16) and bucket[0].part:
        element = bucket[0].part.elements(start, start + len(totals[0]), totals[0].device)
        words, places = _words_at(element, rounding, bucket[0].key, ROUNDING_STREAM, PER_BLOCK)
        fields = words.T.contiguous().view(torch.int16).flatten().int() & 0xFFFF
        round_at_random(totals[0], dtype, fields[places])
    elif rounding is not None and dtype in (torch.float16, torch.bfloat16):
        every = [(index, 1.0) for index in range(len(bucket))]
        keys = [row.key for row in bucket]
        words, sizes = _words(rounding, keys, ROUNDING_STREAM, totals, every, start, PER_BLOCK)
        fields = words.T.contiguous().view(torch.int16).flatten().int() & 0xFFFF
        for total, fraction in zip(totals, _parts(fields, sizes, PER_BLOCK), strict=True):
            round_at_random(total, dtype, fraction)
    torch._foreach_copy_(outs, totals)


def _directions(
    noise: Noise,
    bucket: Sequence[Row],
    seed: int,
    members: Sequence[tuple[int, float]],
    totals: Sequence[Tensor],
    start: int,
) -> Sequence[Tensor]:
    """z(seed) of the members, from element ``start`` on."""
    entries, first = noise.entries, bucket[0]
    if first.part is not None:
        element = first.part.elements(start, start + len(totals[0]), totals[0].device)
        return [_at(element, noise, seed, first)]
    if first.matrices is not None:
        a, b = torch_factors(entries, seed, first.key, first.matrices, totals[0].device)
        return [torch_values(a, b, first.matrices, start, start + len(totals[0]))]
    keys = [bucket[i].key for i, _ in members]
    words, sizes = _words(seed, keys, DIRECTION_STREAM, totals, members, start, entries.per_block)
    return _parts(entries.from_torch_words(words), sizes, entries.per_block)


def _at(element: Tensor, noise: Noise, seed: int, row: Row) -> Tensor:
    """z(seed) at some elements of the whole tensor, in ascending order."""
    entries, of = noise.entries, row.matrices
    if of is not None:
        a, b = torch_factors(entries, seed, row.key, of, element.device)
        return torch_products(a, b, of, element // of.width, element % of.width)
    words, places = _words_at(element, seed, row.key, DIRECTION_STREAM, entries.per_block)
    return entries.from_torch_words(words)[places]


def _words_at(
    element: Tensor, seed: int, key: int, stream: int, per_block: int
) -> tuple[Tensor, Tensor]:
    """The words of the blocks that have some elements, and the place of each among them."""
    blocks, which = torch.unique_consecutive(element // per_block, return_inverse=True)
    keys = torch.full_like(blocks, philox.signed(key))
    return philox.words_torch(seed, keys, stream, blocks), which * per_block + element % per_block


def _in_order(bucket: Sequence[Row]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Directions in order, each with the rows and coefficients that share its launch."""
    for place in range(max(len(row.terms) for row in bucket)):
        members: dict[int, list[tuple[int, float]]] = {}
        for index, row in enumerate(bucket):
            if place < len(row.terms):
                seed, coefficient = row.terms[place]
                members.setdefault(seed, []).append((index, coefficient))
        yield from members.items()


def _words(
    seed: int,
    keys: Sequence[int],
    stream: int,
    totals: Sequence[Tensor],
    members: Sequence[tuple[int, float]],
    start: int,
    per_block: int,
) -> tuple[Tensor, list[int]]:
    sizes = [totals[index].numel() for index, _ in members]
    device = totals[0].device
    key, number = _lanes(tuple(keys), tuple(sizes), start // per_block, per_block, device)
    return philox.words_torch(seed, key, stream, number), sizes


def _parts(values: Tensor, sizes: Sequence[int], per_block: int) -> list[Tensor]:
    padded = [-(-size // per_block) * per_block for size in sizes]
    return [part[:size] for part, size in zip(torch.split(values, padded), sizes, strict=True)]


@lru_cache(maxsize=8)
def _lanes(
    keys: tuple[int, ...], sizes: tuple[int, ...], block: int, per_block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Key and block number of every block of several tensors, laid end to end."""
    counts = torch.tensor([-(-size // per_block) for size in sizes], device=device)
    every = torch.tensor([philox.signed(key) for key in keys], device=device)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return (
        torch.repeat_interleave(every, counts),
        torch.arange(len(first), device=device) - first + block,
    )


def round_at_random(total: Tensor, dtype: torch.dtype, fractions: Tensor) -> None:
    """Stochastic rounding, as on the CPU."""
    if dtype == torch.bfloat16:
        bits = total.view(torch.int32)
        bits.add_(fractions).bitwise_and_(-0x10000)
        return
    total.mul_(2.0**-112)
    bits = total.view(torch.int32)
    bits.add_(fractions >> 3).bitwise_and_(-0x2000)
    total.mul_(2.0**112)
