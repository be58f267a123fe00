"""Finish: decide within the best group of codes, certify, gather; list the rows that stay in doubt.

A row is certified if its winner beats the other codes of its group by more than float32 may err,
and the best score outside of the group by more than the screen may. docs/exactness.md derives both.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from vqtriton.kernels.row_planes import scale_ratio


@dataclass(frozen=True)
class FinishRowsConfig:
    """Elements of a tile of candidates, [rows, GROUP, dims], and its dims at most."""

    block_elements: int = 4096
    block_d: int = 64
    num_warps: int = 8
    # NVIDIA only; without it ptxas spills a little to reach the next step of occupancy
    max_registers: int = 255


@triton.jit
def write_rows(
    x_rows_ptr, code_rows_ptr, quantized_rows_ptr, sq_error_ptrs, is_valid, row_mask,
    stride_xd, stride_cd, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The code of each row and their squared distance; zeros where ``is_valid`` is false."""
    sq_error = tl.zeros_like(is_valid.to(tl.float32))
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = row_mask[:, None] & (offs_d < D)
        valid_mask = mask & is_valid[:, None]
        x = tl.load(x_rows_ptr[:, None] + offs_d * stride_xd, mask=valid_mask, other=0.0)
        code = tl.load(code_rows_ptr[:, None] + offs_d * stride_cd, mask=valid_mask, other=0.0)
        tl.store(
            quantized_rows_ptr[:, None] + offs_d,
            code.to(quantized_rows_ptr.dtype.element_ty),
            mask=mask,
        )
        x = x.to(tl.float32)
        difference = x - code.to(tl.float32)
        # inf - inf: an infinite x gives NaN, as a NaN does
        sq_error += tl.sum(difference * difference + (x - x), 1)
    tl.store(sq_error_ptrs, sq_error, mask=row_mask)


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K"])
def finish_rows_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16, as given
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    norms_ptr,          # [H, 4] fp32, of `vqtriton.planes.CodePlanes`
    groups_ptr,         # [H, N] int32, of the screen, as the next three
    second_ptr,         # [H, N] fp32
    error_ptr,          # [H, N] fp32
    row_scale_ptr,      # [H, N] fp32
    mask_ptr,           # [H, N] bool, if HAS_MASK
    indices_ptr,        # [H, N] int64, out
    quantized_ptr,      # [H, N, D] as x, out if GATHER
    sq_error_ptr,       # [H, N] fp32, out if GATHER
    rows_ptr,           # [H, N] int32, out: the rows in doubt, in any order
    thresholds_ptr,     # [H, N] fp32, out: for each of them, what a rival's score must reach
    num_rows_ptr,       # [H] int32, in 0, out: how many
    bound_products, bound_distances, bound_tiny,
    N, K, stride_xh, stride_xn, stride_xd, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr, HAS_MASK: tl.constexpr,
    GATHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    offs_row = head * N + offs_n
    x_rows_ptr = x_ptr + head * stride_xh + offs_n * stride_xn
    codebook_ptr += head * stride_ch
    mean_ptr += head * D
    scale = tl.load(scale_ptr + head)
    # of rows beyond the last: any power of two
    row_scale = tl.load(row_scale_ptr + offs_row, mask=row_mask, other=1.0)
    ratio = scale_ratio(row_scale, scale)
    group = tl.load(groups_ptr + offs_row, mask=row_mask, other=0)

    members = tl.arange(0, GROUP)
    code = group[:, None] * GROUP + members[None, :]
    is_code = row_mask[:, None] & (code < K)
    codes_rows_ptr = codebook_ptr + code.to(tl.int64) * stride_ck
    scores = tl.zeros((BLOCK_N, GROUP), tl.float32)
    sqnorm = tl.zeros((BLOCK_N,), tl.float32)
    not_finite = tl.zeros((BLOCK_N,), tl.int32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        dim_mask = offs_d < D
        x = tl.load(
            x_rows_ptr[:, None] + offs_d[None, :] * stride_xd,
            mask=row_mask[:, None] & dim_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        mean = tl.load(mean_ptr + offs_d, mask=dim_mask, other=0.0)
        y = (x - mean[None, :]) * row_scale[:, None]
        not_finite += tl.sum((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
        sqnorm += tl.sum(y * y, 1)
        codes = tl.load(
            codes_rows_ptr[:, :, None] + offs_d[None, None, :] * stride_cd,
            mask=is_code[:, :, None] & dim_mask[None, None, :],
            other=0.0,
        ).to(tl.float32)
        e = (codes - mean[None, None, :]) * scale
        # y·e − ratio·‖e‖²/2
        scores += tl.sum(e * (y[:, None, :] - e * (0.5 * ratio)[:, None, None]), 2)
    half_max_sqnorm = tl.load(norms_ptr + (head * 4 + 3))
    scores += (ratio * half_max_sqnorm)[:, None]
    # NaN, from a code that is not finite, does not win
    scores = tl.where(is_code & (scores == scores), scores, float("-inf"))
    best = tl.max(scores, 1)
    # the lowest index keeps a tie
    member = tl.min(tl.where(scores == best[:, None], members[None, :], GROUP - 1), 1)
    # no distance of a row that is not finite is finite
    index = tl.where(not_finite > 0, 0, tl.minimum(group * GROUP + member, K - 1))
    is_valid = row_mask
    if HAS_MASK:
        is_valid = tl.load(mask_ptr + offs_row, mask=row_mask, other=0) != 0
    tl.store(indices_ptr + offs_row, tl.where(is_valid, index, -1).to(tl.int64), mask=row_mask)
    if GATHER:
        write_rows(
            x_rows_ptr, codebook_ptr + index.to(tl.int64) * stride_ck,
            quantized_ptr + offs_row * D, sq_error_ptr + offs_row, is_valid, row_mask,
            stride_xd, stride_cd, D, BLOCK_D,
        )  # fmt: skip

    if EXACT:
        max_norm = tl.load(norms_ptr + head * 4)
        norm = tl.sqrt(sqnorm)
        own_error = bound_products * max_norm * (norm + 0.5 * ratio * max_norm)
        own_error += bound_distances * norm * (norm / ratio) + bound_tiny
        # code − mean may overflow, though it does not in float64, where the scale was chosen
        own_error = tl.where(scale < 6.018531076210112e-36, float("inf"), own_error)
        others = tl.max(tl.where(members[None, :] == member[:, None], float("-inf"), scores), 1)
        second = tl.load(second_ptr + offs_row, mask=row_mask, other=0.0)
        # there is no other group; the screen says 0
        second = tl.where(K <= GROUP, float("-inf"), second)
        error = tl.load(error_ptr + offs_row, mask=row_mask, other=0.0)
        # written so that a NaN or an infinite error leaves the row in doubt
        is_certain = (best - second > error + own_error) & (best - others > 2 * own_error)
        is_certain = is_certain | (not_finite > 0)
        doubt = (is_valid & (is_certain == 0)).to(tl.int32)
        # the last term: two subtractions are rounded
        threshold = best - (error + own_error + 2.384185791015625e-07 * tl.abs(best))
        first = tl.atomic_add(num_rows_ptr + head, tl.sum(doubt, 0))
        place = head * N + first + tl.cumsum(doubt, 0) - doubt
        tl.store(rows_ptr + place, offs_n.to(tl.int32), mask=doubt > 0)
        tl.store(thresholds_ptr + place, threshold, mask=doubt > 0)
