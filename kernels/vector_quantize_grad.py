"""Gradients of the straight-through estimator and of both terms of the loss, one pass each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.arguments import Pull
from vqtriton.kernels.code_sums import CodeSumsConfig, segment_sums
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import strides_of


@dataclass(frozen=True)
class GradXConfig:
    """Tiles."""

    block_elements: int = 2048
    block_d: int = 256
    num_warps: int = 4


@triton.jit(do_not_specialize=["N", "stride_lh", "stride_ln"])
def grad_x_kernel(
    grad_quantized_ptr,  # [H, N, D] in the dtype of x
    grad_loss_ptr,       # [H, N] fp32
    x_ptr,               # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,        # [H, K, D] fp32 / fp16 / bf16
    indices_ptr,         # [H, N] int64
    grad_x_ptr,          # [H, N, D] in the dtype of x, out
    weight,
    N,
    stride_gh, stride_gn, stride_gd, stride_lh, stride_ln, stride_xh, stride_xn, stride_xd,
    stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    row_mask = offs_n < N
    index = tl.load(indices_ptr + head * N + offs_n, mask=row_mask, other=-1)
    # a masked row has a gradient of zero
    mask = (index >= 0)[:, None] & (offs_d < D)[None, :]
    grad_quantized = tl.load(
        grad_quantized_ptr + head * stride_gh + offs_n[:, None] * stride_gn
        + offs_d[None, :] * stride_gd,
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    grad_loss = tl.load(
        grad_loss_ptr + head * stride_lh + offs_n * stride_ln, mask=row_mask, other=0.0
    )
    x = tl.load(
        x_ptr + head * stride_xh + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd,
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    code = tl.load(
        codebook_ptr + head * stride_ch + index[:, None] * stride_ck + offs_d[None, :] * stride_cd,
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    grad_x = grad_quantized + (weight * grad_loss)[:, None] * (x - code)
    tl.store(
        grad_x_ptr + (head * N + offs_n[:, None]) * D + offs_d[None, :],
        tl.where(mask, grad_x, 0.0).to(grad_x_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (offs_d < D)[None, :],
    )


def grad_x(grad_quantized: Tensor, pull: Pull, *, config: GradXConfig | None = None) -> Tensor:
    """grad_quantized + weight·grad_loss·(x - codebook[indices]), zero where the index is -1.

    Args:
        grad_quantized: [H, N, D], the dtype of x, any strides.
        config: tiles.

    Returns:
        [H, N, D] in the dtype of x.
    """
    config = config or GradXConfig()
    grad_loss, x, codebook, indices, weight = pull
    heads, num_rows, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_d = min(config.block_d, next_power_of_2(dim))
    block_rows = max(1, config.block_elements // block_d)
    grid = (cdiv(num_rows, block_rows), cdiv(dim, block_d), heads)
    with torch.cuda.device_of(x):
        launch(
            grad_x_kernel,
            grid,
            grad_quantized,
            grad_loss,
            x,
            codebook,
            indices.contiguous(),
            out,
            weight,
            num_rows,
            *strides_of(grad_quantized),
            *grad_loss.stride(),
            *strides_of(x),
            *codebook.stride(),
            D=dim,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return out


def grad_codebook(pull: Pull, *, config: CodeSumsConfig | None = None) -> Tensor:
    """Σ weight·grad_loss_n·(e - x_n) over the finite rows of each code e.

    The differences are added up, not n·e and Σx, which would cancel where codes are near rows. Rows
    with an index outside [0, K) are left out.

    Returns:
        [H, K, D] float32, as repeatable and as accurate as `code_sums`.
    """
    size = pull.codebook.shape[1]
    config = config or CodeSumsConfig()
    sums, _ = segment_sums(pull.x, pull.indices, size, pull=pull, config=config)
    return sums
