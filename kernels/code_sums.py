"""Sums of the rows of each code, deterministic and indifferent to how uneven the codes are.

The rows are sorted by code and cut into chunks of at most ``chunk`` rows of one code. One program
sums a chunk; a second kernel adds up the chunks of a code. There are at most N/chunk + K chunks,
whatever the data, so the grid needs no answer from the device, and no program has more than
``chunk`` rows even if one code has them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class CodeSumsConfig:
    """Rows of a chunk, and tiles."""

    chunk: int = 256
    block_rows: int = 16
    block_d: int = 128
    num_warps: int = 4


@triton.jit(do_not_specialize=["K"])
def chunk_sums_kernel(
    x_ptr,              # [N, D] fp32 / fp16 / bf16
    order_ptr,          # [N] int64, rows sorted by code
    chunk_code_ptr,     # [C] int64, the code of each chunk; K for a chunk that is not used
    code_start_ptr,     # [K + 1] int64, where the rows of a code start in `order`
    chunk_start_ptr,    # [K + 1] int64, where the chunks of a code start
    partial_ptr,        # [C, D] fp32, out
    K, stride_xn, stride_xd,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    code = tl.load(chunk_code_ptr + chunk)
    if code < K:
        offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        dim_mask = offs_d < D
        start = tl.load(code_start_ptr + code)
        start += (chunk - tl.load(chunk_start_ptr + code)) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(code_start_ptr + (code + 1)))
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(start, end, BLOCK_ROWS):
            offs = first + tl.arange(0, BLOCK_ROWS)
            row_mask = offs < end
            row = tl.load(order_ptr + offs, mask=row_mask, other=0)
            x = tl.load(
                x_ptr + row[:, None] * stride_xn + offs_d[None, :] * stride_xd,
                mask=row_mask[:, None] & dim_mask[None, :],
                other=0.0,
            )
            sums += tl.sum(x.to(tl.float32), 0)
        tl.store(partial_ptr + chunk * D + offs_d, sums, mask=dim_mask)


@triton.jit
def combine_kernel(
    partial_ptr,        # [C, D] fp32
    chunk_start_ptr,    # [K + 1] int64
    sums_ptr,           # [K, D] fp32, out
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    code = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    dim_mask = offs_d < D
    end = tl.load(chunk_start_ptr + (code + 1))
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(tl.load(chunk_start_ptr + code), end, BLOCK_ROWS):
        offs = first + tl.arange(0, BLOCK_ROWS)
        partial = tl.load(
            partial_ptr + offs[:, None] * D + offs_d[None, :],
            mask=(offs < end)[:, None] & dim_mask[None, :],
            other=0.0,
        )
        sums += tl.sum(partial, 0)
    tl.store(sums_ptr + code * D + offs_d, sums, mask=dim_mask)


def code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, *, config: CodeSumsConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and number of the rows of each code.

    Args:
        x: [N, D] float32 / float16 / bfloat16, any strides. Rows that are not finite are left out.
        indices: [N] int64; rows with an index outside [0, K) are left out.
        codebook_size: K.
        config: tiles.

    Returns:
        sums, [K, D] float32; counts, [K] int64.
    """
    config = config or CodeSumsConfig()
    num_rows, dim = x.shape
    keep = (indices >= 0) & (indices < codebook_size)
    # the largest element of a row is finite when all are; this reads x without a copy of it
    keep &= torch.linalg.vector_norm(x, torch.inf, dim=1).isfinite()
    sorted_indices, order = indices.where(keep, codebook_size).sort(stable=True)
    codes = torch.arange(codebook_size + 1, device=x.device)
    code_start = torch.searchsorted(sorted_indices, codes)
    counts = code_start.diff()
    chunk_start = torch.zeros_like(code_start)
    torch.cumsum((counts + (config.chunk - 1)) // config.chunk, 0, out=chunk_start[1:])
    num_chunks = num_rows // config.chunk + min(codebook_size, num_rows)
    chunks = torch.arange(num_chunks, device=x.device)
    chunk_code = torch.searchsorted(chunk_start[1:], chunks, right=True)

    sums = torch.empty(codebook_size, dim, dtype=torch.float32, device=x.device)
    partial = torch.empty(num_chunks, dim, dtype=torch.float32, device=x.device)
    block_d = min(config.block_d, triton.next_power_of_2(dim))
    blocks_d = triton.cdiv(dim, block_d)
    with torch.cuda.device_of(x):
        if num_chunks > 0:
            chunk_sums_kernel[(num_chunks, blocks_d)](
                x,
                order,
                chunk_code,
                code_start,
                chunk_start,
                partial,
                codebook_size,
                *x.stride(),
                D=dim,
                CHUNK=config.chunk,
                BLOCK_ROWS=config.block_rows,
                BLOCK_D=block_d,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
            )
        combine_kernel[(codebook_size, blocks_d)](
            partial,
            chunk_start,
            sums,
            D=dim,
            BLOCK_ROWS=config.block_rows,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return sums, counts
