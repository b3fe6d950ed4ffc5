"""The fused form of ``accumulate`` for NVIDIA GPUs: one launch for all tensors of a dtype.

Every program works on one block of one tensor: reads it once, adds every term from seeds and
coefficients in device memory, rounds and writes it once. The numbers are those of the reference,
bit for bit. Floor: one read and one write of the view, 2 * bytes / bandwidth; the generator and the
quantile cost about half of that in fp32, beside it.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from zo_adapt import philox
from zo_adapt.accumulate import Place, arithmetic, finish, flat
from zo_adapt.noise import QUANTILE, ROUNDING_STREAM, Noise
from zo_adapt.sums import GRAPH_TABLES, HEADER, Sums

BLOCK = 4096
"""Elements of one program; a multiple of every noise's elements per block."""
WARPS = 8
ALIGNMENT = 16
"""Bytes; tensors that begin at a multiple of it are read 16 bytes at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _fields(start, seed, key, STREAM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Fields of the generator's words for elements start .. start + BLOCK, in order."""
    per_block: tl.constexpr = 256 // BITS
    counters: tl.constexpr = BLOCK // per_block
    counter = (start // per_block + 1 + tl.arange(0, counters)).to(tl.uint64)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox_impl(counter, zero, zero, zero + STREAM, seed, key)
    # Joined so that word 2i + j lies at [i, j]: row-major order is the words' order.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (counters, 4, 1))
    shift = (tl.arange(0, 64 // BITS) * BITS).to(tl.uint64)
    field = (words >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(field, (BLOCK,)).to(tl.int32)


@triton.jit
def _gaussian(field, quantile):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The value of a 16-bit field: as the table of ``noise`` is made, in the same fp32 steps."""
    # 2**23 + k has the bits 0x4B000000 + k; subtracting 2**23 - 1/2 leaves k + 1/2, exactly.
    rank = ((field >> 1) | 0x4B000000).to(tl.float32, bitcast=True) - 8388607.5
    bits = rank.to(tl.int32, bitcast=True)
    row = quantile + ((bits >> 23) - 126)
    m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    size = tl.load(row + 48) * m + tl.load(row + 32)
    size = (size * m + tl.load(row + 16)) * m + tl.load(row)
    return (size.to(tl.int32, bitcast=True) ^ (field << 31)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
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
    decay = tl.load(this + 2).to(tl.float64, bitcast=True).to(ARITHMETIC)
    total = before.to(ARITHMETIC) * decay
    first = tl.load(this)
    for term in range(first, first + tl.load(this + 1)):
        seed = tl.load(terms + 2 * term).to(tl.uint64, bitcast=True)
        c = tl.load(terms + 2 * term + 1).to(tl.float64, bitcast=True).to(ARITHMETIC)
        field = _fields(start, seed, key, 0, FIELD_BITS, BLOCK)
        if FIELD_BITS == 1:
            total += tl.where(field == 1, c, -c)
        else:
            total += _gaussian(field, quantile).to(ARITHMETIC) * c
    if ROUNDING:
        seed = tl.load(sums).to(tl.uint64, bitcast=True)
        fraction = _fields(start, seed, key, STREAM, 16, BLOCK)
        if tl.bfloat16 == DTYPE:
            bits = (total.to(tl.int32, bitcast=True) + fraction) & -0x10000
            total = bits.to(tl.float32, bitcast=True)
        else:
            scaled = total * 1.9259299443872359e-34  # 2**-112
            bits = (scaled.to(tl.int32, bitcast=True) + (fraction >> 3)) & -0x2000
            total = bits.to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2**112
    result = total.to(DTYPE)
    if left >= BLOCK:
        tl.store(out + element, result)
    else:
        tl.store(out + element, result, mask=element < left)


_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class OnCUDA:
    """Places of one device and dtype; what does not change lies in device memory."""

    def __init__(self, noise: Noise, places: Sequence[Place]) -> None:
        self._noise, self._places = noise, places
        self._device, self._dtype = places[0].out.device, places[0].out.dtype
        self._addresses: list[tuple[int, int]] = []

    def __call__(self, sums: Sums, outs: Sequence[Tensor]) -> None:
        """Add and round."""
        sources = [place.source for place in self._places]
        addresses = [(o.data_ptr(), s.data_ptr()) for o, s in zip(outs, sources, strict=True)]
        if addresses != self._addresses:
            self._locate(addresses, outs)
        if len(self._records):
            self._launch(self._records, self._aligned, sums)
        for index in self._strided:
            result, source = flat(outs[index], sources[index])
            place = self._places[index]._replace(out=result, source=source)
            OnCUDA(self._noise, [place])(sums, [result])
            finish(outs[index], result)

    def _locate(self, addresses: list[tuple[int, int]], outs: Sequence[Tensor]) -> None:
        """Write down where the tensors lie now."""
        self._addresses = addresses
        strided = [
            not (out.is_contiguous() and place.source.is_contiguous())
            for out, place in zip(outs, self._places, strict=True)
        ]
        self._strided = [index for index, yes in enumerate(strided) if yes]
        places = [place for place, apart in zip(self._places, strided, strict=True) if not apart]
        kept = [pair for pair, apart in zip(addresses, strided, strict=True) if not apart]
        self._aligned = all(a % ALIGNMENT == 0 for pair in kept for a in pair)
        records = _records(places, kept) if places else np.empty((0, 6), np.int64)
        # What is copied from here must not become part of a captured graph.
        capturing = GRAPH_TABLES.get() is not None
        with torch.cuda.stream(torch.cuda.Stream(self._device) if capturing else None):
            self._records = torch.from_numpy(records).to(self._device)

    def _launch(self, records: Tensor, aligned: bool, sums: Sums) -> None:
        dtype = self._dtype
        tables = GRAPH_TABLES.get()
        if tables is not None:
            # Also where they were there before: the next call may move them elsewhere.
            tables.append(records)
        header, terms = sums.on(self._device)
        half = dtype in (torch.float16, torch.bfloat16)
        with torch.cuda.device(self._device):
            _kernel[(len(records),)](
                records,
                header,
                terms,
                _quantile(self._device),
                FIELD_BITS=256 // self._noise.per_block,
                DTYPE=_TRITON_DTYPES[dtype],
                ARITHMETIC=_TRITON_DTYPES[arithmetic(dtype)],
                ROUNDING=half and sums.rounding is not None,
                STREAM=ROUNDING_STREAM,
                ALIGNED=aligned,
                HEADER=HEADER,
                BLOCK=BLOCK,
                num_warps=WARPS,
                # A fused multiply-add rounds once where the reference rounds twice.
                enable_fp_fusion=False,
            )


def _records(places: Sequence[Place], addresses: Sequence[tuple[int, int]]) -> np.ndarray:
    """One record for each block of each tensor."""
    sizes = np.array([place.source.numel() for place in places], np.int64)
    counts = -(-sizes // BLOCK)
    row = np.repeat(np.arange(len(places)), counts)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK
    at = np.array(addresses, np.int64)[row] + (start * places[0].source.element_size())[:, None]
    keys = np.array([philox.signed(place.key) for place in places], np.int64)
    which = np.array([place.sum for place in places], np.int64)
    return np.column_stack((at, sizes[row] - start, keys[row], start, which[row]))


@cache
def _quantile(device: torch.device) -> Tensor:
    """The constants, column by column."""
    return torch.tensor(QUANTILE, device=device).T.contiguous()
