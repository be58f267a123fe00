"""How well a codebook is used, and what quantization costs."""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy (nats) of the code frequencies: the number of codes in effective use.

    Args:
        counts: [..., K], how often each code was chosen; any non-negative numbers.

    Returns:
        [...] float64 in [1, K]; 0 where no code was chosen.
    """
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    entropy = torch.special.entr(counts / total).sum(-1)
    return entropy.exp().where(total.squeeze(-1) > 0, 0)


def usage(counts: Tensor) -> Tensor:
    """Fraction of the codes that were chosen at least once: [..., K] -> [...] float64 in [0, 1]."""
    return (counts > 0).double().mean(-1)


def quantization_error(x: Tensor, quantized: Tensor) -> Tensor:
    """Mean over the vectors of the squared L2 distance to what replaced them.

    Args:
        x: [..., D].
        quantized: [..., D].

    Returns:
        [] float64, in squared units of ``x``; NaN if there are no vectors.
    """
    if x.shape != quantized.shape:
        raise ValueError(f"quantized has shape {tuple(quantized.shape)}, x has {tuple(x.shape)}")
    return (x.double() - quantized.double()).square().sum(-1).mean()
