"""Arguments that several functions share, in the order of the ops' schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pull(NamedTuple):
    """What draws vectors and codes to one another: weight·grad_loss·(x - codebook[indices]).

    The ops take it without heads: [N, D] for [H, N, D], and so on. Strides may be any.
    """

    grad_loss: Tensor  # [H, N] fp32, the gradient of each row's part of the loss
    x: Tensor  # [H, N, D] fp32 / fp16 / bf16
    codebook: Tensor  # [H, K, D] fp32 / fp16 / bf16
    indices: Tensor  # [H, N] int64 in [-1, K)
    # twice the weight of the commitment term if x is pulled, of the codebook term if codes are
    weight: float


class Update(NamedTuple):
    """A step of the moving averages of codes, and of dead codes."""

    cluster_size: Tensor  # [K] fp32, changed
    codebook: Tensor  # [K, D] fp32, changed
    counts: Tensor  # [K] fp32 / int64, rows of the batch per code
    sums: Tensor | None  # [K, D] fp32, their sums; None: the codes follow no moving average
    samples: Tensor | None  # [K, D] fp32, rows that may replace dead codes
    is_filled: Tensor | None  # [K] fp32, which of the samples there are
    # [2] fp32, 1 - decay, and the cluster size below which a code is dead. On the device, so that
    # neither a graph nor a compiler takes it for a constant
    rates: Tensor
