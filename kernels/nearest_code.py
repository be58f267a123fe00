"""Nearest code: a float32 screen with a certificate, then float64 for the rows it leaves in doubt.

The names follow vqtriton/screening.py: y = scale·(x − mean), the score of code k is
y·e_k − ‖e_k‖²/2. The rows in doubt are listed on the device, so that nothing waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class NearestCodeConfig:
    """Tiles of the two kernels. The defaults fit every target that is checked."""

    block_n: int = 32
    block_k: int = 64
    # the part of D that is multiplied at a time; `tl.dot` takes no less than 16, and
    # an IEEE dot is unrolled into registers, so that more of it spills
    block_d: int = 16
    num_warps: int = 4
    num_stages: int = 1
    # NVIDIA only; without it ptxas spills a little to reach the next step of occupancy
    max_registers: int = 168
    resolve_block_n: int = 16
    resolve_block_k: int = 64
    resolve_num_warps: int = 4
    # programs that share the rows in doubt, however many they are
    resolve_programs: int = 1024


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K"])
def screen_kernel(
    x_ptr,              # [N, D] fp32 / fp16 / bf16
    codes_ptr,          # [K, D] fp32, e_k
    half_sqnorm_ptr,    # [K] fp32, +inf where the code is not finite
    mean_ptr,           # [D] fp32
    scale_ptr,          # [] fp32
    max_norm_ptr,       # [] fp32, max ‖e_k‖
    indices_ptr,        # [N] int64, out
    rows_ptr,           # [N] int64, out: the rows in doubt, in any order
    num_rows_ptr,       # [] int64, in 0, out: how many
    bound_products, bound_distances, bound_tiny,
    N, K, stride_xn, stride_xd,
    D: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64 before it multiplies a stride
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    scale = tl.load(scale_ptr)
    x_rows_ptr = x_ptr + offs_n * stride_xn

    sqnorm = tl.zeros((BLOCK_N,), tl.float32)
    not_finite = tl.zeros((BLOCK_N,), tl.int32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        dim_mask = offs_d < D
        mask = row_mask[:, None] & dim_mask[None, :]
        x = tl.load(
            x_rows_ptr[:, None] + offs_d[None, :] * stride_xd,
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        mean = tl.load(mean_ptr + offs_d, mask=dim_mask, other=0.0)
        y = (x - mean[None, :]) * scale
        sqnorm += tl.sum(y * y, 1)
        not_finite += tl.sum((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)

    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, K, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        code_mask = offs_k < K
        codes_rows_ptr = codes_ptr + offs_k * D
        dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
            dim_mask = offs_d < D
            x = tl.load(
                x_rows_ptr[:, None] + offs_d[None, :] * stride_xd,
                mask=row_mask[:, None] & dim_mask[None, :],
                other=0.0,
            )
            mean = tl.load(mean_ptr + offs_d, mask=dim_mask, other=0.0)
            y = (x.to(tl.float32) - mean[None, :]) * scale
            codes = tl.load(
                codes_rows_ptr[None, :] + offs_d[:, None],
                mask=code_mask[None, :] & dim_mask[:, None],
                other=0.0,
            )
            # always IEEE float32: the bound holds for no other precision
            dots = tl.dot(y, codes, dots, input_precision="ieee")
        half_sqnorm = tl.load(half_sqnorm_ptr + offs_k, mask=code_mask, other=float("inf"))
        scores = dots - half_sqnorm[None, :]
        # a NaN score, from a row that is not finite or overflows, must not win
        scores = tl.where(scores == scores, scores, float("-inf"))

        block_best, block_column = tl.max(scores, 1, return_indices=True)
        is_best = tl.arange(0, BLOCK_K)[None, :] == block_column[:, None]
        block_second = tl.max(tl.where(is_best, float("-inf"), scores), 1)
        second = tl.maximum(tl.minimum(best, block_best), tl.maximum(second, block_second))
        # strictly greater: the lowest index keeps a tie
        index = tl.where(block_best > best, start + block_column, index)
        best = tl.maximum(best, block_best)

    # no distance of a row that is not finite is finite
    index = tl.where(not_finite > 0, 0, index)
    tl.store(indices_ptr + offs_n, index.to(tl.int64), mask=row_mask)
    if EXACT:
        norm = tl.sqrt(sqnorm)
        max_norm = tl.load(max_norm_ptr)
        error = bound_products * max_norm * (norm + 0.5 * max_norm)
        error += bound_distances * sqnorm + bound_tiny
        # written so that a NaN or an infinite error leaves the row in doubt
        is_certain = best - second > 2 * error
        is_certain = is_certain | (not_finite > 0)
        doubt = (row_mask & (is_certain == 0)).to(tl.int64)
        first = tl.atomic_add(num_rows_ptr, tl.sum(doubt, 0))
        place = first + tl.cumsum(doubt, 0) - doubt
        tl.store(rows_ptr + place, offs_n, mask=doubt > 0)


@triton.jit(do_not_specialize=["K"])
def resolve_kernel(
    x_ptr,              # [N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [K, D] fp32 / fp16 / bf16, as given
    rows_ptr,           # [N] int64, the rows in doubt
    num_rows_ptr,       # [] int64
    indices_ptr,        # [N] int64, out: only the rows in doubt
    K, stride_xn, stride_xd, stride_ck, stride_cd,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_rows = tl.load(num_rows_ptr)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    for start in range(first, num_rows, tl.num_programs(0) * BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        row_mask = offs < num_rows
        row = tl.load(rows_ptr + offs, mask=row_mask, other=0)
        x_rows_ptr = x_ptr + row * stride_xn
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        index = tl.zeros((BLOCK_N,), tl.int32)
        for start_k in range(0, K, BLOCK_K):
            offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
            code_mask = offs_k < K
            codes_ptr = codebook_ptr + offs_k * stride_ck
            distances = tl.zeros((BLOCK_N, BLOCK_K), tl.float64)
            # dimension by dimension: the order of `vqtriton.reference.squared_distances`
            for d in range(D):
                offset_d = tl.cast(d, tl.int64)
                x = tl.load(x_rows_ptr + offset_d * stride_xd, mask=row_mask, other=0.0)
                code = tl.load(codes_ptr + offset_d * stride_cd, mask=code_mask, other=0.0)
                difference = x.to(tl.float64)[:, None] - code.to(tl.float64)[None, :]
                distances += difference * difference
            # a NaN is not below inf either
            is_finite = (distances < float("inf")) & code_mask[None, :]
            distances = tl.where(is_finite, distances, float("inf"))
            block_least, block_column = tl.min(distances, 1, return_indices=True)
            index = tl.where(block_least < least, start_k + block_column, index)
            least = tl.minimum(least, block_least)
        tl.store(indices_ptr + row, index.to(tl.int64), mask=row_mask)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    prepared: Any,
    bound: Any,
    *,
    exact: bool,
    config: NearestCodeConfig | None = None,
) -> Tensor:
    """Index of the nearest code.

    Args:
        x: [N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        codebook: [K, D], likewise.
        prepared: `vqtriton.screening.PreparedCodebook` of ``codebook``, float32.
        bound: `vqtriton.screening.Bound` for D.
        exact: resolve the rows in doubt.
        config: tiles.

    Returns:
        [N] int64.
    """
    config = config or NearestCodeConfig()
    num_rows, dim = x.shape
    size = codebook.shape[0]
    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    rows = torch.empty(num_rows if exact else 0, dtype=torch.int64, device=x.device)
    num_doubtful = torch.zeros((), dtype=torch.int64, device=x.device)
    limits = {} if torch.version.hip else {"maxnreg": config.max_registers}
    with torch.cuda.device_of(x):
        screen_kernel[(triton.cdiv(num_rows, config.block_n),)](
            x,
            prepared.codes,
            prepared.half_sqnorm,
            prepared.mean,
            prepared.scale,
            prepared.max_norm,
            indices,
            rows,
            num_doubtful,
            *bound,
            num_rows,
            size,
            *x.stride(),
            D=dim,
            EXACT=exact,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
            **limits,
        )
        if exact:
            programs = min(triton.cdiv(num_rows, config.resolve_block_n), config.resolve_programs)
            resolve_kernel[(programs,)](
                x,
                codebook,
                rows,
                num_doubtful,
                indices,
                size,
                *x.stride(),
                *codebook.stride(),
                D=dim,
                BLOCK_N=config.resolve_block_n,
                BLOCK_K=config.resolve_block_k,
                num_warps=config.resolve_num_warps,
                # a fused multiply-add rounds once where the definition rounds twice
                enable_fp_fusion=False,
                **limits,
            )
    return indices
