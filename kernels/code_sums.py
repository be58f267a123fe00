"""Sums of the rows of each code, deterministic and indifferent to how uneven the codes are.

The rows are sorted by code and cut into chunks of rows of one code, about √N at most. One program
sums a chunk; a second kernel adds up the chunks of a code, if there are several. There are at most
N/chunk + K chunks, whatever the data, so the grid needs no answer from the device, and no program
has more than about √N rows or chunks even if one code has them all.

Both add in float64, and a sum is rounded to float32 once, so what it is wrong by does not grow with
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

from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.row_planes import register_limit, strides_of


@dataclass(frozen=True)
class CodeSumsConfig:
    """Tiles."""

    # rows of a chunk, at least; a power of two
    least_chunk: int = 256
    # elements of a tile, and most dimensions of it
    block_elements: int = 1024
    block_d: int = 1024
    num_warps: int = 4
    # without a limit ptxas spills a few for the next step of occupancy
    max_registers: int = 128

    def chunk(self, num_rows: int) -> int:
        """So that one code with all rows has no more chunks than a chunk has rows."""
        return max(self.least_chunk, next_power_of_2(math.isqrt(num_rows)))


@triton.jit(do_not_specialize=["num_rows", "N", "K", "num_segments"])
def segment_keys_kernel(
    indices_ptr,  # [H·N] int64
    keys_ptr,     # [H·N] uint8 / int16 / int32 / int64, out: the segment; H·K if it is left out
    num_rows, N, K, num_segments,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_rows
    index = tl.load(indices_ptr + offs, mask=mask, other=0)
    segment = tl.where((index >= 0) & (index < K), offs // N * K + index, num_segments)
    tl.store(keys_ptr + offs, segment.to(keys_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lower_bound(sorted_ptr, size, target, steps):
    """The first place in `sorted` of what is at least the target; `size` if there is none."""
    low = tl.zeros_like(target)
    high = low + size
    for _ in range(steps):
        middle = (low + high) >> 1
        is_open = low < high
        is_less = tl.load(sorted_ptr + middle, mask=is_open, other=0).to(tl.int64) < target
        low = tl.where(is_open & is_less, middle + 1, low)
        high = tl.where(is_open & (is_less == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["num_rows", "num_segments", "chunk_rows", "steps"])
def segment_bounds_kernel(
    keys_ptr,           # [H·N], sorted
    segment_start_ptr,  # [H·K + 1] int64, out: where the rows of a segment start
    chunks_ptr,         # [H·K + 1] int64, out: 0, and then how many chunks each segment has
    num_rows, num_segments, chunk_rows, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = _lower_bound(keys_ptr, num_rows, segment, steps)
    end = _lower_bound(keys_ptr, num_rows, segment + 1, steps)
    tl.store(segment_start_ptr + segment, start, mask=segment <= num_segments)
    chunks = (end - start + chunk_rows - 1) // chunk_rows
    tl.store(chunks_ptr + (segment + 1), chunks, mask=segment < num_segments)
    tl.store(chunks_ptr + segment, tl.zeros_like(segment), mask=segment == 0)


@triton.jit(do_not_specialize=["num_chunks", "num_segments", "steps"])
def chunk_segments_kernel(
    chunk_start_ptr,    # [H·K + 1] int64, where the chunks of a segment start
    chunk_segment_ptr,  # [C] int64, out: the segment of each chunk; H·K for one that is not used
    num_chunks, num_segments, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # the last that does not start after it
    segment = _lower_bound(chunk_start_ptr, num_segments + 1, chunk + 1, steps) - 1
    tl.store(chunk_segment_ptr + chunk, segment, mask=chunk < num_chunks)


@triton.jit(do_not_specialize=["num_segments", "N", "chunk_rows", "stride_gn"])
def chunk_sums_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H·K, D] fp32 / fp16 / bf16, if IS_GRAD
    grad_loss_ptr,      # [H·N] fp32, if IS_GRAD
    order_ptr,          # [H·N] int64, rows sorted by segment: one code of one head
    chunk_segment_ptr,  # [C] int64, the segment of each chunk; H·K for a chunk that is not used
    segment_start_ptr,  # [H·K + 1] int64, where the rows of a segment start in `order`
    chunk_start_ptr,    # [H·K + 1] int64, where the chunks of a segment start
    sums_ptr,           # [H·K, D] fp32 / fp64, out: of segments of one chunk
    counts_ptr,         # [H·K] int64, out: likewise
    partial_ptr,        # [C, D] fp64, out: of the chunks of other segments
    partial_count_ptr,  # [C] int64, out: likewise
    weight,
    num_segments, N, chunk_rows,
    stride_xh, stride_xn, stride_xd, stride_ck, stride_cd, stride_gn,
    D: tl.constexpr, HAS_HEADS: tl.constexpr, IS_GRAD: tl.constexpr, IS_WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ x_n, or with IS_GRAD Σ weight·grad_loss_n·(e - x_n), over finite rows if IS_WHOLE."""
    chunk = tl.program_id(0).to(tl.int64)
    segment = tl.load(chunk_segment_ptr + chunk)
    if segment < num_segments:
        offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        dim_mask = offs_d < D
        first_chunk = tl.load(chunk_start_ptr + segment)
        is_only = tl.load(chunk_start_ptr + (segment + 1)) - first_chunk == 1
        start = tl.load(segment_start_ptr + segment) + (chunk - first_chunk) * chunk_rows
        end = tl.minimum(start + chunk_rows, tl.load(segment_start_ptr + (segment + 1)))
        if IS_GRAD:
            code_offs = segment * stride_ck + offs_d * stride_cd
            code = tl.load(codebook_ptr + code_offs, mask=dim_mask, other=0.0).to(tl.float32)

        sums = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float64)
        counts = tl.zeros((BLOCK_ROWS,), tl.int32)
        for first in range(start, end, BLOCK_ROWS):
            offs = first + tl.arange(0, BLOCK_ROWS)
            keep = offs < end
            row = tl.load(order_ptr + offs, mask=keep, other=0)
            row_offs = row * stride_xn
            if HAS_HEADS:
                row_offs = (row // N) * stride_xh + (row % N) * stride_xn
            value = tl.load(
                x_ptr + row_offs[:, None] + offs_d[None, :] * stride_xd,
                mask=keep[:, None] & dim_mask[None, :],
                other=0.0,
            ).to(tl.float32)
            if IS_WHOLE:
                is_bad = tl.where(tl.abs(value) < float("inf"), 0, 1)
                keep = keep & (tl.max(is_bad, 1) == 0)
            if IS_GRAD:
                grad = weight * tl.load(grad_loss_ptr + row * stride_gn, mask=keep, other=0.0)
                value = grad[:, None] * (code[None, :] - value)
            value = tl.where(keep[:, None] & dim_mask[None, :], value, 0.0)
            sums += value.to(tl.float64)
            counts += keep.to(tl.int32)

        total, count = tl.sum(sums, 0), tl.sum(counts, 0)
        if is_only:
            rounded = total.to(sums_ptr.dtype.element_ty)
            tl.store(sums_ptr + segment * D + offs_d, rounded, mask=dim_mask)
            tl.store(counts_ptr + segment, count)
        else:
            tl.store(partial_ptr + chunk * D + offs_d, total, mask=dim_mask)
            tl.store(partial_count_ptr + chunk, count)


@triton.jit
def combine_chunks_kernel(
    partial_ptr,        # [C, D] fp64
    partial_count_ptr,  # [C] int64
    chunk_start_ptr,    # [H·K + 1] int64
    sums_ptr,           # [H·K, D] fp32 / fp64, out: of segments that have not one chunk
    counts_ptr,         # [H·K] int64, out: likewise
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(chunk_start_ptr + segment)
    end = tl.load(chunk_start_ptr + (segment + 1))
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    dim_mask = offs_d < D
    if end == start:
        zeros = tl.zeros((BLOCK_D,), sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + segment * D + offs_d, zeros, mask=dim_mask)
        tl.store(counts_ptr + segment, 0)
    if end - start > 1:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float64)
        counts = tl.zeros((BLOCK_ROWS,), tl.int64)
        for first in range(start, end, BLOCK_ROWS):
            offs = first + tl.arange(0, BLOCK_ROWS)
            mask = offs < end
            partial = tl.load(
                partial_ptr + offs[:, None] * D + offs_d[None, :],
                mask=mask[:, None] & dim_mask[None, :],
                other=0.0,
            )
            sums += partial
            counts += tl.load(partial_count_ptr + offs, mask=mask, other=0)
        total = tl.sum(sums, 0).to(sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + segment * D + offs_d, total, mask=dim_mask)
        tl.store(counts_ptr + segment, tl.sum(counts, 0))


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
    codebook: Tensor | None = None,
    grad_loss: Tensor | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `code_sums`; with codebook [H, K, D] and grad_loss [H, N] of their weighted differences:
    Σ weight·grad_loss_n·(e - x_n)."""
    heads, num_rows, dim = x.shape
    num_segments = heads * codebook_size
    is_whole = dim <= config.block_d
    if not is_whole:
        # no program sees all of a row; its largest element is finite when all are
        is_finite = torch.linalg.vector_norm(x, torch.inf, dim=2).isfinite()
        indices = indices.where(is_finite, -1)
    chunk_rows = config.chunk(num_rows)
    order, segment_start, chunk_start, chunk_segment = cut_into_chunks(
        indices, codebook_size, chunk_rows
    )
    num_chunks = len(chunk_segment)
    dtype = torch.float64 if double else torch.float32
    sums = torch.empty(num_segments, dim, dtype=dtype, device=x.device)
    counts = torch.empty(num_segments, dtype=torch.int64, device=x.device)
    partial = torch.empty(num_chunks, dim, dtype=torch.float64, device=x.device)
    partial_count = torch.empty(num_chunks, dtype=torch.int64, device=x.device)
    is_grad = codebook is not None and grad_loss is not None
    codes = codebook.reshape(num_segments, dim) if codebook is not None else sums
    grads = grad_loss.reshape(-1) if grad_loss is not None else sums
    block_d = min(config.block_d, next_power_of_2(dim))
    block_rows = min(64, max(1, config.block_elements // block_d))
    blocks_d = cdiv(dim, block_d)
    with torch.cuda.device_of(x):
        if num_chunks > 0:
            chunk_sums_kernel[(num_chunks, blocks_d)](
                x,
                codes,
                grads,
                order,
                chunk_segment,
                segment_start,
                chunk_start,
                sums,
                counts,
                partial,
                partial_count,
                weight,
                num_segments,
                num_rows,
                chunk_rows,
                *strides_of(x),
                *codes.stride(),
                grads.stride(0),
                D=dim,
                HAS_HEADS=heads > 1,
                IS_GRAD=is_grad,
                IS_WHOLE=is_whole,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
                **register_limit(config.max_registers),
            )
        combine_chunks_kernel[(num_segments, blocks_d)](
            partial,
            partial_count,
            chunk_start,
            sums,
            counts,
            D=dim,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
            **register_limit(config.max_registers),
        )
    return sums.view(heads, codebook_size, dim), counts.view(heads, codebook_size)


def cut_into_chunks(
    indices: Tensor, codebook_size: int, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [H·N] sorted by segment, where each segment starts, where its chunks do, and the
    segment of each chunk; see `chunk_sums_kernel`."""
    heads, num_rows = indices.shape
    num_segments, total = heads * codebook_size, heads * num_rows
    num_chunks = total // chunk_rows + min(num_segments, total)
    device, block = indices.device, 256
    # sorted 8 bits at a time, so by as few bytes as do
    keys = torch.empty(total, dtype=_key_dtype(num_segments), device=device)
    segment_start = torch.empty(num_segments + 1, dtype=torch.int64, device=device)
    chunk_start = torch.empty_like(segment_start)
    chunk_segment = torch.empty(num_chunks, dtype=torch.int64, device=device)
    options = {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": False}
    with torch.cuda.device_of(indices):
        if total > 0:
            segment_keys_kernel[(cdiv(total, block),)](
                indices.contiguous(), keys, total, num_rows, codebook_size, num_segments, **options
            )
        keys, order = keys.sort(stable=True)
        segment_bounds_kernel[(cdiv(num_segments + 1, block),)](
            keys,
            segment_start,
            chunk_start,
            total,
            num_segments,
            chunk_rows,
            total.bit_length(),
            **options,
        )
        chunk_start.cumsum_(0)
        if num_chunks > 0:
            chunk_segments_kernel[(cdiv(num_chunks, block),)](
                chunk_start,
                chunk_segment,
                num_chunks,
                num_segments,
                (num_segments + 1).bit_length(),
                **options,
            )
    return order, segment_start, chunk_start, chunk_segment


def _key_dtype(largest: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
