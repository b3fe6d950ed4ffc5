"""The fused form of ``gathered`` for NVIDIA GPUs: rows of a table, shifted as they are read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_adapt.noise import philox
from zo_adapt.noise.accumulate import arithmetic
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.sums import GRAPH_TABLES, HEADER, Sums
from zo_adapt.noise.triton_numbers import TRITON_DTYPES, quantile_table, summed

BLOCK = 512
"""Elements of one program of one warp; a multiple of every noise's elements per block."""


@triton.jit(do_not_specialize_on_alignment=["sums", "terms"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    out,  # noqa: ANN001
    weight,  # noqa: ANN001
    ids,  # noqa: ANN001
    width,  # noqa: ANN001
    which,  # noqa: ANN001
    sums,  # noqa: ANN001
    terms,  # noqa: ANN001
    quantile,  # noqa: ANN001
    FIELD_BITS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_block: tl.constexpr = 256 // FIELD_BITS
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(ids + row).to(tl.int64) * width
    # Noise is made by whole blocks of the generator, wherever in one the row begins.
    first = start // per_block * per_block + tl.program_id(1) * BLOCK
    column = first - start + tl.arange(0, BLOCK)
    inside = (column >= 0) & (column < width)
    key = tl.load(which).to(tl.uint64, bitcast=True)
    this = sums + 1 + HEADER * tl.load(which + 1)
    before = tl.load(weight + start + column, mask=inside, other=0.0)
    total = summed(before, this, terms, first, key, quantile, FIELD_BITS, ARITHMETIC, BLOCK)
    tl.store(out + row * width + column, total.to(before.dtype), mask=inside)


class GatheredOnCUDA:
    """Shifted rows of one tensor; what does not change lies in device memory."""

    def __init__(self, noise: Noise, weight: Tensor, key: int, sum: int) -> None:
        self._noise, self._weight = noise, weight
        self._which = torch.tensor([philox.signed(key), sum]).to(weight.device)

    def __call__(self, ids: Tensor, sums: Sums) -> Tensor:
        """The rows of these numbers, (*ids.shape, width)."""
        weight, width, per_block = (
            self._weight,
            self._weight.shape[1],
            self._noise.entries.per_block,
        )
        tables = GRAPH_TABLES.get()
        if tables is not None:
            tables.append(self._which)
        header, terms = sums.on(weight.device)
        out = weight.new_empty((*ids.shape, width), requires_grad=False)
        if out.numel() == 0:
            return out
        reach = width if width % per_block == 0 else width + per_block - 1
        with torch.cuda.device(weight.device):
            _kernel[(ids.numel(), -(-reach // BLOCK))](
                out,
                weight.contiguous(),
                ids.contiguous(),
                width,
                self._which,
                header,
                terms,
                quantile_table(weight.device),
                FIELD_BITS=256 // per_block,
                ARITHMETIC=TRITON_DTYPES[arithmetic(weight.dtype)],
                HEADER=HEADER,
                BLOCK=BLOCK,
                num_warps=1,
                # A fused multiply-add rounds once where the reference rounds twice.
                enable_fp_fusion=False,
            )
        return out
