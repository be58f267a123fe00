"""Rows divided by their lengths, bit for bit as `vqtriton.reference.normalized` defines it.

A thread adds up the squares of a row in the order of the dimensions. So the threads of a warp read
addresses that are a row apart; what they fetch stays in the L1 cache for the next dimensions.
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

LEAST_NORM = tl.constexpr(constants.LEAST_NORM)


@dataclass(frozen=True)
class NormalizeRowsConfig:
    """Tiles of rows; of their dimensions when they are divided."""

    block_n: int = 128
    block_d: int = 8
    num_warps: int = 4


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N"])
def normalize_rows_kernel(
    x_ptr,      # [N, D] fp32 / fp16 / bf16
    out_ptr,    # [N, D] fp32, out
    N, stride_xn, stride_xd,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    x_rows_ptr = x_ptr + offs_n * stride_xn
    sqnorm = tl.zeros((BLOCK_N,), tl.float64)
    for d in range(D):
        x = tl.load(x_rows_ptr + tl.cast(d, tl.int64) * stride_xd, mask=row_mask, other=0.0)
        x = x.to(tl.float64)
        sqnorm += x * x
    # the square root and the division of float64 are rounded correctly
    norm = tl.sqrt(sqnorm)
    least = tl.full((BLOCK_N,), LEAST_NORM, tl.float64)
    # a NaN stays
    norm = tl.where(norm < least, least, norm)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = row_mask[:, None] & (offs_d < D)
        x = tl.load(x_rows_ptr[:, None] + offs_d * stride_xd, mask=mask, other=0.0)
        x = (x.to(tl.float64) / norm[:, None]).to(tl.float32)
        tl.store(out_ptr + (offs_n[:, None] * D + offs_d), x, mask=mask)


def normalize_rows(x: Tensor, config: NormalizeRowsConfig | None = None) -> Tensor:
    """x [N, D] float32 / float16 / bfloat16, any strides -> [N, D] float32."""
    config = config or NormalizeRowsConfig()
    num_rows, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return out
    with torch.cuda.device_of(x):
        launch(
            normalize_rows_kernel,
            (cdiv(num_rows, config.block_n),),
            *(x, out, num_rows, *x.stride()),
            D=dim,
            BLOCK_N=config.block_n,
            BLOCK_D=min(config.block_d, next_power_of_2(dim)),
            num_warps=config.num_warps,
            # harmless: the square of a float32 is exact in float64
            enable_fp_fusion=True,
        )
    return out
