"""The fused form of ``accumulate`` for CUDA: one launch for all tensors of a dtype.

Every program works on one block of one tensor: reads it once, adds every term from seeds and
coefficients in device memory, rounds and writes it once. The numbers are those of the reference,
bit for bit. Floor: one read and one write of the view, 2 * bytes / bandwidth.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from zo_adapt import philox
from zo_adapt.accumulate import Row, arithmetic
from zo_adapt.noise import Noise

BLOCK = 4096
"""Elements of one program; a multiple of every noise's elements per block."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    tensors,  # noqa: ANN001
    programs,  # noqa: ANN001
    seeds,  # noqa: ANN001
    factors,  # noqa: ANN001
    values,  # noqa: ANN001
    terms,  # noqa: ANN001
    FIELD_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_block: tl.constexpr = 256 // FIELD_BITS
    counters: tl.constexpr = BLOCK // per_block
    # This program's tensor (address of the result, of the source, length, key) and place in it.
    index = tl.load(programs + 2 * tl.program_id(0))
    start = tl.load(programs + 2 * tl.program_id(0) + 1)
    out = tl.load(tensors + 4 * index).to(tl.pointer_type(DTYPE))
    source = tl.load(tensors + 4 * index + 1).to(tl.pointer_type(DTYPE))
    numel = tl.load(tensors + 4 * index + 2)
    key = tl.load(tensors + 4 * index + 3).to(tl.uint64, bitcast=True)
    factors += index * (terms + 1)

    element = start + tl.arange(0, BLOCK)
    inside = element < numel
    decay = tl.load(factors).to(ARITHMETIC)
    total = tl.load(source + element, mask=inside, other=0.0).to(ARITHMETIC) * decay
    # Counter words beyond the first are zero: directions are stream 0.
    counter = (start // per_block + 1 + tl.arange(0, counters)).to(tl.uint64)
    zero = tl.zeros_like(counter)
    shift = (tl.arange(0, 64 // FIELD_BITS) * FIELD_BITS).to(tl.uint64)
    for term in range(terms):
        seed = tl.load(seeds + term).to(tl.uint64, bitcast=True)
        w0, w1, w2, w3 = philox_impl(counter, zero, zero, zero, seed, key)
        # Joined so that word 2i + j lies at [i, j]: row-major order is the words' order.
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (counters, 4, 1))
        field = (words >> shift[None, None, :]) & ((1 << FIELD_BITS) - 1)
        z = tl.load(values + tl.reshape(field, (BLOCK,)).to(tl.int32))
        total += z.to(ARITHMETIC) * tl.load(factors + 1 + term).to(ARITHMETIC)
    tl.store(out + element, total.to(DTYPE), mask=inside)


_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def accumulate_fused(noise: Noise, rows: Sequence[Row]) -> None:
    """One launch for the rows of one device and dtype that share their directions.

    A direction may come more than once: sums in fp32 depend on the order.
    """
    by_seeds: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_seeds.setdefault(tuple(seed for seed, _ in row.terms), []).append(row)
    for seeds, same in by_seeds.items():
        _launch(noise, seeds, same)


def _launch(noise: Noise, seeds: Sequence[int], rows: Sequence[Row]) -> None:
    device, dtype = rows[0].out.device, rows[0].out.dtype
    factors = np.array([[row.decay, *(c for _, c in row.terms)] for row in rows], np.float64)
    tensors = [
        (row.out.data_ptr(), row.source.data_ptr(), row.out.numel(), philox.signed(row.key))
        for row in rows
    ]
    programs = _programs(tuple(row.out.numel() for row in rows), device)
    with torch.cuda.device(device):
        _kernel[(len(programs),)](
            _upload(np.array(tensors, np.int64), device),
            programs,
            _upload(np.array(seeds, np.uint64).view(np.int64), device),
            _upload(factors, device),
            noise.levels(device),
            len(seeds),
            FIELD_BITS=256 // noise.per_block,
            DTYPE=_TRITON_DTYPES[dtype],
            ARITHMETIC=_TRITON_DTYPES[arithmetic(dtype)],
            BLOCK=BLOCK,
            num_warps=8,
            # A fused multiply-add rounds once where the reference rounds twice.
            enable_fp_fusion=False,
        )


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _programs(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Tensor and first element of every program."""
    rows = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, BLOCK)]
    return torch.tensor(rows, dtype=torch.int64, device=device)
