"""Rows in a random order, from which dead codes are given new values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.code_sums import CodeSumsConfig, sort_rows
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch

# pairs of rows and codes up to which rows are counted by comparing each index with each code
MOST_COMPARED = 1 << 28
# a key is below this
MOST_KEYS = (1 << 31) - 2


class Drawn(NamedTuple):
    """What `vqtriton.kernels.ema_update.ema_update_` draws from."""

    rows: Tensor  # [N, D] fp32 / fp16 / bf16
    order: Tensor  # [N] int32 / int64: those that may be drawn come first, in a random order
    old_size: Tensor  # [K] fp32, the cluster sizes before the update
    counts: Tensor  # [K] int64, rows that count and are finite, per code


@triton.jit(do_not_specialize=["N", "K"])
def draw_keys_kernel(
    x_ptr,         # [N, D] fp32 / fp16 / bf16
    indices_ptr,   # [N] int64, -1 of rows that do not count
    seed_ptr,      # [1] int64
    size_ptr,      # [K] fp32
    keys_ptr,      # [N] int64, out: random; -1 of rows that do not count or are not finite
    old_size_ptr,  # [K] fp32, out: a copy of the sizes, which the update overwrites
    N, K, stride_xn, stride_xd, stride_s,
    D: tl.constexpr, MOST_KEYS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    is_drawn = tl.load(indices_ptr + offs_n, mask=mask, other=-1) >= 0
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = tl.load(
            x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd,
            mask=mask[:, None] & (offs_d < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        is_bad = tl.where(tl.abs(x) < float("inf"), 0, 1)
        is_drawn = is_drawn & (tl.max(is_bad, 1) == 0)
    key = tl.randint(tl.load(seed_ptr), offs_n.to(tl.int32)).to(tl.uint32, bitcast=True)
    key = (key.to(tl.int64) & 0x7FFFFFFF) % MOST_KEYS
    tl.store(keys_ptr + offs_n, tl.where(is_drawn, key, -1), mask=mask)
    for start in range(tl.program_id(0) * BLOCK_N, K, tl.num_programs(0) * BLOCK_N):
        offs_k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        size = tl.load(size_ptr + offs_k * stride_s, mask=offs_k < K, other=0.0)
        tl.store(old_size_ptr + offs_k, size, mask=offs_k < K)


@triton.jit(do_not_specialize=["N", "K"])
def count_rows_kernel(
    indices_ptr,  # [N] int64
    keys_ptr,     # [N] int64, negative of rows that are left out
    counts_ptr,   # [K] int64, out: the others, per code
    N, K,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    counts = tl.zeros((BLOCK_K, BLOCK_N), tl.int32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        index = tl.load(indices_ptr + offs_n, mask=offs_n < N, other=-1)
        is_counted = tl.load(keys_ptr + offs_n, mask=offs_n < N, other=-1) >= 0
        index = tl.where(is_counted, index, -1)
        counts += (index[None, :] == offs_k[:, None]).to(tl.int32)
    tl.store(counts_ptr + offs_k, tl.sum(counts, 1).to(tl.int64), mask=offs_k < K)


def draw_rows(
    x: Tensor,
    indices: Tensor,
    cluster_size: Tensor,
    seed: Tensor,
    counts: Tensor | None = None,
) -> Drawn:
    """All rows that count and are finite, in a random order.

    Args:
        x: [N, D] float32 / float16 / bfloat16, any strides, N >= 1.
        indices: [N] int64, -1 for rows that do not count.
        cluster_size: [K] float32.
        seed: [1] int64, random.
        counts: [K] int64, if the rows have been counted.
    """
    num_rows, dim = x.shape
    size = len(cluster_size)
    device = x.device
    keys = torch.empty(1, num_rows, dtype=torch.int64, device=device)
    old_size = torch.empty(size, dtype=torch.float32, device=device)
    block_d = min(64, next_power_of_2(dim))
    with torch.cuda.device_of(x):
        launch(
            draw_keys_kernel,
            (cdiv(num_rows, 64),),
            *(x, indices.contiguous(), seed, cluster_size, keys, old_size),
            *(num_rows, size, *x.stride(), cluster_size.stride(0)),
            D=dim,
            MOST_KEYS=MOST_KEYS,
            BLOCK_N=64,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=False,
        )
        order, _ = sort_rows(keys, MOST_KEYS, None, CodeSumsConfig())
        if counts is None:
            counts = torch.empty(size, dtype=torch.int64, device=device)
            tensors = indices.contiguous(), keys, counts
            tiles = {"BLOCK_K": 16, "BLOCK_N": 128}
            options = {**tiles, "num_warps": 4, "enable_fp_fusion": False}
            launch(count_rows_kernel, (cdiv(size, 16),), *tensors, num_rows, size, **options)
    return Drawn(x, order, old_size, counts)
