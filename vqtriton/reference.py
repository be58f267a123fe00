"""What is right: every op in plain torch, evaluated in float64. Slow, holds [N, K].

These functions have the signatures of the public ones; ``precision`` and ``backend`` are accepted
so that one can stand in for the other, and have no effect.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class Quantized(NamedTuple):
    """What `vector_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


# so that an exported program that returns it can be saved
_pytree._register_namedtuple(Quantized, serialized_type_name="vqtriton.Quantized")


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """[N, K] float64 squared L2 distances between x [N, D] and codebook [K, D].

    This order of operations *defines* the distance: one subtraction, one product and one addition
    per dimension, in the order of the dimensions, each rounded once to float64. Every backend
    decides close calls with exactly this sum, so that not even the last bit is left to chance.
    """
    x, codebook = x.double(), codebook.double()
    distances = x.new_zeros(x.shape[0], codebook.shape[0])
    for d in range(x.shape[1]):
        difference = x[:, d, None] - codebook[None, :, d]
        distances = distances + difference * difference
    return distances


def nearest_code(
    x: Tensor, codebook: Tensor, *, precision: str = "exact", backend: str = "auto"
) -> Tensor:
    """See `vqtriton.nearest_code`."""
    distances = squared_distances(x.detach().reshape(-1, x.shape[-1]), codebook.detach())
    distances = distances.nan_to_num(nan=torch.inf, posinf=torch.inf)
    # `min` may return any of equal minima; the lowest index is the rule
    columns = torch.arange(codebook.shape[0], dtype=torch.int64, device=x.device)
    is_nearest = distances == distances.amin(1, keepdim=True)
    indices = torch.where(is_nearest, columns, codebook.shape[0]).amin(1)
    return indices.reshape(x.shape[:-1])


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    deterministic: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See `vqtriton.code_sums`."""
    rows = x.reshape(-1, x.shape[-1]).double()
    flat = indices.reshape(-1)
    keep = (flat >= 0) & (flat < codebook_size) & rows.isfinite().all(1)
    one_hot = torch.nn.functional.one_hot(flat[keep], codebook_size)
    sums = one_hot.double().T @ rows[keep]
    return sums.to(torch.float64 if x.dtype == torch.float64 else torch.float32), one_hot.sum(0)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
) -> Quantized:
    """See `vqtriton.vector_quantize`. The three stop-gradients are written as in the paper."""
    indices = nearest_code(x, codebook)
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    x64 = x.double().where(valid[..., None], 0)
    finite = x64.isfinite().all(-1)
    codes = codebook.double()[indices]

    # straight through: the value of the code, the gradient of x
    x_finite = x64.where(x64.isfinite(), 0)
    quantized = (codes.detach() + (x_finite - x_finite.detach())).where(valid[..., None], 0)

    # a row that is not finite has no say in where its code goes
    target = x64.detach().where(finite[..., None], codes.detach())
    codebook_term = (target - codes).square().sum(-1)
    commitment_term = (x64 - codes.detach()).square().sum(-1)
    loss = codebook_weight * codebook_term + commitment_weight * commitment_term
    loss = loss.where(finite, torch.nan).where(valid, 0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (valid.sum() * x.shape[-1]).clamp(min=1)
    loss = loss.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return Quantized(quantized.to(x.dtype), indices.where(valid, -1), loss)
