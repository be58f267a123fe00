"""Codebooks as fp16 planes for the tensor-core screen, and the bound on its error.

The names follow vqtriton/screening.py: y = scale·(x − mean), e_k = scale·(c_k − mean). The score
of code k is s_k = y·e_k + (E² − ‖e_k‖²)/2 with E = max ‖e_k‖. The constant E²/2 changes no decision
and keeps the best score of a row from being negative. For dot products the mean is 0 and the score
y·e_k + E²/2. docs/exactness.md derives the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, ScreenBound
from vqtriton.kernels.constants import (
    BIAS_WEIGHTS,
    EXPONENT,
    GROUP,
    MAX_NARROW_DIM,
    MIN_NORMAL,
    NORM_BITS,
    PAD_CODES,
    PAD_OFFSET,
    SAMPLE,
    SLACK,
    WIDE_GROUP,
)
from vqtriton.screening import U64
from vqtriton.tensors import finite_rows

# Dimensions up to which the inner columns hold both planes, so that a score has the accuracy of
# float32. Four columns a dimension: three products and a place for the bias.
MAX_SPLIT_DIM = 8
U32 = 2.0**-24
# Underflow, most of all of the bias in fp16: see docs/exactness.md.
TINY = 2.0**-20


class TensorCore(NamedTuple):
    """How a unit adds up products of two fp16 numbers in float32.

    All products of a step and the sum so far are aligned to the largest of them, cut, added, and
    the new sum is cut to float32.
    """

    products: int  # added in a step
    extra_bits: int  # kept below float32's last bit when terms are aligned


# by compute capability, as published: docs/exactness.md says where, and who validated it on which
# GPUs
TENSOR_CORES = {
    (7, 0): TensorCore(products=4, extra_bits=0),
    (8, 0): TensorCore(products=8, extra_bits=1),
    (8, 6): TensorCore(products=8, extra_bits=1),
    (8, 9): TensorCore(products=8, extra_bits=1),
    (9, 0): TensorCore(products=16, extra_bits=2),
    (10, 0): TensorCore(products=16, extra_bits=2),
}
# none errs more, and neither do sums that are rounded to nearest, in whatever order
WORST_TENSOR_CORE = TensorCore(products=1, extra_bits=0)

# beyond it the first part of a bias may not fit into fp16: docs/exactness.md
MAX_DIM = 4094


def inner_size(dim: int) -> tuple[int, bool, bool]:
    """Inner columns of a plane, is_split, has_bias_columns.

    At least 16, which is what tensor cores take, and of few parts whose sizes are powers of two,
    which is what `tl.dot` takes.

    Raises:
        ValueError: more dimensions than the bound is derived for.
    """
    if dim > MAX_DIM:
        raise ValueError(
            f"codebook has {dim} columns; the kernels take at most {MAX_DIM}, use backend='torch'"
        )
    if dim <= MAX_SPLIT_DIM:
        return (16 if dim <= 4 else 32), True, True

    def padded(columns: int) -> int:
        if columns > 128:
            unit = 32 if columns <= 256 else 64
            return -(-columns // unit) * unit
        whole, rest = columns // 64 * 64, columns % 64
        return whole + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)

    return padded(dim), False, padded(dim + 3) == padded(dim)


def group_size(dim: int) -> int:
    """Codes in a group."""
    return GROUP if dim <= MAX_NARROW_DIM else WIDE_GROUP


def column_order(size: int, group: int, lanes: int, vec: int) -> Tensor:
    """[size] the code that each column holds; size is a multiple of group·lanes.

    An accumulator gives a thread ``vec`` columns of every ``vec·lanes``. This order gives it
    ``group`` codes that follow one another.
    """
    code = torch.arange(size, dtype=torch.int64).view(-1, lanes, group // vec, vec)
    return code.transpose(1, 2).reshape(-1)


def to_plane(values: Tensor) -> Tensor:
    """float64 -> fp16 without subnormals, by way of float32, as torch on a CPU does in any case.

    To round twice may choose the neighbour that is farther, by 2⁻¹³ of what lies between the two.
    It does no harm: what is left is measured against what was chosen.
    """
    values = values.float()
    return values.where(values.abs() >= MIN_NORMAL, 0).half()


def _rounded_up(values: Tensor) -> Tensor:
    """float64 to `NORM_BITS` bits."""
    lost = 53 - NORM_BITS
    bits = values.view(torch.int64)
    return (((bits + (1 << lost) - 1) >> lost) << lost).view(torch.float64)


def prepare_planes(
    codebook: Tensor, *, group: int = 0, lanes: int = 4, vec: int = 2, is_dot: bool = False
) -> CodePlanes:
    """Centre, scale, split into planes, order for the screen: what the kernels are held to.

    Args:
        codebook: [H, K, D] float32 / float16 / bfloat16.
        group: codes whose scores are reduced together; 0 for `group_size`.
        lanes, vec: of the accumulator: `vqtriton.kernels.screen_tiles.ACCUMULATOR_ORDER`.
        is_dot: for scores that are dot products.
    """
    size, dim = codebook.shape[1:]
    group = group or group_size(dim)
    inner, is_split, has_bias_columns = inner_size(dim)
    padding = -size % PAD_CODES
    codes = codebook.double()
    is_finite = finite_rows(codes)
    codes = codes.where(is_finite[..., None], 0)
    sampled = min(size, SAMPLE)
    sample = torch.arange(sampled, dtype=torch.int64, device=codebook.device) * size // sampled
    count = is_finite[:, sample].sum(1).clamp(min=1)
    mean = (codes[:, sample].sum(1) / count[:, None]).float()
    if is_dot:
        mean = torch.zeros_like(mean)
    # the differences in float32, as in the kernels: of halves where they would overflow
    is_large = torch.maximum(codes.abs(), mean.double().abs()[:, None]).amax(2) >= 2.0**126
    half = torch.where(is_large, 0.5, 1.0)[..., None]
    differences = (codes.float() * half - mean[:, None] * half).double() / half
    largest = differences.where(is_finite[..., None], 0).abs().amax((1, 2))
    exponent = torch.frexp(largest).exponent
    codes = (codes - mean.double()[:, None]).where(is_finite[..., None], 0)
    scale = torch.ldexp(torch.ones_like(mean[:, 0]), (EXPONENT - exponent).clamp(-126, 126))
    codes = codes * scale.double()[:, None, None]

    high = to_plane(codes)
    rest = codes - high.double()
    low = torch.zeros_like(high)
    if is_split:
        low = to_plane(rest)
        rest = rest - low.double()
    sqnorm = codes.square().sum(2)
    max_sqnorm = _rounded_up(sqnorm.amax(1) * (1 + (dim + 8) * 2.0**-23))
    sqnorms = [
        torch.maximum(max_sqnorm, high.double().square().sum(2).amax(1)),
        low.double().square().sum(2).amax(1),
        rest.square().sum(2).amax(1),
    ]
    # upper bounds stay upper bounds when they are rounded
    norms = torch.stack([*(sq.sqrt() * (1 + 2.0**-22) for sq in sqnorms), max_sqnorm / 2], 1)
    norms = norms[:, None]
    own_sqnorm = torch.zeros_like(sqnorm) if is_dot else sqnorm
    offset = ((own_sqnorm - max_sqnorm[:, None]) / 2).where(is_finite, PAD_OFFSET)
    offset = torch.nn.functional.pad(offset, (0, padding), value=PAD_OFFSET).float()

    bias_columns = []
    rest = -offset.double()
    for weight in BIAS_WEIGHTS:
        bias_columns.append(to_plane(rest / weight))
        rest = rest - bias_columns[-1].double() * weight
    plane = torch.nn.functional.pad(high, (0, 0, 0, padding))
    low = torch.nn.functional.pad(low, (0, 0, 0, padding))
    if is_split:
        dims = inner // 4
        plane, low = (torch.nn.functional.pad(part, (0, dims - dim)) for part in (plane, low))
        last = torch.nn.functional.pad(torch.stack(bias_columns, 2), (0, dims - 3))
        plane = torch.stack([plane, low, plane, last], 3).flatten(2)
    elif has_bias_columns:
        plane = torch.cat([plane, torch.stack(bias_columns, 2)], 2)
    plane = torch.nn.functional.pad(plane, (0, inner - plane.shape[2]))
    order = column_order(size + padding, group, lanes, vec).to(codebook.device)
    return CodePlanes(
        codes=plane[:, order].contiguous(),
        offset=offset[:, order].contiguous(),
        mean=mean,
        scale=scale,
        norms=norms.float(),
        group=group,
        lanes=lanes,
        vec=vec,
        is_split=is_split,
        has_bias_columns=has_bias_columns,
        is_dot=is_dot,
    )


def prepare_planes_with_kernels(
    codebook: Tensor, *, group: int = 0, lanes: int = 4, vec: int = 2, is_dot: bool = False
) -> CodePlanes:
    """`prepare_planes` in one launch, or two. Only the order of sums is another."""
    from vqtriton.kernels import prepare_planes as kernel

    inner, is_split, has_bias_columns = inner_size(codebook.shape[2])
    order = {"group": group or group_size(codebook.shape[2]), "lanes": lanes, "vec": vec}
    tensors = kernel.prepare_planes(
        codebook, inner, is_split, has_bias_columns, **order, is_dot=is_dot
    )
    return planes_of(tensors, codebook.shape[2], **order, is_dot=is_dot)


def planes_of(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    group: int = 0,
    lanes: int = 4,
    vec: int = 2,
    is_dot: bool = False,
) -> CodePlanes:
    """`CodePlanes` of D dimensions, from its tensors."""
    codes, offset, mean, scale, norms = tensors
    _, is_split, has_bias_columns = inner_size(dim)
    group = group or group_size(dim)
    return CodePlanes(
        *(codes, offset, mean, scale, norms, group, lanes, vec),
        *(is_split, has_bias_columns, is_dot),
    )


def accumulation_bound(inner: int, unit: TensorCore = WORST_TENSOR_CORE) -> float:
    """Error of a sum of ``inner`` products in units of the sum of their magnitudes."""
    steps = -(-inner // unit.products)
    # all terms of a step but the largest are cut when they are aligned, then their sum is
    return steps * (unit.products * 2.0**-unit.extra_bits + 1) * 2.0**-23


def screen_bound(
    planes: CodePlanes, block_k: int, unit: TensorCore = WORST_TENSOR_CORE
) -> ScreenBound:
    """Bound on the error of a score from `vqtriton.kernels.screen_codes`.

    Args:
        block_k: codes in a tile.
        unit: what multiplies.
    """
    dim, inner = planes.mean.shape[1], planes.codes.shape[2]
    positions = block_k // (planes.group * planes.lanes)
    accumulation = accumulation_bound(inner, unit)
    packing = positions * 2 * U32
    own = 4 * U32 + packing
    return ScreenBound(
        products=SLACK * (accumulation + own),
        bias=SLACK * ((own + accumulation * planes.has_bias_columns) / 2 + (dim + 4) * U64),
        distances=SLACK * (dim + 4) * U64,
        tiny=TINY,
    )
