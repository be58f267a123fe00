"""Moving averages of the codes, and dead codes, in place and in one launch.

Every program goes through all [K] counts first, and where dead codes are revived through all
cluster sizes, in the same order, so that all have the same totals without waiting for each other;
then each updates codes of its own. So there are no more programs than multiprocessors: each reads
4·K bytes for the totals, or 12·K, mostly from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.arguments import Update
from vqtriton.kernels.draw_rows import Drawn
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.row_planes import register_limit
from vqtriton.kernels.screen_tiles import num_processors


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
def _bounded(value):
    # what overflows is the largest: an average that is infinite once stays so for ever
    largest = 3.4028234663852886e38
    return tl.clamp(value, -largest, largest)


@triton.jit
def _lerp(start, end, weight):
    # exact at both ends, as torch.lerp, and where they are equal
    step = _bounded(end - start)
    return tl.where(weight < 0.5, start + weight * step, end - step * (1 - weight))


@triton.jit(do_not_specialize=["K", "S", "codes_per_program"])
def ema_update_kernel(
    counts_ptr,      # [H, K] fp32 / int64, of the batch
    sums_ptr,        # [H, K, D] fp32, of the batch, if IS_EMA
    samples_ptr,     # [H, S, D] fp32 / fp16 / bf16, if REVIVES
    filled_ptr,      # [H, S] int32 / int64, the samples that are filled come first, if REVIVES
    num_filled_ptr,  # [H] int64, how many are; None: as many as the counts add up to
    rates_ptr,       # [2] fp32, 1 - decay and the threshold
    old_size_ptr,    # [H, K] fp32, the cluster sizes as they were; a copy if REVIVES
    size_ptr,        # [H, K] fp32, out
    codebook_ptr,    # [H, K, D] fp32, in and out
    before_ptr,      # [H, K, D] fp32, out if KEEPS: the codes as they were
    K, S, codes_per_program,
    stride_rh, stride_rn, stride_rd, stride_oh, stride_o, stride_sh, stride_s,
    stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, IS_EMA: tl.constexpr, REVIVES: tl.constexpr, KEEPS: tl.constexpr,
    BLOCK_SCAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    counts_ptr += head * K
    old_size_ptr += head * stride_oh
    size_ptr += head * stride_sh
    codebook_ptr += head * stride_ch
    if IS_EMA:
        sums_ptr += head * K * D
    if KEEPS:
        before_ptr += head * K * D
    if REVIVES:
        samples_ptr += head * stride_rh
        filled_ptr += head * S
    first_code = tl.program_id(0).to(tl.int64) * codes_per_program
    end_code = tl.minimum(first_code + codes_per_program, K)

    num_rows = tl.zeros((BLOCK_SCAN,), tl.float64)
    for first in range(0, K, BLOCK_SCAN):
        offs = first + tl.arange(0, BLOCK_SCAN).to(tl.int64)
        num_rows += tl.load(counts_ptr + offs, mask=offs < K, other=0).to(tl.float64)
    # a batch in which no row counts is no step
    weight = tl.where(tl.sum(num_rows, 0) > 0, tl.load(rates_ptr), 0.0)

    if REVIVES:
        threshold = tl.load(rates_ptr + tl.full((), 1, tl.int64))
        totals = tl.zeros((BLOCK_SCAN,), tl.float64)
        dead_before = tl.zeros((BLOCK_SCAN,), tl.int32)
        for first in range(0, K, BLOCK_SCAN):
            offs = first + tl.arange(0, BLOCK_SCAN).to(tl.int64)
            mask = offs < K
            size = _lerp(
                tl.load(old_size_ptr + offs * stride_o, mask=mask, other=0.0),
                tl.load(counts_ptr + offs, mask=mask, other=0).to(tl.float32),
                weight,
            )
            totals += size.to(tl.float64)
            dead_before += ((size < threshold) & (offs < first_code)).to(tl.int32)
        revived_size = tl.maximum((tl.sum(totals, 0) / K).to(tl.float32), threshold)
        turn = tl.sum(dead_before, 0)
        if num_filled_ptr is None:
            num_filled = tl.sum(num_rows, 0).to(tl.int32)
        else:
            num_filled = tl.load(num_filled_ptr + head).to(tl.int32)

    for first in range(first_code, end_code, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end_code
        count = tl.load(counts_ptr + offs_k, mask=mask_k, other=0).to(tl.float32)
        size = _lerp(
            tl.load(old_size_ptr + offs_k * stride_o, mask=mask_k, other=0.0), count, weight
        )
        # the part of the average that the batch is; none of a code that no row chose
        is_chosen = (count > 0) & (size > 0)
        share = tl.minimum(tl.div_rn(weight * count, tl.where(is_chosen, size, 1.0)), 1.0)
        is_chosen = is_chosen & (share > 0)
        if REVIVES:
            is_dead = (size < threshold) & mask_k & (num_filled > 0)
            place = (turn + tl.cumsum(is_dead.to(tl.int32), 0) - 1) % tl.maximum(num_filled, 1)
            turn += tl.sum(is_dead.to(tl.int32), 0)
            sample = tl.load(filled_ptr + place.to(tl.int64), mask=is_dead, other=0).to(tl.int64)
            size = tl.where(is_dead, revived_size, size)
        tl.store(size_ptr + offs_k * stride_s, size, mask=mask_k)
        for first_d in range(0, D, BLOCK_D):
            offs_d = first_d + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = mask_k[:, None] & (offs_d < D)[None, :]
            codes_ptr = codebook_ptr + offs_k[:, None] * stride_ck + offs_d[None, :] * stride_cd
            code = tl.load(codes_ptr, mask=mask, other=0.0)
            if KEEPS:
                tl.store(before_ptr + offs_k[:, None] * D + offs_d[None, :], code, mask=mask)
            if IS_EMA:
                total = tl.load(
                    sums_ptr + offs_k[:, None] * D + offs_d[None, :], mask=mask, other=0.0
                )
                mean = tl.div_rn(_bounded(total), tl.where(is_chosen, count, 1.0)[:, None])
                # a sum of several ranks may be inf - inf
                is_moved = is_chosen[:, None] & (total == total)
                code = tl.where(is_moved, _bounded(_lerp(code, mean, share[:, None])), code)
            if REVIVES:
                drawn = tl.load(
                    samples_ptr + sample[:, None] * stride_rn + offs_d[None, :] * stride_rd,
                    mask=mask & is_dead[:, None],
                    other=0.0,
                ).to(tl.float32)
                code = tl.where(is_dead[:, None], drawn, code)
            tl.store(codes_ptr, code, mask=mask)


def _strides(tensor: Tensor, num_dims: int) -> tuple[int, ...]:
    """The first is 0 for a single head."""
    return (0,) * (num_dims - tensor.ndim) + tensor.stride()


def ema_update_(
    update: Update,
    *,
    before: Tensor | None = None,
    drawn: Drawn | None = None,
    config: EmaUpdateConfig | None = None,
) -> None:
    """One step of the moving averages, in place; see `vqtriton.torch_backend.ema_update_`.

    Args:
        update: of one codebook, or of several: [H, K, D] and so on.
        before: [K, D] float32, gets the codes as they were.
        drawn: in place of samples: the rows of a batch, whose counts are ``counts``.
        config: tiles.
    """
    cluster_size, codebook, counts, sums, samples, is_filled, rates = update
    config = config or EmaUpdateConfig()
    *heads, size, dim = codebook.shape
    block_d = min(config.block_d, next_power_of_2(dim))
    block_k = min(config.block_k, max(1, config.block_elements // block_d))
    programs = min(cdiv(size, block_k), num_processors(codebook.device))
    codes_per_program = cdiv(cdiv(size, programs), block_k) * block_k
    old_size, filled, num_filled = cluster_size, None, None
    if drawn is not None:
        samples, filled, old_size, _ = drawn
    elif samples is not None and is_filled is not None:
        filled = torch.argsort(is_filled == 0, dim=-1, stable=True)
        num_filled = (is_filled != 0).sum(-1)
        # every program reads the sizes of all codes, which others write meanwhile
        old_size = cluster_size.clone()
    with torch.cuda.device_of(codebook):
        launch(
            ema_update_kernel,
            (programs, *(heads or (1,))),
            counts.contiguous(),
            None if sums is None else sums.contiguous(),
            samples,
            filled,
            num_filled,
            rates,
            old_size,
            cluster_size,
            codebook,
            before,
            size,
            0 if filled is None else filled.shape[-1],
            codes_per_program,
            *((0, 0, 0) if samples is None else _strides(samples, 3)),
            *_strides(old_size, 2),
            *_strides(cluster_size, 2),
            *_strides(codebook, 3),
            D=dim,
            IS_EMA=sums is not None,
            REVIVES=samples is not None,
            KEEPS=before is not None,
            BLOCK_SCAN=config.block_scan,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **register_limit(config.max_registers),
        )
