"""The gradient of what a chain of codebooks quantizes, for all levels in one pass.

A residual is made again from x and the chosen codes, so nothing of size N·Q·D is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch


@dataclass(frozen=True)
class ResidualGradXConfig:
    """Tiles."""

    block_elements: int = 2048
    block_d: int = 256
    num_warps: int = 4


@triton.jit(do_not_specialize=["N", "K", "Q", "stride_pn", "stride_pq"])
def residual_grad_x_kernel(
    grad_quantized_ptr,  # [N, D] in the dtype of x
    pulls_ptr,           # [N, Q] fp32
    x_ptr,               # [N, D] fp32 / fp16 / bf16
    codebooks_ptr,       # [Q, K, D] fp32 / fp16 / bf16
    indices_ptr,         # [N, Q] int64
    grad_x_ptr,          # [N, D] in the dtype of x, out
    N, K, Q, stride_gn, stride_gd, stride_pn, stride_pq, stride_xn, stride_xd,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    row_mask = offs_n < N
    list_ptr = indices_ptr + offs_n * Q
    # a masked row has a gradient of zero
    is_there = tl.load(list_ptr, mask=row_mask, other=-1) >= 0
    mask = is_there[:, None] & (offs_d < D)
    rows = offs_n[:, None]
    grad = tl.load(
        grad_quantized_ptr + rows * stride_gn + offs_d * stride_gd, mask=mask, other=0.0
    ).to(tl.float32)
    residual = tl.load(x_ptr + rows * stride_xn + offs_d * stride_xd, mask=mask, other=0.0)
    residual = residual.to(tl.float32)
    pulled = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for level in range(0, Q):
        place = tl.cast(level, tl.int64)
        index = tl.load(list_ptr + place, mask=row_mask, other=-1)
        has_code = index >= 0
        pull = tl.load(pulls_ptr + offs_n * stride_pn + place * stride_pq, mask=has_code, other=0.0)
        code_ptrs = codebooks_ptr + (place * K + index)[:, None] * D + offs_d
        code = tl.load(code_ptrs, mask=mask & has_code[:, None], other=0.0)
        residual -= code.to(tl.float32)
        # a row that is not finite has no pull where it has no code
        pulled += tl.where(has_code[:, None], pull[:, None] * residual, 0.0)
    grad_x = tl.where(mask, grad + pulled, 0.0)
    tl.store(
        grad_x_ptr + rows * D + offs_d,
        grad_x.to(grad_x_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (offs_d < D),
    )


def residual_grad_x(
    grad_quantized: Tensor,
    pulls: Tensor,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    config: ResidualGradXConfig | None = None,
) -> Tensor:
    """grad_quantized + Σ_q pulls[:, q]·(what level q leaves of x), zero for masked rows.

    Args:
        grad_quantized: [N, D], any strides.
        pulls: [N, Q] float32, any strides.
        x: [N, D] float32 / float16 / bfloat16, any strides.
        codebooks: [Q, K, D], contiguous.
        indices: [N, Q] int64, contiguous; -1 where a row has no code at a level.
        config: tiles.

    Returns:
        [N, D] in the dtype of x.
    """
    config = config or ResidualGradXConfig()
    num_rows, dim = x.shape
    levels, size, _ = codebooks.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block_d = min(config.block_d, next_power_of_2(dim))
    block_rows = max(1, config.block_elements // block_d)
    with torch.cuda.device_of(x):
        launch(
            residual_grad_x_kernel,
            (cdiv(num_rows, block_rows), cdiv(dim, block_d)),
            *(grad_quantized, pulls, x, codebooks, indices, out, num_rows, size, levels),
            *(*grad_quantized.stride(), *pulls.stride(), *x.stride()),
            D=dim,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return out
