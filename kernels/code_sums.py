"""Sums of the rows of each code, deterministic and indifferent to how uneven the codes are.

The rows are sorted by code, in a stable order, and cut into chunks of equal size, wherever codes
end. One program sums a chunk. The codes that lie within it are done then; of one that goes on in a
neighbour a partial sum is left. A second kernel adds up the partial sums of those codes. So every
program has equally many rows, whatever the data, and no code has more chunks than √N or 256.

Few rows need one launch: a program for each code lists the rows that have it and adds them up. It
reads all indices, and in the worst case all rows. More rows, as long as N² comparisons are few, are
sorted by a kernel of our own: it counts the rows that come before each row, which is the place of
the row. That is one launch, where torch's sort takes several.

All adds in float64, and a sum is rounded to float32 once, so what it is wrong by does not grow with
the number of rows: at most 2⁻²⁴ of it, and n·2⁻⁵³·Σ|x|. Callers that divide the sums can have them
unrounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.arguments import Pull
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import register_limit, strides_of
from vqtriton.kernels.screen_tiles import row_unit
from vqtriton.kernels.sum_codes import (
    is_not_finite,
    residual_of,
    store_sum,
    sum_codes_kernel,
    sum_of_list,
)


@dataclass(frozen=True)
class CodeSumsConfig:
    """Tiles."""

    # rows of a chunk, at least; a power of two
    least_chunk: int = 32
    # rows whose indices are looked at together
    block_n: int = 1024
    # elements of a tile, and most dimensions of it
    block_elements: int = 2048
    block_d: int = 1024
    num_warps: int = 4
    # pipeline stages of the loop over the rows of a code: while a tile is added up, the rows of the
    # next two tiles are loaded, and the list of rows for the two after these
    stages: int = 5
    # without a limit ptxas spills a few for the next step of occupancy
    max_registers: int = 168
    # rows, over all heads, up to which their places are counted
    most_counted: int = 16384
    # elements of x, over all heads, and pairs of a row and a code, up to which each code has a
    # program to itself: it adds up all of x if all rows have that code
    most_elements: int = 1 << 19
    most_pairs: int = 1 << 23
    # programs of a head, about: with more codes than that, each program takes several
    most_programs: int = 1024

    def chunk(self, num_rows: int) -> int:
        """So that there are no more chunks than a chunk has rows, or 256."""
        most_chunks = max(256, math.isqrt(num_rows))
        return max(self.least_chunk, next_power_of_2(max(1, cdiv(num_rows, most_chunks))))


@triton.jit
def _fill_with_zeros(ptr, size, BLOCK: tl.constexpr):
    """``size`` elements, by all programs along the first axis; nothing of None."""
    if ptr is not None:
        for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            offs = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
            tl.store(ptr + offs, tl.zeros((BLOCK,), ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _segments(indices_ptr, offs, num_rows, N, K, num_segments, HAS_HEADS: tl.constexpr):
    """Of rows, int32: one code of one head; H·K of what is left out or beyond the last row."""
    index = tl.load(indices_ptr + offs, mask=offs < num_rows, other=-1)
    segment = index
    if HAS_HEADS:
        segment += offs // N * K
    return tl.where((index >= 0) & (index < K), segment, num_segments).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "N", "K", "num_segments", "num_elements", "num_counts"])
def place_rows_kernel(
    indices_ptr,   # [H·N] int64
    order_ptr,     # [H·N] int32, out: rows sorted by segment: one code of one head
    segments_ptr,  # [H·N] int32, out: their segments; H·K of rows that are left out
    sums_ptr,      # [H·K, D] fp32 / fp64, set to zero, for those that come after
    counts_ptr,    # [H·K] int64, likewise
    num_rows, N, K, num_segments, num_elements, num_counts,
    HAS_HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    _fill_with_zeros(sums_ptr, num_elements, BLOCK_OTHERS)
    _fill_with_zeros(counts_ptr, num_counts, BLOCK_OTHERS)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    segment = _segments(indices_ptr, row, num_rows, N, K, num_segments, HAS_HEADS)
    # not added up across threads before the end
    places = tl.zeros((BLOCK_ROWS, BLOCK_OTHERS), tl.int32)
    for start in range(0, num_rows, BLOCK_OTHERS):
        other = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_OTHERS)
        others = _segments(indices_ptr, other, num_rows, N, K, num_segments, HAS_HEADS)
        # an earlier row of the same code comes first, too
        others -= (other < first).to(tl.int32)
        # what is counted below or is not there comes before none
        is_other = (other < num_rows) & ((other < first) | (other >= first + BLOCK_ROWS))
        others = tl.where(is_other, others, num_segments + 1)
        places += (others[None, :] < segment[:, None]).to(tl.int32)
    own = first + tl.arange(0, BLOCK_ROWS)
    owns = _segments(indices_ptr, own, num_rows, N, K, num_segments, HAS_HEADS)
    owns = tl.where(own < num_rows, owns, num_segments + 1)
    goes_first = (own[None, :] < row[:, None]).to(tl.int32)
    place = tl.sum((owns[None, :] < segment[:, None] + goes_first).to(tl.int32), 1)
    place = (place + tl.sum(places, 1)).to(tl.int64)
    tl.store(order_ptr + place, row.to(tl.int32), mask=row < num_rows)
    tl.store(segments_ptr + place, segment, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "N", "K", "num_segments", "num_elements", "num_counts"])
def segment_keys_kernel(
    indices_ptr,  # [H·N] int64
    keys_ptr,     # [H·N] uint8 / int16 / int32, out: the segment; H·K if it is left out
    sums_ptr,     # [H·K, D] fp32 / fp64, set to zero, for those that come after
    counts_ptr,   # [H·K] int64, likewise
    num_rows, N, K, num_segments, num_elements, num_counts,
    HAS_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _fill_with_zeros(sums_ptr, num_elements, BLOCK)
    _fill_with_zeros(counts_ptr, num_counts, BLOCK)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    segment = _segments(indices_ptr, row, num_rows, N, K, num_segments, HAS_HEADS)
    tl.store(keys_ptr + row, segment.to(keys_ptr.dtype.element_ty), mask=row < num_rows)


@triton.jit
def _store_run(
    x_ptr, codebook_ptr, grad_loss_ptr, indices_ptr, order_ptr, segments_ptr, sums_ptr, counts_ptr,
    partial_ptr, partial_count_ptr, totals, segment, start, stop, goes_on, weight, N, K,
    num_segments, stride_xh, stride_xn, stride_xd, stride_ck, stride_cd, stride_gn,
    offs_d, dim_mask,
    D: tl.constexpr, HAS_HEADS: tl.constexpr, IS_GRAD: tl.constexpr, IS_CHAIN: tl.constexpr,
    IS_WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of a segment's rows in a chunk, from start to stop; nothing of those left out."""
    # the rare path must not need more registers than the common one
    FEWER: tl.constexpr = (BLOCK_ROWS + 1) // 2
    if segment < num_segments:
        chunk = tl.program_id(0).to(tl.int64)
        place = tl.cast(segment, tl.int64)
        list_ptr = order_ptr + tl.cast(start, tl.int64)
        total = tl.sum(totals, 0)
        count = tl.cast(stop - start, tl.int32)
        if IS_WHOLE:  # noqa: SIM102, a constexpr by itself
            if is_not_finite(total):
                code = tl.zeros((BLOCK_D,), tl.float32)
                if IS_GRAD:
                    code_ptrs = codebook_ptr + place * stride_ck + offs_d * stride_cd
                    code = tl.load(code_ptrs, mask=dim_mask, other=0.0).to(tl.float32)
                head = tl.full((), 0, tl.int64)
                if HAS_HEADS:
                    # the rows of a list count those of earlier heads
                    head = tl.load(list_ptr).to(tl.int64) // N
                    x_ptr += head * (stride_xh - N * stride_xn)
                    indices_ptr -= head * N
                total, count = sum_of_list(
                    x_ptr, codebook_ptr, grad_loss_ptr, indices_ptr, list_ptr, code, count,
                    head.to(tl.int32), weight, N, K, stride_xn, stride_xd, stride_ck, stride_cd,
                    stride_gn, offs_d, dim_mask, IS_GRAD, IS_CHAIN, True, FEWER, BLOCK_D, 1,
                )  # fmt: skip
        count = count.to(tl.int64)
        may_begin = (start == 0) & (chunk > 0)
        before_ptr = segments_ptr + tl.full((), -1, tl.int64)
        before = tl.load(before_ptr, mask=may_begin, other=0).to(tl.int32)
        is_begun = may_begin & (before == segment)
        if is_begun | goes_on:
            place = 2 * chunk + (is_begun == 0).to(tl.int64)
            store_sum(partial_ptr, partial_count_ptr, place, total, count, dim_mask, offs_d, D)
        else:
            store_sum(sums_ptr, counts_ptr, place, total, count, dim_mask, offs_d, D)


@triton.jit(do_not_specialize=["num_rows", "num_segments", "N", "K", "chunk_rows", "stride_gn"])
def chunk_sums_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H·K, D] fp32 / fp16 / bf16, if IS_GRAD or IS_CHAIN
    grad_loss_ptr,      # [H·N] fp32, if IS_GRAD
    indices_ptr,        # [H, N] int64, if IS_CHAIN
    order_ptr,          # [H·N] int32 / int64, rows sorted by segment
    segments_ptr,       # [H·N] uint8 / int16 / int32, their segments
    sums_ptr,           # [H·K, D] fp32 / fp64, out: of segments that lie within a chunk
    counts_ptr,         # [H·K] int64, out: likewise
    partial_ptr,        # [C, 2, D] fp64, out: of the first segment of a chunk, if it began before
    partial_count_ptr,  # [C, 2] int64, out: it, and of the last, if that began in it and goes on
    weight,
    num_rows, num_segments, N, K, chunk_rows,
    stride_xh, stride_xn, stride_xd, stride_ck, stride_cd, stride_gn,
    D: tl.constexpr, HAS_HEADS: tl.constexpr, IS_GRAD: tl.constexpr, IS_CHAIN: tl.constexpr,
    IS_WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ x_n, or with IS_GRAD Σ weight·grad_loss_n·(e - x_n), over finite rows if IS_WHOLE.

    If IS_CHAIN, the heads are levels, and x_n is what the levels before have left of it.
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    dim_mask = offs_d < D
    # places are those of the chunk from here on, so that they take one register
    first = chunk * chunk_rows
    end = tl.minimum(num_rows - first, chunk_rows).to(tl.int32)
    is_last_chunk = first + end == num_rows
    segments_ptr += first
    order_ptr += first

    of_run = tl.load(segments_ptr).to(tl.int32)
    run_start = tl.full((), 0, tl.int32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float64)
    offs = tl.arange(0, BLOCK_ROWS)
    next_segment = tl.load(segments_ptr + offs.to(tl.int64), mask=offs < end, other=0)
    next_row = tl.load(order_ptr + offs.to(tl.int64), mask=offs < end, other=0)
    for start in range(0, end, BLOCK_ROWS):
        offs = start + tl.arange(0, BLOCK_ROWS)
        segment = next_segment
        is_there = (offs < end) & (segment < num_segments)
        row = next_row.to(tl.int64)
        row_offs = row * stride_xn
        if HAS_HEADS:
            row_offs = (row // N) * stride_xh + (row % N) * stride_xn
        mask = is_there[:, None] & dim_mask[None, :]
        x_ptrs = x_ptr + row_offs[:, None] + offs_d[None, :] * stride_xd
        value = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if IS_CHAIN:
            level = tl.where(is_there, (row // N).to(tl.int32), 0)
            value = residual_of(
                value, row % N, is_there, level, tl.max(level, 0), codebook_ptr, indices_ptr, N, K,
                stride_ck, stride_cd, offs_d, dim_mask,
            )  # fmt: skip
        if IS_GRAD:
            code_offs = segment.to(tl.int64) * stride_ck
            code_ptrs = codebook_ptr + code_offs[:, None] + offs_d[None, :] * stride_cd
            code = tl.load(code_ptrs, mask=mask, other=0.0).to(tl.float32)
            grad = weight * tl.load(grad_loss_ptr + row * stride_gn, mask=is_there, other=0.0)
            value = tl.where(mask, grad[:, None] * (code - value), 0.0)
        # where the next tile is, while the rows of this one are on their way
        tile_end = tl.minimum(start + BLOCK_ROWS, end)
        last = tl.load(segments_ptr + (tile_end - 1).to(tl.int64)).to(tl.int32)
        has_next = (tile_end < end) | (is_last_chunk == 0)
        following = tl.load(segments_ptr + tile_end.to(tl.int64), mask=has_next, other=0)
        following = tl.where(has_next, following.to(tl.int32), -1)
        ahead = offs + BLOCK_ROWS
        next_segment = tl.load(segments_ptr + ahead.to(tl.int64), mask=ahead < end, other=0)
        next_row = tl.load(order_ptr + ahead.to(tl.int64), mask=ahead < end, other=0)
        run = start
        while run < tile_end:
            next_run = tile_end
            of_next = following
            if (of_run == last) & (run == start):
                total += value.to(tl.float64)
            else:
                if of_run != last:
                    is_own = (segment == of_run) & (offs < end)
                    next_run = run + tl.sum(is_own.to(tl.int32), 0)
                    of_next = tl.load(segments_ptr + next_run.to(tl.int64)).to(tl.int32)
                is_of_run = (offs >= run) & (offs < next_run)
                total += tl.where(is_of_run[:, None], value, 0.0).to(tl.float64)
            if (of_next != of_run) | (next_run == end):
                _store_run(
                    x_ptr, codebook_ptr, grad_loss_ptr, indices_ptr, order_ptr, segments_ptr,
                    sums_ptr, counts_ptr, partial_ptr, partial_count_ptr, total, of_run, run_start,
                    next_run, of_next == of_run, weight, N, K, num_segments,
                    stride_xh, stride_xn, stride_xd, stride_ck, stride_cd, stride_gn, offs_d,
                    dim_mask, D, HAS_HEADS, IS_GRAD, IS_CHAIN, IS_WHOLE, BLOCK_ROWS, BLOCK_D,
                )  # fmt: skip
                total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float64)
                run_start = next_run
            run = next_run
            of_run = of_next


@triton.jit(do_not_specialize=["num_segments", "num_chunks", "chunk_rows"])
def combine_chunks_kernel(
    segments_ptr,       # [H·N] uint8 / int16 / int32, sorted
    partial_ptr,        # [C, 2, D] fp64, of `chunk_sums_kernel`
    partial_count_ptr,  # [C, 2] int64
    sums_ptr,           # [H·K, D] fp32 / fp64, out: of segments that cross a border
    counts_ptr,         # [H·K] int64, out: likewise
    num_segments, num_chunks, chunk_rows,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program for each border between two chunks; a segment has that of its first."""
    chunk = tl.program_id(0).to(tl.int64)
    border = (chunk + 1) * chunk_rows
    segment = tl.load(segments_ptr + (border - 1)).to(tl.int64)
    crosses = tl.load(segments_ptr + border).to(tl.int64) == segment
    start = chunk * chunk_rows
    before = tl.load(segments_ptr + (start - 1), mask=start > 0, other=0).to(tl.int64)
    begins = (start == 0) | (before != segment)
    if crosses & begins & (segment < num_segments):
        offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        dim_mask = offs_d < D
        total = tl.load(partial_ptr + (2 * chunk + 1) * D + offs_d, mask=dim_mask, other=0.0)
        count = tl.load(partial_count_ptr + (2 * chunk + 1))
        first = chunk + 1
        goes_on = first > 0
        while goes_on:
            chunks = first + tl.arange(0, BLOCK_ROWS)
            is_there = chunks < num_chunks
            there = tl.load(segments_ptr + chunks * chunk_rows, mask=is_there, other=0)
            is_there = is_there & (there.to(tl.int64) == segment)
            partial = tl.load(
                partial_ptr + (2 * chunks)[:, None] * D + offs_d[None, :],
                mask=is_there[:, None] & dim_mask[None, :],
                other=0.0,
            )
            total += tl.sum(partial, 0)
            counts = tl.load(partial_count_ptr + 2 * chunks, mask=is_there, other=0)
            count += tl.sum(counts, 0)
            goes_on = tl.min(is_there.to(tl.int32), 0) > 0
            first += BLOCK_ROWS
        store_sum(sums_ptr, counts_ptr, segment, total, count, dim_mask, offs_d, D)


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    double: bool = False,
    config: CodeSumsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum and number of the rows of each code.

    Args:
        x: [H, N, D] float32 / float16 / bfloat16, any strides. Rows that are not finite are left
            out.
        indices: [H, N] int64; rows with an index outside [0, K) are left out.
        codebook_size: K.
        double: leave the sums in float64, as they were added.
        config: tiles.

    Returns:
        sums, [H, K, D] float32, or float64 with ``double``; counts, [H, K] int64.
    """
    return segment_sums(x, indices, codebook_size, double=double, config=config or CodeSumsConfig())


def segment_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    config: CodeSumsConfig,
    double: bool = False,
    pull: Pull | None = None,
    chain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `code_sums`; with a pull of differences: Σ weight·grad_loss_n·(e - x_n).

    With a chain, [Q, K, D], x is [Q, N, D] with a stride of 0 before N, the indices [Q, N] are
    those of the levels, and level q adds up what the levels before it have left of the rows.
    """
    heads, num_rows, dim = x.shape
    num_segments, total = heads * codebook_size, heads * num_rows
    block_d = min(config.block_d, next_power_of_2(dim))
    # offsets that are not known to be aligned take registers, and so do codes that are subtracted
    is_plain = row_unit(x) > 1 and chain is None
    elements = config.block_elements if is_plain else config.block_elements // 2
    block_rows = min(64, max(1, elements // block_d))
    blocks_d = cdiv(dim, block_d)
    is_whole = dim <= config.block_d
    if not is_whole:
        # no program sees all of a row; its largest element is finite when all are
        rows = x if chain is None else x[:1]
        is_finite = torch.linalg.vector_norm(rows, torch.inf, dim=2).isfinite()
        indices = indices.where(is_finite, -1)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    sums = empty(heads, codebook_size, dim, dtype=torch.float64 if double else torch.float32)
    counts = empty(heads, codebook_size, dtype=torch.int64)
    chunk_rows = config.chunk(total)
    num_chunks = cdiv(total, chunk_rows)
    options = {
        "D": dim,
        "BLOCK_ROWS": block_rows,
        "BLOCK_D": block_d,
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
        **register_limit(config.max_registers),
    }
    codes, grads, weight = sums, counts, 1.0
    if pull is not None:
        codes, grads, weight = pull.codebook, pull.grad_loss, pull.weight
    if chain is not None:
        codes = chain
    codes, grads = codes.reshape(num_segments, dim), grads.reshape(-1)
    strides = *strides_of(x), *codes.stride(), grads.stride(-1)
    flags = {"IS_GRAD": pull is not None, "IS_CHAIN": chain is not None, "IS_WHOLE": is_whole}
    indices = indices.contiguous()
    is_few = total * dim <= config.most_elements and total * codebook_size <= config.most_pairs
    # a grid takes no more heads
    if is_few and heads <= 65535:
        codes_per_program = cdiv(codebook_size, config.most_programs)
        lists = empty(total, dtype=torch.int32)
        tensors = x, codes, grads, indices, lists, sums, counts
        grid = (cdiv(codebook_size, codes_per_program), blocks_d, heads)
        sizes = num_rows, codebook_size, codes_per_program
        with torch.cuda.device_of(x):
            launch(
                sum_codes_kernel,
                grid,
                *(*tensors, weight, *sizes, *strides),
                **flags,
                BLOCK_N=config.block_n,
                # single elements are loaded into registers, and there are not enough of these
                STAGES=config.stages if row_unit(x) > 1 else 1,
                **options,
            )
        return sums, counts
    partial = empty(num_chunks, 2, dim, dtype=torch.float64)
    partial_count = empty(num_chunks, 2, dtype=torch.int64)
    with torch.cuda.device_of(x):
        order, segments = sort_rows(indices, codebook_size, (sums, counts), config)
        launch(
            chunk_sums_kernel,
            (num_chunks, blocks_d),
            x,
            codes,
            grads,
            indices,
            order,
            segments,
            sums,
            counts,
            partial,
            partial_count,
            weight,
            total,
            num_segments,
            num_rows,
            codebook_size,
            chunk_rows,
            *strides,
            HAS_HEADS=heads > 1,
            **flags,
            **options,
        )
        if num_chunks > 1:
            launch(
                combine_chunks_kernel,
                (num_chunks - 1, blocks_d),
                segments,
                partial,
                partial_count,
                sums,
                counts,
                num_segments,
                num_chunks,
                chunk_rows,
                **options,
            )
    return sums, counts


def sort_rows(
    indices: Tensor,
    size: int,
    outputs: tuple[Tensor, Tensor] | None,
    config: CodeSumsConfig,
) -> tuple[Tensor, Tensor]:
    """Rows [H·N] sorted by segment, and the segment of each: see `chunk_sums_kernel`.

    ``outputs``, sums [H, K, D] and counts [H, K] for K = ``size``, are set to zero.
    """
    heads, num_rows = indices.shape
    num_segments, total = heads * size, indices.numel()
    sums, counts = outputs or (None, None)
    elements = (0, 0) if sums is None or counts is None else (sums.numel(), counts.numel())
    arguments = total, num_rows, size, num_segments, *elements
    options = {"HAS_HEADS": heads > 1, "num_warps": 4, "enable_fp_fusion": False}
    if total <= config.most_counted:
        order = torch.empty(total, dtype=torch.int32, device=indices.device)
        segments = torch.empty_like(order)
        tensors = indices.contiguous(), order, segments, sums, counts
        tiles = {"BLOCK_ROWS": 32, "BLOCK_OTHERS": 128}
        grid = (max(1, cdiv(total, 32)),)
        launch(place_rows_kernel, grid, *tensors, *arguments, **tiles, **options)
        return order, segments
    # sorted 8 bits at a time, so by as few bytes as do
    keys = torch.empty(total, dtype=_key_dtype(num_segments), device=indices.device)
    tensors = indices.contiguous(), keys, sums, counts
    grid = (cdiv(total, 256),)
    launch(segment_keys_kernel, grid, *tensors, *arguments, BLOCK=256, **options)
    segments, order = keys.sort(stable=True)
    return order, segments


def _key_dtype(largest: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int16):
        if largest <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32
