"""Residual quantizer: the nearest codes of a chain of codebooks, in one launch.

Each level searches the codebook of its own for what the levels before it have left of a row. So
the levels of a row depend on one another, but rows do not: a program takes a tile of rows through
all levels, and no program waits for another. What a level does is what `nearest_code` does: screen
on tensor cores, finish with a certificate. docs/exactness.md derives both.

Rows in doubt are settled where they are, since the next level needs them. First the codes that may
be the nearest are compared by float32 distances, which err much less than the screen. Where these
cannot tell either, the canonical float64 distance of `vqtriton.reference.squared_distances`
decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, OwnBound, ScreenBound
from vqtriton.kernels.finish_rows import (
    cost_gap,
    group_costs,
    judge,
    least_of_others,
    nearest_of_group,
    take_codes,
)
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.rescue_rows import PAIR, nearest_of_groups
from vqtriton.kernels.row_planes import (
    plane_constants,
    register_limit,
    row_error,
    row_planes,
    scale_ratio,
    tile_scores,
)
from vqtriton.kernels.screen_codes import best_group, classes_of, keep_best, kept_groups
from vqtriton.kernels.screen_tiles import ScreenCodesConfig, architecture, num_processors

_PAIR = tl.constexpr(PAIR)
# numbers of a row that pass from the screen to the finish: fp32, and int32 without the kept groups
FLOATS, INTS = 5, 4
_FLOATS, _INTS = tl.constexpr(FLOATS), tl.constexpr(INTS)
# levels whose codes are loaded at a time, when they are added up
TOGETHER = tl.constexpr(4)


@triton.jit
def _two_least(cost):
    """least [R], the smallest of costs [GROUP, R]; member [R] int32, its place; others [R]."""
    members = tl.arange(0, cost.shape[0])[:, None]
    least = tl.min(cost, 0)
    member = tl.min(tl.where(cost == least[None, :], members, cost.shape[0]), 0)
    return least, member, least_of_others(cost, member)


@triton.jit
def _costs_of_groups(
    x_rows_ptr, codebook_ptr, group, is_group, row_scale, K, end_d,
    D: tl.constexpr, GROUP: tl.constexpr, IS_SMALL: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """`group_costs` of a group for each row, and the first code; each code belongs to one group."""
    own = group * GROUP
    first = tl.maximum(tl.minimum(own, K - GROUP), 0)
    cost = group_costs(
        x_rows_ptr, codebook_ptr, first, row_scale, None, K, end_d, 1,
        D, False, GROUP, IS_SMALL, BLOCK_D, AHEAD,
    )  # fmt: skip
    is_own = (first[None, :] + tl.arange(0, GROUP)[:, None] >= own[None, :]) & is_group[None, :]
    return tl.where(is_own, cost, float("inf")), first


@triton.jit
def _search_row(
    x_row_ptr, codebook_ptr, row_scale, least_gap, K, end_d,
    D: tl.constexpr, GROUP: tl.constexpr, IS_SMALL: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_D: tl.constexpr, AHEAD: tl.constexpr, GROUPS_64: tl.constexpr,
):  # fmt: skip
    """The nearest code of one row among all codes, int32."""
    groups = (K + GROUP - 1) // GROUP
    lanes = tl.arange(0, PAIRS)
    x_rows_ptr = x_row_ptr + tl.zeros((PAIRS,), tl.int64)
    row_scales = tl.zeros((PAIRS,), tl.float32) + row_scale
    least = tl.full((PAIRS,), float("inf"), tl.float32)
    second = tl.full((PAIRS,), float("inf"), tl.float32)
    code = tl.zeros((PAIRS,), tl.int32)
    for start in range(0, groups, PAIRS):
        group = start + lanes
        cost, first = _costs_of_groups(
            x_rows_ptr, codebook_ptr, group, group < groups, row_scales, K, end_d,
            D, GROUP, IS_SMALL, PAIR_D, AHEAD,
        )  # fmt: skip
        cost_least, member, others = _two_least(cost)
        second = tl.minimum(tl.maximum(least, cost_least), tl.minimum(second, others))
        code = tl.where(cost_least < least, first + member, code)
        least = tl.minimum(least, cost_least)
    best, lane = tl.min(least, 0, return_indices=True)
    second = tl.min(tl.minimum(second, tl.where(lanes == lane, float("inf"), least)), 0)
    found = tl.sum(tl.where(lanes == lane, code, 0), 0)
    # written so that a NaN, from infinities, is in doubt
    if (cost_gap(best, second, D, False) > least_gap) == 0:
        least_64 = tl.full((1,), float("inf"), tl.float64)
        # index 0 for a row that has no finite distance
        index = tl.zeros((1,), tl.int32)
        for start in range(0, groups, GROUPS_64):
            others_64 = start + tl.arange(0, GROUPS_64)[None, :]
            least_64, index = nearest_of_groups(
                x_row_ptr + tl.zeros((1,), tl.int64), codebook_ptr, others_64, others_64 < groups,
                least_64, index, K, end_d, 1, D, False, GROUP, 4,
            )  # fmt: skip
        found = tl.sum(index, 0)
    return found


@triton.jit
def _settle_rows(
    doubt, is_known, is_rival, rows_ptr, codebook_ptr, row_scale_ptr, groups_ptr, pairs_ptr,
    codes_ptr, costs_ptr, seconds_ptr, counts_ptr, listed_ptr, found_ptr, least_gap, K, end_d,
    D: tl.constexpr, GROUP: tl.constexpr, IS_SMALL: tl.constexpr, BLOCK_N: tl.constexpr,
    CLASSES: tl.constexpr, PAIRS: tl.constexpr, PAIR_D: tl.constexpr, AHEAD: tl.constexpr,
    HARD_N: tl.constexpr, GROUPS_64: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N] int32, the nearest codes of the rows in doubt.

    ``is_known`` [BLOCK_N]: all codes that may be the nearest are in the kept groups that
    ``is_rival`` [BLOCK_N, CLASSES] tells. The pointers are those of the tile: residual rows
    ``rows_ptr``, kept groups ``groups_ptr``, and scratch.
    """
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_class = offs_n[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
    known = doubt * is_known.to(tl.int32)
    unknown = doubt - known
    num_unknown = tl.sum(unknown, 0)
    # pairs of a row and a group
    is_pair = (is_rival & (known > 0)[:, None]).to(tl.int32)
    flat = tl.reshape(is_pair, (BLOCK_N * CLASSES,))
    num_pairs = tl.sum(flat, 0)
    place = tl.cumsum(flat, 0) - flat
    tl.store(pairs_ptr + place.to(tl.int64), tl.arange(0, BLOCK_N * CLASSES), mask=flat > 0)
    if num_unknown > 0:
        rank = tl.cumsum(unknown, 0) - unknown
        tl.store(listed_ptr + rank.to(tl.int64), tl.arange(0, BLOCK_N), mask=unknown > 0)
    tl.debug_barrier()
    for i in range(0, num_unknown):
        row = tl.load(listed_ptr + tl.cast(i, tl.int64)).to(tl.int64)
        found = _search_row(
            rows_ptr + row * D, codebook_ptr, tl.load(row_scale_ptr + row), least_gap, K, end_d,
            D, GROUP, IS_SMALL, PAIRS, PAIR_D, AHEAD, GROUPS_64,
        )  # fmt: skip
        tl.store(found_ptr + row, found)
    if num_pairs > 0:
        for start in range(0, num_pairs, PAIRS):
            # pairs beyond the last are the last again, so that loads need no mask
            offs_pair = tl.minimum(start + tl.arange(0, PAIRS), num_pairs - 1)
            slot = tl.load(pairs_ptr + offs_pair.to(tl.int64)).to(tl.int64)
            row = slot // CLASSES
            cost, first = _costs_of_groups(
                rows_ptr + row * D, codebook_ptr, tl.load(groups_ptr + slot), row >= 0,
                tl.load(row_scale_ptr + row), K, end_d, D, GROUP, IS_SMALL, PAIR_D, AHEAD,
            )  # fmt: skip
            least, member, others = _two_least(cost)
            tl.store(costs_ptr + slot, least)
            tl.store(seconds_ptr + slot, others)
            tl.store(codes_ptr + slot, first + member)
        tl.debug_barrier()
        # what is not a pair was not written
        is_there = is_pair > 0
        cost = tl.load(costs_ptr + offs_class, mask=is_there, other=float("inf"))
        second = tl.load(seconds_ptr + offs_class, mask=is_there, other=float("inf"))
        code = tl.load(codes_ptr + offs_class, mask=is_there, other=0)
        least, winner = tl.min(cost, 1, return_indices=True)
        is_winner = tl.arange(0, CLASSES)[None, :] == winner[:, None]
        others = tl.minimum(tl.where(is_winner, float("inf"), cost), second)
        others = tl.min(others, 1)
        # written so that a NaN, from infinities, is in doubt
        is_hard = (cost_gap(least, others, D, False) > least_gap) == 0
        hard = known * is_hard.to(tl.int32)
        code = tl.sum(tl.where(is_winner, code, 0), 1)
        tl.store(found_ptr + offs_n, code, mask=known > hard)
        num_hard = tl.sum(hard, 0)
        if num_hard > 0:
            # groups that hold a code that may be the nearest
            is_tied = (cost_gap(least[:, None], cost, D, False) > least_gap) == 0
            tied = (is_tied & is_there & (hard > 0)[:, None]).to(tl.int32)
            group = tl.load(groups_ptr + offs_class)
            offs_tied = offs_n[:, None] * CLASSES + (tl.cumsum(tied, 1) - tied)
            tl.store(pairs_ptr + offs_tied, group, mask=tied > 0)
            tl.store(counts_ptr + offs_n, tl.sum(tied, 1))
            rank = tl.cumsum(hard, 0) - hard
            tl.store(listed_ptr + rank.to(tl.int64), tl.arange(0, BLOCK_N), mask=hard > 0)
            tl.debug_barrier()
            for start in range(0, num_hard, HARD_N):
                offs_hard = tl.minimum(start + tl.arange(0, HARD_N), num_hard - 1)
                row = tl.load(listed_ptr + offs_hard.to(tl.int64)).to(tl.int64)
                count = tl.load(counts_ptr + row)
                least_64 = tl.full((HARD_N,), float("inf"), tl.float64)
                # index 0 for a row that has no finite distance
                index = tl.zeros((HARD_N,), tl.int32)
                for i in range(0, tl.max(count, 0), _PAIR):
                    offs_list = i + tl.arange(0, _PAIR)[None, :]
                    is_listed = offs_list < count[:, None]
                    list_ptrs = pairs_ptr + (row[:, None] * CLASSES + offs_list)
                    listed = tl.load(list_ptrs, mask=is_listed, other=0)
                    least_64, index = nearest_of_groups(
                        rows_ptr + row * D, codebook_ptr, listed, is_listed, least_64, index,
                        K, end_d, 1, D, False, GROUP, 4,
                    )  # fmt: skip
                tl.store(found_ptr + row, index)
    tl.debug_barrier()
    return tl.load(found_ptr + offs_n, mask=doubt > 0, other=0)


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K", "padded_K", "num_norms", "levels"])
def residual_quantize_kernel(
    x_ptr,          # [N, D] fp32 / fp16 / bf16
    mask_ptr,       # [N] bool, if HAS_MASK: False for rows that do not count
    codebook_ptr,   # [Q, K, D] fp32, contiguous
    codes_ptr,      # [Q, padded_K, INNER] fp16, of `CodePlanes`, as the next four
    offset_ptr,     # [Q, padded_K] fp32
    mean_ptr,       # [Q, D] fp32
    scale_ptr,      # [Q] fp32
    norms_ptr,      # [Q, P, 4] fp32
    indices_ptr,    # [N, Q] int64, out
    quantized_ptr,  # [N, D] as x, out
    errors_ptr,     # [N, Q] fp32, out
    residual_ptr,   # [2, N', D] fp32, scratch; N' are the rows of all tiles
    floats_ptr,     # [T, (2·CLASSES + FLOATS)·BLOCK_N] fp32, scratch
    ints_ptr,       # [T, (3·CLASSES + INTS)·BLOCK_N] int32, scratch
    bound_products, bound_bias, bound_distances, bound_tiny,
    own_products, own_distances, own_tiny,
    N, K, padded_K, num_norms, levels, stride_xn, stride_xd,
    D: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, HOLD_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    LOAD_D: tl.constexpr, CLASSES: tl.constexpr, LOG_MERGED: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_SMALL: tl.constexpr, FINISH_D: tl.constexpr, COPY_D: tl.constexpr, AHEAD: tl.constexpr,
    PAIRS: tl.constexpr, PAIR_D: tl.constexpr, HARD_N: tl.constexpr, GROUPS_64: tl.constexpr,
):  # fmt: skip
    MERGED: tl.constexpr = BLOCK_K // (GROUP * CLASSES)
    KEPT: tl.constexpr = BLOCK_N * CLASSES
    # int64 before they multiply a stride
    pid = tl.program_id(0).to(tl.int64)
    first_n = pid * BLOCK_N
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_n = first_n + rows
    row_mask = offs_n < N
    is_valid = row_mask
    if HAS_MASK:
        is_valid = is_valid & (tl.load(mask_ptr + offs_n, mask=row_mask, other=0) != 0)
    # it is D, but the compiler does not know: unrolled, loops need too many registers
    end_d = tl.minimum(K, 1) * D
    residual_size = tl.num_programs(0).to(tl.int64) * BLOCK_N * D
    residual_ptr += first_n * D
    offs_kept = rows[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
    # scratch of the tile
    scores_ptr = floats_ptr + pid * (2 * KEPT + _FLOATS * BLOCK_N)
    seconds_ptr = scores_ptr + tl.full((), KEPT, tl.int64)
    error_ptr = scores_ptr + tl.full((), 2 * KEPT, tl.int64)
    row_scale_ptr = error_ptr + tl.full((), BLOCK_N, tl.int64)
    norm_ptr = error_ptr + tl.full((), 2 * BLOCK_N, tl.int64)
    second_ptr = error_ptr + tl.full((), 3 * BLOCK_N, tl.int64)
    others_ptr = error_ptr + tl.full((), 4 * BLOCK_N, tl.int64)
    groups_ptr = ints_ptr + pid * (3 * KEPT + _INTS * BLOCK_N)
    pairs_ptr = groups_ptr + tl.full((), KEPT, tl.int64)
    found_codes_ptr = groups_ptr + tl.full((), 2 * KEPT, tl.int64)
    chosen_ptr = groups_ptr + tl.full((), 3 * KEPT, tl.int64)
    counts_ptr = chosen_ptr + tl.full((), BLOCK_N, tl.int64)
    listed_ptr = chosen_ptr + tl.full((), 2 * BLOCK_N, tl.int64)
    found_ptr = chosen_ptr + tl.full((), 3 * BLOCK_N, tl.int64)

    # rows that do not count are zeros
    for start_d in range(0, end_d, COPY_D):
        offs_d = (start_d + tl.arange(0, COPY_D)).to(tl.int64)[None, :]
        is_element = is_valid[:, None] & (offs_d < D)
        x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d * stride_xd
        x = tl.load(x_ptrs, mask=is_element, other=0.0).to(tl.float32)
        is_dim = tl.broadcast_to(offs_d < D, x.shape)
        tl.store(residual_ptr + (rows[:, None] * D + offs_d), x, mask=is_dim)
    tl.debug_barrier()

    for i in range(0, levels):
        level = tl.cast(i, tl.int64)
        x_rows_ptr = residual_ptr + level % 2 * residual_size + rows * D
        left_rows_ptr = residual_ptr + (level + 1) % 2 * residual_size + rows * D
        mean_level_ptr = mean_ptr + level * D
        scale = tl.load(scale_ptr + level)
        planes, row_scale, ratio, high, low, rest = row_planes(
            x_rows_ptr, mean_level_ptr, scale, 1,
            D, False, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL, LOAD_D,
        )  # fmt: skip
        error = row_error(
            high, low, rest, ratio, norms_ptr, level, num_norms,
            bound_products, bound_bias, bound_distances, bound_tiny,
        )  # fmt: skip
        tl.store(error_ptr + rows, error)
        tl.store(row_scale_ptr + rows, row_scale)
        tl.store(norm_ptr + rows, high + low + rest)
        best = tl.full((BLOCK_N, CLASSES), -2147483648, tl.int32)
        # of each class, so that in the loop nothing passes from thread to thread
        others = tl.full((BLOCK_N, CLASSES), -2147483648, tl.int32)
        tile = tl.zeros((BLOCK_N, CLASSES), tl.int32)
        # what the compiler cannot see: K is padded to whole tiles
        level_k = tl.multiple_of(level * padded_K, BLOCK_K)
        for start in range(0, padded_K, BLOCK_K):
            # of the whole tile: else the loads do not know that they are aligned
            start_k = tl.multiple_of(tl.cast(start, tl.int64), BLOCK_K)
            scores = tile_scores(
                planes, x_rows_ptr, mean_level_ptr, row_scale, ratio, codes_ptr + level_k * INNER,
                offset_ptr + level_k, start_k, 1,
                D, INNER, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_K, BLOCK_D, TAIL,
            )  # fmt: skip
            best, others, tile = keep_best(
                scores, start, best, others, tile, BLOCK_N, BLOCK_K, GROUP, LANES, VEC, CLASSES,
                MERGED, LOG_MERGED,
            )  # fmt: skip
        groups, best, others = kept_groups(best, others, tile, GROUP, LANES, CLASSES, MERGED)
        chosen, second = best_group(groups, best, others)
        tl.store(groups_ptr + offs_kept, groups)
        tl.store(scores_ptr + offs_kept, best.to(tl.float32, bitcast=True))
        tl.store(others_ptr + rows, others.to(tl.float32, bitcast=True))
        tl.store(second_ptr + rows, second)
        tl.store(chosen_ptr + rows, chosen)
        tl.debug_barrier()

        level_codebook_ptr = codebook_ptr + level * K * D
        row_scale = tl.load(row_scale_ptr + rows)
        ratio = scale_ratio(row_scale, scale)
        # whole groups, also where the last is not: codes of another one do no harm
        first = tl.maximum(tl.minimum(tl.load(chosen_ptr + rows) * GROUP, K - GROUP), 0)
        index, is_bad, cost, least, member = nearest_of_group(
            x_rows_ptr, level_codebook_ptr, first, row_scale, scale, K, end_d, 1,
            D, False, GROUP, IS_SMALL, FINISH_D, AHEAD,
        )  # fmt: skip
        gap = cost_gap(least, least_of_others(cost, member), D, False)
        # rows that do not count stay zeros
        score, sq_error = take_codes(
            x_rows_ptr, level_codebook_ptr + index.to(tl.int64) * D, left_rows_ptr, mean_level_ptr,
            row_scale, scale, 0.5 * ratio, is_valid, rows >= 0, end_d, 1,
            D, False, True, True, True, True, FINISH_D,
        )  # fmt: skip
        # a bad row is certain
        score = tl.where(tl.abs(score) < float("inf"), score, float("-inf"))
        doubt, threshold = judge(
            tl.load(second_ptr + rows), tl.where(is_bad, float("inf"), score),
            tl.where(is_bad, float("inf"), gap), tl.load(error_ptr + rows),
            tl.load(norm_ptr + rows), ratio, is_valid, scale, norms_ptr, num_norms,
            own_products, own_distances, own_tiny, K, level, False, GROUP,
        )  # fmt: skip
        if tl.sum(doubt, 0) > 0:
            # written so that a NaN is a rival
            is_rival = (tl.load(scores_ptr + offs_kept) < threshold[:, None]) == 0
            # the screen's scores are not needed any more
            tl.debug_barrier()
            found = _settle_rows(
                doubt, tl.load(others_ptr + rows) < threshold, is_rival,
                residual_ptr + level % 2 * residual_size, level_codebook_ptr, row_scale_ptr,
                groups_ptr, pairs_ptr, found_codes_ptr, scores_ptr, seconds_ptr, counts_ptr,
                listed_ptr, found_ptr, own_tiny, K, end_d,
                D, GROUP, IS_SMALL, BLOCK_N, CLASSES, PAIRS, PAIR_D, AHEAD, HARD_N, GROUPS_64,
            )  # fmt: skip
            is_new = (doubt > 0) & (found != index)
            if tl.sum(is_new.to(tl.int32), 0) > 0:
                index = tl.where(is_new, found, index)
                _score, new_error = take_codes(
                    x_rows_ptr, level_codebook_ptr + index.to(tl.int64) * D, left_rows_ptr,
                    None, None, None, None, is_valid, is_new, end_d, 1,
                    D, False, False, True, True, False, FINISH_D,
                )  # fmt: skip
                sq_error = tl.where(is_new, new_error, sq_error)
        offs_out = offs_n * levels + level
        tl.store(indices_ptr + offs_out, tl.where(is_valid, index, -1).to(tl.int64), mask=row_mask)
        tl.store(errors_ptr + offs_out, sq_error, mask=row_mask)
        tl.debug_barrier()

    for start_d in range(0, end_d, COPY_D):
        offs_d = (start_d + tl.arange(0, COPY_D)).to(tl.int64)[None, :]
        is_element = is_valid[:, None] & (offs_d < D)
        first_index = tl.load(indices_ptr + offs_n * levels, mask=is_valid, other=0)
        codes_ptrs = codebook_ptr + first_index[:, None] * D + offs_d
        total = tl.load(codes_ptrs, mask=is_element, other=0.0)
        for first_level in range(1, levels, TOGETHER):
            for ahead in tl.static_range(TOGETHER):
                next_level = tl.cast(first_level + ahead, tl.int64)
                is_level = is_valid & (next_level < levels)
                index_ptrs = indices_ptr + (offs_n * levels + next_level)
                next_index = tl.load(index_ptrs, mask=is_level, other=0)
                codes_ptrs = codebook_ptr + (next_level * K + next_index)[:, None] * D + offs_d
                code = tl.load(codes_ptrs, mask=is_level[:, None] & (offs_d < D), other=0.0)
                # to add 0 would change the sign of -0
                total = tl.where(is_level[:, None], total + code, total)
        quantized_ptrs = quantized_ptr + offs_n[:, None] * D + offs_d
        total = total.to(quantized_ptr.dtype.element_ty)
        tl.store(quantized_ptrs, total, mask=row_mask[:, None] & (offs_d < D))


class ResidualQuantized(NamedTuple):
    """What `residual_quantize` returns."""

    quantized: Tensor  # [N, D] in the dtype of x, the sum of the codes, zeros where masked
    indices: Tensor  # [N, Q] int64, -1 where masked
    errors: Tensor  # [N, Q] fp32, squared norms of what each level leaves, 0 where masked


def config_for(x: Tensor, inner: int) -> ScreenCodesConfig:
    """The default tiles for x [N, D] and planes of ``inner`` columns."""
    is_few = cdiv(x.shape[0], 128) < 2 * num_processors(x.device)
    return residual_quantize_config(architecture(x.device), inner, is_few=is_few)


def residual_quantize_config(
    target: str, inner: int, *, is_few: bool = True
) -> ScreenCodesConfig:
    """Tiles that neither spill nor overflow shared memory; sm_80's fit 99 KiB, for sm_86 and up.

    Args:
        target: a key of `vqtriton.kernels.screen_tiles.ACCUMULATOR_ORDER`.
        inner: columns of the planes.
        is_few: so few rows that smaller tiles are to fill the processors.
    """
    return ScreenCodesConfig(
        block_n=64, block_k=128, num_warps=8, num_stages=2, max_registers=255, finish_ahead=2
    )


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    planes: CodePlanes,
    screen_bound: ScreenBound,
    own_bound: OwnBound,
    *,
    mask: Tensor | None = None,
    config: ScreenCodesConfig | None = None,
) -> ResidualQuantized:
    """The nearest code of x, then that of the difference in the next codebook, and so on.

    Args:
        x: [N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        codebooks: [Q, K, D] float32, contiguous. A codebook with fewer codes than others is filled
            up with infinities: a code that is not finite is never chosen.
        planes: of ``codebooks``, for distances.
        screen_bound: `vqtriton.planes.screen_bound` for these planes and ``config.block_k``.
        own_bound: `vqtriton.screening.error_bound` for D in float32.
        mask: [N] bool, False for rows that get index -1, zeros and no error.
        config: tiles.

    Raises:
        ValueError: the tiles do not fit the planes.
    """
    (num_rows, dim), (levels, size, _) = x.shape, codebooks.shape
    padded_size, inner = planes.codes.shape[1:]
    config = config or config_for(x, inner)
    chunk = planes.group * planes.lanes
    if config.block_k % chunk or padded_size % config.block_k:
        raise ValueError(
            f"block_k is {config.block_k}; it must be a multiple of group * lanes = {chunk} and "
            f"divide the padded number of codes, {padded_size}"
        )
    tiles = cdiv(num_rows, config.block_n)
    num_groups, num_classes = classes_of(planes, config)
    classes = planes.lanes * num_classes
    # of float32, in loads of 16 bytes
    elements, width = 4 * 32 * config.num_warps, next_power_of_2(dim)
    pair_d = min(32, width)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    found = ResidualQuantized(
        empty(num_rows, dim, dtype=x.dtype),
        empty(num_rows, levels, dtype=torch.int64),
        empty(num_rows, levels, dtype=torch.float32),
    )
    constants = plane_constants(planes, config.block_d, config.hold_rows)
    del constants["IS_DOT"]
    with torch.cuda.device_of(x):
        launch(
            residual_quantize_kernel,
            (tiles,),
            x,
            None if mask is None else mask.contiguous(),
            codebooks,
            *planes.tensors,
            found.indices,
            found.quantized,
            found.errors,
            empty(2, tiles * config.block_n, dim, dtype=torch.float32),
            empty(tiles, (2 * classes + FLOATS) * config.block_n, dtype=torch.float32),
            empty(tiles, (3 * classes + INTS) * config.block_n, dtype=torch.int32),
            *screen_bound,
            *own_bound,
            num_rows,
            size,
            padded_size,
            planes.norms.shape[1],
            levels,
            *x.stride(),
            **constants,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            CLASSES=classes,
            LOG_MERGED=(num_groups // num_classes).bit_length() - 1,
            HAS_MASK=mask is not None,
            # fewer codes than a group
            IS_SMALL=size < planes.group,
            FINISH_D=min(width, max(1, elements // config.block_n)),
            COPY_D=min(width, max(1, 4 * elements // config.block_n)),
            AHEAD=config.finish_ahead,
            PAIRS=elements // pair_d,
            PAIR_D=pair_d,
            HARD_N=max(1, 32 * config.num_warps // (PAIR * planes.group)),
            GROUPS_64=max(1, 32 * config.num_warps // planes.group),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # a fused multiply-add rounds once where the definition rounds twice
            enable_fp_fusion=False,
            **register_limit(config.max_registers),
        )
    return found
