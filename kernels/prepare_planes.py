"""Codebooks as fp16 planes for the screen, in three launches. vqtriton/planes.py defines them.

1. sums of the finite codes, one per part of the codebook;
2. every program adds these up to the mean, and goes through its part once more: the norm of each
   code about the mean, and the largest norm and coordinate;
3. planes, offsets and bounds.

All in float64, as in the torch version. The order of the sums is fixed and a maximum has no order,
so every bit is repeatable; neither depends on the number of processors.
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

EXPONENT = tl.constexpr(constants.EXPONENT)
MIN_NORMAL = tl.constexpr(constants.MIN_NORMAL)
BIAS_WEIGHTS = tl.constexpr(constants.BIAS_WEIGHTS)
PAD_OFFSET = tl.constexpr(constants.PAD_OFFSET)


@dataclass(frozen=True)
class PreparePlanesConfig:
    """A tile is whole codes of about so many elements."""

    block_elements: int = 4096
    # parts of a codebook: two for each processor of a large GPU. Each part reads the sums of all,
    # so more of them cost more than they hide
    most_parts: int = 256
    # of the two kernels that go through parts, of which few fit into a processor
    part_warps: int = 8
    # of the last kernel: the more elements a thread has, the less its square roots weigh
    plane_warps: int = 4


@triton.jit
def _load_codes(
    codebook_ptr, offs_k, K, stride_ck, stride_cd, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_K, BLOCK_D] fp64, and which of the codes are finite; there are none beyond K."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
    codes = tl.load(
        codebook_ptr + offs_k[:, None] * stride_ck + offs_d[None, :] * stride_cd,
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    # not below infinity: NaN, too
    is_bad = tl.where(tl.abs(codes) < float("inf"), 0, 1)
    is_finite = (tl.max(is_bad, 1) == 0) & (offs_k < K)
    return codes.to(tl.float64), is_finite


@triton.jit(do_not_specialize=["K", "codes_per_part"])
def part_sums_kernel(
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16
    sums_ptr,           # [H, parts, D] fp64, out
    counts_ptr,         # [H, parts] int32, finite codes, out
    peaks_ptr,          # [H, 2] fp64, set to zero
    norms_ptr,          # [H, 4] fp32, set to zero
    K, codes_per_part, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    # for the maxima of the kernels that follow: one launch less than to allocate zeros
    if part == 0:
        tl.store(peaks_ptr + (head * 2 + tl.arange(0, 2)), 0.0)
        tl.store(norms_ptr + (head * 4 + tl.arange(0, 4)), 0.0)
    codebook_ptr += head * stride_ch
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    counts = tl.zeros((BLOCK_K,), tl.int32)
    first = part * codes_per_part
    for start in range(first, tl.minimum(first + codes_per_part, K), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        codes, is_finite = _load_codes(codebook_ptr, offs_k, K, stride_ck, stride_cd, D, BLOCK_D)
        sums += tl.where(is_finite[:, None], codes, 0.0)
        counts += is_finite.to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    place = head * tl.num_programs(0) + part
    tl.store(sums_ptr + (place * D + offs_d), tl.sum(sums, 0), mask=offs_d < D)
    tl.store(counts_ptr + place, tl.sum(counts, 0))


@triton.jit(do_not_specialize=["K", "codes_per_part"])
def centred_norms_kernel(
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16
    sums_ptr,           # [H, parts, D] fp64
    counts_ptr,         # [H, parts] int32
    mean_ptr,           # [H, D] fp32, out
    sqnorm_ptr,         # [H, K] fp64, ‖c_k − mean‖², -1 where a code is not finite, out
    peaks_ptr,          # [H, 2] fp64, max |c_kd − mean_d| and max ‖c_k − mean‖², out
    K, codes_per_part, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    counts = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, parts, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        places = head * parts + offs
        mask = (offs < parts)[:, None] & (offs_d < D)[None, :]
        sums += tl.load(sums_ptr + (places[:, None] * D + offs_d[None, :]), mask=mask, other=0.0)
        counts += tl.load(counts_ptr + places, mask=offs < parts, other=0)
    count = tl.maximum(tl.sum(counts, 0), 1)
    mean = (tl.sum(sums, 0) / count.to(tl.float64)).to(tl.float32)
    if part == 0:
        tl.store(mean_ptr + (head * D + offs_d), mean, mask=offs_d < D)

    codebook_ptr += head * stride_ch
    largest = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    max_sqnorm = tl.zeros((BLOCK_K,), tl.float64)
    first = part * codes_per_part
    for start in range(first, tl.minimum(first + codes_per_part, K), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        codes, is_finite = _load_codes(codebook_ptr, offs_k, K, stride_ck, stride_cd, D, BLOCK_D)
        centred = tl.where(is_finite[:, None], codes - mean.to(tl.float64)[None, :], 0.0)
        largest = tl.maximum(largest, tl.abs(centred))
        sqnorm = tl.sum(centred * centred, 1)
        max_sqnorm = tl.maximum(max_sqnorm, sqnorm)
        sqnorm = tl.where(is_finite, sqnorm, -1.0)
        tl.store(sqnorm_ptr + (head * K + offs_k), sqnorm, mask=offs_k < K)
    # relaxed: nothing is read before the next launch
    tl.atomic_max(peaks_ptr + head * 2, tl.max(tl.max(largest, 1), 0), sem="relaxed")
    tl.atomic_max(peaks_ptr + (head * 2 + 1), tl.max(max_sqnorm, 0), sem="relaxed")


@triton.jit
def _power_of_two(largest):
    """The scale that brings ``largest`` into [2⁹, 2¹⁰), from the bits of its exponent."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) - 1022
    exponent = tl.where(largest == 0.0, 0, exponent)
    excess = tl.minimum(tl.maximum(exponent - EXPONENT, -126), 126)
    return ((127 - excess) << 23).to(tl.int32).to(tl.float32, bitcast=True)


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


@triton.jit(do_not_specialize=["K"])
def planes_kernel(
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16
    mean_ptr,           # [H, D] fp32
    sqnorm_ptr,         # [H, K] fp64
    peaks_ptr,          # [H, 2] fp64
    codes_ptr,          # [H, columns, INNER] fp16, out
    offset_ptr,         # [H, columns] fp32, out
    scale_ptr,          # [H] fp32, out
    norms_ptr,          # [H, 4] fp32, out
    K, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_k = _code_of_column(column, GROUP, LANES, VEC).to(tl.int64)
    place = head * tl.num_programs(0) * BLOCK_K + column

    scale = _power_of_two(tl.load(peaks_ptr + head * 2))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + head, scale)
    scale = scale.to(tl.float64)
    # powers of two: as if the codes had been scaled before
    max_sqnorm = tl.load(peaks_ptr + (head * 2 + 1)) * scale * scale
    sqnorm = tl.load(sqnorm_ptr + (head * K + offs_k), mask=offs_k < K, other=-1.0)
    is_finite = sqnorm >= 0
    offset = (sqnorm * scale * scale - max_sqnorm) * 0.5
    offset = tl.where(is_finite, offset, PAD_OFFSET).to(tl.float32)
    tl.store(offset_ptr + place, offset)

    # inner columns of a dimension, and which of them this one is
    PARTS: tl.constexpr = 4 if SPLIT else 1
    inner = tl.arange(0, BLOCK_INNER)
    offs_d = (inner // PARTS).to(tl.int64)
    part = (inner % PARTS)[None, :]
    mask = is_finite[:, None] & (offs_d < D)[None, :]
    codes = tl.load(
        codebook_ptr + head * stride_ch + offs_k[:, None] * stride_ck + offs_d[None, :] * stride_cd,
        mask=mask,
        other=0.0,
    )
    mean = tl.load(mean_ptr + (head * D + offs_d), mask=offs_d < D, other=0.0).to(tl.float64)
    # what is not finite, or beyond K, is zeros
    row_scale = tl.where(is_finite, scale, 0.0)[:, None]
    codes = (codes.to(tl.float32).to(tl.float64) - mean[None, :]) * row_scale
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
        codes_ptr + (place[:, None] * INNER + inner[None, :]), plane, mask=(inner < INNER)[None, :]
    )

    # of each dimension once
    is_first = part == 0
    high_sq = tl.where(is_first, high.to(tl.float64) * high.to(tl.float64), 0.0)
    _raise_bound(norms_ptr + head * 4, tl.maximum(tl.sum(high_sq, 1), max_sqnorm))
    if SPLIT:
        low_sq = tl.where(is_first, low.to(tl.float64) * low.to(tl.float64), 0.0)
        _raise_bound(norms_ptr + (head * 4 + 1), tl.sum(low_sq, 1))
    _raise_bound(norms_ptr + (head * 4 + 2), tl.sum(tl.where(is_first, rest * rest, 0.0), 1))
    if tl.program_id(0) == 0:
        tl.store(norms_ptr + (head * 4 + 3), (max_sqnorm * 0.5).to(tl.float32))


def prepare_planes(
    codebook: Tensor,
    inner: int,
    is_split: bool,
    has_bias_columns: bool,
    *,
    group: int = GROUP,
    lanes: int = 4,
    vec: int = 2,
    config: PreparePlanesConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `vqtriton.planes.CodePlanes`.

    Bit for bit those of `vqtriton.planes.prepare_planes`, unless the order of a sum in float64
    changes how it rounds to float32.

    Args:
        codebook: [H, K, D] float32 / float16 / bfloat16, K >= 1, any strides.
        inner, is_split, has_bias_columns: `vqtriton.planes.inner_size` of D.
        group, lanes, vec: as for `vqtriton.planes.prepare_planes`.
        config: tiles.

    Returns:
        codes [H, K, inner] float16 and offset [H, K] float32, K padded to `PAD_CODES`, in the order
        of the columns; mean [H, D], scale [H] and norms [H, 4], float32.
    """
    config = config or PreparePlanesConfig()
    heads, size, dim = codebook.shape
    if PAD_CODES % (group * lanes) or group % vec:
        raise ValueError(
            f"group is {group}, lanes {lanes}, vec {vec}; group * lanes must divide {PAD_CODES}, "
            "and vec group"
        )
    block_d = next_power_of_2(dim)
    block_k = min(PAD_CODES, max(1, config.block_elements // block_d))
    codes_per_part = cdiv(cdiv(size, block_k), config.most_parts) * block_k
    parts = cdiv(size, codes_per_part)
    columns = cdiv(size, PAD_CODES) * PAD_CODES
    block_inner = next_power_of_2(inner)
    block_columns = min(PAD_CODES, max(1, config.block_elements // block_inner))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codebook.device)

    sums = empty(heads, parts, dim, dtype=torch.float64)
    counts = empty(heads, parts, dtype=torch.int32)
    sqnorm = empty(heads, size, dtype=torch.float64)
    peaks = empty(heads, 2, dtype=torch.float64)
    codes = empty(heads, columns, inner, dtype=torch.float16)
    offset, mean = empty(heads, columns), empty(heads, dim)
    scale, norms = empty(heads), empty(heads, 4)
    # harmless: products with the scale, a power of two, are exact, and squares are for sums
    fuse = {"enable_fp_fusion": True}
    tiles = {"D": dim, "BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": config.part_warps}
    sizes = (size, codes_per_part, *codebook.stride())
    with torch.cuda.device_of(codebook):
        part_sums_kernel[(parts, heads)](
            codebook, sums, counts, peaks, norms, *sizes, **tiles, **fuse
        )
        centred_norms_kernel[(parts, heads)](
            codebook, sums, counts, mean, sqnorm, peaks, *sizes, **tiles, **fuse
        )
        planes_kernel[(columns // block_columns, heads)](
            codebook,
            mean,
            sqnorm,
            peaks,
            codes,
            offset,
            scale,
            norms,
            size,
            *codebook.stride(),
            D=dim,
            INNER=inner,
            SPLIT=is_split,
            BIAS_COLUMNS=has_bias_columns,
            GROUP=group,
            LANES=lanes,
            VEC=vec,
            BLOCK_K=block_columns,
            BLOCK_INNER=block_inner,
            num_warps=config.plane_warps,
            **fuse,
        )
    return codes, offset, mean, scale, norms
