"""The fused form of ``accumulate`` for NVIDIA GPUs: one launch for all tensors of a dtype.

Every program works on one block of one tensor: reads it once, adds every term from seeds and
coefficients in device memory, rounds and writes it once. The numbers are those of the reference,
bit for bit. Floor: one read and one write of the view, 2 * bytes / bandwidth; the generator and the
quantile cost about half of that in fp32, beside it.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_adapt.errors import ViewError
from zo_adapt.noise import philox
from zo_adapt.noise.accumulate import Place, arithmetic, finish
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.rounding import ROUNDING_STREAM
from zo_adapt.noise.sums import GRAPH_TABLES, HEADER, Sums
from zo_adapt.noise.triton_numbers import (
    TRITON_DTYPES,
    fields,
    quantile_table,
    rounded,
    summed,
)

BLOCK = 4096
"""Elements of one program; a multiple of every noise's elements per block."""
WARPS, WARPS_OF_HALVES = 8, 4
"""Of a program. Half precision is bound by the generator, not by memory: with two of its blocks a
thread, the key schedule serves both."""
REGISTERS = 80
"""Most of a thread, where halves are rounded to the nearest: half as many programs more at a time,
for two numbers that are kept elsewhere."""
ALIGNMENT = 16
"""Bytes; tensors that begin at a multiple of it are read 16 bytes at a time."""


# Slices of one table: their alignment differs from call to call.
@triton.jit(do_not_specialize_on_alignment=["sums", "terms"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    programs,  # noqa: ANN001
    sums,  # noqa: ANN001
    terms,  # noqa: ANN001
    quantile,  # noqa: ANN001
    FIELD_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ROUNDING: tl.constexpr,
    STREAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program's block: addresses of result and source, elements left, key, place, sum.
    record = programs + 6 * tl.program_id(0)
    out = tl.load(record).to(tl.pointer_type(DTYPE))
    source = tl.load(record + 1).to(tl.pointer_type(DTYPE))
    left = tl.load(record + 2)
    key = tl.load(record + 3).to(tl.uint64, bitcast=True)
    start = tl.load(record + 4)
    # The first number is the seed of the rounding.
    this = sums + 1 + HEADER * tl.load(record + 5)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
        source = tl.multiple_of(source, 16)

    element = tl.arange(0, BLOCK)
    if left >= BLOCK:
        before = tl.load(source + element)
    else:
        before = tl.load(source + element, mask=element < left, other=0.0)
    total = summed(before, this, terms, start, key, quantile, FIELD_BITS, ARITHMETIC, BLOCK)
    if ROUNDING:
        seed = tl.load(sums).to(tl.uint64, bitcast=True)
        fraction = fields(start, seed, key, STREAM, 16, BLOCK)
        result = rounded(total, fraction, DTYPE)
    else:
        result = total.to(DTYPE)
    if left >= BLOCK:
        tl.store(out + element, result)
    else:
        tl.store(out + element, result, mask=element < left)


class OnCUDA:
    """Places of one device and dtype; what does not change lies in device memory."""

    def __init__(self, noise: Noise, places: Sequence[Place]) -> None:
        self._noise, self._places = noise, places
        self._device, self._dtype = places[0].out.device, places[0].out.dtype
        self._sources = [place.source for place in places]
        self._outs: Sequence[Tensor] = ()
        self._read: list[Tensor] = []
        self._addresses: list[int] = []
        self._constants: dict[tuple[bool, bool], tuple[Any, ...]] = {}
        self._compiled: dict[tuple[bool, bool], Any] = {}

    def __call__(self, sums: Sums, outs: Sequence[Tensor]) -> None:
        """Add and round."""
        self.located(outs)(sums)

    def located(self, outs: Sequence[Tensor]) -> Callable[[Sums], None]:
        """The same for these outputs, until others are named or a tensor moves to other memory."""
        if outs is not self._outs:
            in_place = all(map(operator.is_, outs, self._sources))
            self._outs, self._read = outs, self._sources if in_place else [*self._sources, *outs]
        addresses = list(map(Tensor.data_ptr, self._read))
        if addresses != self._addresses:
            self._locate(addresses, outs)
        return self._run

    def _run(self, sums: Sums) -> None:
        outs = self._outs
        if len(self._strided) < len(outs):
            self._launch(sums)
        for index in self._strided:
            source, out = self._sources[index].contiguous(), outs[index]
            result = out if out.is_contiguous() else torch.empty_like(source)
            place = self._places[index]._replace(out=result, source=source)
            type(self)(self._noise, [place])(sums, [result])
            finish(out, result)

    def _locate(self, addresses: list[int], outs: Sequence[Tensor]) -> None:
        """Write down where the tensors lie now.

        Raises:
            ViewError: They are not what they were when the kernel was made for them.
        """
        for tensor in self._read:
            if (tensor.device, tensor.dtype) != (self._device, self._dtype):
                raise ViewError(
                    f"a tensor of the view was {self._dtype} on {self._device} and is "
                    f"{tensor.dtype} on {tensor.device} now; convert or move a model first, then "
                    "make its view"
                )
        self._addresses = addresses
        count = len(outs)
        pairs = list(zip(addresses[-count:], addresses[:count], strict=True))
        strided = [
            not (out.is_contiguous() and place.source.is_contiguous())
            for out, place in zip(outs, self._places, strict=True)
        ]
        self._strided = [index for index, yes in enumerate(strided) if yes]
        places = [place for place, apart in zip(self._places, strided, strict=True) if not apart]
        kept = [pair for pair, apart in zip(pairs, strided, strict=True) if not apart]
        # What is copied from here must not become part of a captured graph.
        capturing = GRAPH_TABLES.get() is not None
        with torch.cuda.stream(torch.cuda.Stream(self._device) if capturing else None):
            self._describe(places, kept)

    def _describe(self, places: Sequence[Place], addresses: Sequence[tuple[int, int]]) -> None:
        """Put into device memory what a launch reads of its places."""
        records = _records(places, addresses) if places else np.empty((0, 6), np.int64)
        self._aligned = bool((records[:, :2] % ALIGNMENT == 0).all())
        self._records = torch.from_numpy(records).to(self._device)

    def _launch(self, sums: Sums) -> None:
        dtype, records, aligned = self._dtype, self._records, self._aligned
        tables = GRAPH_TABLES.get()
        if tables is not None:
            # Also where they were there before: the next call may move them elsewhere.
            tables.append(records)
        header, terms = sums.on(self._device)
        rounding = dtype in (torch.float16, torch.bfloat16) and sums.rounding is not None
        way = rounding, aligned
        if way not in self._constants:
            self._constants[way] = self._constants_of(*way)
        arguments = records, header, terms, *self._constants[way]
        grid = len(records), 1, 1
        with torch.cuda.device(self._device):
            compiled = self._compiled.get(way)
            if compiled is not None:
                # A third of the time of finding it again by its arguments.
                compiled[grid](*arguments)
                return
            # A fused multiply-add rounds once where the reference rounds twice.
            half = dtype.itemsize == 2
            options = {"maxnreg": REGISTERS} if half and not rounding else {}
            launched = _kernel[grid](
                *arguments,
                num_warps=WARPS_OF_HALVES if half else WARPS,
                enable_fp_fusion=False,
                **options,
            )
            self._compiled[way] = launched  # None in Triton's interpreter

    def _constants_of(self, rounding: bool, aligned: bool) -> tuple[Any, ...]:
        """The kernel's arguments from ``quantile`` on."""
        return (
            quantile_table(self._device),
            256 // self._noise.entries.per_block,
            TRITON_DTYPES[self._dtype],
            TRITON_DTYPES[arithmetic(self._dtype)],
            rounding,
            ROUNDING_STREAM,
            aligned,
            HEADER,
            BLOCK,
        )


def _records(places: Sequence[Place], addresses: Sequence[tuple[int, int]]) -> np.ndarray:
    """One record for each block of each tensor."""
    # Of every range: place, first element here, first element of the whole tensor, length.
    ranges = np.concatenate([_ranges(index, place) for index, place in enumerate(places)])
    counts = -(-ranges[:, 3] // BLOCK)
    place, here, first, size = np.repeat(ranges, counts, 0).T
    start = (np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK
    offset = (here + start) * places[0].source.element_size()
    at = np.array(addresses, np.int64)[place] + offset[:, None]
    keys = np.array([philox.signed(one.key) for one in places], np.int64)
    which = np.array([one.sum for one in places], np.int64)
    return np.column_stack((at, size - start, keys[place], first + start, which[place]))


def _ranges(index: int, place: Place) -> np.ndarray:
    size, part = place.source.numel(), place.part
    length, first, stride = (size, 0, 0) if part is None else (part.length, part.first, part.stride)
    number = np.arange(size // length if length else 0)
    return np.column_stack(
        (
            np.full_like(number, index),
            number * length,
            first + number * stride,
            np.full_like(number, length),
        )
    )
