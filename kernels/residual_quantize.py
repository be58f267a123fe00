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

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, OwnBound, ScreenBound
from vqtriton.kernels.constants import WIDE_GROUP
from vqtriton.kernels.finish_rows import (
    cost_gap,
    judge,
    least_of_others,
    nearest_of_group,
    take_codes,
)
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.rescue_rows import PAIR
from vqtriton.kernels.residual_level import ResidualLevelConfig, add_codes, quantize_few
from vqtriton.kernels.row_planes import (
    MOST_NORMS,
    plane_constants,
    register_limit,
    row_error,
    row_planes,
    scale_ratio,
    store_row_planes,
    tile_scores,
)
from vqtriton.kernels.screen_codes import (
    best_group,
    check_tiles,
    classes_of,
    keep_best,
    kept_groups,
)
from vqtriton.kernels.screen_tiles import ScreenCodesConfig, architecture
from vqtriton.kernels.settle_rows import settle_rows

# codes in a group of the planes that it takes fewest instructions with: the finish reads a group of
# codes for each row of each level
GROUP = WIDE_GROUP
# scratch of a row: numbers of fp32 and of int32, besides those of its kept groups
FLOATS, INTS = 3, 3
_FLOATS, _INTS = tl.constexpr(FLOATS), tl.constexpr(INTS)
# levels that are looked at together
TOGETHER = tl.constexpr(16)


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K", "padded_K", "num_norms", "levels"])
def residual_quantize_kernel(
    x_ptr,          # [N, D] fp32 / fp16 / bf16
    depths_ptr,     # [N] int64, if HAS_DEPTHS: how many levels a row has
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
    planes_ptr,     # [N', INNER] fp16, scratch unless HOLD_ROWS
    floats_ptr,     # [T, (2·CLASSES + FLOATS)·BLOCK_N + 4·Q] fp32, scratch
    ints_ptr,       # [T, (4·CLASSES + INTS)·BLOCK_N] int32, scratch
    bound_products, bound_bias, bound_distances, bound_tiny,
    own_products, own_distances, own_tiny,
    N, K, padded_K, num_norms, levels, stride_xn, stride_xd,
    D: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, HOLD_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    LOAD_D: tl.constexpr, CLASSES: tl.constexpr, LOG_MERGED: tl.constexpr, HAS_DEPTHS: tl.constexpr,
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
    if HAS_DEPTHS:
        is_valid = is_valid & (tl.load(depths_ptr + offs_n, mask=row_mask, other=0) > 0)
    # it is D, but the compiler does not know: unrolled, loops need too many registers
    end_d = tl.minimum(K, 1) * D
    residual_size = tl.num_programs(0).to(tl.int64) * BLOCK_N * D
    residual_ptr += first_n * D
    # scratch of the tile
    costs_ptr = floats_ptr + pid * (2 * KEPT + _FLOATS * BLOCK_N + 4 * levels)
    seconds_ptr = costs_ptr + tl.full((), KEPT, tl.int64)
    error_ptr = costs_ptr + tl.full((), 2 * KEPT, tl.int64)
    row_scale_ptr = error_ptr + tl.full((), BLOCK_N, tl.int64)
    norm_ptr = error_ptr + tl.full((), 2 * BLOCK_N, tl.int64)
    maxima_ptr = error_ptr + tl.full((), _FLOATS * BLOCK_N, tl.int64)
    best_ptr = ints_ptr + pid * (4 * KEPT + _INTS * BLOCK_N)
    others_ptr = best_ptr + tl.full((), KEPT, tl.int64)
    tile_ptr = best_ptr + tl.full((), 2 * KEPT, tl.int64)
    groups_ptr = best_ptr + tl.full((), 3 * KEPT, tl.int64)
    counts_ptr = best_ptr + tl.full((), 4 * KEPT, tl.int64)
    listed_ptr = counts_ptr + tl.full((), BLOCK_N, tl.int64)
    found_ptr = counts_ptr + tl.full((), 2 * BLOCK_N, tl.int64)

    # the largest norms of each level
    for start in range(0, levels, TOGETHER):
        offs_level = (start + tl.arange(0, TOGETHER)).to(tl.int64)
        offs_norm = tl.arange(0, MOST_NORMS)[None, :]
        is_norm = (offs_level < levels)[:, None] & (offs_norm < num_norms)
        for which in tl.static_range(4):
            norms_ptrs = norms_ptr + ((offs_level[:, None] * num_norms + offs_norm) * 4 + which)
            largest = tl.max(tl.load(norms_ptrs, mask=is_norm, other=0.0), 1)
            tl.store(maxima_ptr + (offs_level * 4 + which), largest, mask=offs_level < levels)
    # rows that do not count are zeros
    for start_d in range(0, end_d, COPY_D):
        offs_d = (start_d + tl.arange(0, COPY_D)).to(tl.int64)[None, :]
        is_element = is_valid[:, None] & (offs_d < D)
        x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d * stride_xd
        x = tl.load(x_ptrs, mask=is_element, other=0.0).to(tl.float32)
        # an infinite x is as wrong as a NaN, and its error shall say so
        x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
        is_dim = tl.broadcast_to(offs_d < D, x.shape)
        tl.store(residual_ptr + (rows[:, None] * D + offs_d), x, mask=is_dim)
    tl.debug_barrier()

    for i in range(0, levels):
        level = tl.cast(i, tl.int64)
        # 0, but the compiler does not know: it would compute all addresses before the loop over the
        # levels, and there are too few registers to keep them
        rows = tl.arange(0, BLOCK_N).to(tl.int64) + level // levels
        offs_kept = rows[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
        is_counted = is_valid
        if HAS_DEPTHS:
            is_counted = tl.load(depths_ptr + offs_n, mask=row_mask, other=0) > level
        x_rows_ptr = residual_ptr + level % 2 * residual_size + rows * D
        left_rows_ptr = residual_ptr + (level + 1) % 2 * residual_size + rows * D
        mean_level_ptr = mean_ptr + level * D
        scale = tl.load(scale_ptr + level)
        planes = ()
        screened_rows_ptr = x_rows_ptr
        if HOLD_ROWS:
            planes, row_scale, ratio, high, low, rest = row_planes(
                x_rows_ptr, mean_level_ptr, scale, 1,
                D, False, INNER, SPLIT, BIAS_COLUMNS, True, BLOCK_N, BLOCK_D, TAIL, LOAD_D,
            )  # fmt: skip
        else:
            screened_rows_ptr = planes_ptr + (first_n + rows) * INNER
            row_scale, ratio, high, low, rest = store_row_planes(
                x_rows_ptr, screened_rows_ptr, mean_level_ptr, scale, 1,
                D, INNER, BIAS_COLUMNS, BLOCK_N, BLOCK_D, LOAD_D,
            )  # fmt: skip
            tl.debug_barrier()
        error = row_error(
            high, low, rest, ratio, maxima_ptr, level, None,
            bound_products, bound_bias, bound_distances, bound_tiny,
        )  # fmt: skip
        tl.store(error_ptr + rows, error)
        tl.store(row_scale_ptr + rows, row_scale)
        tl.store(norm_ptr + rows, high + low + rest)
        best = tl.full((BLOCK_N, CLASSES), -2147483648, tl.int32)
        # each class keeps its own, so that threads exchange nothing inside the loop
        others = tl.full((BLOCK_N, CLASSES), -2147483648, tl.int32)
        tile = tl.zeros((BLOCK_N, CLASSES), tl.int32)
        # what the compiler cannot see: K is padded to whole tiles
        level_k = tl.multiple_of(level * padded_K, BLOCK_K)
        for start in range(0, padded_K, BLOCK_K):
            # the start of the whole tile, so that the compiler sees aligned loads
            start_k = tl.multiple_of(tl.cast(start, tl.int64), BLOCK_K)
            scores = tile_scores(
                planes, screened_rows_ptr, None, row_scale, ratio, codes_ptr + level_k * INNER,
                offset_ptr + level_k, start_k, 1,
                D, INNER, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_K, BLOCK_D, TAIL,
            )  # fmt: skip
            best, others, tile = keep_best(
                scores, start, best, others, tile, BLOCK_N, BLOCK_K, GROUP, LANES, VEC, CLASSES,
                MERGED, LOG_MERGED,
            )  # fmt: skip
        # from here on few threads share a row
        tl.store(best_ptr + offs_kept, best)
        tl.store(others_ptr + offs_kept, others)
        tl.store(tile_ptr + offs_kept, tile)
        tl.debug_barrier()
        groups, best, others = kept_groups(
            tl.load(best_ptr + offs_kept), tl.load(others_ptr + offs_kept),
            tl.load(tile_ptr + offs_kept), GROUP, LANES, CLASSES, MERGED,
        )  # fmt: skip
        chosen, second = best_group(groups, best, others)

        level_codebook_ptr = codebook_ptr + level * K * D
        row_scale = tl.load(row_scale_ptr + rows)
        ratio = scale_ratio(row_scale, scale)
        # whole groups, also where the last is not: codes of another one do no harm
        first = tl.maximum(tl.minimum(chosen * GROUP, K - GROUP), 0)
        index, is_bad, cost, least, member = nearest_of_group(
            x_rows_ptr, level_codebook_ptr, first, row_scale, scale, K, end_d, 1,
            D, False, GROUP, IS_SMALL, FINISH_D, AHEAD, True,
        )  # fmt: skip
        gap = cost_gap(least, least_of_others(cost, member), D, False)
        # rows that have no level leave zeros
        score, sq_error = take_codes(
            x_rows_ptr, level_codebook_ptr + index.to(tl.int64) * D, left_rows_ptr, mean_level_ptr,
            row_scale, scale, 0.5 * ratio, is_counted, rows >= 0, end_d, 1,
            D, False, True, True, True, True, COPY_D,
        )  # fmt: skip
        # a bad row is certain
        score = tl.where(tl.abs(score) < float("inf"), score, float("-inf"))
        doubt, threshold = judge(
            second, tl.where(is_bad, float("inf"), score),
            tl.where(is_bad, float("inf"), gap), tl.load(error_ptr + rows),
            tl.load(norm_ptr + rows), ratio, is_counted, scale, maxima_ptr, None,
            own_products, own_distances, own_tiny, K, level, False, GROUP,
        )  # fmt: skip
        if tl.sum(doubt, 0) > 0:
            # written so that a NaN is a rival
            is_rival = (best.to(tl.float32, bitcast=True) < threshold[:, None]) == 0
            found = settle_rows(
                doubt, others.to(tl.float32, bitcast=True) < threshold, is_rival, groups,
                residual_ptr + level % 2 * residual_size, level_codebook_ptr, row_scale_ptr,
                groups_ptr, best_ptr, others_ptr, costs_ptr, seconds_ptr, counts_ptr, listed_ptr,
                found_ptr, own_tiny, K, end_d,
                D, GROUP, IS_SMALL, BLOCK_N, CLASSES, PAIRS, PAIR_D, AHEAD, HARD_N, GROUPS_64,
            )  # fmt: skip
            is_new = (doubt > 0) & (found != index)
            if tl.sum(is_new.to(tl.int32), 0) > 0:
                index = tl.where(is_new, found, index)
                _score, new_error = take_codes(
                    x_rows_ptr, level_codebook_ptr + index.to(tl.int64) * D, left_rows_ptr,
                    None, None, None, None, is_counted, is_new, end_d, 1,
                    D, False, False, True, True, False, COPY_D,
                )  # fmt: skip
                sq_error = tl.where(is_new, new_error, sq_error)
        offs_out = (first_n + rows) * levels + level
        tl.store(
            indices_ptr + offs_out, tl.where(is_counted, index, -1).to(tl.int64), mask=row_mask
        )
        tl.store(errors_ptr + offs_out, sq_error, mask=row_mask)
        tl.debug_barrier()

    add_codes(
        codebook_ptr, indices_ptr, quantized_ptr, offs_n, is_valid, row_mask, K, levels, end_d,
        D, COPY_D,
    )  # fmt: skip


class ResidualQuantized(NamedTuple):
    """What `residual_quantize` returns."""

    quantized: Tensor  # [N, D] in the dtype of x, the sum of the codes
    indices: Tensor  # [N, Q] int64, -1 where a row has no level
    errors: Tensor  # [N, Q] fp32, squared norms of the residuals; 0 where a row has no level


@dataclass(frozen=True)
class ResidualQuantizeConfig:
    """Tiles of both ways."""

    chain: ScreenCodesConfig = field(default_factory=ScreenCodesConfig)
    few: ResidualLevelConfig = field(default_factory=ResidualLevelConfig)


def config_for(x: Tensor, inner: int) -> ResidualQuantizeConfig:
    """The default tiles for x [N, D] and planes of ``inner`` columns."""
    return residual_quantize_config(architecture(x.device), inner)


def residual_quantize_config(target: str, inner: int) -> ResidualQuantizeConfig:
    """Tiles that neither spill nor overflow shared memory; sm_80's fit 99 KiB, for sm_86 and up.

    Args:
        target: a key of `vqtriton.kernels.screen_tiles.ACCUMULATOR_ORDER`.
        inner: columns of the planes.
    """
    chain = ScreenCodesConfig(
        block_n=64, block_k=128, block_d=64, num_warps=8, num_stages=2, max_registers=255
    )
    if inner > (128 if target == "sm_90" else 64) or inner & (inner - 1):
        # rows and codes arrive together
        chain = replace(chain, hold_rows=False, block_d=min(64, inner & -inner), num_stages=3)
    else:
        # one product a tile: of the first of several, Triton would divide the tile in another way
        chain = replace(chain, block_d=inner)
    if target == "sm_90":
        chain = replace(chain, block_k=256, num_stages=3, finish_ahead=2)
    if target == "gfx942":
        # a thread of fewer has more registers
        chain = replace(chain, num_warps=4)
    if target == "sm_80":
        # each class costs registers, and twice as many lanes have classes there
        chain = replace(chain, block_k=128 if inner <= 64 else 64, classes=2)
    return ResidualQuantizeConfig(chain)


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    planes: CodePlanes,
    screen_bound: ScreenBound,
    own_bound: OwnBound,
    *,
    depths: Tensor | None = None,
    config: ResidualQuantizeConfig | None = None,
) -> ResidualQuantized:
    """The nearest code of x, then that of the difference in the next codebook, and so on.

    Args:
        x: [N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        codebooks: [Q, K, D] float32, contiguous. A codebook with fewer codes than others is filled
            up with infinities: a code that is not finite is never chosen.
        planes: of ``codebooks``, for distances, best in groups of `GROUP`.
        screen_bound: `vqtriton.planes.screen_bound` for these planes and ``config.chain.block_k``.
        own_bound: `vqtriton.screening.error_bound` for D in float32.
        depths: [N] int64, how many levels each row has; None: all. Later ones have index -1, no
            code and no error.
        config: tiles.

    Raises:
        ValueError: the tiles do not fit the planes.
    """
    num_rows, dim = x.shape
    levels = codebooks.shape[0]
    config = config or config_for(x, planes.codes.shape[2])
    found = ResidualQuantized(
        torch.empty((num_rows, dim), dtype=x.dtype, device=x.device),
        torch.empty((num_rows, levels), dtype=torch.int64, device=x.device),
        torch.empty((num_rows, levels), dtype=torch.float32, device=x.device),
    )
    depths = None if depths is None else depths.contiguous()
    with torch.cuda.device_of(x):
        if num_rows <= config.few.most_rows:
            quantize_few(x, codebooks, planes, own_bound, depths, found, config.few)
        else:
            _quantize_many(
                x, codebooks, planes, screen_bound, own_bound, depths, found, config.chain
            )
    return found


def _quantize_many(
    x: Tensor,
    codebooks: Tensor,
    planes: CodePlanes,
    screen_bound: ScreenBound,
    own_bound: OwnBound,
    depths: Tensor | None,
    found: ResidualQuantized,
    config: ScreenCodesConfig,
) -> None:
    """All levels in one launch."""
    (num_rows, dim), (levels, size, _) = x.shape, codebooks.shape
    padded_size = planes.codes.shape[1]
    check_tiles(planes, config)
    tiles = cdiv(num_rows, config.block_n)
    num_groups, num_classes = classes_of(planes, config)
    classes = planes.lanes * num_classes
    # float32 values that the threads of a program load at once, 16 bytes each
    elements, width = 4 * 32 * config.num_warps, next_power_of_2(dim)
    pair_d = min(32, width)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    planes_of_rows = None
    if not config.hold_rows:
        planes_of_rows = scratch(tiles * config.block_n, planes.codes.shape[2], dtype=torch.float16)
    constants = plane_constants(planes, config.block_d, config.hold_rows)
    del constants["IS_DOT"]
    # a plane is put together from four parts at most
    constants["LOAD_D"] = max(constants["LOAD_D"], constants["BLOCK_D"] // 4)
    launch(
        residual_quantize_kernel,
        (tiles,),
        x,
        depths,
        codebooks,
        *planes.tensors,
        found.indices,
        found.quantized,
        found.errors,
        scratch(2, tiles * config.block_n, dim),
        planes_of_rows,
        scratch(tiles, (2 * classes + FLOATS) * config.block_n + 4 * levels),
        scratch(tiles, (4 * classes + INTS) * config.block_n, dtype=torch.int32),
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
        HAS_DEPTHS=depths is not None,
        # fewer codes than a group
        IS_SMALL=size < planes.group,
        FINISH_D=min(width, max(1, elements // config.block_n)),
        COPY_D=min(width, max(1, 2 * config.finish_ahead * elements // config.block_n)),
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
