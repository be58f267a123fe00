"""Rows as fp16 planes, and their scores against a tile of codes: shared by screen and rescue.

The names follow vqtriton/planes.py, which prepares the codes. Here y = row_scale·(x − mean), where
the scale of a row is that of the codes, or as much less as it takes to stay within fp16. Scores are
scaled likewise: y·e_k + ratio·(E² − ‖e_k‖²)/2, ratio = row_scale / scale. For dot products
the scale of a row is the one that makes no score negative: y·e_k + E²/2, and the ratio is 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels import constants
from vqtriton.kernels.code_planes import CodePlanes

MIN_NORMAL = tl.constexpr(constants.MIN_NORMAL)
BIAS_WEIGHTS = tl.constexpr(constants.BIAS_WEIGHTS)
SLACK = tl.constexpr(constants.SLACK)
MOST_NORMS = tl.constexpr(constants.MOST_NORMS)


@triton.jit
def _to_plane(y):
    """fp16 with subnormals as zeros, so that it does not matter whether hardware flushes them."""
    return tl.where(tl.abs(y) < MIN_NORMAL, 0.0, y).to(tl.float16)


@triton.jit
def _bias_weights(column, ratio):
    """BIAS_WEIGHTS for the columns of a bias, zeros behind them.

    column [C], ratio [R] -> [R, C] fp16.
    """
    weights = tl.where(column == 0, BIAS_WEIGHTS[0], 0.0)
    weights = tl.where(column == 1, BIAS_WEIGHTS[1], weights)
    weights = tl.where(column == 2, BIAS_WEIGHTS[2], weights)
    return _to_plane(weights[None, :] * ratio[:, None])


@triton.jit
def _load_rows(
    x_rows_ptr, mean_ptr, row_scale, start_d, stride_xd, D: tl.constexpr, DIMS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """y, [BLOCK_N, DIMS] fp32, from dimension ``start_d`` on."""
    offs_d = (start_d + tl.arange(0, DIMS)).to(tl.int64)
    x_ptrs = x_rows_ptr[:, None] + offs_d[None, :] * stride_xd
    if EVEN:
        x = tl.load(x_ptrs)
        mean = tl.load(mean_ptr + offs_d)
    else:
        x = tl.load(x_ptrs, mask=(offs_d < D)[None, :], other=0.0)
        mean = tl.load(mean_ptr + offs_d, mask=offs_d < D, other=0.0)
    return (x.to(tl.float32) - mean[None, :]) * row_scale[:, None]


@triton.jit
def scale_ratio(row_scale, scale):
    """row_scale / scale, powers of two, without the rounding of a fast division; or 0."""
    exponent = row_scale.to(tl.int32, bitcast=True) >> 23
    exponent -= tl.cast(scale, tl.int32, bitcast=True) >> 23
    return (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def choose_scale(
    x_rows_ptr, mean_ptr, scale, stride_xd, D: tl.constexpr, IS_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """row_scale and ratio, [BLOCK_N] fp32, powers of two: |y| < 2¹⁵; if IS_DOT, ‖y‖ ≤ 2⁸ ≤ E/2."""
    ones = tl.full((BLOCK_N,), 1.0, tl.float32)
    largest = tl.zeros((BLOCK_N, DIMS), tl.int32)
    for start_d in range(0, D, DIMS):
        y = _load_rows(x_rows_ptr, mean_ptr, ones, start_d, stride_xd, D, DIMS, D % DIMS == 0)
        # as integers NaN is the largest
        largest = tl.maximum(largest, tl.abs(y).to(tl.int32, bitcast=True))
    largest = tl.max(largest, 1)
    # biased exponents: largest < 2^((largest >> 23) − 126)
    if IS_DOT:
        # at least ‖x‖ / 64; it does not overflow for D ≤ 2¹²
        norm = largest.to(tl.float32, bitcast=True) * (D**0.5 / 64)
        exponent = tl.minimum(255 - (norm.to(tl.int32, bitcast=True) >> 23), 254)
        return (exponent << 23).to(tl.float32, bitcast=True), ones
    exponent = tl.minimum(tl.cast(scale, tl.int32, bitcast=True) >> 23, 268 - (largest >> 23))
    row_scale = (exponent << 23).to(tl.float32, bitcast=True)
    return row_scale, scale_ratio(row_scale, scale)


@triton.jit
def _split_rows(
    x_rows_ptr, mean_ptr, row_scale, ratio, start_d, stride_xd, D: tl.constexpr,
    SPLIT: tl.constexpr, BIAS_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, LOAD_D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Inner columns of the rows' plane, from ``start_d`` on, and three sums of squares.

    At most LOAD_D dimensions are loaded at a time. If they are few, few threads share a row: what
    is computed per row, each of these computes.

    Returns:
        plane [BLOCK_N, WIDTH] fp16; [BLOCK_N] fp32 sums of squares of its high parts, of its low
        parts and of what neither holds.
    """
    DIMS: tl.constexpr = WIDTH // 4 if SPLIT else min(WIDTH, LOAD_D)
    parts = ()
    high_sq = tl.zeros((ratio.shape[0], DIMS), tl.float32)
    low_sq = high_sq
    rest_sq = high_sq
    for i in tl.static_range(1 if SPLIT else WIDTH // DIMS):
        first_d = start_d + i * DIMS
        y = _load_rows(x_rows_ptr, mean_ptr, row_scale, first_d, stride_xd, D, DIMS, EVEN)
        high = _to_plane(y)
        rest = y - high.to(tl.float32)
        high_sq = tl.fma(high.to(tl.float32), high.to(tl.float32), high_sq)
        offs_d = first_d + tl.arange(0, DIMS)
        if SPLIT:
            low = _to_plane(rest)
            rest -= low.to(tl.float32)
            low_sq = tl.fma(low.to(tl.float32), low.to(tl.float32), low_sq)
            # four columns a dimension, so that a thread puts them together without moving data
            weights = _bias_weights(offs_d, ratio).to(tl.float32)
            low, high = low.to(tl.float32), high.to(tl.float32)
            plane = tl.join(tl.join(low, high), tl.join(high, weights))
            # axes: dimension, then which of a pair, then which pair
            plane = tl.reshape(tl.permute(plane, (0, 1, 3, 2)), (y.shape[0], WIDTH))
            # fp16 last: Triton 3.6.0 fails on sm_100 with the reshape next to the dot
            high = plane.to(tl.float16)
        elif BIAS_COLUMNS and not EVEN:
            high = tl.where((offs_d < D)[None, :], high, _bias_weights(offs_d - D, ratio))
        rest_sq = tl.fma(rest, rest, rest_sq)
        # ruff's form of this is not one that Triton takes
        parts = parts + (high,)  # noqa: RUF005
    plane = _side_by_side(parts, ratio.shape[0], WIDTH, len(parts))
    return plane, tl.sum(high_sq, 1), tl.sum(low_sq, 1), tl.sum(rest_sq, 1)


@triton.jit
def _side_by_side(parts, ROWS: tl.constexpr, WIDTH: tl.constexpr, NUM: tl.constexpr):
    """NUM tensors [ROWS, WIDTH / NUM] -> [ROWS, WIDTH]; NUM is 1, 2 or 4."""
    if NUM == 1:
        whole = parts[0]
    elif NUM == 2:
        whole = tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1))
    else:
        whole = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
        whole = tl.permute(whole, (0, 3, 2, 1))
    return tl.reshape(whole, (ROWS, WIDTH))


@triton.jit
def row_planes(
    x_rows_ptr, mean_ptr, scale, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, HOLD_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TAIL: tl.constexpr, LOAD_D: tl.constexpr,
):  # fmt: skip
    """The rows whose addresses are ``x_rows_ptr``, [BLOCK_N], as `tile_scores` takes them.

    Returns:
        planes: a tuple of [BLOCK_N, BLOCK_D or TAIL] fp16; empty unless HOLD_ROWS.
        row_scale, ratio, high, low, rest: [BLOCK_N] fp32; the last three are the norms of the high
        parts, of the low parts and of what neither holds.
    """
    FULL: tl.constexpr = INNER // BLOCK_D
    WIDTH: tl.constexpr = BLOCK_D if FULL > 0 else TAIL
    row_scale, ratio = choose_scale(
        x_rows_ptr, mean_ptr, scale, stride_xd, D, IS_DOT, BLOCK_N,
        WIDTH // 4 if SPLIT else min(WIDTH, LOAD_D),
    )  # fmt: skip
    high_sq = tl.zeros((BLOCK_N,), tl.float32)
    low_sq = tl.zeros((BLOCK_N,), tl.float32)
    rest_sq = tl.zeros((BLOCK_N,), tl.float32)
    planes = ()
    if HOLD_ROWS:
        for i in tl.static_range(FULL):
            plane, high, low, rest = _split_rows(
                x_rows_ptr, mean_ptr, row_scale, ratio, i * BLOCK_D, stride_xd,
                D, SPLIT, BIAS_COLUMNS, BLOCK_D, LOAD_D, (i + 1) * BLOCK_D <= D,
            )  # fmt: skip
            # ruff's form of this is not one that Triton takes
            planes = planes + (plane,)  # noqa: RUF005
            high_sq += high
            low_sq += low
            rest_sq += rest
        if TAIL > 0:
            plane, high, low, rest = _split_rows(
                x_rows_ptr, mean_ptr, row_scale, ratio, FULL * BLOCK_D, stride_xd,
                D, SPLIT, BIAS_COLUMNS, TAIL, LOAD_D, FULL * BLOCK_D + TAIL <= D,
            )  # fmt: skip
            # ruff's form of this is not one that Triton takes
            planes = planes + (plane,)  # noqa: RUF005
            high_sq += high
            low_sq += low
            rest_sq += rest
    else:
        for start_d in range(0, INNER, BLOCK_D):
            _, high, low, rest = _split_rows(
                x_rows_ptr, mean_ptr, row_scale, ratio, start_d, stride_xd,
                D, False, False, BLOCK_D, LOAD_D, INNER == D,
            )  # fmt: skip
            high_sq += high
            rest_sq += rest
    return planes, row_scale, ratio, tl.sqrt(high_sq), tl.sqrt(low_sq), tl.sqrt(rest_sq)


@triton.jit
def store_row_planes(
    x_rows_ptr, plane_rows_ptr, mean_ptr, scale, stride_xd,
    D: tl.constexpr, INNER: tl.constexpr, BIAS_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, LOAD_D: tl.constexpr,
):  # fmt: skip
    """As `row_planes`, of more than 8 dimensions, but the planes go to ``plane_rows_ptr``.

    These are the addresses of [INNER] fp16 each. Afterwards `tile_scores` can load them.
    """
    DIMS: tl.constexpr = min(BLOCK_D, LOAD_D)
    row_scale, ratio = choose_scale(
        x_rows_ptr, mean_ptr, scale, stride_xd, D, False, BLOCK_N, DIMS
    )  # fmt: skip
    high_sq = tl.zeros((BLOCK_N,), tl.float32)
    rest_sq = tl.zeros((BLOCK_N,), tl.float32)
    for start_d in range(0, INNER, DIMS):
        plane, high, _, rest = _split_rows(
            x_rows_ptr, mean_ptr, row_scale, ratio, start_d, stride_xd,
            D, False, BIAS_COLUMNS, DIMS, LOAD_D, INNER == D,
        )  # fmt: skip
        offs = (start_d + tl.arange(0, DIMS)).to(tl.int64)
        tl.store(plane_rows_ptr[:, None] + offs[None, :], plane)
        high_sq += high
        rest_sq += rest
    return row_scale, ratio, tl.sqrt(high_sq), tl.zeros_like(ratio), tl.sqrt(rest_sq)


@triton.jit
def largest_norm(norms_ptr, head, num_norms, WHICH: tl.constexpr):
    """One of the four of `vqtriton.kernels.code_planes.CodePlanes`; the only row if no number."""
    if num_norms is None:
        largest = tl.load(norms_ptr + (head * 4 + WHICH))
    else:
        largest = _largest_of(norms_ptr, head, num_norms, WHICH)
    return largest


@triton.jit
def _largest_of(norms_ptr, head, num_norms, WHICH: tl.constexpr):
    offs = tl.arange(0, MOST_NORMS)
    norms_ptrs = norms_ptr + ((head * num_norms + offs) * 4 + WHICH)
    return tl.max(tl.load(norms_ptrs, mask=offs < num_norms, other=0.0), 0)


@triton.jit
def row_error(
    high, low, rest, ratio, norms_ptr, head, num_norms,
    bound_products, bound_bias, bound_distances, bound_tiny,
):  # fmt: skip
    """[BLOCK_N] fp32, the bound on the error of a score, +inf for a row that is not finite."""
    max_norm = largest_norm(norms_ptr, head, num_norms, 0)
    max_low = largest_norm(norms_ptr, head, num_norms, 1)
    max_rest = largest_norm(norms_ptr, head, num_norms, 2)
    norm = high + low + rest
    error = SLACK * (rest * max_norm + (high + low) * max_rest + low * max_low)
    error += bound_products * norm * max_norm + ratio * (bound_bias * max_norm * max_norm)
    error += bound_distances * norm * (norm / ratio) + bound_tiny
    # NaN, from a row that is not finite or overflows
    return tl.where(error < float("inf"), error, float("inf"))


@triton.jit
def tile_scores(
    planes, x_rows_ptr, mean_ptr, row_scale, ratio, codes_ptr, offset_ptr, start_k, stride_xd,
    D: tl.constexpr, INNER: tl.constexpr, BIAS_COLUMNS: tl.constexpr, HOLD_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] fp32 scores of the codes in the columns from ``start_k`` (int64) on.

    Without a mean, ``x_rows_ptr`` are planes of `store_row_planes`.
    """
    FULL: tl.constexpr = INNER // BLOCK_D
    columns = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_full = columns[None, :] * INNER + tl.arange(0, BLOCK_D).to(tl.int64)[:, None]
    tile_ptr = codes_ptr + start_k * INNER
    scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if HOLD_ROWS:
        for i in tl.static_range(FULL):
            codes = tl.load(tile_ptr + (i * BLOCK_D + offs_full))
            scores = tl.dot(planes[i], codes, scores)
        if TAIL > 0:
            offs_tail = columns[None, :] * INNER + tl.arange(0, TAIL).to(tl.int64)[:, None]
            codes = tl.load(tile_ptr + (FULL * BLOCK_D + offs_tail))
            scores = tl.dot(planes[FULL], codes, scores)
    else:
        for start_d in range(0, INNER, BLOCK_D):
            if mean_ptr is None:
                offs = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
                plane = tl.load(x_rows_ptr[:, None] + offs[None, :])
            else:
                # subnormals stay: their residual was measured as if they were flushed
                y = _load_rows(
                    x_rows_ptr, mean_ptr, row_scale, start_d, stride_xd, D, BLOCK_D, INNER == D
                )
                plane = y.to(tl.float16)
                if BIAS_COLUMNS:
                    column = start_d + tl.arange(0, BLOCK_D) - D
                    plane = tl.where((column < 0)[None, :], plane, _bias_weights(column, ratio))
            codes = tl.load(tile_ptr + (tl.cast(start_d, tl.int64) + offs_full))
            scores = tl.dot(plane, codes, scores)
    if not BIAS_COLUMNS:
        # no sum: it would become the accumulator's start, a move per score and one more term for
        # the tensor cores to truncate
        offset = tl.broadcast_to(tl.load(offset_ptr + start_k + columns)[None, :], scores.shape)
        scores = tl.fma(offset, -ratio[:, None], scores)
    return scores


def plane_constants(planes: CodePlanes, block_d: int, hold_rows: bool) -> dict[str, Any]:
    """The constexprs of a kernel that multiplies rows and `vqtriton.planes.CodePlanes`."""
    inner = planes.codes.shape[2]
    block_d = min(block_d, inner)
    if not hold_rows:
        # a loop has tiles of one size
        block_d = min(block_d, inner & -inner)
    return {
        "D": planes.mean.shape[1],
        "IS_DOT": planes.is_dot,
        "INNER": inner,
        "SPLIT": planes.is_split,
        "BIAS_COLUMNS": planes.has_bias_columns,
        "GROUP": planes.group,
        "LANES": planes.lanes,
        "VEC": planes.vec,
        "HOLD_ROWS": hold_rows,
        "BLOCK_D": block_d,
        "TAIL": inner % block_d,
        # on other targets the compiler would read the codes from shared memory in a slower way
        "LOAD_D": 16 if hold_rows and planes.lanes in (1, 4) else 64,
    }


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Of [H, ...]; 0 for a single head, whose stride is the size of the batch.

    Triton compiles anew for each alignment of a stride, so for some batches and not for others.
    """
    head, *others = tensor.stride()
    return (head if tensor.shape[0] > 1 else 0, *others)


def register_limit(registers: int | None) -> dict[str, int]:
    """The option of a launch; there is none on AMD."""
    return {"maxnreg": registers} if registers and not torch.version.hip else {}
