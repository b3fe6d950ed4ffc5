"""The fused form of ``accumulate`` for matrices that are made of factors, on NVIDIA GPUs.

One launch draws the factors of every term, 4 bytes an entry of a or b; another works on tiles of
the matrices, reads each once, adds every term from two short vectors, rounds and writes it once.
No noise is made for an element, so that the floor is one read and one write of the view.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from zo_adapt.noise import philox
from zo_adapt.noise.accumulate import Place, arithmetic
from zo_adapt.noise.low_rank import Matrices, Rectangle, rectangle_of, scale
from zo_adapt.noise.rounding import ROUNDING_STREAM
from zo_adapt.noise.sums import GRAPH_TABLES, HEADER, Sums
from zo_adapt.noise.triton_accumulate import ALIGNMENT, OnCUDA
from zo_adapt.noise.triton_factors import FactorsDrawn, keep
from zo_adapt.noise.triton_numbers import TRITON_DTYPES, fields_of, rounded

ROWS, COLUMNS, WARPS = 32, 128, 4
"""Of a tile, and what works on it."""
MOST_BYTES = 256 * 2**20
"""Factors that are there at a time, where one tensor's do not need more."""


@triton.jit(do_not_specialize_on_alignment=["sums", "terms"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    tiles,  # noqa: ANN001
    tensors,  # noqa: ANN001
    factors,  # noqa: ANN001
    numel,  # noqa: ANN001
    sums,  # noqa: ANN001
    terms,  # noqa: ANN001
    RANK: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ROUNDING: tl.constexpr,
    STREAM: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEADER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # This program's tile: tensor, matrix, first row and column.
    tile = tiles + 4 * tl.program_id(0)
    tensor = tensors + 12 * tl.load(tile).to(tl.int64)
    matrix = tl.load(tile + 1).to(tl.int64)
    top, begin = tl.load(tile + 2), tl.multiple_of(tl.load(tile + 3), COLUMNS)
    line = top + tl.arange(0, ROWS)
    column = begin + tl.arange(0, COLUMNS)
    # The tensor: addresses of result and source, key, sum, its factors' place, height, width; of
    # the part of each matrix that is here height and width; first matrix, line and column.
    out = tl.load(tensor).to(tl.pointer_type(DTYPE))
    source = tl.load(tensor + 1).to(tl.pointer_type(DTYPE))
    this = sums + 1 + HEADER * tl.load(tensor + 3)
    height = tl.load(tensor + 5)
    width = tl.load(tensor + 6)
    lines, columns = tl.load(tensor + 7), tl.load(tensor + 8)
    if ALIGNED:
        # Without the three hints every element is read and written by itself: 2.4 times as slow.
        columns = tl.multiple_of(columns, 16)
    has_line, has_column = line < lines, column < columns
    inside = has_line[:, None] & has_column[None, :]
    first_here = (matrix * lines + top) * columns + begin
    if ALIGNED:
        first_here = tl.multiple_of(first_here, 16)
        out, source = tl.multiple_of(out, 16), tl.multiple_of(source, 16)
    out += first_here
    source += first_here
    here = tl.arange(0, ROWS)[:, None] * columns.to(tl.int32) + tl.arange(0, COLUMNS)[None, :]
    # From here on they are numbered as in the whole tensor.
    matrix += tl.load(tensor + 9)
    line += tl.load(tensor + 10)
    column += tl.load(tensor + 11)

    total = tl.load(source + here, mask=inside, other=0.0).to(ARITHMETIC)
    decay = tl.load(this + 2).to(tl.float64, bitcast=True).to(ARITHMETIC)
    if decay != 1.0:
        total *= decay
    own = tl.load(tensor + 4) + matrix * (RANK * (height + width))
    first = tl.load(this)
    for term in range(tl.load(this + 1)):
        c = tl.load(terms + 2 * (first + term) + 1).to(tl.float64, bitcast=True).to(ARITHMETIC)
        left = factors + tl.cast(term, tl.int64) * numel + own
        right = left + RANK * height
        a = tl.load(left + line, mask=has_line, other=0.0)
        b = tl.load(right + column, mask=has_column, other=0.0)
        z = a[:, None] * b[None, :]
        for p in range(1, RANK):
            a = tl.load(left + p * height + line, mask=has_line, other=0.0)
            b = tl.load(right + p * width + column, mask=has_column, other=0.0)
            z += a[:, None] * b[None, :]
        if RANK > 1:
            z *= SCALE
        total += z.to(ARITHMETIC) * c
    if ROUNDING:
        seed = tl.load(sums).to(tl.uint64, bitcast=True)
        key = tl.load(tensor + 2).to(tl.uint64, bitcast=True)
        if WHOLE_BLOCKS:
            # Rows are whole blocks of the generator, 16 elements each.
            block = (begin + tl.load(tensor + 11)) // 16 + tl.arange(0, COLUMNS // 16)
            counter = (matrix * height + line)[:, None] * (width // 16) + block[None, :] + 1
            counter = tl.reshape(counter, (ROWS * COLUMNS // 16,))
            fraction = fields_of(counter, seed, key, STREAM, 16, ROWS * COLUMNS)
        else:
            element = (matrix * height + line)[:, None] * width + column[None, :]
            counter = tl.reshape(element // 16 + 1, (ROWS * COLUMNS,))
            all_of_block = fields_of(counter, seed, key, STREAM, 16, 16 * ROWS * COLUMNS)
            all_of_block = tl.reshape(all_of_block, (ROWS * COLUMNS, 16))
            own_one = tl.reshape(element % 16, (ROWS * COLUMNS,))[:, None]
            chosen = tl.where(own_one == tl.arange(0, 16)[None, :], all_of_block, 0)
            fraction = tl.sum(chosen, 1)
        result = rounded(total, tl.reshape(fraction, (ROWS, COLUMNS)), DTYPE)
    else:
        result = total.to(DTYPE)
    tl.store(out + here, result, mask=inside)


class FactorsOnCUDA(OnCUDA):
    """Places of one device and dtype whose tensors are all made of factors."""

    def _describe(self, places: Sequence[Place], addresses: Sequence[tuple[int, int]]) -> None:
        """Put into device memory what a launch reads of its places, part by part."""
        self._of = [self._matrices_of(place) for place in places]
        self._described, self._pairs = places, addresses
        self._parts: dict[int, list[_Part]] = {}

    def _matrices_of(self, place: Place) -> Matrices:
        of = place.matrices(self._noise)
        if of is None:
            raise RuntimeError("a tensor without factors")
        return of

    def _launch(self, sums: Sums) -> None:
        count = max(len(sums.sums[place.sum].terms) for place in self._described)
        limit = max(1, MOST_BYTES // (4 * max(1, count)))  # entries of factors for a term
        size = 1 << (limit.bit_length() - 1)  # few partitions, whatever the number of terms
        if size not in self._parts:
            # What is copied from here must not become part of a captured graph.
            capturing = GRAPH_TABLES.get() is not None
            with torch.cuda.stream(torch.cuda.Stream(self._device) if capturing else None):
                self._parts[size] = self._cut(size)
        for part in self._parts[size]:
            part(sums, max(1, count))

    def _cut(self, size: int) -> "list[_Part]":
        parts: list[list[int]] = []
        used = size + 1
        for index, of in enumerate(self._of):
            whole = self._has_whole_blocks(index)
            same = bool(parts) and self._has_whole_blocks(parts[-1][0]) == whole
            if used + of.numel > size or not same:
                parts.append([])
                used = 0
            parts[-1].append(index)
            used += of.numel
        return [
            _Part(
                [self._described[i] for i in part],
                [self._pairs[i] for i in part],
                [self._of[i] for i in part],
                self._has_whole_blocks(part[0]),
            )
            for part in parts
        ]

    def _has_whole_blocks(self, index: int) -> bool:
        """Whether rows, and what is here of them, begin where blocks of the rounding do."""
        part = self._described[index].part
        return self._of[index].width % 16 == 0 and (part is None or part.first % 16 == 0)


class _Part:
    """Some places, whose factors are there together."""

    def __init__(
        self,
        places: Sequence[Place],
        addresses: Sequence[tuple[int, int]],
        matrices: Sequence[Matrices],
        whole_blocks: bool,
    ) -> None:
        first = places[0].source
        self._device, self._dtype, self._whole = first.device, first.dtype, whole_blocks
        self._tile = (ROWS, COLUMNS) if whole_blocks else (4, 32)
        self._rank, self._scale = matrices[0].rank, float(scale(matrices[0]))
        listed = [(p.key, of, p.sum) for p, of in zip(places, matrices, strict=True)]
        self._drawn = FactorsDrawn(self._device, listed)
        here = [_rectangle(place, of) for place, of in zip(places, matrices, strict=True)]
        described = [
            (*pair, philox.signed(place.key), place.sum, start, of.height, of.width, *part[1:])
            for place, pair, of, start, part in zip(
                places, addresses, matrices, self._drawn.starts, here, strict=False
            )
        ]
        self._aligned = whole_blocks and all(
            pair[0] % ALIGNMENT == 0 and pair[1] % ALIGNMENT == 0 and part.width % 16 == 0
            for pair, part in zip(addresses, here, strict=True)
        )
        self._tensors = torch.from_numpy(np.array(described, np.int64)).to(self._device)
        self._tiles = torch.from_numpy(_tiles(here, *self._tile)).to(self._device)

    def __call__(self, sums: Sums, count: int) -> None:
        """Draw the factors and add."""
        factors = torch.empty((count, self._drawn.numel), device=self._device)
        self._drawn(sums, factors)
        keep(self._tensors, self._tiles)
        header, terms = sums.on(self._device)
        half = self._dtype.itemsize == 2
        with torch.cuda.device(self._device):
            _kernel[(len(self._tiles),)](
                self._tiles,
                self._tensors,
                factors,
                self._drawn.numel,
                header,
                terms,
                RANK=self._rank,
                SCALE=self._scale,
                DTYPE=TRITON_DTYPES[self._dtype],
                ARITHMETIC=TRITON_DTYPES[arithmetic(self._dtype)],
                ROUNDING=half and sums.rounding is not None,
                STREAM=ROUNDING_STREAM,
                WHOLE_BLOCKS=self._whole,
                ALIGNED=self._aligned,
                HEADER=HEADER,
                ROWS=self._tile[0],
                COLUMNS=self._tile[1],
                num_warps=WARPS,
                # A fused multiply-add rounds once where the reference rounds twice.
                enable_fp_fusion=False,
            )


def _rectangle(place: Place, of: Matrices) -> Rectangle:
    found = rectangle_of(place.part, of)
    if found is None:
        raise RuntimeError("a part of matrices that is no rectangle")
    return found


def _tiles(here: Sequence[Rectangle], rows: int, columns: int) -> np.ndarray:
    """Tensor, matrix, first row and first column of every tile."""
    parts = []
    for index, (count, height, width, *_) in enumerate(here):
        of_matrix = range(count), range(0, height, rows), range(0, width, columns)
        places = np.stack(np.meshgrid(*of_matrix, indexing="ij"), -1).reshape(-1, 3)
        parts.append(np.insert(places, 0, index, 1).astype(np.int32))
    return np.concatenate(parts)
