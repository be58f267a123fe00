"""Codebook gather, and the squared error of each row in the same pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class GatherCodesConfig:
    """Elements of a tile; rows and columns follow from D."""

    block_elements: int = 2048
    block_d: int = 128
    num_warps: int = 4


@triton.jit(do_not_specialize=["N"])
def gather_codes_kernel(
    x_ptr,              # [N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [K, D] fp32 / fp16 / bf16
    indices_ptr,        # [N] int64, -1 where masked
    quantized_ptr,      # [N, D] as x, contiguous, out
    sq_error_ptr,       # [N] fp32, out
    N, stride_xn, stride_xd, stride_ck, stride_cd, stride_i,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    index = tl.load(indices_ptr + offs_n * stride_i, mask=row_mask, other=-1)
    is_valid = index >= 0
    codes_ptr = codebook_ptr + tl.where(is_valid, index, 0) * stride_ck
    sq_error = tl.zeros((BLOCK_N,), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = row_mask[:, None] & (offs_d < D)[None, :]
        valid_mask = mask & is_valid[:, None]
        x = tl.load(
            (x_ptr + offs_n * stride_xn)[:, None] + offs_d[None, :] * stride_xd,
            mask=valid_mask,
            other=0.0,
        ).to(tl.float32)
        code = tl.load(codes_ptr[:, None] + offs_d[None, :] * stride_cd, mask=valid_mask, other=0.0)
        tl.store(
            quantized_ptr + offs_n[:, None] * D + offs_d[None, :],
            code.to(quantized_ptr.dtype.element_ty),
            mask=mask,
        )
        difference = x - code.to(tl.float32)
        # inf - inf: an infinite x gives NaN, as a NaN does
        sq_error += tl.sum(difference * difference + (x - x), 1)
    tl.store(sq_error_ptr + offs_n, sq_error, mask=row_mask)


def gather_codes(
    x: Tensor, codebook: Tensor, indices: Tensor, *, config: GatherCodesConfig | None = None
) -> tuple[Tensor, Tensor]:
    """codebook[indices] and its squared distance to x.

    Args:
        x: [N, D] float32 / float16 / bfloat16, any strides.
        codebook: [K, D], likewise.
        indices: [N] int64 in [-1, K); -1 gives zeros.
        config: tiles.

    Returns:
        quantized, [N, D] in the dtype of ``x``; squared distances, [N] float32.
    """
    config = config or GatherCodesConfig()
    num_rows, dim = x.shape
    quantized = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    sq_error = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return quantized, sq_error
    block_d = min(config.block_d, triton.next_power_of_2(dim))
    block_n = max(1, config.block_elements // block_d)
    with torch.cuda.device_of(x):
        gather_codes_kernel[(triton.cdiv(num_rows, block_n),)](
            x,
            codebook,
            indices,
            quantized,
            sq_error,
            num_rows,
            *x.stride(),
            *codebook.stride(),
            *indices.stride(),
            D=dim,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return quantized, sq_error
