"""Moving averages, the codes that follow from them, and dead codes, in place and in one launch.

Every program goes through all [K] counts and cluster sizes first, in the same order, so that all
have the same totals without waiting for each other; then each updates codes of its own. So there
are no more programs than multiprocessors: each reads 12·K bytes, mostly of L2, for the totals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.row_planes import register_limit
from vqtriton.kernels.screen_codes import num_processors


@dataclass(frozen=True)
class EmaUpdateConfig:
    """Tiles."""

    # codes that are summed at a time
    block_scan: int = 2048
    # elements of a tile of codes, and most codes and dimensions of it
    block_elements: int = 2048
    block_k: int = 256
    block_d: int = 256
    num_warps: int = 8
    max_registers: int = 168


@triton.jit
def _lerp(start, end, weight):
    # exact at both ends, and what torch.lerp does
    step = end - start
    return tl.where(weight < 0.5, start + weight * step, end - step * (1 - weight))


@triton.jit
def _finite(value):
    # as torch.nan_to_num: an average that overflows once would stay infinite for ever
    largest = 3.4028234663852886e38
    return tl.where(value == value, tl.clamp(value, -largest, largest), 0.0)


@triton.jit(do_not_specialize=["K", "codes_per_program"])
def ema_update_kernel(
    counts_ptr,      # [K] fp32, of the batch
    sums_ptr,        # [K, D] fp32, of the batch, if IS_EMA
    samples_ptr,     # [K, D] fp32, if REVIVES
    filled_ptr,      # [K] int64, the samples that are filled come first, if REVIVES
    num_filled_ptr,  # [] int64, how many are, if REVIVES
    old_size_ptr,    # [K] fp32, a copy of the cluster sizes as they were
    size_ptr,        # [K] fp32, out
    embed_sum_ptr,   # [K, D] fp32, in and out, if IS_EMA
    codebook_ptr,    # [K, D] fp32, in and out
    weight, eps, threshold,
    K, codes_per_program, stride_s, stride_ek, stride_ed, stride_ck, stride_cd,
    D: tl.constexpr, IS_EMA: tl.constexpr, REVIVES: tl.constexpr,
    BLOCK_SCAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first_code = tl.program_id(0).to(tl.int64) * codes_per_program
    end_code = tl.minimum(first_code + codes_per_program, K)

    most = tl.zeros((BLOCK_SCAN,), tl.float32)
    for first in range(0, K, BLOCK_SCAN):
        offs = first + tl.arange(0, BLOCK_SCAN).to(tl.int64)
        most = tl.maximum(most, tl.load(counts_ptr + offs, mask=offs < K, other=0.0))
    # a batch in which no row counts is no step
    weight = tl.where(tl.max(most, 0) > 0, weight, 0.0)

    totals = tl.zeros((BLOCK_SCAN,), tl.float64)
    dead_before = tl.zeros((BLOCK_SCAN,), tl.int32)
    for first in range(0, K, BLOCK_SCAN):
        offs = first + tl.arange(0, BLOCK_SCAN).to(tl.int64)
        mask = offs < K
        size = _lerp(
            tl.load(old_size_ptr + offs, mask=mask, other=0.0),
            tl.load(counts_ptr + offs, mask=mask, other=0.0),
            weight,
        )
        totals += size.to(tl.float64)
        dead_before += ((size < threshold) & (offs < first_code)).to(tl.int32)
    total = tl.sum(totals, 0)
    # (size + eps) / (total + K·eps)·total: a code is the average of so many rows
    scale = (total / (total + K * eps)).to(tl.float32)
    revived_size = tl.maximum((total / K).to(tl.float32), threshold)
    turn = tl.sum(dead_before, 0)
    num_filled = turn
    if REVIVES:
        num_filled = tl.load(num_filled_ptr).to(tl.int32)

    for first in range(first_code, end_code, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end_code
        size = _lerp(
            tl.load(old_size_ptr + offs_k, mask=mask_k, other=0.0),
            tl.load(counts_ptr + offs_k, mask=mask_k, other=0.0),
            weight,
        )
        rows = (size + eps) * scale
        if REVIVES:
            is_dead = (size < threshold) & mask_k & (num_filled > 0)
            place = (turn + tl.cumsum(is_dead.to(tl.int32), 0) - 1) % tl.maximum(num_filled, 1)
            turn += tl.sum(is_dead.to(tl.int32), 0)
            sample = tl.load(filled_ptr + place.to(tl.int64), mask=is_dead, other=0)
            size = tl.where(is_dead, revived_size, size)
        tl.store(size_ptr + offs_k * stride_s, size, mask=mask_k)
        for first_d in range(0, D, BLOCK_D):
            offs_d = first_d + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = mask_k[:, None] & (offs_d < D)[None, :]
            offs = offs_k[:, None] * D + offs_d[None, :]
            codes_ptr = codebook_ptr + offs_k[:, None] * stride_ck + offs_d[None, :] * stride_cd
            code = tl.load(codes_ptr, mask=mask, other=0.0)
            if IS_EMA:
                sums_of_codes_ptr = (
                    embed_sum_ptr + offs_k[:, None] * stride_ek + offs_d[None, :] * stride_ed
                )
                embed_sum = _finite(
                    _lerp(
                        tl.load(sums_of_codes_ptr, mask=mask, other=0.0),
                        _finite(tl.load(sums_ptr + offs, mask=mask, other=0.0)),
                        weight,
                    )
                )
                # with eps=0 a code that was never chosen has nothing to be the average of
                is_mean = (rows > 0)[:, None]
                mean = _finite(tl.div_rn(embed_sum, tl.where(is_mean, rows[:, None], 1.0)))
                code = tl.where(is_mean, mean, code)
            if REVIVES:
                drawn = tl.load(
                    samples_ptr + sample[:, None] * D + offs_d[None, :],
                    mask=mask & is_dead[:, None],
                    other=0.0,
                )
                code = tl.where(is_dead[:, None], drawn, code)
            if IS_EMA:
                if REVIVES:
                    embed_sum = tl.where(is_dead[:, None], _finite(drawn * revived_size), embed_sum)
                tl.store(sums_of_codes_ptr, embed_sum, mask=mask)
            tl.store(codes_ptr, code, mask=mask)


def ema_update_(
    cluster_size: Tensor,
    codebook: Tensor,
    embed_sum: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    samples: Tensor | None,
    is_filled: Tensor | None,
    decay: float,
    eps: float,
    threshold: float,
    *,
    config: EmaUpdateConfig | None = None,
) -> None:
    """One step of the moving averages, in place; see `vqtriton.blocked.ema_update_`.

    Args:
        cluster_size: [K] float32, changed.
        codebook: [K, D] float32, changed.
        embed_sum: [K, D] float32, changed; None where the codes follow no moving average.
        counts: [K] float32, rows of the batch per code.
        sums: [K, D] float32, their sums.
        samples: [K, D] float32, rows that may replace dead codes; None if there are none.
        is_filled: [K] float32, which of the samples there are.
        decay: of the averages.
        eps: Laplace smoothing, in rows.
        threshold: cluster size below which a code is dead.
        config: tiles.
    """
    config = config or EmaUpdateConfig()
    size, dim = codebook.shape
    block_d = min(config.block_d, triton.next_power_of_2(dim))
    block_k = min(config.block_k, max(1, config.block_elements // block_d))
    programs = min(triton.cdiv(size, block_k), num_processors(codebook.device))
    codes_per_program = triton.cdiv(triton.cdiv(size, programs), block_k) * block_k
    counts, sums = counts.contiguous(), sums.contiguous()
    filled, num_filled = counts, counts
    if samples is not None and is_filled is not None:
        samples = samples.contiguous()
        filled = torch.argsort(is_filled == 0, stable=True)
        num_filled = (is_filled != 0).sum()
    with torch.cuda.device_of(codebook):
        ema_update_kernel[(programs,)](
            counts,
            sums,
            sums if samples is None else samples,
            filled,
            num_filled,
            cluster_size.clone(memory_format=torch.contiguous_format),
            cluster_size,
            codebook if embed_sum is None else embed_sum,
            codebook,
            1 - decay,
            eps,
            threshold,
            size,
            codes_per_program,
            cluster_size.stride(0),
            *(codebook if embed_sum is None else embed_sum).stride(),
            *codebook.stride(),
            D=dim,
            IS_EMA=embed_sum is not None,
            REVIVES=samples is not None,
            BLOCK_SCAN=config.block_scan,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **register_limit(config.max_registers),
        )
