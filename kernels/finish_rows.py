"""Finish: decide within the best group of codes, certify, gather; list the rows that stay in doubt.

A row is certified if its winner beats the other codes of its group by more than float32 may err,
and the best score outside of the group by more than the screen may. docs/exactness.md derives both.
A row in doubt has known rivals if the screen kept all groups that may hold the nearest code: then
these are listed. Any other row has to be searched again.

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

    T is the number of tiles of rows, and N' the rows of all of these. L is the number of rows of a
    tile whose rivals can be listed.
    """

    codebook: Tensor  # [H, K, D] fp32 / fp16 / bf16, contiguous
    mask: Tensor | None  # [H, N] bool, False for rows that do not count
    indices: Tensor  # [H, N] int64, out
    quantized: Tensor | None  # [H, N, D] as x, out
    losses: Tensor | None  # [H, N] fp32, out: weight times the squared distance
    chosen: Tensor  # [H, N'] int32, scratch: the best group
    best: Tensor  # [H, N'] fp32, scratch: the score of the winner
    gaps: Tensor  # [H, N'] fp32, scratch: how far the others of its group are behind it
    rows: Tensor  # [H, N'] int32, out: of each tile, those with known rivals first, others last
    thresholds: Tensor  # [H, N'] fp32, out: for the others, what a rival's score must reach
    rivals: Tensor  # [H, T, L, CLASSES] int32, out: the groups that may hold the nearest code
    rival_counts: Tensor  # [H, T, L] int32, out: how many they are
    known: Tensor  # [H, T] int32, out: rows in doubt with known rivals
    unknown: Tensor  # [H, T] int32, out: the other rows in doubt
    arrivals: Tensor  # [H, T + 1] int32, set to zero, for the rescue
    valid: Tensor  # [H, T] int32, out: rows that count
    sums: Tensor  # [H, S] fp64, out: of the losses of the rows of a tile that are certain
    bound_products: float
    bound_distances: float
    bound_tiny: float
    weight: float
    num_codes: int
    num_sums: int  # S; the first T sums belong to the tiles


@triton.jit
def _load_dims(ptrs, offs_d, D: tl.constexpr, IS_EVEN: tl.constexpr):
    """fp32, zeros beyond the last dimension; ``offs_d`` broadcasts to the pointers."""
    if IS_EVEN:
        return tl.load(ptrs).to(tl.float32)
    return tl.load(ptrs, mask=tl.broadcast_to(offs_d < D, ptrs.shape), other=0.0).to(tl.float32)


@triton.jit
def take_codes(
    x_rows_ptr, code_rows_ptr, quantized_rows_ptr, mean_ptr, row_scale, scale, half_ratio,
    is_valid, row_mask, end_d, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, SCORE: tl.constexpr, GATHER: tl.constexpr,
    SUBTRACT: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each row the score of a code, and its squared distance; if GATHER, the code is written.

    If SUBTRACT, what is written is the row less the code. All rows can be read, also beyond
    ``row_mask``. If HAS_MASK, those that are not valid get zeros.

    Returns:
        score [R] fp32, if SCORE: y·e − ratio·‖e‖²/2, or y·e; sq_error [R] fp32, if GATHER.
    """
    score = tl.zeros((row_mask.shape[0], BLOCK_D), tl.float32)
    sq_error = score
    for start_d in range(0, end_d, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        x = _load_dims(x_rows_ptr[:, None] + offs_d * stride_xd, offs_d, D, D % BLOCK_D == 0)
        code = _load_dims(code_rows_ptr[:, None] + offs_d, offs_d, D, D % BLOCK_D == 0)
        if SCORE:
            mean = _load_dims(mean_ptr + offs_d, offs_d, D, D % BLOCK_D == 0)
            y = (x - mean) * row_scale[:, None]
            e = (code - mean) * scale
            if not IS_DOT:
                y -= e * half_ratio[:, None]
            score += e * y
        if GATHER:
            if HAS_MASK:
                x = tl.where(is_valid[:, None], x, 0.0)
                code = tl.where(is_valid[:, None], code, 0.0)
            written = x - code if SUBTRACT else code
            tl.store(
                quantized_rows_ptr[:, None] + offs_d,
                written.to(quantized_rows_ptr.dtype.element_ty),
                mask=row_mask[:, None] & (offs_d < D),
            )
            sq_error += (x - code) * (x - code)
    return tl.sum(score, 1), tl.sum(sq_error, 1)


@triton.jit
def not_finite(x_rows_ptr, end_d, stride_xd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whether a row has a NaN or an infinity."""
    found = tl.zeros(x_rows_ptr.shape, tl.int32)
    for start_d in range(0, end_d, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        x = _load_dims(x_rows_ptr[:, None] + offs_d * stride_xd, offs_d, D, D % BLOCK_D == 0)
        found = tl.maximum(found, tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1))
    return found > 0


@triton.jit
def group_costs(
    x_rows_ptr, codebook_ptr, first, row_scale, scale, num_codes, end_d, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, IS_SMALL: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, IS_FUSED: tl.constexpr,
):  # fmt: skip
    """Of the codes from ``first`` on: the smallest is the best, inf what is not finite.

    [GROUP, R] fp32: the squared distance in units of 1/row_scale², or the opposite of the dot
    product. A thread has all these codes for its dimensions of a row, so it loads x once.
    """
    members = tl.arange(0, GROUP)
    offs_code = members.to(tl.int64) * D
    if IS_SMALL:
        # no memory beyond the codebook
        offs_code = tl.minimum(members, num_codes - 1).to(tl.int64) * D
    codes_ptr = (codebook_ptr + first.to(tl.int64) * D)[None, :, None] + offs_code[:, None, None]
    terms = tl.zeros((GROUP, first.shape[0], BLOCK_D), tl.float32)
    # this many tiles of dimensions are loaded at a time
    TILES: tl.constexpr = AHEAD if D % (AHEAD * BLOCK_D) == 0 else 1
    for start_tiles in range(0, end_d, TILES * BLOCK_D):
        for i in tl.static_range(TILES):
            offs_d = (start_tiles + i * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
            x_ptrs = x_rows_ptr[:, None] + offs_d[None, :] * stride_xd
            x = _load_dims(x_ptrs, offs_d[None, :], D, D % BLOCK_D == 0)
            # exact, as the scale is a power of two
            x = (x * row_scale[:, None])[None, :, :]
            offs_d = offs_d[None, None, :]
            codes = _load_dims(codes_ptr + offs_d, offs_d, D, D % BLOCK_D == 0)
            if IS_DOT:
                terms -= x * (codes * scale)
            else:
                # rounded once; centred, it would be rounded three times
                difference = tl.fma(codes, -row_scale[None, :, None], x)
                if IS_FUSED:
                    # where the compiler is not to fuse, but here may
                    terms = tl.fma(difference, difference, terms)
                else:
                    terms += difference * difference
    cost = tl.sum(terms, 2)
    is_finite = cost < float("inf")
    if IS_DOT:
        is_finite = is_finite & (cost > float("-inf"))
    if IS_SMALL:
        is_finite = is_finite & (members < num_codes)[:, None]
    return tl.where(is_finite, cost, float("inf"))


@triton.jit
def nearest_of_group(
    x_rows_ptr, codebook_ptr, first, row_scale, scale, num_codes, end_d, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, IS_SMALL: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, IS_FUSED: tl.constexpr,
):  # fmt: skip
    """The nearest code of each row among those from ``first`` on, by float32 distances.

    Returns:
        index [R] int32, 0 for a row that is not finite; is_bad [R] bool, whether it is; cost
        [GROUP, R] of `group_costs`; least [R], the smallest cost; member [R] int32, its place.
    """
    cost = group_costs(
        x_rows_ptr, codebook_ptr, first, row_scale, scale, num_codes, end_d, stride_xd,
        D, IS_DOT, GROUP, IS_SMALL, BLOCK_D, AHEAD, IS_FUSED,
    )  # fmt: skip
    members = tl.arange(0, GROUP)[:, None]
    least = tl.min(cost, 0)
    # the lowest index keeps a tie
    member = tl.min(tl.where(cost == least[None, :], members, GROUP), 0)
    # no distance of a row that is not finite is finite
    is_bad = least == float("inf")
    if tl.max(is_bad.to(tl.int32), 0) > 0:
        is_bad = is_bad & not_finite(x_rows_ptr, end_d, stride_xd, D, BLOCK_D)
    return tl.where(is_bad, 0, first + member), is_bad, cost, least, member


@triton.jit
def least_of_others(cost, member):
    """The smallest cost of [GROUP, R] but that of the member [R]."""
    members = tl.arange(0, cost.shape[0])[:, None]
    return tl.min(tl.where(members == member[None, :], float("inf"), cost), 0)


@triton.jit
def cost_gap(least, others, D: tl.constexpr, IS_DOT: tl.constexpr):
    """By how much other costs exceed the least one, less what both may err by."""
    gap = others - least
    if not IS_DOT:
        # see docs/exactness.md
        gap -= (2.1 * (D + 12) * 5.960464477539063e-08) * least
    return gap


@triton.jit
def finish_rows(
    x_ptr, group, mean_ptr, scale, row_scale_ptr,
    codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, chosen_ptr, best_ptr, gaps_ptr,
    rows_ptr, weight, num_codes, head, N, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
    HAS_MASK: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr, IS_SMALL: tl.constexpr,
    FINISH_N: tl.constexpr, FINISH_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Chooses and writes the nearest code in the group of each row, [BLOCK_N] int32.

    Pointers to x and mean are those of the head. What `certify` needs is passed on through memory,
    as there are few registers.
    """
    tile = tl.program_id(0).to(tl.int64)
    first_place = (head * tl.num_programs(0) + tile) * BLOCK_N
    codebook_ptr += head * num_codes * D
    first_n = tile * BLOCK_N
    # it is D, but the compiler does not know: unrolled, loops need too many registers
    end_d = tl.minimum(num_codes, 1) * D
    tl.store(chosen_ptr + (first_place + tl.arange(0, BLOCK_N)), group)
    tl.debug_barrier()
    for start_n in range(0, BLOCK_N, FINISH_N):
        place = start_n + tl.arange(0, FINISH_N)
        offs_n = first_n + place
        row_mask = offs_n < N
        # rows beyond the last are the last again, so that loads need no mask
        row = tl.minimum(offs_n, N - 1)
        offs_row = head * N + row
        row_scale = tl.load(row_scale_ptr + offs_row)
        x_rows_ptr = x_ptr + row * stride_xn
        # whole groups, also where the last is not: codes of another one do no harm
        first = tl.load(chosen_ptr + (first_place + place)) * GROUP
        first = tl.maximum(tl.minimum(first, num_codes - GROUP), 0)
        index, is_bad, cost, least, member = nearest_of_group(
            x_rows_ptr, codebook_ptr, first, row_scale, scale, num_codes, end_d, stride_xd,
            D, IS_DOT, GROUP, IS_SMALL, FINISH_D, AHEAD, False,
        )  # fmt: skip
        is_valid = row_mask
        if HAS_MASK:
            is_valid = is_valid & (tl.load(mask_ptr + offs_row) != 0)
        tl.store(indices_ptr + offs_row, tl.where(is_valid, index, -1).to(tl.int64), mask=row_mask)
        half_ratio = 0.5 * scale_ratio(row_scale, scale)
        quantized_rows_ptr = None
        if GATHER:
            quantized_rows_ptr = quantized_ptr + offs_row * D
        score, sq_error = take_codes(
            x_rows_ptr, codebook_ptr + index.to(tl.int64) * D, quantized_rows_ptr,
            mean_ptr, row_scale, scale, half_ratio, is_valid, row_mask, end_d, stride_xd,
            D, IS_DOT, EXACT, GATHER, False, HAS_MASK, FINISH_D,
        )  # fmt: skip
        if GATHER:
            loss = tl.where(is_bad & is_valid, float("nan"), weight * sq_error)
            tl.store(losses_ptr + offs_row, loss, mask=row_mask)
        tl.store(rows_ptr + (first_place + place), offs_n.to(tl.int32))
        if EXACT:
            gap = cost_gap(least, least_of_others(cost, member), D, IS_DOT)
            # a bad row is certain
            score = tl.where(tl.abs(score) < float("inf"), score, float("-inf"))
            tl.store(gaps_ptr + (first_place + place), tl.where(is_bad, float("inf"), gap))
            tl.store(best_ptr + (first_place + place), tl.where(is_bad, float("inf"), score))


@triton.jit
def judge(
    second, best, gap, error, norm, ratio, is_valid, scale, norms_ptr, num_norms,
    bound_products, bound_distances, bound_tiny, num_codes, head,
    IS_DOT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Which rows are in doubt; what does not begin with scale is [R], or a pointer.

    ``second`` is the largest score, as screened, of a group that was not chosen; ``best`` the score
    of the winner, +inf for a row that is certain; ``gap`` that of `cost_gap` in the group.

    Returns:
        doubt [R] int32; threshold [R] fp32, what a rival's screened score must reach.
    """
    max_norm = largest_norm(norms_ptr, head, num_norms, 0)
    # the constant in the screen's scores
    shift = largest_norm(norms_ptr, head, num_norms, 3)
    if IS_DOT:
        own_error = bound_products * max_norm * norm + bound_tiny
        # the scores here are without the constant: beside it they would lose digits
        second -= shift
        least_gap = 2 * own_error
    else:
        own_error = bound_products * max_norm * (norm + 0.5 * ratio * max_norm)
        own_error += bound_distances * norm * (norm / ratio) + bound_tiny
        best += ratio * shift
        least_gap = tl.zeros_like(own_error) + bound_tiny
    # code − mean may overflow, though it does not in float64, where the scale was chosen
    own_error = tl.where(scale < 6.018531076210112e-36, float("inf"), own_error)
    # with a single group the screen reports 0 for the others
    second = tl.where(num_codes <= GROUP, float("-inf"), second)
    # written so that a NaN or an infinite error leaves the row in doubt
    is_certain = (best - second > error + own_error) & (gap > least_gap)
    is_certain = is_certain | (best == float("inf"))
    doubt = (is_valid & (is_certain == 0)).to(tl.int32)
    if IS_DOT:
        best += shift
    # the last term: two subtractions are rounded
    threshold = best - (error + own_error + 2.384185791015625e-07 * tl.abs(best))
    return doubt, threshold


@triton.jit
def certify(
    second, scale, norms_ptr, num_norms, error_ptr, row_scale_ptr, norm_ptr,
    mask_ptr, losses_ptr, best_ptr, gaps_ptr, rows_ptr, valid_ptr, sums_ptr,
    bound_products, bound_distances, bound_tiny, num_codes, num_sums, head, N,
    IS_DOT: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr, HAS_MASK: tl.constexpr,
    GATHER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which rows are in doubt after `finish_rows`; adds up the losses of the others.

    second [BLOCK_N] fp32 is the largest score, as screened, of a group that was not chosen.

    Returns:
        doubt [BLOCK_N] int32; threshold [BLOCK_N] fp32, what a rival's screened score must reach.
    """
    tl.debug_barrier()
    tile = tl.program_id(0).to(tl.int64)
    places = (head * tl.num_programs(0) + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    # also the numbers of the rows: else what was computed from them would stay in registers
    offs_n = tl.load(rows_ptr + places).to(tl.int64)
    row_mask = offs_n < N
    offs_row = head * N + tl.minimum(offs_n, N - 1)
    is_valid = row_mask
    if HAS_MASK:
        is_valid = is_valid & (tl.load(mask_ptr + offs_row) != 0)
    doubt = tl.zeros((BLOCK_N,), tl.int32)
    threshold = second
    if EXACT:
        error = tl.load(error_ptr + offs_row)
        norm = tl.load(norm_ptr + offs_row)
        ratio = scale_ratio(tl.load(row_scale_ptr + offs_row), scale)
        best = tl.load(best_ptr + places)
        gap = tl.load(gaps_ptr + places)
        doubt, threshold = judge(
            second, best, gap, error, norm, ratio, is_valid, scale, norms_ptr, num_norms,
            bound_products, bound_distances, bound_tiny, num_codes, head, IS_DOT, GROUP,
        )  # fmt: skip
    if GATHER:
        losses = tl.load(losses_ptr + offs_row)
        certain = tl.where(row_mask & (doubt == 0), losses, 0.0).to(tl.float64)
        tl.store(sums_ptr + (head * num_sums + tile), tl.sum(certain, 0))
        place = head * tl.num_programs(0) + tile
        tl.store(valid_ptr + place, tl.sum(is_valid.to(tl.int32), 0))
    return doubt, threshold


@triton.jit
def list_doubts(
    doubt, is_known, threshold, num_rivals, rows_ptr, thresholds_ptr, rival_counts_ptr, known_ptr,
    unknown_ptr, arrivals_ptr, head, BLOCK_N: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Lists the rows in doubt of a tile; all parameters but the pointers are [BLOCK_N].

    Returns:
        [BLOCK_N] int64, place of the list of a row's rivals; -1 for a row that has no such list.
    """
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.num_programs(0)
    first_n = tile * BLOCK_N
    offs_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int32)
    offs_tile = head * tiles + tile
    known = doubt * is_known.to(tl.int32)
    rank = tl.cumsum(known, 0) - known
    known = known * (rank < LISTED).to(tl.int32)
    unknown = doubt - known
    last = BLOCK_N - 1 - (tl.cumsum(unknown, 0) - unknown)
    # `certify` has read what stands there
    tl.debug_barrier()
    tl.store(rows_ptr + (offs_tile * BLOCK_N + rank), offs_n, mask=known > 0)
    tl.store(rows_ptr + (offs_tile * BLOCK_N + last), offs_n, mask=unknown > 0)
    tl.store(thresholds_ptr + (offs_tile * BLOCK_N + last), threshold, mask=unknown > 0)
    place = tl.where(known > 0, offs_tile * LISTED + rank, -1)
    tl.store(rival_counts_ptr + place, num_rivals, mask=known > 0)
    tl.store(known_ptr + offs_tile, tl.sum(known, 0))
    tl.store(unknown_ptr + offs_tile, tl.sum(unknown, 0))
    tl.store(arrivals_ptr + (head * (tiles + 1) + tile), 0)
    if tile == 0:
        tl.store(arrivals_ptr + (head * (tiles + 1) + tiles), 0)
    return place


# kept groups, and parts, that are loaded at a time
KEPT = tl.constexpr(32)
PARTS = tl.constexpr(8)


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["num_codes", "num_sums", "N", "num_norms", "splits"])
def finish_parts_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    norms_ptr,          # [H, P, 4] fp32, of `vqtriton.planes.CodePlanes`
    groups_ptr,         # [H, N, splits, CLASSES] int32, of the screen, as the next five
    scores_ptr,         # [H, N, splits, CLASSES] fp32
    others_ptr,         # [splits, H, N] fp32
    error_ptr,          # [H, N] fp32
    row_scale_ptr,      # [H, N] fp32
    norm_ptr,           # [H, N] fp32
    # see `Finish`
    codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, chosen_ptr, best_ptr, gaps_ptr,
    rows_ptr, thresholds_ptr, rivals_ptr, rival_counts_ptr, known_ptr, unknown_ptr, arrivals_ptr,
    valid_ptr, sums_ptr,
    bound_products, bound_distances, bound_tiny, weight, num_codes, num_sums,
    N, num_norms, splits, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr,
    EXACT: tl.constexpr, HAS_MASK: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_SMALL: tl.constexpr, LISTED: tl.constexpr, FINISH_N: tl.constexpr, FINISH_D: tl.constexpr,
    AHEAD: tl.constexpr, X_UNIT: tl.constexpr,
):  # fmt: skip
    # tells the compiler that strides are multiples of X_UNIT; by itself it finds out only for 16
    stride_xh = stride_xh // X_UNIT * X_UNIT
    stride_xn = stride_xn // X_UNIT * X_UNIT
    # int64 before they multiply a stride
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows beyond the last are the last again, so that loads need no mask
    row = head * N + tl.minimum(offs_n, N - 1)
    # the kept groups of a row, from all parts, follow one another
    num_kept = splits * CLASSES
    offs_kept = row[:, None] * num_kept
    entries = tl.arange(0, KEPT)[None, :]
    group = tl.zeros((BLOCK_N,), tl.int32)
    # integers: a NaN that has won its part wins the row
    best = tl.full((BLOCK_N,), -2147483648, tl.int32)
    second = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, num_kept, KEPT):
        offs = offs_kept + (start + entries)
        is_kept = tl.broadcast_to(start + entries < num_kept, offs.shape)
        scores = tl.load(scores_ptr + offs, mask=is_kept, other=0.0).to(tl.int32, bitcast=True)
        groups = tl.load(groups_ptr + offs, mask=is_kept, other=0)
        scores = tl.where(is_kept, scores, -2147483648)
        block_best, winner = tl.max(scores, 1, return_indices=True)
        is_winner = entries == winner[:, None]
        behind = tl.max(tl.where(is_winner, -2147483648, scores), 1)
        block_group = tl.sum(tl.where(is_winner, groups, 0), 1)
        group = tl.where(block_best > best, block_group, group)
        second = tl.maximum(tl.maximum(second, behind), tl.minimum(best, block_best))
        best = tl.maximum(best, block_best)
    others = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)[None, :]
        offs = split.to(tl.int64) * heads * N + row[:, None]
        left = tl.load(
            others_ptr + offs, mask=tl.broadcast_to(split < splits, offs.shape), other=0.0
        )
        others = tl.maximum(others, tl.max(left.to(tl.int32, bitcast=True), 1))
    second = tl.maximum(second, others).to(tl.float32, bitcast=True)
    others = others.to(tl.float32, bitcast=True)
    scale = tl.load(scale_ptr + head)
    finish_rows(
        x_ptr + head * stride_xh, group, mean_ptr + head * D, scale, row_scale_ptr,
        codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, chosen_ptr, best_ptr,
        gaps_ptr, rows_ptr, weight, num_codes, head, N, stride_xn, stride_xd,
        D, IS_DOT, GROUP, EXACT, HAS_MASK, GATHER, BLOCK_N, IS_SMALL, FINISH_N, FINISH_D,
        AHEAD,
    )  # fmt: skip
    doubt, threshold = certify(
        second, scale, norms_ptr, num_norms, error_ptr, row_scale_ptr, norm_ptr,
        mask_ptr, losses_ptr, best_ptr, gaps_ptr, rows_ptr, valid_ptr, sums_ptr,
        bound_products, bound_distances, bound_tiny, num_codes, num_sums, head, N,
        IS_DOT, GROUP, EXACT, HAS_MASK, GATHER, BLOCK_N,
    )  # fmt: skip
    if EXACT:
        num_rivals = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, num_kept, KEPT):
            offs = offs_kept + (start + entries)
            is_kept = tl.broadcast_to(start + entries < num_kept, offs.shape)
            scores = tl.load(scores_ptr + offs, mask=is_kept, other=0.0)
            is_rival = ((scores < threshold[:, None]) == 0) & is_kept
            num_rivals += tl.sum(is_rival.to(tl.int32), 1)
        is_known = (others < threshold) & (num_rivals <= CLASSES)
        place = list_doubts(
            doubt, is_known, threshold, num_rivals, rows_ptr, thresholds_ptr, rival_counts_ptr,
            known_ptr, unknown_ptr, arrivals_ptr, head, BLOCK_N, LISTED,
        )  # fmt: skip
        before = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, num_kept, KEPT):
            offs = offs_kept + (start + entries)
            is_kept = tl.broadcast_to(start + entries < num_kept, offs.shape)
            scores = tl.load(scores_ptr + offs, mask=is_kept, other=0.0)
            groups = tl.load(groups_ptr + offs, mask=is_kept, other=0)
            is_rival = ((scores < threshold[:, None]) == 0) & is_kept & (place >= 0)[:, None]
            is_rival = is_rival.to(tl.int32)
            rank = before[:, None] + tl.cumsum(is_rival, 1) - is_rival
            tl.store(rivals_ptr + (place[:, None] * CLASSES + rank), groups, mask=is_rival > 0)
            before += tl.sum(is_rival, 1)
