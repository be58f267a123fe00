"""The layer as one would write it in eager torch, in the dtype of its inputs.

What our errors are measured by: at the indices given, this is what torch itself makes of the
formulas of the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    codes = codebook[indices]
    # torch 2.8 has no gradient of mse_loss for two dtypes; later ones widen as here
    dtype = torch.promote_types(x.dtype, codes.dtype)
    codebook_term = F.mse_loss(codes.to(dtype), x.detach().to(dtype))
    commitment_term = F.mse_loss(x.to(dtype), codes.detach().to(dtype))
    quantized = (x + (codes - x).detach()).to(x.dtype)
    return quantized, codebook_weight * codebook_term + commitment_weight * commitment_term


def error(value: Tensor, right: Tensor) -> float:
    return (value.double() - right.double()).abs().max().item()


# of the largest result: what ours may be off by when torch happens to be off by less. Two roundings
# in half precision, four in float32, where a sum over D is rounded in both
FLOOR = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, right: Tensor) -> None:
    """Our error is at most twice torch's own in the same dtype, or some roundings of the result."""
    assert ours.dtype == torchs.dtype
    floor = FLOOR[ours.dtype] * right.abs().max().item()
    assert error(ours, right) <= 2 * error(torchs, right) + floor
