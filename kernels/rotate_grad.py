"""The gradient of the rotation trick: each row's gradient, rotated and scaled as its code is.

Reference: Fifty et al. 2024, arXiv:2410.06424, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels import constants
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch

LEAST_LENGTH = tl.constexpr(constants.LEAST_LENGTH)


@dataclass(frozen=True)
class RotateGradConfig:
    """Elements of the tile of rows that a program holds, with all of their dimensions."""

    elements: int = 4096
    num_warps: int = 4


@triton.jit(do_not_specialize=["N"])
def rotate_grad_kernel(
    grad_ptr,       # [N, D] fp32 / fp16 / bf16
    x_ptr,          # [N, D] fp32 / fp16 / bf16
    quantized_ptr,  # [N, D] fp32 / fp16 / bf16
    out_ptr,        # [N, D] as x, out
    N, stride_gn, stride_gd, stride_xn, stride_xd, stride_qn, stride_qd,
    D: tl.constexpr, IS_FORWARD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    offs_n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = (offs_n < N) & (offs_d < D)
    grad = tl.load(grad_ptr + offs_n * stride_gn + offs_d * stride_gd, mask=mask, other=0.0)
    x = tl.load(x_ptr + offs_n * stride_xn + offs_d * stride_xd, mask=mask, other=0.0)
    to = tl.load(quantized_ptr + offs_n * stride_qn + offs_d * stride_qd, mask=mask, other=0.0)
    grad, x, to = grad.to(tl.float32), x.to(tl.float32), to.to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))[:, None]
    target = tl.sqrt(tl.sum(to * to, 1))[:, None]
    # a NaN stays
    length = tl.where(length < LEAST_LENGTH, LEAST_LENGTH, length)
    x = x / length
    to = to / tl.where(target < LEAST_LENGTH, LEAST_LENGTH, target)
    middle = x + to
    norm = tl.sqrt(tl.sum(middle * middle, 1))[:, None]
    middle = middle / tl.where(norm < LEAST_LENGTH, LEAST_LENGTH, norm)
    before, after = (x, to) if IS_FORWARD else (to, x)
    across = tl.sum(grad * before, 1)[:, None] * after
    out = grad - 2 * middle * tl.sum(grad * middle, 1)[:, None] + 2 * across
    out = out * (target / length)
    tl.store(out_ptr + offs_n * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask)


def rotate_grad(
    grad: Tensor,
    x: Tensor,
    quantized: Tensor,
    is_forward: bool,
    config: RotateGradConfig | None = None,
) -> Tensor:
    """grad, x, quantized [N, D], any strides -> [N, D] in the dtype of x."""
    config = config or RotateGradConfig()
    num_rows, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block_d = next_power_of_2(dim)
    block_n = max(1, config.elements // block_d)
    with torch.cuda.device_of(x):
        launch(
            rotate_grad_kernel,
            (cdiv(num_rows, block_n),),
            *(grad, x, quantized, out, num_rows),
            *(*grad.stride(), *x.stride(), *quantized.stride()),
            D=dim,
            IS_FORWARD=is_forward,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return out
