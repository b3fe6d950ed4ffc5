"""``Factors`` for NVIDIA GPUs: one launch draws those of every tensor and term."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_adapt.noise import philox
from zo_adapt.noise.low_rank import Matrices
from zo_adapt.noise.sums import GRAPH_TABLES, HEADER, Sums
from zo_adapt.noise.triton_numbers import TRITON_DTYPES, fields, gaussian, quantile_table

DRAWN = 1024
"""Entries of factors that one program draws; a multiple of the entries of a block."""


@triton.jit(do_not_specialize_on_alignment=["sums", "terms"])  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]  # noqa: ANN202
    out,  # noqa: ANN001
    numel,  # noqa: ANN001
    programs,  # noqa: ANN001
    sums,  # noqa: ANN001
    terms,  # noqa: ANN001
    quantile,  # noqa: ANN001
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program's block: where it goes, entries left, key, first entry, sum, and of each matrix
    # the entries of all its factors and of the left ones.
    record = programs + 7 * tl.program_id(0)
    term = tl.program_id(1)
    target = tl.load(record)
    left = tl.load(record + 1)
    key = tl.load(record + 2).to(tl.uint64, bitcast=True)
    start = tl.load(record + 3)
    this = sums + 1 + HEADER * tl.load(record + 4)
    entry = tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    if term < tl.load(this + 1):
        pair = terms + 2 * (tl.load(this) + term)
        seed = tl.load(pair).to(tl.uint64, bitcast=True)
        value = gaussian(fields(start, seed, key, 0, 16, BLOCK), quantile)
        if SCALE != 0.0:
            c = (tl.load(pair + 1).to(tl.float64, bitcast=True) * SCALE).to(tl.float32)
            is_left = (start + entry) % tl.load(record + 5) < tl.load(record + 6)
            value = tl.where(is_left, value * c, value)
    at = out + term.to(tl.int64) * numel + target + entry
    tl.store(at, value.to(DTYPE), mask=entry < left)


class FactorsDrawn:
    """Draws the factors of several tensors for all terms of their sums.

    Args:
        device: Where.
        wanted: Key, matrices and sum of each.
        scaled: Multiply a by the term's coefficient and 1 / sqrt(rank).
    """

    def __init__(
        self,
        device: torch.device,
        wanted: Sequence[tuple[int, Matrices, int]],
        *,
        scaled: bool = False,
    ) -> None:
        self.starts = list(accumulate((of.numel for _, of, _ in wanted), initial=0))
        self.numel = self.starts[-1]
        rank = wanted[0][1].rank
        self._scale = rank**-0.5 if scaled else 0.0
        rows = []
        for (key, of, which), place in zip(wanted, self.starts, strict=False):
            start = np.arange(0, of.numel, DRAWN)
            period, middle = rank * (of.height + of.width), rank * of.height
            block = np.empty((len(start), 7), np.int64)
            block[:, 0], block[:, 1], block[:, 2] = (
                place + start,
                of.numel - start,
                philox.signed(key),
            )
            block[:, 3], block[:, 4], block[:, 5], block[:, 6] = start, which, period, middle
            rows.append(block)
        self._records = torch.from_numpy(np.concatenate(rows)).to(device)

    def __call__(self, sums: Sums, out: Tensor) -> None:
        """Into ``out``, (terms, numel); a sum with fewer terms gives zeros."""
        keep(self._records)
        header, terms = sums.on(out.device)
        with torch.cuda.device(out.device):
            _draw[(len(self._records), len(out))](
                out,
                self.numel,
                self._records,
                header,
                terms,
                quantile_table(out.device),
                SCALE=self._scale,
                DTYPE=TRITON_DTYPES[out.dtype],
                HEADER=HEADER,
                BLOCK=DRAWN,
                num_warps=4,
                enable_fp_fusion=False,
            )


def keep(*tables: Tensor) -> None:
    """Let a graph that is captured keep what its kernels read."""
    kept = GRAPH_TABLES.get()
    if kept is not None:
        kept += tables
