"""Settles rows in doubt where they stand: what the chain of a residual quantizer needs at once.

The codes that may be the nearest of a row are compared by float32 distances, which err much less
than the screen. Where these cannot tell either, the canonical float64 distance of
`vqtriton.reference.squared_distances` decides. docs/exactness.md derives the bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqtriton.kernels.finish_rows import cost_gap, group_costs, least_of_others
from vqtriton.kernels.rescue_rows import PAIR, nearest_of_groups

_PAIR = tl.constexpr(PAIR)


@triton.jit
def two_least(cost):
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
        D, False, GROUP, IS_SMALL, BLOCK_D, AHEAD, True,
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
        cost_least, member, others = two_least(cost)
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
def settle_rows(
    doubt, is_known, is_rival, groups, rows_ptr, codebook_ptr, row_scale_ptr, groups_ptr, pairs_ptr,
    codes_ptr, costs_ptr, seconds_ptr, counts_ptr, listed_ptr, found_ptr, least_gap, K, end_d,
    D: tl.constexpr, GROUP: tl.constexpr, IS_SMALL: tl.constexpr, BLOCK_N: tl.constexpr,
    CLASSES: tl.constexpr, PAIRS: tl.constexpr, PAIR_D: tl.constexpr, AHEAD: tl.constexpr,
    HARD_N: tl.constexpr, GROUPS_64: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N] int32, the nearest codes of the rows in doubt.

    ``is_known`` [BLOCK_N]: all codes that may be the nearest are in the kept groups that
    ``is_rival`` tells, as ``groups`` [BLOCK_N, CLASSES]. ``rows_ptr`` has the rows, and the other
    pointers are scratch.
    """
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_class = offs_n[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
    known = doubt * is_known.to(tl.int32)
    unknown = doubt - known
    num_unknown = tl.sum(unknown, 0)
    # pairs of a row and a group
    is_pair = (is_rival & (known > 0)[:, None]).to(tl.int32)
    of_row = tl.sum(is_pair, 1)
    num_pairs = tl.sum(of_row, 0)
    # all have read what the screen left there
    tl.debug_barrier()
    tl.store(groups_ptr + offs_class, groups)
    place = (tl.cumsum(of_row, 0) - of_row)[:, None] + (tl.cumsum(is_pair, 1) - is_pair)
    tl.store(pairs_ptr + place.to(tl.int64), offs_class.to(tl.int32), mask=is_pair > 0)
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
            least, member, others = two_least(cost)
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
            offs_tied = offs_n[:, None] * CLASSES + (tl.cumsum(tied, 1) - tied)
            tl.store(pairs_ptr + offs_tied, groups, mask=tied > 0)
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
