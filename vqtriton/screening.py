"""The arithmetic that makes a cheap search exact: a prepared codebook and an error bound.

With y = scale·(x − mean) and e_k = scale·(c_k − mean), the nearest code maximises the score
s_k = y·e_k − ‖e_k‖²/2. For the metric "dot" the mean is 0 and the score y·e_k. A screen evaluates
the scores in low precision. A code whose score is more than twice the error bound below the best
cannot be the nearest; whatever is left is decided by the float64 distance of
`vqtriton.reference.squared_distances`, or by the dot product. docs/design.md derives the bound.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import frexp, isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton.kernels.code_planes import OwnBound
from vqtriton.kernels.constants import SLACK
from vqtriton.tensors import finite_rows

# Unit roundoff of the canonical distance.
U64 = 2.0**-53
# Underflow: each of some 3·D roundings can lose the smallest normal number, D < 2¹².
TINY = {torch.float32: 2.0**-110, torch.float64: 2.0**-1008}

# Largest norms of codes that need no scale.
PLAIN_NORMS = 2.0**-30, 2.0**30

# A sum over so few dimensions, of so many codes, is faster as a product with a vector.
SHORT, MANY = 16, 4096
# Elements of the codes that are squared at a time.
BLOCK_ELEMENTS = 1 << 17
# Scores of a block: smaller ones are slower.
BLOCK_SCORES = 1 << 21
# Codes whose costs are reduced together: `amin` over strides is vectorised, `argmin` is not.
GROUP = 8
# Norms below it have squares, and distances, that do not overflow.
LARGEST_NORM = {torch.float32: 2.0**60, torch.float64: 2.0**500}


class CentredCodebook(NamedTuple):
    """A codebook in the form that the screens read."""

    codes: Tensor  # [K, D] screen dtype, e_k; zeros where a code is not finite
    half_sqnorm: Tensor  # [K] screen dtype, unit·‖e_k‖²/2, or 0 for "dot"; +inf: code not finite
    mean: Tensor | None  # [D] screen dtype; None: 0, with the scale 1
    scale: float  # a power of two
    max_norm: float  # max ‖e_k‖
    unit: float = 1.0  # what the costs of codes are measured in

    @property
    def tensors(self) -> list[Tensor]:
        """What must be kept to make it again with `centred_codebook_of`."""
        assert self.mean is not None
        numbers = self.codes.new_tensor((self.scale, self.max_norm))
        return [self.codes, self.half_sqnorm, self.mean, numbers]


def centred_codebook_of(tensors: Sequence[Tensor]) -> CentredCodebook:
    codes, half_sqnorm, mean, numbers = tensors
    return CentredCodebook(codes, half_sqnorm, mean, *numbers.tolist())


def plain_codebook(codebook: Tensor, dtype: torch.dtype, metric: str) -> CentredCodebook | None:
    """A codebook as it is, which takes one pass; None if its squares may leave the range.

    Its mean counts as 0. The norms are summed in ``dtype``, in any order.
    """
    codes = codebook if codebook.dtype == dtype else codebook.to(dtype)
    if codes.shape[1] <= SHORT and codes.shape[0] >= MANY:
        ones = codes.new_ones(codes.shape[1])
        # with `out`, autocast leaves it alone
        sqnorm = torch.mv(codes.square(), ones, out=torch.empty_like(codes[:, 0]))
    else:
        sqnorm = torch.linalg.vector_norm(codes, dim=1).square_()
    max_norm = sqrt(float(sqnorm.amax()))
    # written so that a NaN is out of it
    if not PLAIN_NORMS[0] < max_norm < PLAIN_NORMS[1]:
        return None
    if metric == "dot":
        sqnorm.zero_()
    # to halve the norms would take another pass
    return CentredCodebook(codes, sqnorm, None, 1.0, max_norm, 2.0)


def centred_codebook(codebook: Tensor, dtype: torch.dtype, metric: str = "l2") -> CentredCodebook:
    """Centre on the mean and scale by a power of two, so that max |e_kd| is in [1/2, 1).

    Both change no decision. Centring keeps the scores small beside their differences when the data
    is far from the origin; scaling keeps the products away from overflow and underflow. In float64
    there is no scale: there the screen must overflow and underflow where the distances do.
    For "dot" the mean is 0: then scores are dot products of the codes as they are.
    """
    centred = _centred(codebook.to(dtype), dtype, None, metric)
    if not isfinite(centred.max_norm):
        # codes that are not finite, or whose sum or difference overflows
        centred = _centred(codebook.double(), dtype, finite_rows(codebook), metric)
    return centred


def _centred(
    codebook: Tensor, dtype: torch.dtype, is_finite: Tensor | None, metric: str
) -> CentredCodebook:
    """`centred_codebook`, with differences in the codebook's dtype.

    None: all codes are finite, and so are their sum and their differences.
    """
    if is_finite is not None:
        codebook = codebook.masked_fill(~is_finite[:, None], 0)
    if metric == "dot":
        mean = codebook.new_zeros(codebook.shape[1], dtype=dtype)
    elif is_finite is None:
        mean = codebook.mean(0)
    else:
        # an average of values below the largest number cannot overflow, their sum can
        mean = (codebook / is_finite.sum().clamp(min=1)).sum(0).to(dtype)
    codes = codebook - mean
    if is_finite is not None:
        codes.masked_fill_(~is_finite[:, None], 0)
    scale = 1.0
    if dtype == torch.float32:
        low, high = codes.aminmax()
        exponent = frexp(max(-float(low), float(high)))[1]
        scale = 2.0 ** min(max(-exponent, -120), 120)
        codes.mul_(scale)
    codes = codes.to(dtype, memory_format=torch.contiguous_format)
    # of the codes as they were rounded, some at a time: new memory takes longer than the sums
    parts = codes.split(max(1, BLOCK_ELEMENTS // codes.shape[1]))
    sqnorms = [part.to(torch.float64, copy=True).square_().sum(1) for part in parts]
    sqnorm = torch.cat(sqnorms) if len(sqnorms) > 1 else sqnorms[0]
    half_sqnorm = (torch.zeros_like(sqnorm) if metric == "dot" else sqnorm / 2).to(dtype)
    if is_finite is not None:
        half_sqnorm.masked_fill_(~is_finite, torch.inf)
    return CentredCodebook(codes, half_sqnorm, mean, scale, sqrt(float(sqnorm.amax())))


@functools.cache
def error_bound(dim: int, dtype: torch.dtype, input_roundoff: float = 0.0) -> OwnBound:
    """Bound on the error of a score summed in ``dtype``, in any order.

    Args:
        dim: D.
        dtype: of the products and of their sum.
        input_roundoff: unit roundoff of what the matmul does to its inputs first
            (2⁻⁹ for bfloat16), 0 if it takes them as they are.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return OwnBound(
        products=SLACK * ((dim + 8) * roundoff / (1 - (dim + 8) * roundoff) + 3 * input_roundoff),
        distances=SLACK * (dim + 4) * U64,
        tiny=TINY[dtype],
    )


def margin_terms(
    prepared: CentredCodebook, bound: OwnBound | None, longest: float, metric: str
) -> tuple[float, float]:
    """Slope and constant, by the norm of its row, of twice the error of a cost."""
    if bound is None:
        return 0.0, 0.0
    max_norm = prepared.max_norm
    slope, constant = bound.products * max_norm, bound.tiny
    if metric == "dot":
        slope += bound.distances * max_norm
    else:
        slope += bound.distances * longest
        # norms of plain codes err as much as their products
        constant += bound.products * max_norm * max_norm * (0.5 if prepared.mean is not None else 1)
    return 2 * prepared.unit * slope, 2 * prepared.unit * constant


def add_margin(
    least: Tensor, y: Tensor, prepared: CentredCodebook, bound: OwnBound | None, metric: str
) -> Tensor | None:
    """Adds a margin to the least cost of each row: the nearest code's cost is not above the sum.

    Args:
        least: [N], changed; NaN where the numbers of a row may overflow.
        y: [N, D], the rows, centred and scaled.
        bound: None: no margin is added.

    Returns:
        [N] bool, the rows whose numbers do not overflow; None where that is all of them.
    """
    largest = LARGEST_NORM[y.dtype] - prepared.max_norm
    if bound is not None and metric == "l2":
        # one long row is not to widen the margin of the others
        largest = min(largest, bound.products / bound.distances * prepared.max_norm)
    norm = torch.linalg.vector_norm(y, dim=1)
    longest = float(norm.amax())
    is_sound = None
    if not longest < largest:
        is_sound = norm < largest
        least.masked_fill_(~is_sound, torch.nan)
        norm.masked_fill_(~is_sound, 0)
        longest = float(norm.amax())
    if bound is not None:
        slope, constant = margin_terms(prepared, bound, longest, metric)
        least.add_(norm, alpha=slope).add_(constant)
    return is_sound


def matmul_input_roundoff(device: torch.device, dtype: torch.dtype) -> float:
    """What the process-wide settings allow a float32 matmul to do to its inputs."""
    if dtype != torch.float32:
        return 0.0
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # torch refuses the older question once this newer setting has been used
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is None:
        setting = torch.get_float32_matmul_precision()
    return 0.0 if setting in ("ieee", "none", "highest") else 2.0**-9
