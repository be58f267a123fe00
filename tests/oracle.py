"""What is right, in numpy and float64, independent of the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def distances(x: Tensor, codebook: Tensor) -> np.ndarray:
    """[N, K] sums of squared differences, added up in the order of the dimensions."""
    x, codebook = x.detach().cpu().double().numpy(), codebook.detach().cpu().double().numpy()
    total = np.zeros((x.shape[0], codebook.shape[0]))
    with np.errstate(all="ignore"):
        for x_column, code_column in zip(x.T, codebook.T, strict=True):
            total += (x_column[:, None] - code_column[None, :]) ** 2
    return np.where(np.isfinite(total), total, np.inf)


def costs_of_dots(x: Tensor, codebook: Tensor) -> np.ndarray:
    """[N, K] opposites of the dot products, added up in the order of the dimensions."""
    x, codebook = x.detach().cpu().double().numpy(), codebook.detach().cpu().double().numpy()
    total = np.zeros((x.shape[0], codebook.shape[0]))
    with np.errstate(all="ignore"):
        for x_column, code_column in zip(x.T, codebook.T, strict=True):
            total += x_column[:, None] * code_column[None, :]
    return np.where(np.isfinite(total), -total, np.inf)


def normalized(x: Tensor) -> Tensor:
    """[N, D] divided by the lengths, whose squares are added up in the order of the dimensions."""
    rows = x.detach().cpu().double().numpy()
    with np.errstate(all="ignore"):
        sqnorms = np.zeros(len(rows))
        for column in rows.T:
            sqnorms += column**2
        rows = rows / np.maximum(np.sqrt(sqnorms), 1e-12)[:, None]
        return torch.from_numpy(rows if x.dtype == torch.float64 else rows.astype(np.float32))


def nearest_code(x: Tensor, codebook: Tensor, block: int = 512, metric: str = "l2") -> Tensor:
    """[N] int64; `argmin` returns the first of equal minima."""
    flat = x.reshape(-1, x.shape[-1])
    if metric == "cosine":
        flat, codebook = normalized(flat), normalized(codebook)
    costs = costs_of_dots if metric == "dot" else distances
    parts = [costs(rows, codebook).argmin(1) for rows in flat.split(block)]
    indices = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(indices).reshape(x.shape[:-1])


def code_sums(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """float64 sums [K, D] and counts [K]."""
    sums = np.zeros((codebook_size, x.shape[1]))
    counts = np.zeros(codebook_size, dtype=np.int64)
    for row, index in zip(x.detach().cpu().double().numpy(), indices.tolist(), strict=True):
        if 0 <= index < codebook_size and np.isfinite(row).all():
            sums[index] += row
            counts[index] += 1
    return torch.from_numpy(sums), torch.from_numpy(counts)


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], codebooks [Q, K, D] -> quantized as x, indices [N, Q], float64 errors [N, Q].

    What is left after a level, and the sum of the codes, are float32.
    """
    left = x.detach().cpu().float().numpy()
    is_wrong = ~np.isfinite(left).all(1)
    quantized, indices, errors = None, [], []
    with np.errstate(all="ignore"):
        for codebook in codebooks.detach().cpu().float():
            indices.append(nearest_code(torch.from_numpy(left), codebook))
            codes = codebook.numpy()[indices[-1].numpy()]
            quantized = codes if quantized is None else quantized + codes
            left = left - codes
            squares = np.square(left.astype(np.float64)).sum(1)
            errors.append(torch.from_numpy(np.where(is_wrong, np.nan, squares)))
    return torch.from_numpy(quantized).to(x.dtype), torch.stack(indices, 1), torch.stack(errors, 1)
