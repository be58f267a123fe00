"""Nearest code: screen on tensor cores, finish with a certificate, rescue the rows left in doubt.

Three kernels, one after the other, that nothing waits for; docs/exactness.md shows why their result
is the argmin of the float64 distances. The kernels are in screen_codes.py, finish_rows.py and
rescue_rows.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqtriton.kernels.finish_rows import FinishRowsConfig, finish_rows_kernel
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.rescue_rows import RescueRowsConfig, rescue_rows_kernel, settle_rows_kernel
from vqtriton.kernels.row_planes import plane_constants, register_limit, strides_of
from vqtriton.kernels.screen_codes import (
    ScreenCodesConfig,
    architecture,
    num_processors,
    rows_are_aligned,
    screen_codes,
    screen_codes_config,
)


@dataclass(frozen=True)
class NearestCodeConfig:
    """Tiles of all kernels."""

    screen: ScreenCodesConfig = field(default_factory=ScreenCodesConfig)
    finish: FinishRowsConfig = field(default_factory=FinishRowsConfig)
    rescue: RescueRowsConfig = field(default_factory=RescueRowsConfig)


class NearestCode(NamedTuple):
    """What `nearest_code` returns."""

    indices: Tensor  # [H, N] int64, -1 where masked
    quantized: Tensor | None  # [H, N, D] in the dtype of x
    sq_error: Tensor | None  # [H, N] fp32, squared distance to x; NaN where x is not finite
    num_doubtful: Tensor  # [H] int32, rows that the rescue decided


def nearest_code_config(target: str, inner: int, is_aligned: bool = True) -> NearestCodeConfig:
    """Tiles that neither spill nor overflow shared memory: see `screen_codes_config`."""
    is_wide = inner > 64 and not is_aligned
    return NearestCodeConfig(
        screen_codes_config(target, inner, is_aligned),
        FinishRowsConfig(),
        RescueRowsConfig(
            block_d=16 if is_wide else 64,
            hold_rows=inner <= 128 and not is_wide,
        ),
    )


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    planes: Any,
    screen_bound: Any,
    finish_bound: Any,
    *,
    exact: bool,
    mask: Tensor | None = None,
    gather: bool = False,
    splits: int | None = None,
    config: NearestCodeConfig | None = None,
) -> NearestCode:
    """Index of the nearest code, the code itself and its squared distance.

    Args:
        x: [H, N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        codebook: [H, K, D], likewise.
        planes: `vqtriton.planes.CodePlanes` of ``codebook``.
        screen_bound: `vqtriton.planes.screen_bound` for these planes and ``config.screen.block_k``.
        finish_bound: `vqtriton.screening.error_bound` for D in float32.
        exact: certify, and rescue what is not certified; else the best of the group that the
            screen found.
        mask: [H, N] bool, False for rows that get index -1, zeros and no error.
        gather: fill ``quantized`` and ``sq_error``; else they are None.
        splits: see `screen_codes`.
        config: tiles.
    """
    heads, num_rows, dim = x.shape
    size = codebook.shape[1]
    padded_size, inner = planes.codes.shape[1:]
    config = config or nearest_code_config(architecture(x.device), inner, rows_are_aligned(x))
    groups, _, second, error, row_scale = screen_codes(
        x, planes, screen_bound, splits=splits, config=config.screen
    )

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    indices = empty(heads, num_rows, dtype=torch.int64)
    quantized = empty(heads, num_rows, dim, dtype=x.dtype) if gather else None
    sq_error = empty(heads, num_rows, dtype=torch.float32) if gather else None
    rows = empty(heads, num_rows if exact else 0, dtype=torch.int32)
    thresholds = empty(heads, num_rows if exact else 0, dtype=torch.float32)
    num_doubtful = torch.zeros(heads, dtype=torch.int32, device=x.device)
    if mask is not None:
        mask = mask.contiguous()
    strides = (*strides_of(x), *strides_of(codebook))
    width = next_power_of_2(dim)

    with torch.cuda.device_of(x):
        block_d = min(config.finish.block_d, width)
        block_n = max(1, config.finish.block_elements // (planes.group * block_d))
        finish_rows_kernel[(cdiv(num_rows, block_n), heads)](
            x,
            codebook,
            planes.mean,
            planes.scale,
            planes.norms,
            groups,
            second,
            error,
            row_scale,
            mask,
            indices,
            quantized,
            sq_error,
            rows,
            thresholds,
            num_doubtful,
            *finish_bound,
            num_rows,
            size,
            *strides,
            D=dim,
            GROUP=planes.group,
            EXACT=exact,
            HAS_MASK=mask is not None,
            GATHER=gather,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=config.finish.num_warps,
            enable_fp_fusion=True,
            **register_limit(config.finish.max_registers),
        )
        if not exact:
            return NearestCode(indices, quantized, sq_error, num_doubtful)

        rescue = config.rescue
        programs = rescue.programs_per_processor * num_processors(x.device)
        tiles = padded_size // rescue.block_k
        # if every row is in doubt there is no more work than this
        programs = min(cdiv(programs, heads), cdiv(num_rows, rescue.block_n) * tiles)
        list_size = 2 * rescue.chunk_tiles * rescue.block_k // planes.group
        counts = empty(heads, programs, rescue.block_n, dtype=torch.int32)
        lists = empty(heads, programs, rescue.block_n, list_size, dtype=torch.int32)
        least = empty(heads, programs, rescue.block_n, dtype=torch.float64)
        least_index = empty(heads, programs, rescue.block_n, dtype=torch.int32)
        rescue_rows_kernel[(programs, heads)](
            x,
            codebook,
            planes.codes,
            planes.offset,
            planes.mean,
            planes.scale,
            rows,
            thresholds,
            num_doubtful,
            counts,
            lists,
            indices,
            least,
            least_index,
            num_rows,
            size,
            padded_size,
            *strides,
            **plane_constants(planes, rescue.block_d, rescue.hold_rows),
            BLOCK_N=rescue.block_n,
            BLOCK_K=rescue.block_k,
            CHUNK_TILES=rescue.chunk_tiles,
            num_warps=rescue.num_warps,
            num_stages=rescue.num_stages,
            # a fused multiply-add rounds once where the definition rounds twice
            enable_fp_fusion=False,
            **register_limit(rescue.max_registers),
        )
        block_d = min(rescue.settle_block_d, width)
        settle_rows_kernel[(programs, heads)](
            x,
            codebook,
            rows,
            num_doubtful,
            least,
            least_index,
            indices,
            quantized,
            sq_error,
            num_rows,
            programs,
            tiles,
            *strides,
            D=dim,
            GATHER=gather,
            RESCUE_BLOCK_N=rescue.block_n,
            BLOCK_N=max(1, rescue.settle_block_elements // block_d),
            BLOCK_D=block_d,
            num_warps=rescue.settle_num_warps,
            enable_fp_fusion=True,
        )
    return NearestCode(indices, quantized, sq_error, num_doubtful)
