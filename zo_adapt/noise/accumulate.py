"""``out <- decay * source + sum_k c_k z(s_k)`` over many tensors: where noise is added.

fp32 arithmetic, terms in order, one rounding to the tensor's dtype at the end: to the nearest value
or, for updates in half precision, stochastically. On the CPU the work goes in chunks that stay in
the cache, over the cores for large tensors; on NVIDIA GPUs one kernel does it all
(``triton_accumulate``); elsewhere torch operations do (``torch_accumulate``). Extra memory: a chunk
(CPU), one record of 48 bytes for 4,096 elements (NVIDIA), a bucket of 4 M elements (elsewhere).
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt.noise.coordinates import Coordinates
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.low_rank import Matrices, numpy_values, rectangle_of
from zo_adapt.noise.parts import Part
from zo_adapt.noise.rounding import fractions, round_at_random
from zo_adapt.noise.sums import Sums

CHUNK = 1 << 16
"""Elements worked on at a time on the CPU: 256 KiB of fp32 stay in the second-level cache."""
SPAN = 16 * CHUNK
"""Elements that one thread of the CPU works through."""


class Place(NamedTuple):
    """One tensor's share of an accumulation.

    Args:
        out: Where the result goes; may be ``source`` itself.
        source: The weights.
        key: The tensor's noise key.
        sum: Which of the sums is added here, by its index.
        part: Which part of a tensor ``out`` and ``source`` are; None: all of it.
    """

    out: Tensor
    source: Tensor
    key: int
    sum: int = 0
    part: Part | None = None

    def matrices(self, noise: Noise) -> Matrices | None:
        """How the whole tensor is made of factors."""
        return noise.matrices(self.source.shape if self.part is None else self.part.shape)


class Row(NamedTuple):
    """A place with its sum, on flat contiguous tensors."""

    out: Tensor
    source: Tensor
    key: int
    part: Part | None
    matrices: Matrices | None
    terms: Sequence[tuple[int, float]]
    decay: float


class Runner(Protocol):
    """Runs the places of one device and dtype."""

    def __call__(self, sums: Sums, outs: Sequence[Tensor]) -> None:
        """Add and round; the results go to ``outs``, one for each place."""

    def located(self, outs: Sequence[Tensor]) -> Callable[[Sums], None]:
        """The same for these outputs, while no tensor moves to other memory."""
        return partial(self, outs=outs)


class Accumulation:
    """An accumulation whose tensors stay and whose sums change from call to call.

    Args:
        noise: Of the directions.
        places: They may differ in device, dtype and memory layout.

    Example:
        >>> from zo_adapt.noise.distributions import RADEMACHER
        >>> from zo_adapt.noise.sums import Sum, Sums
        >>> x = torch.zeros(3)
        >>> Accumulation(RADEMACHER, [Place(x, x, key=7)])(Sums([Sum([(1, 0.5)])]))
        >>> x.abs()
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, noise: Noise, places: Iterable[Place]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype, type], list[int]] = {}
        places = list(places)
        for index, place in enumerate(places):
            if place.source.numel():  # a process may hold nothing of a tensor
                run = _runner_of(noise, place)
                kinds.setdefault((place.out.device, place.out.dtype, run), []).append(index)
        self._runners: list[tuple[Runner, list[int], list[Tensor]]] = [
            (run(noise, [places[i] for i in same]), same, [places[i].out for i in same])
            for (_, _, run), same in kinds.items()
        ]

    def __call__(self, sums: Sums, outs: Sequence[Tensor] | None = None) -> None:
        """Add the sums at their places and round.

        Args:
            sums: What is added.
            outs: Where the results go, one for each place; None: where the places say.
        """
        with torch.no_grad():
            for run, same, own in self._runners:
                run(sums, own if outs is None else [outs[i] for i in same])

    def located(self) -> Callable[[Sums], None]:
        """The same into the places' own outputs, while no tensor moves to other memory."""
        runs = [run.located(own) for run, _, own in self._runners]

        @torch.no_grad()
        def accumulate(sums: Sums) -> None:
            for run in runs:
                run(sums)

        return accumulate


def fits_kernels(noise: Noise, place: Place) -> bool:
    """Whether the kernels of NVIDIA GPUs know such a part.

    These are rectangles of matrices, and ranges that begin where a block of the generator does.
    """
    part, of = place.part, place.matrices(noise)
    if part is None or of is not None:
        return of is None or rectangle_of(part, of) is not None
    return part.begins_at_multiples_of(noise.entries.per_block)


def _runner_of(noise: Noise, place: Place) -> type:
    if isinstance(noise, Coordinates):
        from zo_adapt.noise.coordinate_accumulate import OnCoordinates

        return OnCoordinates
    has_factors = place.matrices(noise) is not None
    return _runner(place.out.device, has_factors, fits_kernels(noise, place))


@cache
def _runner(device: torch.device, has_factors: bool, fits: bool) -> type:
    if device.type == "cpu":
        return OnCPU
    if device.type == "cuda" and fits and importlib.util.find_spec("triton") is not None:
        from zo_adapt.noise.triton_accumulate import OnCUDA
        from zo_adapt.noise.triton_low_rank import FactorsOnCUDA

        return FactorsOnCUDA if has_factors else OnCUDA
    from zo_adapt.noise.torch_accumulate import OnAnyDevice

    return OnAnyDevice


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat(out: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Result and source in row-major order, in which elements are numbered whatever the layout.

    A result of another layout is made apart; ``finish`` takes it where it belongs.
    """
    row_major = source.reshape(-1)
    return (out.view(-1) if out.is_contiguous() else torch.empty_like(row_major)), row_major


def finish(out: Tensor, result: Tensor) -> None:
    """Copy a result that was made apart to where it belongs."""
    if not out.is_contiguous():
        out.copy_(result.view(out.shape))


def rows_of(
    noise: Noise, places: Sequence[Place], flats: Sequence[tuple[Tensor, Tensor]], sums: Sums
) -> list[Row]:
    """Places on their flat tensors, with their sums."""
    return [
        Row(*tensors, place.key, place.part, place.matrices(noise), *sums.sums[place.sum])
        for tensors, place in zip(flats, places, strict=True)
    ]


class OnCPU(Runner):
    """Chunk by chunk in numpy, whose own generator makes the words."""

    def __init__(self, noise: Noise, places: Sequence[Place]) -> None:
        self._noise, self._places = noise, places

    def __call__(self, sums: Sums, outs: Sequence[Tensor]) -> None:
        """Add and round."""
        flats = [flat(out, place.source) for out, place in zip(outs, self._places, strict=True)]
        _run(self._noise, rows_of(self._noise, self._places, flats, sums), sums.rounding)
        for out, (result, _) in zip(outs, flats, strict=True):
            finish(out, result)


def _run(noise: Noise, rows: Sequence[Row], rounding: int | None) -> None:
    large = [row for row in rows if row.out.numel() > SPAN]
    for row in rows:
        if row.out.numel() <= SPAN:
            _run_span(noise, row, rounding, 0, row.out.numel())
    futures = [
        _pool().submit(
            _run_span_in_thread, noise, row, rounding, start, min(start + SPAN, row.out.numel())
        )
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


def _after_fork() -> None:
    """In a forked child, which has the pool's object and OpenMP's, but the threads of neither.

    Where this process has run large tensors, torch would wait for its threads for ever; with one it
    waits for none, as in the workers of a DataLoader.
    """
    if _pool.cache_info().currsize:
        _pool.cache_clear()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _run_span(noise: Noise, row: Row, rounding: int | None, start: int, stop: int) -> None:
    if row.out.numel() <= CHUNK:
        _run_chunk(noise, row, rounding, 0)
        return
    for first in range(start, stop, CHUNK):
        part = slice(first, min(first + CHUNK, stop))
        chunk = row._replace(out=row.out[part], source=row.source[part])
        _run_chunk(noise, chunk, rounding, first)


@torch.no_grad()
def _run_span_in_thread(*span: Any) -> None:
    """``_run_span``; a thread of the pool has an autograd mode of its own."""
    _run_span(*span)


def _run_chunk(noise: Noise, row: Row, rounding: int | None, first: int) -> None:
    out, source = row.out, row.source
    in_place = out.dtype == arithmetic(out.dtype)
    if in_place and out.data_ptr() != source.data_ptr():
        out.copy_(source)
    total = (out if in_place else source.to(arithmetic(out.dtype))).detach().numpy()
    scalar = total.dtype.type
    if row.decay != 1.0:
        total *= scalar(row.decay)
    ranges = [(first, total.size)]
    if row.part is not None:
        ranges = list(row.part.ranges(first, total.size))
    for seed, coefficient in row.terms:
        of_ranges = [
            numpy_values(noise.entries, seed, row.key, row.matrices, *one) for one in ranges
        ]
        total += _joined(of_ranges) * scalar(coefficient)
    if in_place:
        return
    if rounding is not None:
        of_ranges = [fractions(rounding, row.key, *one) for one in ranges]
        round_at_random(total, out.dtype, _joined(of_ranges))
    out.copy_(torch.from_numpy(total))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
