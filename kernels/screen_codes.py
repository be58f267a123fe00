"""Screen: per row the best groups of codes and their scores, from fp16 tensor cores.

The names follow vqtriton/planes.py, which prepares the codes. A group is ``GROUP`` codes that
follow one another in the codebook; its score is that of its best member. Groups are divided into
classes by their place in a tile. The best of each class is kept, and the largest score of all that
are not kept. docs/exactness.md bounds the error, for at most 4094 dimensions.

Scores that matter are positive, so the kernel compares their bits as int32: max and min of three
integers are one instruction on sm_90 and later and on AMD, NaN beats everything, and the bits of
a group's position within the tile can stand in the lowest bits of its score.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, ScreenBound
from vqtriton.kernels.finish_rows import (
    Finish,
    certify,
    finish_parts_kernel,
    finish_rows,
    list_doubts,
)
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import (
    plane_constants,
    register_limit,
    row_error,
    row_planes,
    strides_of,
    tile_scores,
)
from vqtriton.kernels.screen_tiles import (
    ScreenCodesConfig,
    choose_splits,
    num_processors,
    row_unit,
)

# what a kernel that does not finish gets in its place
NO_FINISH = (None,) * 17 + (0.0,) * 4 + (0,) * 2
# one row in this many of a tile can have its rivals listed
LISTED_SHARE = 4
# dimensions of a tile of the finish: a sector of 32 bytes, where they are float32
FINISH_D = 8


@triton.jit
def _halves(a, ROWS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(a, (ROWS, HALF, 2, LANES)), (0, 1, 3, 2)))


@triton.jit
def _two_best(a, ROWS: tl.constexpr, NUM: tl.constexpr, LOG_NUM: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, NUM, LANES] int32 -> the largest and the second largest along NUM, [ROWS, LANES]."""
    best = a
    second = tl.full((ROWS, NUM, LANES), -2147483648, tl.int32)
    # halves of what is left; a thread holds both, so nothing moves
    for level in tl.static_range(LOG_NUM):
        p, q = _halves(best, ROWS, NUM >> (level + 1), LANES)
        r, s = _halves(second, ROWS, NUM >> (level + 1), LANES)
        best = tl.maximum(p, q)
        second = tl.maximum(tl.maximum(r, s), tl.minimum(p, q))
    return tl.reshape(best, (ROWS, LANES)), tl.reshape(second, (ROWS, LANES))


@triton.jit
def keep_best(
    scores, start, best, others, tile,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, CLASSES: tl.constexpr, MERGED: tl.constexpr, LOG_MERGED: tl.constexpr,
):  # fmt: skip
    """best and tile [BLOCK_N, CLASSES], others [BLOCK_N, LANES or CLASSES], after a tile's scores.

    Bits as int32: the best score of each class, with the position of its group in the lowest bits,
    and the largest score of a group that is not kept. ``tile`` is the start of the best's tile.
    """
    # groups that a lane has in a tile
    NUM: tl.constexpr = BLOCK_K // (GROUP * LANES)
    # the first of equal scores is the largest
    position = MERGED - 1 - tl.arange(0, MERGED)
    # the columns are ordered so that a thread holds whole groups on the targets it was chosen
    # for; on others the same reductions move data between threads
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.reshape(bits, (BLOCK_N, NUM, GROUP // VEC, LANES, VEC))
    # one chain of maxima per group, which compilers turn into maxima of three
    bits = tl.reshape(tl.permute(bits, (0, 1, 3, 2, 4)), (BLOCK_N, NUM, LANES, GROUP))
    group_bits = tl.max(bits, 3)
    group_bits = tl.reshape(group_bits, (BLOCK_N, CLASSES // LANES, MERGED, LANES))
    if MERGED > 1:
        group_bits = (group_bits & (0 - MERGED)) | position[None, None, :, None]
    group_bits = tl.permute(group_bits, (0, 2, 1, 3))
    group_bits = tl.reshape(group_bits, (BLOCK_N, MERGED, CLASSES))
    tile_best, tile_second = _two_best(group_bits, BLOCK_N, MERGED, LOG_MERGED, CLASSES)
    tile = tl.where(tile_best > best, start, tile)
    left = tl.maximum(tile_second, tl.minimum(best, tile_best))
    if others.shape[1] < CLASSES:
        left = tl.max(tl.reshape(left, (BLOCK_N, CLASSES // LANES, LANES)), 1)
    others = tl.maximum(others, left)
    best = tl.maximum(best, tile_best)
    return best, others, tile


@triton.jit
def kept_groups(
    best, others, tile,
    GROUP: tl.constexpr, LANES: tl.constexpr, CLASSES: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """After all tiles: groups [BLOCK_N, CLASSES], their scores' bits, and others [BLOCK_N]."""
    classes = tl.arange(0, CLASSES)[None, :]
    within = (classes // LANES) * MERGED + (MERGED - 1 - (best & (MERGED - 1)))
    groups = tile // GROUP + within * LANES + classes % LANES
    best = best & (0 - MERGED)
    # negative scores are not in order: whatever they are, zero is above them
    others = tl.maximum(tl.max(others, 1) & (0 - MERGED), 0)
    return groups, best, others


@triton.jit
def best_group(groups, best, others):
    """The best of the kept groups, [BLOCK_N] int32, and the largest score outside of it, fp32."""
    classes = tl.arange(0, groups.shape[1])[None, :]
    _row_best, winner = tl.max(best, 1, return_indices=True)
    is_winner = classes == winner[:, None]
    second = tl.max(tl.where(is_winner, -2147483648, best), 1)
    second = tl.maximum(others, second).to(tl.float32, bitcast=True)
    return tl.sum(tl.where(is_winner, groups, 0), 1), second


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["num_codes", "num_sums", "N", "K", "num_norms", "codes_per_split"])
def screen_codes_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codes_ptr,          # [H, K, INNER] fp16, in the order of the columns
    offset_ptr,         # [H, K] fp32, (‖e_k‖² − E²)/2, or −E²/2, in the order of the columns
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    norms_ptr,          # [H, P, 4] fp32: the largest norm of a code, of its low part, of its rest
    groups_ptr,         # [H, N, splits, CLASSES] int32, out unless FINISH, as the next two
    scores_ptr,         # [H, N, splits, CLASSES] fp32, out
    others_ptr,         # [splits, H, N] fp32, out: the largest score of a group that is not kept
    error_ptr,          # [H, N] fp32, out
    row_scale_ptr,      # [H, N] fp32, out
    norm_ptr,           # [H, N] fp32, out: at least the norm of y
    bound_products, bound_bias, bound_distances, bound_tiny,
    # if FINISH: see `vqtriton.kernels.finish_rows.Finish`
    codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, chosen_ptr, best_ptr, gaps_ptr,
    rows_ptr, thresholds_ptr, rivals_ptr, rival_counts_ptr, known_ptr, unknown_ptr, arrivals_ptr,
    valid_ptr, sums_ptr,
    own_products, own_distances, own_tiny, weight, num_codes, num_sums,
    N, K, num_norms, codes_per_split, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    HOLD_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, LOAD_D: tl.constexpr, CLASSES: tl.constexpr, LOG_MERGED: tl.constexpr,
    FINISH: tl.constexpr, EXACT: tl.constexpr, HAS_MASK: tl.constexpr, GATHER: tl.constexpr,
    IS_SMALL: tl.constexpr, LISTED: tl.constexpr, FINISH_N: tl.constexpr,
    FINISH_D: tl.constexpr, AHEAD: tl.constexpr, X_UNIT: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    head = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    # tells the compiler that strides are multiples of X_UNIT; by itself it finds out only for 16
    stride_xh = stride_xh // X_UNIT * X_UNIT
    stride_xn = stride_xn // X_UNIT * X_UNIT
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    # rows beyond the last are the last again, so that loads need no mask; int32 up to here, as a
    # multiplication of int64 takes several instructions
    last_n = tl.minimum(N - 1 - first_n, BLOCK_N - 1).to(tl.int32)
    row = tl.minimum(offs_n, last_n).to(tl.int64)
    x_rows_ptr = x_ptr + head * stride_xh + first_n * stride_xn + row * stride_xn
    row_mask = offs_n <= last_n
    offs_n = first_n + offs_n
    mean_ptr += head * D
    scale = tl.load(scale_ptr + head)

    planes, row_scale, ratio, high, low, rest = row_planes(
        x_rows_ptr, mean_ptr, scale, stride_xd,
        D, IS_DOT, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL, LOAD_D,
    )  # fmt: skip

    norm = high + low + rest
    error = row_error(
        high, low, rest, ratio, norms_ptr, head, num_norms,
        bound_products, bound_bias, bound_distances, bound_tiny,
    )  # fmt: skip
    # stored before the loop and loaded again after it, to free registers inside of it
    if split == 0:
        tl.store(error_ptr + head * N + offs_n, error, mask=row_mask)
        tl.store(row_scale_ptr + head * N + offs_n, row_scale, mask=row_mask)
        tl.store(norm_ptr + head * N + offs_n, norm, mask=row_mask)

    # groups of a lane in a tile that share a class
    MERGED: tl.constexpr = BLOCK_K // (GROUP * CLASSES)
    best = tl.full((BLOCK_N, CLASSES), -2147483648, tl.int32)
    others = tl.full((BLOCK_N, LANES), -2147483648, tl.int32)
    tile = tl.zeros((BLOCK_N, CLASSES), tl.int32)
    first = tl.program_id(1) * codes_per_split
    last = tl.minimum(first + codes_per_split, K)
    # what the compiler cannot see: K is padded to whole tiles
    head_k = tl.multiple_of(head * K, BLOCK_K)
    codes_ptr += head_k * INNER
    offset_ptr += head_k
    for start in range(first, last, BLOCK_K):
        # the start of the whole tile, so that the compiler sees aligned loads
        start_k = tl.multiple_of(tl.cast(start, tl.int64), BLOCK_K)
        scores = tile_scores(
            planes, x_rows_ptr, mean_ptr, row_scale, ratio, codes_ptr, offset_ptr, start_k,
            stride_xd, D, INNER, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_K, BLOCK_D, TAIL,
        )  # fmt: skip

        best, others, tile = keep_best(
            scores, start, best, others, tile, BLOCK_N, BLOCK_K, GROUP, LANES, VEC, CLASSES,
            MERGED, LOG_MERGED,
        )  # fmt: skip

    groups, best, others = kept_groups(best, others, tile, GROUP, LANES, CLASSES, MERGED)
    if FINISH:
        group, second = best_group(groups, best, others)
        finish_rows(
            x_ptr + head * stride_xh, group, mean_ptr, scale, row_scale_ptr,
            codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, chosen_ptr, best_ptr,
            gaps_ptr, rows_ptr, weight, num_codes, head, N, stride_xn, stride_xd,
            D, IS_DOT, GROUP, EXACT, HAS_MASK, GATHER, BLOCK_N, IS_SMALL, FINISH_N, FINISH_D,
            AHEAD,
        )  # fmt: skip
        doubt, threshold = certify(
            second, scale, norms_ptr, num_norms, error_ptr, row_scale_ptr, norm_ptr,
            mask_ptr, losses_ptr, best_ptr, gaps_ptr, rows_ptr, valid_ptr, sums_ptr,
            own_products, own_distances, own_tiny, num_codes, num_sums, head, N,
            IS_DOT, GROUP, EXACT, HAS_MASK, GATHER, BLOCK_N,
        )  # fmt: skip
        if EXACT:
            # written so that a NaN is a rival
            is_rival = (best.to(tl.float32, bitcast=True) < threshold[:, None]) == 0
            is_rival = (is_rival & (doubt > 0)[:, None]).to(tl.int32)
            place = list_doubts(
                doubt, others.to(tl.float32, bitcast=True) < threshold, threshold,
                tl.sum(is_rival, 1), rows_ptr, thresholds_ptr, rival_counts_ptr, known_ptr,
                unknown_ptr, arrivals_ptr, head, BLOCK_N, LISTED,
            )  # fmt: skip
            rank = tl.cumsum(is_rival, 1) - is_rival
            tl.store(
                rivals_ptr + (place[:, None] * CLASSES + rank),
                groups,
                mask=(is_rival > 0) & (place >= 0)[:, None],
            )
    else:
        offs_out = (split * tl.num_programs(2) + head) * N + offs_n
        offs_class = (head * N + offs_n) * tl.num_programs(1) + split
        offs_class = offs_class[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
        tl.store(groups_ptr + offs_class, groups, mask=row_mask[:, None])
        tl.store(scores_ptr + offs_class, best.to(tl.float32, bitcast=True), mask=row_mask[:, None])
        tl.store(others_ptr + offs_out, others.to(tl.float32, bitcast=True), mask=row_mask)


class Screened(NamedTuple):
    """What a screen leaves for the finish: of each part of the codes, and of all.

    The first three are None where the screen itself finishes.
    """

    groups: Tensor | None  # [H·N·splits·CLASSES] int32: codes ``group * planes.group`` and up
    scores: Tensor | None  # [H·N·splits·CLASSES] fp32
    others: Tensor | None  # [splits·H·N] fp32: the largest score of a group that is not kept
    error: Tensor  # [H·N] fp32, +inf for a row that is not finite or overflows
    row_scale: Tensor  # [H·N] fp32; scores are in units of scale * row_scale
    norm: Tensor  # [H·N] fp32, at least the norm of y


class Parts(NamedTuple):
    """How the codes are divided."""

    splits: int
    codes: int  # codes in each part; the last may have fewer


def check_tiles(planes: CodePlanes, config: ScreenCodesConfig) -> None:
    """
    Raises:
        ValueError: the tiles do not fit the planes.
    """
    size, chunk = planes.codes.shape[1], planes.group * planes.lanes
    if config.block_k % chunk or size % config.block_k:
        raise ValueError(
            f"block_k is {config.block_k}; it must be a multiple of group * lanes = {chunk} and "
            f"divide the padded number of codes, {size}"
        )


def parts_of(
    heads: int, num_rows: int, planes: CodePlanes, config: ScreenCodesConfig, splits: int | None
) -> Parts:
    """See `screen_codes`.

    Raises:
        ValueError: the tiles do not fit the planes, or there are too many heads.
    """
    size, inner = planes.codes.shape[1:]
    check_tiles(planes, config)
    tiles = size // config.block_k
    if splits is None:
        programs = heads * cdiv(num_rows, config.block_n)
        processors = num_processors(planes.codes.device)
        splits = choose_splits(programs, tiles, 2 * inner * config.block_k, processors, inner)
    if max(heads, splits) > 65535:
        raise ValueError(f"{heads} heads, {splits} splits; a grid takes no more than 65535")
    tiles_per_split = cdiv(tiles, min(splits, tiles))
    return Parts(cdiv(tiles, tiles_per_split), tiles_per_split * config.block_k)


def screen_codes(
    x: Tensor,
    planes: CodePlanes,
    bound: ScreenBound,
    screened: Screened,
    parts: Parts,
    config: ScreenCodesConfig,
    finish: Finish | None = None,
    *,
    exact: bool = True,
) -> None:
    """The best group of each class and its score, and the largest score of all others.

    The nearest code of a row is in the best of all groups if its score exceeds all others by more
    than ``2 * error``.

    Args:
        x: [H, N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        planes: of the codebooks [H, K, D].
        bound: of `vqtriton.planes.screen_bound` for these planes and ``config.block_k``.
        screened: where to write that.
        parts: of `parts_of`: the codes are screened in parts where rows are few and codes many.
            That changes no result.
        config: tiles.
        finish: what to finish with, in the same launch; the codes must be in one part.
        exact: see `vqtriton.kernels.nearest_code.nearest_code`.
    """
    heads, num_rows, _ = x.shape
    groups, classes = classes_of(planes, config)
    launch(
        screen_codes_kernel,
        # rows first: programs that run together read the same codes
        (cdiv(num_rows, config.block_n), parts.splits, heads),
        x,
        *planes.tensors,
        *screened,
        *bound,
        *(NO_FINISH if finish is None else finish),
        num_rows,
        planes.codes.shape[1],
        planes.norms.shape[1],
        parts.codes,
        *strides_of(x),
        **plane_constants(planes, config.block_d, config.hold_rows),
        BLOCK_K=config.block_k,
        LOG_MERGED=(groups // classes).bit_length() - 1,
        FINISH=finish is not None,
        **finish_constants(finish, exact, planes, config),
        X_UNIT=max(1, row_unit(x)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # harmless: the scale is a power of two, so that y is exact before it is rounded
        enable_fp_fusion=True,
        **register_limit(config.max_registers),
    )


def finish_parts(
    x: Tensor,
    planes: CodePlanes,
    screened: Screened,
    parts: Parts,
    config: ScreenCodesConfig,
    finish: Finish,
    *,
    exact: bool,
) -> None:
    """`screen_codes`'s finish, in a launch of its own, after parts."""
    heads, num_rows, dim = x.shape
    launch(
        finish_parts_kernel,
        (cdiv(num_rows, config.block_n), heads),
        x,
        planes.mean,
        planes.scale,
        planes.norms,
        *screened,
        *finish,
        num_rows,
        planes.norms.shape[1],
        parts.splits,
        *strides_of(x),
        D=dim,
        IS_DOT=planes.is_dot,
        GROUP=planes.group,
        **finish_constants(finish, exact, planes, config),
        X_UNIT=max(1, row_unit(x)),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        # without a limit ptxas spills a little to reach the next step of occupancy
        **register_limit(255),
    )


def classes_of(planes: CodePlanes, config: ScreenCodesConfig) -> tuple[int, int]:
    """Groups of a lane in a tile, and classes that they are divided into."""
    groups = config.block_k // (planes.group * planes.lanes)
    return groups, min(groups, config.classes)


def num_listed(config: ScreenCodesConfig) -> int:
    """Rows of a tile whose rivals can be listed."""
    return max(1, config.block_n // LISTED_SHARE)


def finish_constants(
    finish: Finish | None, exact: bool, planes: CodePlanes, config: ScreenCodesConfig
) -> dict[str, Any]:
    block_d = min(FINISH_D, next_power_of_2(planes.mean.shape[1]))
    # loads of 16 bytes
    elements = 16 // finish.codebook.element_size() if finish is not None else 4
    return {
        "CLASSES": planes.lanes * classes_of(planes, config)[1],
        "EXACT": exact,
        "HAS_MASK": finish is not None and finish.mask is not None,
        "GATHER": finish is not None and finish.quantized is not None,
        "BLOCK_N": config.block_n,
        # fewer codes than a group
        "IS_SMALL": finish is not None and finish.num_codes < planes.group,
        "LISTED": num_listed(config),
        "FINISH_N": min(config.block_n, elements * 32 * config.num_warps // block_d),
        "FINISH_D": block_d,
        "AHEAD": config.finish_ahead,
    }
