"""Residual quantizer for few rows: a launch for each level, whose programs share the codes.

A program has all rows and a part of the codes. It compares them by float32 distances, and leaves
what it has found to the programs of the next launch. Each of these first looks at what all parts
have found, and subtracts the nearest code from a copy of the rows of its own. So the codes of a
level are read by all processors at once, and no program waits for another.

Where float32 distances cannot tell which code is the nearest, the parts that may hold it are
searched again, by the canonical float64 distance of `vqtriton.reference.squared_distances`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, OwnBound
from vqtriton.kernels.finish_rows import cost_gap, not_finite, take_codes
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.rescue_rows import nearest_of_groups
from vqtriton.kernels.row_planes import choose_scale, register_limit
from vqtriton.kernels.screen_tiles import num_processors

# levels whose codes are loaded at a time, when they are added up
TOGETHER = tl.constexpr(4)


@dataclass(frozen=True)
class ResidualLevelConfig:
    """How few rows are quantized."""

    # rows up to which a launch for each level takes less time than one for all
    most_rows: int = 16
    # elements of the codes that a program holds
    block_elements: int = 4096
    # that share the codes; None: as many as there are processors
    most_parts: int | None = None
    num_warps: int = 8
    # NVIDIA only; without it ptxas spills a little to reach the next step of occupancy
    max_registers: int = 255


@triton.jit
def add_codes(
    codebook_ptr, indices_ptr, quantized_ptr, offs_n, is_valid, row_mask, K, levels, end_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the sums of the codes of rows, from the first level on; zeros if not ``is_valid``."""
    for start_d in range(0, end_d, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        is_element = is_valid[:, None] & (offs_d < D)
        first_index = tl.load(indices_ptr + offs_n * levels, mask=is_valid, other=0)
        codes_ptrs = codebook_ptr + first_index[:, None] * D + offs_d
        total = tl.load(codes_ptrs, mask=is_element, other=0.0)
        for first_level in range(1, levels, TOGETHER):
            for ahead in tl.static_range(TOGETHER):
                next_level = tl.cast(first_level + ahead, tl.int64)
                is_level = is_valid & (next_level < levels)
                index_ptrs = indices_ptr + (offs_n * levels + next_level)
                next_index = tl.load(index_ptrs, mask=is_level, other=-1)
                is_level = next_index >= 0
                codes_ptrs = codebook_ptr + (next_level * K + next_index)[:, None] * D + offs_d
                code = tl.load(codes_ptrs, mask=is_level[:, None] & (offs_d < D), other=0.0)
                # to add 0 would change the sign of -0
                total = tl.where(is_level[:, None], total + code, total)
        quantized_ptrs = quantized_ptr + offs_n[:, None] * D + offs_d
        total = total.to(quantized_ptr.dtype.element_ty)
        tl.store(quantized_ptrs, total, mask=row_mask[:, None] & (offs_d < D))


@triton.jit
def _load_part(
    codebook_ptr, first, last, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_K, BLOCK_D] fp32, the codes from ``first`` on; zeros from ``last`` on."""
    offs_k = (first + tl.arange(0, BLOCK_K))[:, None]
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    ptrs = codebook_ptr + (offs_k.to(tl.int64) * D + offs_d)
    return tl.load(ptrs, mask=(offs_k < last) & (offs_d < D), other=0.0)


@triton.jit
def _merge_parts(
    rows_ptr, codebook_ptr, costs_ptr, seconds_ptr, codes_ptr, is_valid, least_gap, N, K, parts,
    codes_per_part, end_d,
    D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """[ROWS] int32, the nearest codes of rows; the last three pointers are of a level."""
    rows = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[None, :]
    is_part = (part < parts) & (rows < N)[:, None]
    offs = rows.to(tl.int64)[:, None] * parts + part
    cost = tl.load(costs_ptr + offs, mask=is_part, other=float("inf"))
    second = tl.load(seconds_ptr + offs, mask=is_part, other=float("inf"))
    code = tl.load(codes_ptr + offs, mask=is_part, other=0)
    # no distance of a row that is not finite is finite
    is_bad = not_finite(rows_ptr + rows.to(tl.int64) * D, end_d, 1, D, BLOCK_D)
    least, winner = tl.min(cost, 1, return_indices=True)
    is_winner = part == winner[:, None]
    others = tl.min(tl.minimum(tl.where(is_winner, float("inf"), cost), second), 1)
    index = tl.where(is_bad, 0, tl.sum(tl.where(is_winner, code, 0), 1))
    # written so that a NaN, from infinities, is in doubt
    is_hard = (cost_gap(least, others, D, False) > least_gap) == 0
    hard = (is_hard & is_valid & (is_bad == 0)).to(tl.int32)
    if tl.sum(hard, 0) > 0:
        # parts that hold a code that may be the nearest
        is_rival = (cost_gap(least[:, None], cost, D, False) > least_gap) == 0
        rival = (is_rival & is_part & (hard > 0)[:, None]).to(tl.int32)
        for n in range(0, N):
            row_ptr = rows_ptr + tl.cast(n, tl.int64) * D
            of_row = tl.sum(tl.where((rows == n)[:, None], rival, 0), 0)
            if tl.sum(of_row, 0) > 0:
                least_64 = tl.full((1,), float("inf"), tl.float64)
                # index 0 for a row that has no finite distance
                nearest = tl.zeros((1,), tl.int32)
                for p in range(0, parts):
                    if tl.sum(tl.where(tl.arange(0, PARTS) == p, of_row, 0), 0) > 0:
                        first = p * codes_per_part
                        last = tl.minimum(first + codes_per_part, K)
                        for start in range(first, last, GROUP * GROUPS):
                            group = start // GROUP + tl.arange(0, GROUPS)[None, :]
                            least_64, nearest = nearest_of_groups(
                                row_ptr + tl.zeros((1,), tl.int64), codebook_ptr, group,
                                group * GROUP < last, least_64, nearest, K, end_d, 1,
                                D, False, GROUP, 4,
                            )  # fmt: skip
                index = tl.where(rows == n, tl.sum(nearest, 0), index)
    return index


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K", "levels", "level", "parts", "codes_per_part"])
def residual_level_kernel(
    x_ptr,          # [N, D] fp32 / fp16 / bf16
    depths_ptr,     # [N] int64, if HAS_DEPTHS: how many levels a row has
    codebook_ptr,   # [Q, K, D] fp32, contiguous
    mean_ptr,       # [Q, D] fp32, of `vqtriton.kernels.code_planes.CodePlanes`, as the next
    scale_ptr,      # [Q] fp32
    indices_ptr,    # [N, Q] int64, out: of the level before this one, as the errors
    quantized_ptr,  # [N, D] as x, out after the last level
    errors_ptr,     # [N, Q] fp32, out
    residual_ptr,   # [2, P, ROWS, D] fp32, scratch: the rows of each program
    costs_ptr,      # [2, ROWS, P] fp32, scratch: the least cost of a part, as the next two
    seconds_ptr,    # [2, ROWS, P] fp32, scratch: the next to it
    codes_ptr,      # [2, ROWS, P] int32, scratch: its code
    least_gap,
    N, K, levels, level, parts, codes_per_part, stride_xn, stride_xd,
    D: tl.constexpr, HAS_DEPTHS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, COPY_D: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Ends the level before this one and searches a part of the codes of this one.

    After the last level, only the former.
    """
    # int64 before they multiply a stride
    pid = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS).to(tl.int64)
    row_mask = rows < N
    is_valid = row_mask
    # rows that have the level before this one
    is_counted = row_mask
    if HAS_DEPTHS:
        depth = tl.load(depths_ptr + rows, mask=row_mask, other=0)
        is_valid = is_valid & (depth > 0)
        is_counted = depth >= level
    # it is D, but the compiler does not know: unrolled, loops need too many registers
    end_d = tl.minimum(K, 1) * D
    level_64 = tl.cast(level, tl.int64)
    first = tl.program_id(0) * codes_per_part
    last = tl.minimum(first + codes_per_part, K)
    # after the last level there is nothing to search
    last = tl.where(level < levels, last, 0)
    own_codebook_ptr = codebook_ptr + level_64 * K * D
    # on their way while the level before this one is ended
    codes = _load_part(own_codebook_ptr, first, last, D, BLOCK_K, BLOCK_D)

    of_level = level_64 % 2 * ROWS * parts
    of_before = (level_64 + 1) % 2 * ROWS * parts
    rows_ptr = residual_ptr + (of_level + pid * ROWS) * D
    if level == 0:
        # rows that do not count are zeros
        for start_d in range(0, end_d, COPY_D):
            offs_d = (start_d + tl.arange(0, COPY_D)).to(tl.int64)[None, :]
            x_ptrs = x_ptr + rows[:, None] * stride_xn + offs_d * stride_xd
            x = tl.load(x_ptrs, mask=is_valid[:, None] & (offs_d < D), other=0.0).to(tl.float32)
            # an infinite x is as wrong as a NaN, and its error shall say so
            x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
            is_dim = tl.broadcast_to(offs_d < D, x.shape)
            tl.store(rows_ptr + (rows[:, None] * D + offs_d), x, mask=is_dim)
    else:
        before_ptr = own_codebook_ptr - tl.cast(K, tl.int64) * D
        before_rows_ptr = residual_ptr + (of_before + pid * ROWS) * D
        index = _merge_parts(
            before_rows_ptr, before_ptr, costs_ptr + of_before, seconds_ptr + of_before,
            codes_ptr + of_before, is_counted, least_gap, N, K, parts, codes_per_part, end_d,
            D, ROWS, PARTS, COPY_D, GROUP, GROUPS,
        )  # fmt: skip
        _score, sq_error = take_codes(
            before_rows_ptr + rows * D, before_ptr + index.to(tl.int64) * D, rows_ptr + rows * D,
            None, None, None, None, is_counted, rows >= 0, end_d, 1,
            D, False, False, True, True, True, COPY_D,
        )  # fmt: skip
        if pid == 0:
            offs_out = rows * levels + (level_64 - 1)
            written = tl.where(is_counted, index, -1).to(tl.int64)
            tl.store(indices_ptr + offs_out, written, mask=row_mask)
            tl.store(errors_ptr + offs_out, sq_error, mask=row_mask)
    tl.debug_barrier()
    if level == levels:
        add_codes(
            codebook_ptr, indices_ptr, quantized_ptr, rows, is_valid, row_mask, K, levels, end_d,
            D, COPY_D,
        )  # fmt: skip
    else:
        row_scale, _ratio = choose_scale(
            rows_ptr + rows * D, mean_ptr + level_64 * D, tl.load(scale_ptr + level_64), 1,
            D, False, ROWS, COPY_D,
        )  # fmt: skip
        least = tl.full((ROWS,), float("inf"), tl.float32)
        second = tl.full((ROWS,), float("inf"), tl.float32)
        code = tl.zeros((ROWS,), tl.int32)
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
        for start in range(first, last, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            for n in range(0, N):
                is_row = rows == n
                scale = tl.sum(tl.where(is_row, row_scale, 0.0), 0)
                x_ptrs = rows_ptr + (tl.cast(n, tl.int64) * D + offs_d)
                x = tl.load(x_ptrs, mask=offs_d < D, other=0.0) * scale
                # as `group_costs` has it: rounded once
                difference = tl.fma(codes, -tl.broadcast_to(scale, codes.shape), x[None, :])
                cost = tl.sum(difference * difference, 1)
                cost = tl.where((cost < float("inf")) & (offs_k < last), cost, float("inf"))
                best, place = tl.min(cost, 0, return_indices=True)
                behind = tl.where(tl.arange(0, BLOCK_K) == place, float("inf"), cost)
                behind = tl.minimum(tl.min(behind, 0), tl.maximum(best, least))
                second = tl.where(is_row, tl.minimum(second, behind), second)
                code = tl.where(is_row & (best < least), start + place, code)
                least = tl.where(is_row, tl.minimum(least, best), least)
            codes = _load_part(own_codebook_ptr, start + BLOCK_K, last, D, BLOCK_K, BLOCK_D)
        offs_found = of_level + rows * parts + pid
        tl.store(costs_ptr + offs_found, least, mask=row_mask)
        tl.store(seconds_ptr + offs_found, second, mask=row_mask)
        tl.store(codes_ptr + offs_found, code, mask=row_mask)


def quantize_few(
    x: Tensor,
    codebooks: Tensor,
    planes: CodePlanes,
    own_bound: OwnBound,
    depths: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor],
    config: ResidualLevelConfig,
) -> None:
    """`vqtriton.kernels.residual_quantize.residual_quantize`, which allocates ``found``.

    That is quantized, indices and errors.
    """
    (num_rows, dim), (levels, size, _) = x.shape, codebooks.shape
    quantized, indices, errors = found
    rows, block_d = next_power_of_2(num_rows), next_power_of_2(dim)
    block_k = max(planes.group, config.block_elements // block_d)
    most_parts = config.most_parts or num_processors(x.device)
    codes_per_part = cdiv(cdiv(size, block_k), most_parts) * block_k
    parts = cdiv(size, codes_per_part)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    tensors = (
        x,
        depths,
        codebooks,
        planes.mean,
        planes.scale,
        indices,
        quantized,
        errors,
        empty(2, parts, rows, dim),
        empty(2, rows, parts),
        empty(2, rows, parts),
        empty(2, rows, parts, dtype=torch.int32),
    )
    for level in range(levels + 1):
        launch(
            residual_level_kernel,
            (parts if level < levels else 1,),
            *tensors,
            own_bound.tiny,
            num_rows,
            size,
            levels,
            level,
            parts,
            codes_per_part,
            *x.stride(),
            D=dim,
            HAS_DEPTHS=depths is not None,
            ROWS=rows,
            PARTS=next_power_of_2(parts),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            COPY_D=min(block_d, max(16, 4096 // rows)),
            GROUP=planes.group,
            GROUPS=max(1, min(block_k, 32 * config.num_warps) // planes.group),
            num_warps=config.num_warps,
            # a fused multiply-add rounds once where the definition rounds twice
            enable_fp_fusion=False,
            **register_limit(config.max_registers),
        )
