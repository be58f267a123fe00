"""The ops of a chain by kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqtriton import triton_backend
from vqtriton.residual.torch_backend import (
    residual_grad_codes,
    residual_grad_x,
    sums_of_levels,
)

__all__ = [
    "residual_grad_codes",
    "residual_grad_x",
    "residual_quantize",
    "residual_sums",
]
# tensors of a codebook that was prepared
PARTS = 5


def residual_quantize(
    x: Tensor,
    codebooks: Sequence[Tensor],
    depths: Tensor | None,
    precision: str,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vqtriton.residual.torch_backend`; one search a level."""
    residual = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    quantized = torch.zeros_like(residual)
    indices, errors = [], []
    for level, codebook in enumerate(codebooks):
        mask = None if depths is None else depths > level
        tensors = prepared[level * PARTS : (level + 1) * PARTS]
        codes, error, found, _ = triton_backend.vector_quantize(
            residual, codebook, mask, 1.0, 0.0, "none", precision, tensors
        )
        residual = residual - codes
        quantized += codes
        indices.append(found)
        errors.append(error)
    return quantized.to(x.dtype), torch.stack(indices, 1), torch.stack(errors, 1)


def residual_sums(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, places: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """See `vqtriton.residual.torch_backend`."""
    return sums_of_levels(triton_backend.code_sums, x, codebooks, indices, places)
