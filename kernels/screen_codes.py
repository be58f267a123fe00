"""Screen: per row the best group of codes, its score and the runner-up's, from fp16 tensor cores.

The names follow vqtriton/planes.py, which prepares the codes. A group is ``GROUP`` codes that
follow one another in the codebook; its score is that of its best member. docs/exactness.md bounds
the error, for at most 4094 dimensions.

Scores that matter are positive, so the kernel compares their bits as int32: max and min of three
integers are one instruction on sm_90 and later and on AMD, NaN beats everything, and the bits of
a group's position within the tile can stand in the lowest bits of its score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, ScreenBound
from vqtriton.kernels.finish_rows import Finish, finish_parts_kernel, finish_rows
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import (
    plane_constants,
    register_limit,
    row_error,
    row_planes,
    scale_ratio,
    strides_of,
    tile_scores,
)

# what a kernel that does not finish gets in its place
NO_FINISH = (None,) * 11 + (0.0,) * 4 + (0,) * 5


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
    # elements of a thread in a tile of the finish, [rows, dims]
    finish_elements: int = 8


# threads that share a row of an accumulator, and columns that follow one another in a thread
ACCUMULATOR_ORDER = {"sm_80": (8, 2), "sm_90": (4, 2), "sm_100": (1, 2), "gfx942": (2, 4)}
# a part of the codes has at least so many bytes, unless it has many tiles
LEAST_PART_BYTES = 1 << 20
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


def screen_codes_config(
    target: str, inner: int, is_aligned: bool = True, *, is_few: bool = False
) -> ScreenCodesConfig:
    """Tiles that neither spill nor overflow shared memory; sm_80's fit 99 KiB, for sm_86 and up.

    Args:
        target: a key of `ACCUMULATOR_ORDER`.
        inner: columns of the planes.
        is_aligned: the rows can be loaded 16 bytes at a time; else each element has an address
            of its own, and those of wide rows do not fit into the registers.
        is_few: so few rows that smaller tiles are to fill the processors.
    """
    config = _config_of_many(target, inner, is_aligned)
    if is_few and config.hold_rows and config.block_n == 128:
        # as many elements a thread
        registers = 168 if target == "sm_90" and inner <= 64 and is_aligned else 255
        return replace(config, block_n=64, block_k=128, num_warps=4, max_registers=registers)
    return config


def _config_of_many(target: str, inner: int, is_aligned: bool) -> ScreenCodesConfig:
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
    # room for three CTAs of a multiprocessor; unaligned, ptxas would spill a little for that
    return ScreenCodesConfig(max_registers=168 if is_aligned else 255)


def rows_are_aligned(x: Tensor) -> bool:
    """As Triton sees it: a stride of one is known, of others whether 16 divides them."""
    strides_are_aligned = all(n % 16 == 0 for n in (*strides_of(x)[:-1], x.data_ptr()))
    return x.stride(-1) == 1 and strides_are_aligned


def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(programs: int, tiles: int, tile_bytes: int, processors: int) -> int:
    """Parts of the codes, so that each processor gets two programs if the rows do not suffice.

    Parts cost a launch, so they are worth it only where a program would go through many tiles, or
    through so many bytes of codes that to fetch them takes longer.
    """
    least_tiles = min(64, max(4, LEAST_PART_BYTES // tile_bytes))
    return max(1, min(2 * processors // programs, tiles // least_tiles))


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
@triton.jit(do_not_specialize=["num_codes", "num_spans", "N", "K", "num_norms", "codes_per_split"])
def screen_codes_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codes_ptr,          # [H, K, INNER] fp16, in the order of the columns
    offset_ptr,         # [H, K] fp32, (‖e_k‖² − E²)/2, or −E²/2, in the order of the columns
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    norms_ptr,          # [H, P, 4] fp32: the largest norm of a code, of its low part, of its rest
    groups_ptr,         # [splits, H, N] int32, out unless FINISH, as the next two
    best_ptr,           # [splits, H, N] fp32, out
    second_ptr,         # [splits, H, N] fp32, out
    error_ptr,          # [H, N] fp32, out
    row_scale_ptr,      # [H, N] fp32, out
    norm_ptr,           # [H, N] fp32, out: at least the norm of y
    bound_products, bound_bias, bound_distances, bound_tiny,
    # if FINISH: see `vqtriton.kernels.finish_rows.Finish`
    codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr, thresholds_ptr,
    doubts_ptr, arrivals_ptr, valid_ptr, sums_ptr,
    own_products, own_distances, own_tiny, weight, num_codes, stride_ch, stride_ck, stride_cd,
    num_spans,
    N, K, num_norms, codes_per_split, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    HOLD_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, LOG_NUM: tl.constexpr,
    FINISH: tl.constexpr, EXACT: tl.constexpr, HAS_MASK: tl.constexpr, GATHER: tl.constexpr,
    FINISH_D: tl.constexpr,
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
        D, IS_DOT, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL,
    )  # fmt: skip

    norm = high + low + rest
    error = row_error(
        high, low, rest, ratio, norms_ptr, head, num_norms,
        bound_products, bound_bias, bound_distances, bound_tiny,
    )  # fmt: skip
    # before the loop, and read again behind it: the registers are needed there
    if split == 0:
        tl.store(error_ptr + head * N + offs_n, error, mask=row_mask)
        tl.store(row_scale_ptr + head * N + offs_n, row_scale, mask=row_mask)
        tl.store(norm_ptr + head * N + offs_n, norm, mask=row_mask)
    if FINISH:
        # even the numbers of the rows: what is computed from them would be kept in registers
        offs_tile = (head * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(rows_ptr + offs_tile, offs_n.to(tl.int32))

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
    if FINISH:
        tl.debug_barrier()
        offs_n = tl.load(rows_ptr + offs_tile).to(tl.int64)
        row_mask = offs_n < N
        row = tl.minimum(offs_n, N - 1)
        row_scale = tl.load(row_scale_ptr + head * N + row)
        finish_rows(
            x_ptr + head * stride_xh + row * stride_xn, offs_n, row_mask, group,
            row_second.to(tl.float32, bitcast=True), tl.load(error_ptr + head * N + row),
            tl.load(norm_ptr + head * N + row), row_scale, scale_ratio(row_scale, scale), scale,
            mean_ptr, norms_ptr, head, num_norms,
            codebook_ptr, mask_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr,
            thresholds_ptr, doubts_ptr, arrivals_ptr, valid_ptr, sums_ptr,
            own_products, own_distances, own_tiny, weight, num_codes,
            stride_ch, stride_ck, stride_cd, num_spans, N, stride_xd,
            D, IS_DOT, GROUP, EXACT, HAS_MASK, GATHER, BLOCK_N, FINISH_D,
        )  # fmt: skip
    else:
        row_best = row_best & (0 - NUM)
        offs_out = (split * tl.num_programs(2) + head) * N + offs_n
        tl.store(groups_ptr + offs_out, group, mask=row_mask)
        tl.store(best_ptr + offs_out, row_best.to(tl.float32, bitcast=True), mask=row_mask)
        tl.store(second_ptr + offs_out, row_second.to(tl.float32, bitcast=True), mask=row_mask)


class Screened(NamedTuple):
    """What a screen leaves for the finish: of each part of the codes, and of all.

    The first three are None where the screen itself finishes.
    """

    groups: Tensor | None  # [splits·H·N] int32: codes ``group * planes.group`` and up
    best: Tensor | None  # [splits·H·N] fp32
    second: Tensor | None  # [splits·H·N] fp32
    error: Tensor  # [H·N] fp32, +inf for a row that is not finite or overflows
    row_scale: Tensor  # [H·N] fp32; scores are in units of scale * row_scale
    norm: Tensor  # [H·N] fp32, at least the norm of y


class Parts(NamedTuple):
    """How the codes are divided."""

    splits: int
    codes: int  # codes in each part; the last may have fewer


def parts_of(
    heads: int, num_rows: int, planes: CodePlanes, config: ScreenCodesConfig, splits: int | None
) -> Parts:
    """See `screen_codes`.

    Raises:
        ValueError: the tiles do not fit the planes, or there are too many heads.
    """
    size, inner = planes.codes.shape[1:]
    chunk = planes.group * planes.lanes
    if config.block_k % chunk or size % config.block_k:
        raise ValueError(
            f"block_k is {config.block_k}; it must be a multiple of group * lanes = {chunk} and "
            f"divide the padded number of codes, {size}"
        )
    tiles = size // config.block_k
    if splits is None:
        programs = heads * cdiv(num_rows, config.block_n)
        processors = num_processors(planes.codes.device)
        splits = choose_splits(programs, tiles, 2 * inner * config.block_k, processors)
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
    """Best group of codes of each row, with what a certificate needs.

    The nearest code of a row is in its group if ``best - second > 2 * error``; such a row is
    certified. Every other row is in doubt.

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
    chunk = planes.group * planes.lanes
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
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        LOG_NUM=(config.block_k // chunk).bit_length() - 1,
        FINISH=finish is not None,
        **finish_constants(finish, exact, x.shape[2], config),
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
        BLOCK_N=config.block_n,
        **finish_constants(finish, exact, dim, config),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        # without a limit ptxas spills a little to reach the next step of occupancy
        **register_limit(255),
    )


def finish_constants(
    finish: Finish | None, exact: bool, dim: int, config: ScreenCodesConfig
) -> dict[str, Any]:
    width, threads = next_power_of_2(dim), 32 * config.num_warps
    return {
        "EXACT": exact,
        "HAS_MASK": finish is not None and finish.mask is not None,
        "GATHER": finish is not None and finish.quantized is not None,
        "FINISH_D": min(width, max(1, config.finish_elements * threads // config.block_n)),
    }
