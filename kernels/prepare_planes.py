"""Codebooks as fp16 planes for the screen, in one launch or two. vqtriton/planes.py defines them.

Before a code can be scaled, the largest coordinate and the largest norm of all codes must be known.
Every program finds them by itself, from all of a small codebook, which takes less time than another
launch. For a large one there is a launch before, whose programs look at a part each.

A maximum has no order, and neither do sums that are rounded up to a few bits, so every bit is
repeatable, and none depends on the number of programs or processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels import constants
from vqtriton.kernels.constants import GROUP, PAD_CODES
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import register_limit

EXPONENT = tl.constexpr(constants.EXPONENT)
MIN_NORMAL = tl.constexpr(constants.MIN_NORMAL)
BIAS_WEIGHTS = tl.constexpr(constants.BIAS_WEIGHTS)
PAD_OFFSET = tl.constexpr(constants.PAD_OFFSET)
SAMPLE = tl.constexpr(constants.SAMPLE)
LOST_BITS = tl.constexpr(53 - constants.NORM_BITS)
ROUND_UP = tl.constexpr((1 << (53 - constants.NORM_BITS)) - 1)
MOST_PARTS = tl.constexpr(constants.MOST_PARTS)


@dataclass(frozen=True)
class PreparePlanesConfig:
    """A tile is whole codes of about so many elements."""

    block_elements: int = 4096
    # a codebook with no more elements is small: every program goes through all of it
    most_elements: int = 1 << 18
    # parts of a larger one, at most; about two for each processor of a large GPU
    most_parts: int = constants.MOST_PARTS
    num_warps: int = 8


@triton.jit
def _load_codes(
    codebook_ptr, offs_k, K, stride_ck, stride_cd, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_K, BLOCK_D] fp32, and which of the codes are finite; there are none beyond K."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
    codes = tl.load(
        codebook_ptr + offs_k[:, None] * stride_ck + offs_d[None, :] * stride_cd,
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    # not below infinity: NaN, too
    is_bad = tl.where(tl.abs(codes) < float("inf"), 0, 1)
    return codes, (tl.max(is_bad, 1) == 0) & (offs_k < K)


@triton.jit
def _mean_of_sample(
    codebook_ptr, K, stride_ck, stride_cd,
    D: tl.constexpr, IS_DOT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D] fp32, the centre: of `SAMPLE` codes at even distances, those that are finite.

    Zeros if IS_DOT, since dot products are those of the codes as they are.
    """
    if IS_DOT:
        return tl.zeros((BLOCK_D,), tl.float32)
    size = tl.minimum(K, SAMPLE)
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    counts = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, size, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K).to(tl.int64)
        offs_k = tl.where(place < size, place * K // size, K)
        codes, is_finite = _load_codes(codebook_ptr, offs_k, K, stride_ck, stride_cd, D, BLOCK_D)
        sums += tl.where(is_finite[:, None], codes, 0.0).to(tl.float64)
        counts += is_finite.to(tl.int32)
    count = tl.maximum(tl.sum(counts, 0), 1)
    return (tl.sum(sums, 0) / count.to(tl.float64)).to(tl.float32)


@triton.jit
def _power_of_two(largest):
    """The scale that brings ``largest`` into [2⁹, 2¹⁰), from the bits of its exponent."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) - 1022
    exponent = tl.where(largest == 0.0, 0, exponent)
    excess = tl.minimum(tl.maximum(exponent - EXPONENT, -126), 126)
    return ((127 - excess) << 23).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _peaks(
    codebook_ptr, mean, first, last, K, stride_ck, stride_cd,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of some codes: the largest |c_kd − mean_d|, and a bound on ‖c_k − mean‖²; fp64."""
    largest = tl.zeros((BLOCK_K,), tl.float64)
    max_sqnorm = tl.zeros((BLOCK_K,), tl.float64)
    mean = mean[None, :]
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        codes, is_finite = _load_codes(codebook_ptr, offs_k, K, stride_ck, stride_cd, D, BLOCK_D)
        codes = tl.where(is_finite[:, None], codes, 0.0)
        # halves where the difference would overflow
        extent = tl.max(tl.maximum(tl.abs(codes), tl.abs(mean)), 1)
        half = tl.where(extent < 8.507059173023462e37, 1.0, 0.5)
        centred = tl.abs(codes * half[:, None] - mean * half[:, None])
        centred = tl.where(is_finite[:, None], centred, 0.0)
        peak = tl.max(centred, 1)
        double = tl.where(half < 1, 2.0, 1.0).to(tl.float64)
        largest = tl.maximum(largest, peak.to(tl.float64) * double)
        # by a power of two to about one, so that no square does
        exponent = tl.maximum(tl.minimum(peak.to(tl.int32, bitcast=True) >> 23, 253), 1)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        factor = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64) * double
        scaled = centred * inverse[:, None]
        sqnorm = tl.sum(scaled * scaled, 1).to(tl.float64)
        max_sqnorm = tl.maximum(max_sqnorm, sqnorm * factor * factor)
    # for what is rounded: differences, squares and their sum
    slack: tl.constexpr = 1 + (D + 8) * 2.0**-23
    return tl.max(largest, 0), tl.max(max_sqnorm, 0) * slack


@triton.jit
def _rounded_up(value):
    """fp64 to `NORM_BITS` bits: what is left does not show in which order a sum was made."""
    bits = value.to(tl.int64, bitcast=True)
    bits = ((bits + ROUND_UP) >> LOST_BITS) << LOST_BITS
    return bits.to(tl.float64, bitcast=True)


# a program must not be compiled for each codebook
@triton.jit(do_not_specialize=["K", "codes_per_part", "num_norms"])
def code_peaks_kernel(
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16
    peaks_ptr,          # [H, parts, 2] fp64, out
    mean_ptr,           # [H, D] fp32, out
    norms_ptr,          # [H, num_norms, 4] fp32, set to zero
    K, codes_per_part, num_norms, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, IS_DOT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    # for maxima by the kernel that follows
    if part == 0:
        for i in range(num_norms * 4):
            tl.store(norms_ptr + (head * num_norms * 4 + i), 0.0)
    codebook_ptr += head * stride_ch
    mean = _mean_of_sample(codebook_ptr, K, stride_ck, stride_cd, D, IS_DOT, BLOCK_K, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(mean_ptr + (head * D + offs_d), mean, mask=(offs_d < D) & (part == 0))
    first = part * codes_per_part
    last = tl.minimum(first + codes_per_part, K)
    largest, max_sqnorm = _peaks(
        codebook_ptr, mean, first, last, K, stride_ck, stride_cd, D, BLOCK_K, BLOCK_D
    )
    place = (head * tl.num_programs(0) + part) * 2
    tl.store(peaks_ptr + place, largest)
    tl.store(peaks_ptr + (place + 1), max_sqnorm)


@triton.jit
def _to_plane(values):
    """fp16 without subnormals, by way of fp32: to round twice is what torch does on a CPU.

    It may choose the neighbour of two that is farther by 2⁻¹³ of their distance. What is left is
    measured against what was chosen.
    """
    values = values.to(tl.float32)
    return tl.where(tl.abs(values) < MIN_NORMAL, 0.0, values).to(tl.float16)


@triton.jit
def _code_of_column(column, GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """`vqtriton.planes.column_order`."""
    chunk = column // (GROUP * LANES)
    lane = column // VEC % LANES
    pair = column // (VEC * LANES) % (GROUP // VEC)
    return (chunk * LANES + lane) * GROUP + pair * VEC + column % VEC


@triton.jit
def _raise_bound(bound_ptr, sqnorms):
    """An upper bound on the norms stays one when it is rounded."""
    bound = tl.sqrt(tl.max(sqnorms, 0)) * (1 + 2.0**-22)
    tl.atomic_max(bound_ptr, bound.to(tl.float32), sem="relaxed")


@triton.jit(do_not_specialize=["K", "columns", "parts", "num_norms"])
def planes_kernel(
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16
    peaks_ptr,          # [H, parts, 2] fp64, of `code_peaks_kernel`, unless IS_SMALL
    codes_ptr,          # [H, columns, INNER] fp16, out
    offset_ptr,         # [H, columns] fp32, out
    mean_ptr,           # [H, D] fp32, of `code_peaks_kernel`, or out
    scale_ptr,          # [H] fp32, out
    norms_ptr,          # [H, num_norms, 4] fp32, out; of zeros unless IS_SMALL
    K, columns, parts, num_norms, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, IS_DOT: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    IS_SMALL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    codebook_ptr += head * stride_ch
    norm = (head * num_norms + tl.program_id(0) % num_norms) * 4
    if IS_SMALL:
        mean = _mean_of_sample(codebook_ptr, K, stride_ck, stride_cd, D, IS_DOT, BLOCK_K, BLOCK_D)
        # all programs write the same, and each reads again what it has written itself
        offs_mean = tl.arange(0, BLOCK_D)
        tl.store(mean_ptr + (head * D + offs_mean), mean, mask=offs_mean < D)
        tl.store(norms_ptr + (norm + tl.arange(0, 4)), tl.zeros((4,), tl.float32))
        tl.debug_barrier()
        largest, max_sqnorm = _peaks(
            codebook_ptr, mean, 0, K, K, stride_ck, stride_cd, D, BLOCK_K, BLOCK_D
        )
    else:
        offs = tl.arange(0, MOST_PARTS)
        peaks = (head * parts + offs) * 2
        largest = tl.max(tl.load(peaks_ptr + peaks, mask=offs < parts, other=0.0), 0)
        max_sqnorm = tl.max(tl.load(peaks_ptr + (peaks + 1), mask=offs < parts, other=0.0), 0)
    scale = _power_of_two(largest)
    # powers of two: as if the codes had been scaled before
    wide_scale = scale.to(tl.float64)
    max_sqnorm = _rounded_up(max_sqnorm * wide_scale * wide_scale)
    tl.store(scale_ptr + head, scale)
    tl.store(norms_ptr + (norm + 3), (max_sqnorm * 0.5).to(tl.float32))

    # inner columns of a dimension, and which of them this one is
    PARTS: tl.constexpr = 4 if SPLIT else 1
    inner = tl.arange(0, BLOCK_INNER)
    offs_d = (inner // PARTS).to(tl.int64)
    part = (inner % PARTS)[None, :]
    is_first = part == 0
    mean = tl.load(mean_ptr + (head * D + offs_d), mask=offs_d < D, other=0.0).to(tl.float64)
    step = tl.num_programs(0) * BLOCK_COLUMNS
    for start in range(tl.program_id(0) * BLOCK_COLUMNS, columns, step):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        offs_k = _code_of_column(column, GROUP, LANES, VEC).to(tl.int64)
        place = head * columns + column
        codes = tl.load(
            codebook_ptr + offs_k[:, None] * stride_ck + offs_d[None, :] * stride_cd,
            mask=(offs_k < K)[:, None] & (offs_d < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        is_bad = tl.where(tl.abs(codes) < float("inf"), 0, 1)
        is_finite = (tl.max(is_bad, 1) == 0) & (offs_k < K)
        # what is not finite, or beyond K, is zeros
        codes = (codes.to(tl.float64) - mean[None, :]) * wide_scale
        codes = tl.where(is_finite[:, None] & (offs_d < D)[None, :], codes, 0.0)
        sqnorm = tl.zeros((BLOCK_COLUMNS,), tl.float64)
        if not IS_DOT:
            sqnorm = tl.sum(tl.where(is_first, codes * codes, 0.0), 1)
        offset = tl.where(is_finite, (sqnorm - max_sqnorm) * 0.5, PAD_OFFSET).to(tl.float32)
        tl.store(offset_ptr + place, offset)

        high = _to_plane(codes)
        rest = codes - high.to(tl.float64)
        plane = high
        if SPLIT:
            low = _to_plane(rest)
            rest -= low.to(tl.float64)
            plane = tl.where(part == 1, low, tl.where(part == 3, 0.0, high))
        if BIAS_COLUMNS:
            # float32 is enough: a part takes 11 bits of what is left, and leaves the others
            left = -offset
            for i in tl.static_range(3):
                # a product: Triton's division by a power of two is not exact
                bias = _to_plane(left * (1 / BIAS_WEIGHTS[i]))
                left -= bias.to(tl.float32) * BIAS_WEIGHTS[i]
                is_place = inner == (4 * i + 3 if SPLIT else D + i)
                plane = tl.where(is_place[None, :], bias[:, None], plane)
        tl.store(
            codes_ptr + (place[:, None] * INNER + inner[None, :]),
            plane,
            mask=(inner < INNER)[None, :],
        )

        # each dimension counts once, though it may fill several inner columns
        high_sq = tl.where(is_first, high.to(tl.float64) * high.to(tl.float64), 0.0)
        _raise_bound(norms_ptr + norm, tl.maximum(tl.sum(high_sq, 1), max_sqnorm))
        if SPLIT:
            low_sq = tl.where(is_first, low.to(tl.float64) * low.to(tl.float64), 0.0)
            _raise_bound(norms_ptr + (norm + 1), tl.sum(low_sq, 1))
        _raise_bound(norms_ptr + (norm + 2), tl.sum(tl.where(is_first, rest * rest, 0.0), 1))


def norms_of(size: int, dim: int, inner: int, config: PreparePlanesConfig | None = None) -> int:
    """How many rows of norms there are for K codes: of a small codebook one for each program."""
    config = config or PreparePlanesConfig()
    if size * dim > config.most_elements:
        return 1
    block_columns = min(PAD_CODES, max(1, config.block_elements // next_power_of_2(inner)))
    return min(cdiv(size, PAD_CODES) * PAD_CODES // block_columns, constants.MOST_NORMS)


def prepare_planes(
    codebook: Tensor,
    inner: int,
    is_split: bool,
    has_bias_columns: bool,
    *,
    group: int = GROUP,
    lanes: int = 4,
    vec: int = 2,
    is_dot: bool = False,
    config: PreparePlanesConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `vqtriton.planes.CodePlanes`.

    Bit for bit those of `vqtriton.planes.prepare_planes`, unless the order of a sum changes how it
    is rounded.

    Args:
        codebook: [H, K, D] float32 / float16 / bfloat16, K >= 1, any strides.
        inner, is_split, has_bias_columns: `vqtriton.planes.inner_size` of D.
        group, lanes, vec, is_dot: as for `vqtriton.planes.prepare_planes`.
        config: tiles.

    Returns:
        codes [H, K, inner] float16 and offset [H, K] float32, K padded to `PAD_CODES`, in the order
        of the columns; mean [H, D], scale [H] and norms [H, P, 4], float32, P at most `MOST_NORMS`.
    """
    config = config or PreparePlanesConfig()
    heads, size, dim = codebook.shape
    if PAD_CODES % (group * lanes) or group % vec:
        raise ValueError(
            f"group is {group}, lanes {lanes}, vec {vec}; group * lanes must divide {PAD_CODES}, "
            "and vec group"
        )
    block_d, block_inner = next_power_of_2(dim), next_power_of_2(inner)
    block_k = min(PAD_CODES, max(1, config.block_elements // block_d))
    columns = cdiv(size, PAD_CODES) * PAD_CODES
    block_columns = min(PAD_CODES, max(1, config.block_elements // block_inner))
    is_small = size * dim <= config.most_elements
    num_norms = norms_of(size, dim, inner, config)
    programs = num_norms if is_small else columns // block_columns

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codebook.device)

    codes, offset = empty(heads, columns, inner, dtype=torch.float16), empty(heads, columns)
    mean, scale, norms = empty(heads, dim), empty(heads), empty(heads, num_norms, 4)
    options = {
        "D": dim,
        "IS_DOT": is_dot,
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "num_warps": config.num_warps,
        # without a limit ptxas spills a little to reach the next step of occupancy
        **register_limit(168),
        # harmless: products with the scale, a power of two, are exact, and squares are for sums
        "enable_fp_fusion": True,
    }
    peaks, parts = None, 0
    with torch.cuda.device_of(codebook):
        if not is_small:
            # the kernel that follows looks at no more
            most_parts = min(config.most_parts, constants.MOST_PARTS)
            codes_per_part = cdiv(cdiv(size, block_k), most_parts) * block_k
            parts = cdiv(size, codes_per_part)
            peaks = empty(heads, parts, 2, dtype=torch.float64)
            tensors = codebook, peaks, mean, norms
            sizes = size, codes_per_part, num_norms
            launch(
                code_peaks_kernel, (parts, heads), *tensors, *sizes, *codebook.stride(), **options
            )
        launch(
            planes_kernel,
            (programs, heads),
            *(codebook, peaks, codes, offset, mean, scale, norms),
            *(size, columns, parts, num_norms),
            *codebook.stride(),
            INNER=inner,
            SPLIT=is_split,
            BIAS_COLUMNS=has_bias_columns,
            GROUP=group,
            LANES=lanes,
            VEC=vec,
            IS_SMALL=is_small,
            BLOCK_COLUMNS=block_columns,
            BLOCK_INNER=block_inner,
            **options,
        )
    return codes, offset, mean, scale, norms
