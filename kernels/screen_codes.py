"""Screen: per row the best group of codes, its score and the runner-up's, from fp16 tensor cores.

The names follow vqtriton/planes.py, which prepares the codes. A group is ``GROUP`` codes that
follow one another in the codebook; its score is that of its best member. docs/exactness.md bounds
the error, for at most 4094 dimensions.

Scores that matter are positive, so the kernel compares their bits as int32: max and min of three
integers are one instruction on sm_90 and later and on AMD, NaN beats everything, and the bits of
a group's position within the tile can stand in the lowest bits of its score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.grids import cdiv
from vqtriton.kernels.row_planes import (
    plane_constants,
    register_limit,
    row_error,
    row_planes,
    strides_of,
    tile_scores,
)


@dataclass(frozen=True)
class ScreenCodesConfig:
    """Tiles of the screen. The defaults are those for D <= 64."""

    block_n: int = 128
    block_k: int = 64
    # the part of the inner dimension that is multiplied at a time
    block_d: int = 64
    # True: the rows stay in shared memory or registers; False: they are read again for each tile
    hold_rows: bool = True
    num_warps: int = 4
    num_stages: int = 3
    # NVIDIA only
    max_registers: int | None = None
    merge_block_n: int = 128


# threads that share a row of an accumulator, and columns that follow one another in a thread
ACCUMULATOR_ORDER = {"sm_80": (8, 2), "sm_90": (4, 2), "sm_100": (1, 2), "gfx942": (2, 4)}
# inner columns up to which the rows are held
HELD_INNER = {"sm_80": 128, "sm_90": 256, "sm_100": 256, "gfx942": 128}


def architecture(device: torch.device) -> str:
    """The key of the tables above that fits ``device``: what its accumulators look like."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm_90"
    # consumer Blackwell, 12, multiplies as Ampere does
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def screen_codes_config(target: str, inner: int, is_aligned: bool = True) -> ScreenCodesConfig:
    """Tiles that neither spill nor overflow shared memory; sm_80's fit 99 KiB, for sm_86 and up.

    Args:
        target: a key of `ACCUMULATOR_ORDER`.
        inner: columns of the planes.
        is_aligned: the rows can be loaded 16 bytes at a time; else each element has an address
            of its own, and those of wide rows do not fit into the registers.
    """
    if inner > 64 and not is_aligned:
        # narrow, so that the addresses fit; sm_100 spills with 16
        block_d = 32 if target == "sm_100" else 16
        return ScreenCodesConfig(block_d=block_d, hold_rows=False, num_warps=8, num_stages=2)
    if inner > HELD_INNER[target]:
        # wide tiles: the rows are converted again for each of them
        is_small = target == "sm_80"
        return ScreenCodesConfig(
            block_k=128 if is_small else 256,
            block_d=32 if is_small else 64,
            hold_rows=False,
            num_warps=8,
            num_stages=3 if target in ("sm_90", "sm_100") else 2,
        )
    if inner > 64 or (inner > 32 and not is_aligned):
        # half as many elements a thread
        return ScreenCodesConfig(block_k=128, num_warps=8, num_stages=2)
    # without a limit ptxas spills a little to reach the next step of occupancy
    return ScreenCodesConfig(max_registers=None if is_aligned else 255)


def rows_are_aligned(x: Tensor) -> bool:
    """As Triton sees it: a stride of one is known, of others whether 16 divides them."""
    strides_are_aligned = all(n % 16 == 0 for n in (*strides_of(x)[:-1], x.data_ptr()))
    return x.stride(-1) == 1 and strides_are_aligned


def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(programs: int, tiles: int, processors: int) -> int:
    """Parts of the codes, so that each processor gets two programs if the rows do not suffice."""
    # a part of fewer than four tiles is mostly prologue
    return max(1, min(2 * processors // programs, tiles // 4))


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


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K", "codes_per_split"])
def screen_codes_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codes_ptr,          # [H, K, INNER] fp16, in the order of the columns
    offset_ptr,         # [H, K] fp32, (‖e_k‖² − E²)/2, in the order of the columns
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    norms_ptr,          # [H, 4] fp32: the largest norm of a code, of its low part, of its residual
    groups_ptr,         # [splits, H, N] int32, out
    best_ptr,           # [splits, H, N] fp32, out
    second_ptr,         # [splits, H, N] fp32, out
    error_ptr,          # [H, N] fp32, out
    row_scale_ptr,      # [H, N] fp32, out
    bound_products, bound_bias, bound_distances, bound_tiny,
    N, K, codes_per_split, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, HOLD_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    LOG_NUM: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    head = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    # rows beyond the last are the last again, so that loads need no mask
    x_rows_ptr = x_ptr + head * stride_xh + tl.minimum(offs_n, N - 1) * stride_xn
    mean_ptr += head * D
    scale = tl.load(scale_ptr + head)

    planes, row_scale, ratio, high, low, rest = row_planes(
        x_rows_ptr, mean_ptr, scale, stride_xd,
        D, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL,
    )  # fmt: skip

    # before the loop: its registers are needed there
    if split == 0:
        error = row_error(
            high, low, rest, ratio, norms_ptr, head,
            bound_products, bound_bias, bound_distances, bound_tiny,
        )  # fmt: skip
        tl.store(error_ptr + head * N + offs_n, error, mask=row_mask)
        tl.store(row_scale_ptr + head * N + offs_n, row_scale, mask=row_mask)

    # groups per lane of a tile
    NUM: tl.constexpr = BLOCK_K // (GROUP * LANES)
    # the first of equal scores is the largest
    position = NUM - 1 - tl.arange(0, NUM)
    best = tl.full((BLOCK_N, LANES), -2147483648, tl.int32)
    second = tl.full((BLOCK_N, LANES), -2147483648, tl.int32)
    tile = tl.zeros((BLOCK_N, LANES), tl.int32)
    first = tl.program_id(1) * codes_per_split
    last = tl.minimum(first + codes_per_split, K)
    # what the compiler cannot see: K is padded to whole tiles
    head_k = tl.multiple_of(head * K, BLOCK_K)
    codes_ptr += head_k * INNER
    offset_ptr += head_k
    for start in range(first, last, BLOCK_K):
        # of the whole tile: else the loads do not know that they are aligned
        start_k = tl.multiple_of(tl.cast(start, tl.int64), BLOCK_K)
        scores = tile_scores(
            planes, x_rows_ptr, mean_ptr, row_scale, ratio, codes_ptr, offset_ptr, start_k,
            stride_xd, D, INNER, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_K, BLOCK_D, TAIL,
        )  # fmt: skip

        # the columns are ordered so that a thread holds whole groups on the targets it was chosen
        # for; on others the same reductions move data between threads
        bits = scores.to(tl.int32, bitcast=True)
        bits = tl.reshape(bits, (BLOCK_N, NUM, GROUP // VEC, LANES, VEC))
        # one chain of maxima per group, which compilers turn into maxima of three
        bits = tl.reshape(tl.permute(bits, (0, 1, 3, 2, 4)), (BLOCK_N, NUM, LANES, GROUP))
        group_bits = tl.max(bits, 3)
        group_bits = (group_bits & (0 - NUM)) | position[None, :, None]
        tile_best, tile_second = _two_best(group_bits, BLOCK_N, NUM, LOG_NUM, LANES)
        tile = tl.where(tile_best > best, start, tile)
        second = tl.maximum(tl.maximum(second, tile_second), tl.minimum(best, tile_best))
        best = tl.maximum(best, tile_best)

    lanes = tl.arange(0, LANES)[None, :]
    row_best, lane = tl.max(best, 1, return_indices=True)
    is_best = lanes == lane[:, None]
    row_second = tl.max(tl.where(is_best, second, best), 1)
    row_tile = tl.sum(tl.where(is_best, tile, 0), 1)
    group = row_tile // GROUP + (NUM - 1 - (row_best & (NUM - 1))) * LANES + lane
    # negative scores are not in order: whatever they are, zero is above them
    row_second = tl.maximum(row_second & (0 - NUM), 0)
    row_best = row_best & (0 - NUM)
    offs_out = (split * tl.num_programs(2) + head) * N + offs_n
    tl.store(groups_ptr + offs_out, group, mask=row_mask)
    tl.store(best_ptr + offs_out, row_best.to(tl.float32, bitcast=True), mask=row_mask)
    tl.store(second_ptr + offs_out, row_second.to(tl.float32, bitcast=True), mask=row_mask)


@triton.jit(do_not_specialize=["N", "splits"])
def merge_splits_kernel(
    groups_ptr,         # [splits, N] int32
    best_ptr,           # [splits, N] fp32
    second_ptr,         # [splits, N] fp32
    groups_out_ptr,     # [N] int32, out
    best_out_ptr,       # [N] fp32, out
    second_out_ptr,     # [N] fp32, out
    N, splits,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    group = tl.zeros((BLOCK_N,), tl.int32)
    # integers again: a NaN that has won its split wins the row
    best = tl.full((BLOCK_N,), -2147483648, tl.int32)
    second = tl.full((BLOCK_N,), -2147483648, tl.int32)
    for split in range(splits):
        offs = tl.cast(split, tl.int64) * N + offs_n
        split_group = tl.load(groups_ptr + offs, mask=mask, other=0)
        split_best = tl.load(best_ptr + offs, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        split_second = tl.load(second_ptr + offs, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        group = tl.where(split_best > best, split_group, group)
        second = tl.maximum(tl.maximum(second, split_second), tl.minimum(best, split_best))
        best = tl.maximum(best, split_best)
    second = tl.maximum(second, 0)
    tl.store(groups_out_ptr + offs_n, group, mask=mask)
    tl.store(best_out_ptr + offs_n, best.to(tl.float32, bitcast=True), mask=mask)
    tl.store(second_out_ptr + offs_n, second.to(tl.float32, bitcast=True), mask=mask)


def screen_codes(
    x: Tensor,
    planes: Any,
    bound: Any,
    *,
    splits: int | None = None,
    config: ScreenCodesConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Best group of codes of each row, with what a certificate needs.

    The nearest code of a row is in its group if ``best - second > 2 * error``; such a row is
    certified. Every other row is in doubt.

    Args:
        x: [H, N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        planes: `vqtriton.planes.CodePlanes` of the codebooks [H, K, D].
        bound: `vqtriton.planes.screen_bound` for these planes and ``config.block_k``.
        splits: parts of the codes that are screened apart, for few rows and many codes; chosen
            from the number of rows and processors if it is not given. It changes no result.
        config: tiles.

    Returns:
        groups [H, N] int32 (codes ``group * planes.group`` and up), best, second, error and
        row_scale [H, N] float32; error is +inf for a row that is not finite or overflows, scores
        are in units of ``scale * row_scale``.
    """
    heads, num_rows, _ = x.shape
    size, inner = planes.codes.shape[1:]
    config = config or screen_codes_config(architecture(x.device), inner, rows_are_aligned(x))
    tiles = cdiv(size, config.block_k)
    if splits is None:
        programs = heads * cdiv(num_rows, config.block_n)
        splits = choose_splits(programs, tiles, num_processors(x.device))
    if max(heads, splits) > 65535:
        raise ValueError(f"{heads} heads, {splits} splits; a grid takes no more than 65535")
    chunk = planes.group * planes.lanes
    if config.block_k % chunk or size % config.block_k:
        raise ValueError(
            f"block_k is {config.block_k}; it must be a multiple of group * lanes = {chunk} and "
            f"divide the padded number of codes, {size}"
        )
    num = config.block_k // chunk
    tiles_per_split = cdiv(tiles, min(splits, tiles))
    splits = cdiv(tiles, tiles_per_split)

    shape = (splits, heads, num_rows)
    groups = torch.empty(shape, dtype=torch.int32, device=x.device)
    best = torch.empty(shape, dtype=torch.float32, device=x.device)
    second = torch.empty(shape, dtype=torch.float32, device=x.device)
    error = torch.empty(shape[1:], dtype=torch.float32, device=x.device)
    row_scale = torch.empty_like(error)
    with torch.cuda.device_of(x):
        # rows first: programs that run together read the same codes
        screen_codes_kernel[(cdiv(num_rows, config.block_n), splits, heads)](
            x,
            planes.codes,
            planes.offset,
            planes.mean,
            planes.scale,
            planes.norms,
            groups,
            best,
            second,
            error,
            row_scale,
            *bound,
            num_rows,
            size,
            tiles_per_split * config.block_k,
            *strides_of(x),
            **plane_constants(planes, config.block_d, config.hold_rows),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            LOG_NUM=num.bit_length() - 1,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # harmless: the scale is a power of two, so that y is exact before it is rounded
            enable_fp_fusion=True,
            **register_limit(config.max_registers),
        )
        if splits == 1:
            return groups[0], best[0], second[0], error, row_scale
        merged = [torch.empty_like(t[0]) for t in (groups, best, second)]
        merge_splits_kernel[(cdiv(heads * num_rows, config.merge_block_n),)](
            groups,
            best,
            second,
            *merged,
            heads * num_rows,
            splits,
            BLOCK_N=config.merge_block_n,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return merged[0], merged[1], merged[2], error, row_scale
