"""The generator's numbers in Triton, for kernels that use them: fields, values, sums, rounding.

Each is bit for bit that of the reference in ``entries``, ``distributions`` and ``rounding``.
"""

import os
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from zo_adapt.noise.distributions import QUANTILE

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_ROW = tl.constexpr(
    "{ .reg .u32 row; .reg .u64 at; shr.u32 row, $4, 23; mul.wide.u32 at, row, 16;"
    " add.s64 at, at, $5; ld.global.nc.v4.f32 {$0, $1, $2, $3}, [at + -2032]; }"
)
"""The constants of a row in one load: in Triton, whose widest number has 64 bits, it takes two."""
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter runs no PTX."""


@triton.jit  # type: ignore[untyped-decorator]
def fields(start, seed, key, STREAM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Fields of the generator's words for elements start .. start + BLOCK, in order."""
    per_block: tl.constexpr = 256 // BITS
    counter = start // per_block + 1 + tl.arange(0, BLOCK // per_block)
    return fields_of(counter, seed, key, STREAM, BITS, BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def fields_of(counter, seed, key, STREAM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Fields of the words that these values of the counter give."""
    counters: tl.constexpr = BLOCK * BITS // 256
    counter = counter.to(tl.uint64)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox_impl(counter, zero, zero, zero + STREAM, seed, key)
    # Joined so that word 2i + j lies at [i, j]: row-major order is the words' order.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    # Halves first: a shift of 64 bits is two of 32.
    halves = tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32))
    shift = tl.arange(0, 32 // BITS) * BITS
    field = tl.reshape(halves, (counters, 8, 1)) >> shift[None, None, :]
    return tl.reshape(field & ((1 << BITS) - 1), (BLOCK,)).to(tl.int32)


@triton.jit
def _row(t, quantile):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The constants for t's exponent."""
    bits = t.to(tl.uint32, bitcast=True)
    if _INTERPRETED:
        row = quantile + 4 * ((bits >> 23).to(tl.int32) - 127)
        return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return tl.inline_asm_elementwise(
        _ROW,
        "=f,=f,=f,=f,r,l",
        [bits, quantile],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def gaussian(field, quantile):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The value of a 16-bit field: as ``distributions`` makes its table, in the same fp32 steps."""
    # 2k + 1 of the field 2k + sign: twice the k + 1/2 that the table is made from.
    t = (field | 1).to(tl.uint16).to(tl.float32)
    c0, c1, c2, c3 = _row(t, quantile)
    size = ((c3 * t + c2) * t + c1) * t + c0
    # An addition to the highest bit is its exclusive or, and one instruction with the shift.
    return (size.to(tl.int32, bitcast=True) + (field << 31)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def summed(  # type: ignore[no-untyped-def]  # noqa: ANN201
    before,  # noqa: ANN001
    this,  # noqa: ANN001
    terms,  # noqa: ANN001
    start,  # noqa: ANN001
    key,  # noqa: ANN001
    quantile,  # noqa: ANN001
    FIELD_BITS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements start .. start + BLOCK of a tensor, with the sum at ``this`` added."""
    decay = tl.load(this + 2).to(tl.float64, bitcast=True).to(ARITHMETIC)
    total = before.to(ARITHMETIC)
    if decay != 1.0:
        total *= decay
    first = tl.load(this)
    for term in range(first, first + tl.load(this + 1)):
        seed = tl.load(terms + 2 * term).to(tl.uint64, bitcast=True)
        c = tl.load(terms + 2 * term + 1).to(tl.float64, bitcast=True).to(ARITHMETIC)
        field = fields(start, seed, key, 0, FIELD_BITS, BLOCK)
        if FIELD_BITS == 1:
            total += tl.where(field == 1, c, -c)
        else:
            total += gaussian(field, quantile).to(ARITHMETIC) * c
    return total


@triton.jit  # type: ignore[untyped-decorator]
def rounded(total, fraction, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Up with the probability that keeps the mean; ``fraction`` has 16 bits."""
    if tl.bfloat16 == DTYPE:
        # The upper half of fp32 is bf16: taken as it is, with no conversion.
        bits = total.to(tl.int32, bitcast=True) + fraction
        result = (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        scaled = total * 1.9259299443872359e-34  # 2**-112
        bits = (scaled.to(tl.int32, bitcast=True) + (fraction >> 3)) & -0x2000
        result = (bits.to(tl.float32, bitcast=True) * 5.192296858534828e33).to(DTYPE)  # 2**112
    return result


@cache
def quantile_table(device: torch.device) -> Tensor:
    """The constants c_j 2^(-j (e + 1)) of row e: for t 2^(e + 1) in the place of the mantissa.

    Powers of two change no rounding, so the values keep their bits.
    """
    scales = -np.outer(np.arange(1, 17), np.arange(4))
    return torch.from_numpy(np.ldexp(np.array(QUANTILE, np.float32), scales)).to(device)
