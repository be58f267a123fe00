"""Finish: decide within the best group of codes, certify, gather; list the rows that stay in doubt.

A row is certified if its winner beats the other codes of its group by more than float32 may err,
and the best score outside of the group by more than the screen may. docs/exactness.md derives both.

It is the end of the screen's program. Where the codes are screened in parts, it is a kernel of its
own, which merges the parts first.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.row_planes import largest_norm, scale_ratio


class Finish(NamedTuple):
    """What a finish reads and writes, in the order of the kernels' parameters.

    T is the number of tiles of rows, and N' the rows of all of these.
    """

    codebook: Tensor  # [H, K, D] fp32 / fp16 / bf16, as given
    mask: Tensor | None  # [H, N] bool, False for rows that do not count
    indices: Tensor  # [H, N] int64, out
    quantized: Tensor | None  # [H, N, D] as x, out
    losses: Tensor | None  # [H, N] fp32, out: weight times the squared distance
    rows: Tensor  # [H, N'] int32, out: the rows in doubt, at the beginning of their tile
    thresholds: Tensor  # [H, N'] fp32, out: for each of them, what a rival's score must reach
    doubts: Tensor  # [H, T] int32, out: how many they are
    arrivals: Tensor  # [H, T + 1] int32, set to zero, for the rescue
    valid: Tensor  # [H, T] int32, out: rows that count
    sums: Tensor  # [H, T + S] fp64, out: of the losses of the rows that are certain
    bound_products: float
    bound_distances: float
    bound_tiny: float
    weight: float
    num_codes: int
    stride_ch: int
    stride_ck: int
    stride_cd: int
    num_spans: int


@triton.jit
def write_rows(
    x_rows_ptr, code_rows_ptr, quantized_rows_ptr, losses_ptrs, weight, is_valid, row_mask,
    stride_xd, stride_cd, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The code of each row and its loss, which is returned; zeros where ``is_valid`` is false."""
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
    losses = weight * sq_error
    tl.store(losses_ptrs, losses, mask=row_mask)
    return losses


@triton.jit
def _not_finite(x_rows_ptr, row_mask, stride_xd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whether a row has a NaN or an infinity, int32."""
    found = tl.zeros_like(row_mask.to(tl.int32))
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = row_mask[:, None] & (offs_d < D)
        x = tl.load(x_rows_ptr[:, None] + offs_d * stride_xd, mask=mask, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1))
    return found


@triton.jit
def _load_dims(ptrs, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32, zeros beyond the last dimension."""
    if D % BLOCK_D == 0:
        return tl.load(ptrs).to(tl.float32)
    return tl.load(ptrs, mask=tl.broadcast_to(offs_d < D, ptrs.shape), other=0.0).to(tl.float32)


@triton.jit
def _score_terms(e, y, half_ratio, IS_DOT: tl.constexpr):
    """y·e − ratio·‖e‖²/2, or y·e, before it is summed over the dimensions."""
    if IS_DOT:
        return e * y
    return e * (y - e * half_ratio)


@triton.jit
def finish_rows(
    x_rows_ptr, offs_n, row_mask, group, second, error, norm, row_scale, ratio, scale, mean_ptr,
    norms_ptr, head, num_norms,
    codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr, thresholds_ptr,
    doubts_ptr, arrivals_ptr, valid_ptr, sums_ptr,
    bound_products, bound_distances, bound_tiny, weight, num_codes, stride_ch, stride_ck, stride_cd,
    num_spans, N, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
    HAS_MASK: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr, FINISH_D: tl.constexpr,
):  # fmt: skip
    """All that is left to do for a tile of rows, those in doubt excepted.

    Pointers to x and mean are those of the head. group, second and error are of the screen, norm is
    at least the norm of y.
    """
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.num_programs(0)
    codebook_ptr += head * stride_ch
    offs_row = head * N + offs_n

    half_ratio = (0.5 * ratio)[:, None]
    # no score is below this, so the first code wins if no other does
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    others = best
    member = tl.zeros((BLOCK_N,), tl.int32)
    # the constant in the screen's scores
    shift = largest_norm(norms_ptr, head, num_norms, 3)
    if not IS_DOT:
        shift = ratio * shift
    # two codes at a time share the row; more would need too many registers
    for first in range(0, GROUP, 2):
        # no memory beyond the codebook
        code = tl.minimum(group * GROUP + first, num_codes - 1).to(tl.int64)
        next_code = tl.minimum(group * GROUP + first + 1, num_codes - 1).to(tl.int64)
        products = tl.zeros((BLOCK_N, FINISH_D), tl.float32)
        next_products = products
        for start_d in range(0, D, FINISH_D):
            offs_d = (start_d + tl.arange(0, FINISH_D)).to(tl.int64)[None, :]
            x = _load_dims(x_rows_ptr[:, None] + offs_d * stride_xd, offs_d, D, FINISH_D)
            mean = _load_dims(mean_ptr + offs_d, offs_d, D, FINISH_D)
            y = (x - mean) * row_scale[:, None]
            codes_ptr = codebook_ptr + offs_d * stride_cd
            e = _load_dims(codes_ptr + code[:, None] * stride_ck, offs_d, D, FINISH_D)
            e = (e - mean) * scale
            products += _score_terms(e, y, half_ratio, IS_DOT)
            e = _load_dims(codes_ptr + next_code[:, None] * stride_ck, offs_d, D, FINISH_D)
            e = (e - mean) * scale
            next_products += _score_terms(e, y, half_ratio, IS_DOT)
        for i in tl.static_range(2):
            score = tl.sum(products if i == 0 else next_products, 1)
            # NaN, from a code that is not finite, does not win; nor does infinity
            if IS_DOT:
                is_finite = tl.abs(score) < float("inf")
            else:
                score += shift
                is_finite = score == score
            is_code = (group * GROUP + first + i < num_codes) & is_finite
            score = tl.where(is_code, score, float("-inf"))
            # the lowest index keeps a tie
            others = tl.maximum(others, tl.minimum(best, score))
            member = tl.where(score > best, first + i, member)
            best = tl.maximum(best, score)
    index = tl.minimum(group * GROUP + member, num_codes - 1)
    # no distance of a row that is not finite is finite
    is_suspect = row_mask & ((error < float("inf")) == 0)
    is_bad = tl.zeros((BLOCK_N,), tl.int32)
    if tl.max(is_suspect.to(tl.int32), 0) > 0:
        is_bad = _not_finite(x_rows_ptr, is_suspect, stride_xd, D, FINISH_D)
        index = tl.where(is_bad > 0, 0, index)
    is_valid = row_mask
    if HAS_MASK:
        is_valid = is_valid & (tl.load(mask_ptr + offs_row, mask=row_mask, other=0) != 0)
    tl.store(indices_ptr + offs_row, tl.where(is_valid, index, -1).to(tl.int64), mask=row_mask)

    doubt = tl.zeros((BLOCK_N,), tl.int32)
    if EXACT:
        max_norm = largest_norm(norms_ptr, head, num_norms, 0)
        if IS_DOT:
            own_error = bound_products * max_norm * norm + bound_tiny
            # the scores here are without the constant: beside it they would lose digits
            second -= shift
        else:
            own_error = bound_products * max_norm * (norm + 0.5 * ratio * max_norm)
            own_error += bound_distances * norm * (norm / ratio) + bound_tiny
        # code − mean may overflow, though it does not in float64, where the scale was chosen
        own_error = tl.where(scale < 6.018531076210112e-36, float("inf"), own_error)
        # there is no other group; the screen says 0
        second = tl.where(num_codes <= GROUP, float("-inf"), second)
        # written so that a NaN or an infinite error leaves the row in doubt
        is_certain = (best - second > error + own_error) & (best - others > 2 * own_error)
        is_certain = is_certain | (is_bad > 0)
        doubt = (is_valid & (is_certain == 0)).to(tl.int32)
        if IS_DOT:
            best += shift
        # the last term: two subtractions are rounded
        threshold = best - (error + own_error + 2.384185791015625e-07 * tl.abs(best))
        place = (head * tiles + tile) * BLOCK_N + tl.cumsum(doubt, 0) - doubt
        tl.store(rows_ptr + place, offs_n.to(tl.int32), mask=doubt > 0)
        tl.store(thresholds_ptr + place, threshold, mask=doubt > 0)
        tl.store(doubts_ptr + (head * tiles + tile), tl.sum(doubt, 0))
        tl.store(arrivals_ptr + (head * (tiles + 1) + tile), 0)
        if tile == 0:
            tl.store(arrivals_ptr + (head * (tiles + 1) + tiles), 0)
    if GATHER:
        losses = write_rows(
            x_rows_ptr, codebook_ptr + index.to(tl.int64) * stride_ck,
            quantized_ptr + offs_row * D, losses_ptr + offs_row, weight, is_valid, row_mask,
            stride_xd, stride_cd, D, FINISH_D,
        )  # fmt: skip
        certain = tl.where(row_mask & (doubt == 0), losses, 0.0).to(tl.float64)
        tl.store(sums_ptr + (head * (tiles + num_spans) + tile), tl.sum(certain, 0))
        tl.store(valid_ptr + (head * tiles + tile), tl.sum(is_valid.to(tl.int32), 0))


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["num_codes", "num_spans", "N", "num_norms", "splits"])
def finish_parts_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    norms_ptr,          # [H, P, 4] fp32, of `vqtriton.planes.CodePlanes`
    groups_ptr,         # [splits, H, N] int32, of the screen, as the next five
    best_ptr,           # [splits, H, N] fp32
    second_ptr,         # [splits, H, N] fp32
    error_ptr,          # [H, N] fp32
    row_scale_ptr,      # [H, N] fp32
    norm_ptr,           # [H, N] fp32
    # see `Finish`
    codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr, thresholds_ptr,
    doubts_ptr, arrivals_ptr, valid_ptr, sums_ptr,
    bound_products, bound_distances, bound_tiny, weight, num_codes, stride_ch, stride_ck, stride_cd,
    num_spans,
    N, num_norms, splits, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
    HAS_MASK: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr, FINISH_D: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    # rows beyond the last are the last again, so that loads need no mask
    row = tl.minimum(offs_n, N - 1)
    group = tl.zeros((BLOCK_N,), tl.int32)
    # integers: a NaN that has won its part wins the row
    best = tl.full((BLOCK_N,), -2147483648, tl.int32)
    second = tl.full((BLOCK_N,), -2147483648, tl.int32)
    for split in range(splits):
        offs = (tl.cast(split, tl.int64) * heads + head) * N + row
        split_best = tl.load(best_ptr + offs).to(tl.int32, bitcast=True)
        split_second = tl.load(second_ptr + offs).to(tl.int32, bitcast=True)
        group = tl.where(split_best > best, tl.load(groups_ptr + offs), group)
        second = tl.maximum(tl.maximum(second, split_second), tl.minimum(best, split_best))
        best = tl.maximum(best, split_best)
    second = tl.maximum(second, 0).to(tl.float32, bitcast=True)
    scale = tl.load(scale_ptr + head)
    row_scale = tl.load(row_scale_ptr + head * N + row)
    finish_rows(
        x_ptr + head * stride_xh + row * stride_xn, offs_n, row_mask, group, second,
        tl.load(error_ptr + head * N + row), tl.load(norm_ptr + head * N + row), row_scale,
        scale_ratio(row_scale, scale), scale, mean_ptr + head * D, norms_ptr, head,
        num_norms,
        codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr, thresholds_ptr,
        doubts_ptr, arrivals_ptr, valid_ptr, sums_ptr,
        bound_products, bound_distances, bound_tiny, weight, num_codes,
        stride_ch, stride_ck, stride_cd, num_spans, N, stride_xd,
        D, IS_DOT, GROUP, EXACT, HAS_MASK, GATHER, BLOCK_N, FINISH_D,
    )  # fmt: skip
