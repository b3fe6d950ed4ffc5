"""``out <- decay * source + sum_k c_k z(s_k)`` over many tensors: where noise is added.

fp32 arithmetic, terms in order, one rounding to the tensor's dtype at the end. On the CPU the work
goes in chunks that stay in the cache, over the cores for large tensors; on other devices small
tensors share one evaluation of the generator. Extra memory: a chunk (CPU), or at most ``BUCKET``
elements (elsewhere); never a vector of the view's size.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from zo_adapt import philox
from zo_adapt.noise import DIRECTION_STREAM, Noise

CHUNK = 1 << 16
"""Elements worked on at a time on the CPU: 256 KiB of fp32 stay in the second-level cache."""
SPAN = 16 * CHUNK
"""Elements that one thread of the CPU works through."""
BUCKET = 1 << 22
"""Elements of noise made at a time on other devices."""


class Job(NamedTuple):
    """One tensor's share: ``out <- decay * source + sum c z(seed, key)``.

    Args:
        out: Where the result goes; may be ``source`` itself.
        source: The weights.
        key: The tensor's noise key.
        terms: (seed, coefficient) pairs, added in this order.
        decay: Factor on the weights.
    """

    out: Tensor
    source: Tensor
    key: int
    terms: Sequence[tuple[int, float]]
    decay: float = 1.0


def accumulate(noise: Noise, jobs: Iterable[Job]) -> None:
    """Run every job; tensors may differ in device, dtype and memory layout."""
    with torch.no_grad():
        rows = [_row_major(job) for job in jobs]
        on_cpu = [row for row in rows if row.out.device.type == "cpu"]
        elsewhere = [row for row in rows if row.out.device.type != "cpu"]
        _run_cpu(noise, on_cpu)
        for device, dtype in {(row.out.device, row.out.dtype) for row in elsewhere}:
            same = [r for r in elsewhere if (r.out.device, r.out.dtype) == (device, dtype)]
            _elsewhere(device)(noise, same)
        for row in rows:
            if row.strided is not None:
                row.strided.copy_(row.out.view(row.strided.shape))


class Row(NamedTuple):
    """A job on flat, contiguous tensors; ``strided`` is where a result of other layout must go."""

    out: Tensor
    source: Tensor
    key: int
    terms: Sequence[tuple[int, float]]
    decay: float
    strided: Tensor | None = None


def _row_major(job: Job) -> Row:
    # Elements are numbered in row-major order, whatever the memory layout.
    source = job.source.reshape(-1)
    if job.out.is_contiguous():
        return Row(job.out.view(-1), source, job.key, job.terms, job.decay)
    return Row(torch.empty_like(source), source, job.key, job.terms, job.decay, job.out)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _run_cpu(noise: Noise, rows: Sequence[Row]) -> None:
    large = [row for row in rows if row.out.numel() > SPAN]
    for row in rows:
        if row.out.numel() <= SPAN:
            _run_span(noise, row, 0, row.out.numel())
    futures = [
        _pool().submit(_run_span, noise, row, start, min(start + SPAN, row.out.numel()))
        for row in large
        for start in range(0, row.out.numel(), SPAN)
    ]
    try:
        for future in futures:
            future.result()
    finally:
        # An interrupted caller restores the tensors: no thread may write to them after that.
        for future in futures:
            future.cancel()
        wait(futures)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="zo_adapt-noise")


@torch.no_grad()  # A thread of the pool has an autograd mode of its own.
def _run_span(noise: Noise, row: Row, start: int, stop: int) -> None:
    for first in range(start, stop, CHUNK):
        part = slice(first, min(first + CHUNK, stop))
        _run_chunk(noise, row, first // noise.per_block, row.out[part], row.source[part])


def _run_chunk(noise: Noise, row: Row, block: int, out: Tensor, source: Tensor) -> None:
    in_place = out.dtype == arithmetic(out.dtype)
    if in_place and out.data_ptr() != source.data_ptr():
        out.copy_(source)
    total = (out if in_place else source.to(arithmetic(out.dtype))).detach().numpy()
    scalar = total.dtype.type
    if row.decay != 1.0:
        total *= scalar(row.decay)
    blocks = -(-total.size // noise.per_block)
    for seed, coefficient in row.terms:
        words = philox.words_numpy(seed, row.key, DIRECTION_STREAM, block, blocks)
        z = noise.from_numpy_words(words)[: total.size]
        total += z * scalar(coefficient)
    if not in_place:
        out.copy_(torch.from_numpy(total))


Run = Callable[[Noise, Sequence[Row]], None]


@cache
def _elsewhere(device: torch.device) -> Run:
    """The fused kernel where Triton runs, else the reference in torch operations."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from zo_adapt.triton_accumulate import accumulate_fused

        return accumulate_fused
    return accumulate_reference


def accumulate_reference(noise: Noise, rows: Sequence[Row]) -> None:
    """The same numbers from torch operations, on any device."""
    for bucket in _buckets(rows):
        _run_bucket(noise, bucket)


def _buckets(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one device, at most ``BUCKET`` elements together (or one larger row alone)."""
    bucket: list[Row] = []
    for row in rows:
        full = sum(r.out.numel() for r in bucket) + row.out.numel() > BUCKET
        if bucket and (full or row.out.device != bucket[0].out.device):
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket


def _run_bucket(noise: Noise, bucket: Sequence[Row]) -> None:
    longest = max(row.out.numel() for row in bucket)
    for start in range(0, longest, BUCKET):
        _run_slices(noise, bucket, start, min(start + BUCKET, longest))


def _run_slices(noise: Noise, bucket: Sequence[Row], start: int, stop: int) -> None:
    device = bucket[0].out.device
    outs = [row.out[start:stop] for row in bucket]
    totals = [row.source[start:stop].to(arithmetic(row.out.dtype), copy=True) for row in bucket]
    if any(row.decay != 1.0 for row in bucket):
        torch._foreach_mul_(totals, [row.decay for row in bucket])
    for seed, members in _in_order(bucket):
        sizes = [totals[i].numel() for i, _ in members]
        keys = [bucket[i].key for i, _ in members]
        z = _noise_of(noise, seed, keys, sizes, start, device)
        parts = [part.to(totals[i].dtype) for part, (i, _) in zip(z, members, strict=True)]
        torch._foreach_mul_(parts, [coefficient for _, coefficient in members])
        torch._foreach_add_([totals[i] for i, _ in members], parts)
    torch._foreach_copy_(outs, totals)


def _in_order(bucket: Sequence[Row]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Directions in order, each with the rows and coefficients that share its launch."""
    for place in range(max(len(row.terms) for row in bucket)):
        members: dict[int, list[tuple[int, float]]] = {}
        for index, row in enumerate(bucket):
            if place < len(row.terms):
                seed, coefficient = row.terms[place]
                members.setdefault(seed, []).append((index, coefficient))
        yield from members.items()


def _noise_of(
    noise: Noise,
    seed: int,
    keys: Sequence[int],
    sizes: Sequence[int],
    start: int,
    device: torch.device,
) -> list[Tensor]:
    key, number = _lanes(
        tuple(keys), tuple(sizes), start // noise.per_block, noise.per_block, device
    )
    values = noise.from_torch_words(philox.words_torch(seed, key, DIRECTION_STREAM, number))
    padded = [-(-size // noise.per_block) * noise.per_block for size in sizes]
    return [part[:size] for part, size in zip(torch.split(values, padded), sizes, strict=True)]


@lru_cache(maxsize=8)
def _lanes(
    keys: tuple[int, ...], sizes: tuple[int, ...], block: int, per_block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Key and block number of every block of several tensors, laid end to end."""
    counts = torch.tensor([-(-size // per_block) for size in sizes], device=device)
    signed = torch.tensor([philox.signed(key) for key in keys], device=device)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return (
        torch.repeat_interleave(signed, counts),
        torch.arange(len(first), device=device) - first + block,
    )
