"""Sums of the rows of each code by atomic additions: in no order, so the last bit may change.

No sort and one launch, but additions to one element wait for each other: the more rows a code has,
the longer it takes. `kernels/code_sums.py` is the one that always gives the same bits.

Added in float64 and rounded to float32 once, so a sum is wrong by at most 2⁻²⁴ of it, and
n·2⁻⁵³·Σ|x|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import register_limit, strides_of


@dataclass(frozen=True)
class AtomicSumsConfig:
    """Elements of a tile, and most dimensions of it."""

    block_elements: int = 1024
    block_d: int = 256
    num_warps: int = 4
    # without a limit ptxas spills a few for the next step of occupancy
    max_registers: int = 128


@triton.jit(do_not_specialize=["N", "K"])
def atomic_sums_kernel(
    x_ptr,        # [H, N, D] fp32 / fp16 / bf16
    indices_ptr,  # [H, N] int64
    sums_ptr,     # [H, K, D] fp64, in 0, out
    counts_ptr,   # [H, K] int64, in 0, out
    N, K, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = offs_n < N
    x_rows_ptr = x_ptr + head * stride_xh + offs_n * stride_xn
    index = tl.load(indices_ptr + head * N + offs_n, mask=row_mask, other=-1)
    not_finite = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = row_mask[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_rows_ptr[:, None] + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
        is_finite = tl.abs(x.to(tl.float32)) < float("inf")
        not_finite += tl.sum(tl.where(is_finite, 0, 1), 1)

    keep = (index >= 0) & (index < K) & (not_finite == 0)
    code = head * K + index
    tl.atomic_add(counts_ptr + code, tl.full((BLOCK_ROWS,), 1, tl.int64), mask=keep, sem="relaxed")
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = keep[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_rows_ptr[:, None] + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
        tl.atomic_add(
            sums_ptr + code[:, None] * D + offs_d[None, :],
            x.to(tl.float64),
            mask=mask,
            sem="relaxed",
        )


def atomic_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    double: bool = False,
    config: AtomicSumsConfig | None = None,
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
    heads, num_rows, dim = x.shape
    config = config or AtomicSumsConfig()
    block_d = min(config.block_d, next_power_of_2(dim))
    block_rows = max(1, config.block_elements // block_d)
    size = (heads, codebook_size)
    sums = torch.zeros(*size, dim, dtype=torch.float64, device=x.device)
    counts = torch.zeros(size, dtype=torch.int64, device=x.device)
    if num_rows > 0:
        with torch.cuda.device_of(x):
            launch(
                atomic_sums_kernel,
                (cdiv(num_rows, block_rows), heads),
                x,
                indices.contiguous(),
                sums,
                counts,
                num_rows,
                codebook_size,
                *strides_of(x),
                D=dim,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
                **register_limit(config.max_registers),
            )
    return sums if double else sums.float(), counts
