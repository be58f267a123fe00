"""Sums of few rows in one launch: a program for each code lists the rows that have it, and adds.

It reads all indices of a head, and in the worst case all rows. `vqtriton.kernels.code_sums` says
when it is used, and what a sum is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_sum(sums_ptr, counts_ptr, place, total, count, dim_mask, offs_d, D: tl.constexpr):
    rounded = total.to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + place * D + offs_d, rounded, mask=dim_mask)
    tl.store(counts_ptr + place, count)


@triton.jit
def is_not_finite(total):
    """Whether rows are to be looked at: sums of finite float32 do not overflow in float64."""
    return tl.max(tl.where(tl.abs(total) < float("inf"), 0, 1), 0) > 0


@triton.jit
def residual_of(
    x, row, is_there, level, most, codebook_ptr, indices_ptr, N, K, stride_ck, stride_cd,
    offs_d, dim_mask,
):  # fmt: skip
    """What the levels of a chain that come before have left of the rows, as they subtract it.

    ``level`` is that of each row, or of all, and ``most`` the largest. x is [BLOCK_ROWS, BLOCK_D]
    fp32, the codebook [Q, K, D] and the indices [Q, N] int64.
    """
    for before in range(0, most):
        is_before = is_there & (before < level)
        place = tl.cast(before, tl.int64)
        index = tl.load(indices_ptr + place * N + row, mask=is_before, other=0)
        code_ptrs = codebook_ptr + (place * K + index)[:, None] * stride_ck
        code_ptrs += offs_d[None, :] * stride_cd
        mask = is_before[:, None] & dim_mask[None, :]
        x -= tl.load(code_ptrs, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def sum_of_list(
    x_ptr, codebook_ptr, grad_loss_ptr, indices_ptr, list_ptr, code, count, level, weight, N, K,
    stride_xn, stride_xd, stride_ck, stride_cd, stride_gn, offs_d, dim_mask,
    IS_GRAD: tl.constexpr, IS_CHAIN: tl.constexpr, CHECKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D] fp64, and how many rows it has: the listed ones, if CHECKS the finite ones.

    If IS_CHAIN, what is added up is what ``level`` quantizes of them.
    """
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float64)
    left_out = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in tl.range(0, count, BLOCK_ROWS, num_stages=STAGES):
        offs = start + tl.arange(0, BLOCK_ROWS)
        is_there = offs < count
        row = tl.load(list_ptr + offs.to(tl.int64), mask=is_there, other=0).to(tl.int64)
        mask = is_there[:, None] & dim_mask[None, :]
        x_ptrs = x_ptr + row[:, None] * stride_xn + offs_d[None, :] * stride_xd
        value = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if IS_CHAIN:
            levels = tl.full((BLOCK_ROWS,), 0, tl.int32) + level
            value = residual_of(
                value, row, is_there, levels, level, codebook_ptr, indices_ptr, N, K,
                stride_ck, stride_cd, offs_d, dim_mask,
            )  # fmt: skip
        if CHECKS:
            is_bad = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 1)
            left_out += is_bad
            is_there = is_there & (is_bad == 0)
        if IS_GRAD:
            grad = weight * tl.load(grad_loss_ptr + row * stride_gn, mask=is_there, other=0.0)
            value = grad[:, None] * (code[None, :] - value)
        if IS_GRAD or CHECKS:
            value = tl.where(is_there[:, None] & mask, value, 0.0)
        total += value.to(tl.float64)
    return tl.sum(total, 0), count - tl.sum(left_out, 0)


@triton.jit
def _indices_from(indices_ptr, start, N, BLOCK_N: tl.constexpr):
    """[BLOCK_N] uint32, for K below 2³¹; the largest of what is negative or not there."""
    offs = tl.arange(0, BLOCK_N)
    ptrs = indices_ptr + tl.cast(start, tl.int64) + offs.to(tl.int64)
    index = tl.load(ptrs, mask=offs < N - start, other=-1)
    return tl.where((index >> 32) == 0, index, -1).to(tl.uint32)


@triton.jit(do_not_specialize=["N", "K", "codes_per_program", "stride_gn"])
def sum_codes_kernel(
    x_ptr,          # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,   # [H·K, D] fp32 / fp16 / bf16, if IS_GRAD or IS_CHAIN
    grad_loss_ptr,  # [H·N] fp32, if IS_GRAD
    indices_ptr,    # [H, N] int64
    lists_ptr,      # [H, N] int32, scratch: the rows of each code, one code after the other
    sums_ptr,       # [H·K, D] fp32 / fp64, out
    counts_ptr,     # [H·K] int64, out
    weight,
    N, K, codes_per_program,
    stride_xh, stride_xn, stride_xd, stride_ck, stride_cd, stride_gn,
    D: tl.constexpr, IS_GRAD: tl.constexpr, IS_CHAIN: tl.constexpr, IS_WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program adds up the rows of some codes of a head."""
    head = tl.program_id(2).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    dim_mask = offs_d < D
    x_ptr += head * stride_xh
    all_indices_ptr = indices_ptr
    indices_ptr += head * N
    lists_ptr += head * N
    grad_loss_ptr += head * N * stride_gn
    level = tl.program_id(2)
    # the rare path must not need more registers than the common one
    FEWER: tl.constexpr = (BLOCK_ROWS + 1) // 2
    first = tl.program_id(0) * codes_per_program
    for k in range(first, tl.minimum(first + codes_per_program, K)):
        code = tl.cast(k, tl.uint32)
        # each of BLOCK_N columns lists its own rows; a prefix sum over the columns then gives each
        # its place
        num_before = tl.zeros((BLOCK_N,), tl.int32)
        num_own = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, N, BLOCK_N):
            index = _indices_from(indices_ptr, start, N, BLOCK_N)
            num_before += (index < code).to(tl.int32)
            num_own += (index == code).to(tl.int32)
        count = tl.sum(num_own, 0)
        segment = head * K + k
        total = tl.zeros((BLOCK_D,), tl.float64)
        if count > 0:
            # the lists of smaller codes come first
            place = tl.sum(num_before, 0) + tl.cumsum(num_own, 0) - num_own
            list_ptr = lists_ptr + tl.sum(num_before, 0).to(tl.int64)
            for start in range(0, N, BLOCK_N):
                is_own = _indices_from(indices_ptr, start, N, BLOCK_N) == code
                row = start + tl.arange(0, BLOCK_N)
                tl.store(lists_ptr + place.to(tl.int64), row, mask=is_own)
                place += is_own.to(tl.int32)
            # other threads read what a thread has listed
            tl.debug_barrier()
            vector = total.to(tl.float32)
            if IS_GRAD:
                vector_ptrs = codebook_ptr + segment * stride_ck + offs_d * stride_cd
                vector = tl.load(vector_ptrs, mask=dim_mask, other=0.0).to(tl.float32)
            total, count = sum_of_list(
                x_ptr, codebook_ptr, grad_loss_ptr, all_indices_ptr, list_ptr, vector, count,
                level, weight, N, K, stride_xn, stride_xd, stride_ck, stride_cd, stride_gn,
                offs_d, dim_mask, IS_GRAD, IS_CHAIN, False, BLOCK_ROWS, BLOCK_D, STAGES,
            )  # fmt: skip
            if IS_WHOLE:  # noqa: SIM102, a constexpr by itself
                if is_not_finite(total):
                    total, count = sum_of_list(
                        x_ptr, codebook_ptr, grad_loss_ptr, all_indices_ptr, list_ptr, vector,
                        count, level, weight, N, K, stride_xn, stride_xd, stride_ck, stride_cd,
                        stride_gn, offs_d, dim_mask, IS_GRAD, IS_CHAIN, True, FEWER, BLOCK_D, 1,
                    )  # fmt: skip
        count = count.to(tl.int64)
        store_sum(sums_ptr, counts_ptr, segment, total, count, dim_mask, offs_d, D)
