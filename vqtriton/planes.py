"""Codebooks as fp16 planes for the tensor-core screen, and the bound on its error.

The names follow vqtriton/screening.py: y = scale·(x − mean), e_k = scale·(c_k − mean). The score
of code k is s_k = y·e_k + (E² − ‖e_k‖²)/2 with E = max ‖e_k‖. The constant E²/2 changes no decision
and keeps the best score of a row from being negative. docs/exactness.md derives the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton.kernels.constants import (
    BIAS_WEIGHTS,
    EXPONENT,
    GROUP,
    MIN_NORMAL,
    PAD_CODES,
    PAD_OFFSET,
    SLACK,
)
from vqtriton.screening import U64
from vqtriton.tensors import finite_rows

# Dimensions up to which the inner columns hold both planes, so that a score has the accuracy of
# float32. Four columns a dimension: three products and a place for the bias.
MAX_SPLIT_DIM = 8
# The unit of accumulation on tensor cores, which truncate. Not measured on a GPU.
ACCUMULATION_UNIT = 2.0**-22
U32 = 2.0**-24
# Underflow, most of all of the bias in fp16: see docs/exactness.md.
TINY = 2.0**-20


class CodePlanes(NamedTuple):
    """Codebooks in the form that the tensor-core screen reads."""

    codes: Tensor  # [H, K, inner] fp16, K padded, in the order of the columns
    offset: Tensor  # [H, K] fp32, (‖e_k‖² − E²)/2, likewise; PAD_OFFSET: no finite code
    mean: Tensor  # [H, D] fp32
    scale: Tensor  # [H] fp32, a power of two
    # [H, 4] fp32; upper bounds: E, max ‖low part of e_k‖, max ‖residual of e_k‖; then the E²/2 that
    # is in `offset`, rounded to nearest
    norms: Tensor
    group: int  # codes in a group: group j is codes [j·group, (j + 1)·group)
    lanes: int  # threads that share a row of an accumulator
    vec: int  # columns that follow one another in a thread
    is_split: bool  # inner is (high, low, high, bias) per dimension, (low, high, high, weight) in x
    has_bias_columns: bool  # three inner columns hold the bias

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What must be kept to make it again with `planes_of`."""
        return self.codes, self.offset, self.mean, self.scale, self.norms


class ScreenBound(NamedTuple):
    """What `vqtriton.kernels.screen_codes` turns into the bound of a row."""

    products: float  # times (‖x_h‖ + ‖x_l‖ + ‖δx‖)·E
    bias: float  # times E²
    distances: float  # times (‖x_h‖ + ‖x_l‖ + ‖δx‖)²
    tiny: float


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


def prepare_planes(
    codebook: Tensor, *, group: int = GROUP, lanes: int = 4, vec: int = 2
) -> CodePlanes:
    """Centre, scale, split into planes, order for the screen: what the kernels are held to.

    Args:
        codebook: [H, K, D] float32 / float16 / bfloat16.
        group: codes whose scores are reduced together.
        lanes, vec: of the accumulator: `vqtriton.kernels.screen_codes.ACCUMULATOR_ORDER`.
    """
    size, dim = codebook.shape[1:]
    inner, is_split, has_bias_columns = inner_size(dim)
    padding = -size % PAD_CODES
    codes = codebook.double()
    is_finite = finite_rows(codes)
    codes = codes.where(is_finite[..., None], 0)
    mean = (codes.sum(1) / is_finite.sum(1).clamp(min=1)[:, None]).float()
    codes = (codes - mean.double()[:, None]).where(is_finite[..., None], 0)
    exponent = torch.frexp(codes.abs().amax((1, 2))).exponent
    scale = torch.ldexp(torch.ones_like(mean[:, 0]), (EXPONENT - exponent).clamp(-126, 126))
    codes = codes * scale.double()[:, None, None]

    high = to_plane(codes)
    rest = codes - high.double()
    low = torch.zeros_like(high)
    if is_split:
        low = to_plane(rest)
        rest = rest - low.double()
    sqnorm = codes.square().sum(2)
    max_sqnorm = sqnorm.amax(1)
    sqnorms = [
        torch.maximum(max_sqnorm, high.double().square().sum(2).amax(1)),
        low.double().square().sum(2).amax(1),
        rest.square().sum(2).amax(1),
    ]
    # upper bounds stay upper bounds when they are rounded
    norms = torch.stack([*(sq.sqrt() * (1 + 2.0**-22) for sq in sqnorms), max_sqnorm / 2], 1)
    offset = ((sqnorm - max_sqnorm[:, None]) / 2).where(is_finite, PAD_OFFSET)
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
    )


def prepare_planes_with_kernels(
    codebook: Tensor, *, group: int = GROUP, lanes: int = 4, vec: int = 2
) -> CodePlanes:
    """`prepare_planes` in three launches. Only the order of the sums in float64 is another."""
    from vqtriton.kernels import prepare_planes as kernel

    inner, is_split, has_bias_columns = inner_size(codebook.shape[2])
    tensors = kernel.prepare_planes(
        codebook, inner, is_split, has_bias_columns, group=group, lanes=lanes, vec=vec
    )
    return planes_of(tensors, codebook.shape[2], group=group, lanes=lanes, vec=vec)


def planes_of(
    tensors: Sequence[Tensor], dim: int, *, group: int = GROUP, lanes: int = 4, vec: int = 2
) -> CodePlanes:
    """`CodePlanes` of D dimensions, from its tensors."""
    codes, offset, mean, scale, norms = tensors
    _, is_split, has_bias_columns = inner_size(dim)
    return CodePlanes(
        codes, offset, mean, scale, norms, group, lanes, vec, is_split, has_bias_columns
    )


def screen_bound(planes: CodePlanes, block_k: int) -> ScreenBound:
    """Bound on the error of a score from `vqtriton.kernels.screen_codes` with tiles of block_k."""
    dim, inner = planes.mean.shape[1], planes.codes.shape[2]
    positions = block_k // (planes.group * planes.lanes)
    accumulation = (inner + 2) * ACCUMULATION_UNIT
    packing = positions * 2 * U32
    own = 4 * U32 + packing
    return ScreenBound(
        products=SLACK * (accumulation + own),
        bias=SLACK * ((own + accumulation * planes.has_bias_columns) / 2 + (dim + 4) * U64),
        distances=SLACK * (dim + 4) * U64,
        tiny=TINY,
    )
