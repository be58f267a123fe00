"""The screen alone, whose parts are merged here."""

from __future__ import annotations

import torch
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, ScreenBound
from vqtriton.kernels.screen_codes import ScreenCodesConfig, Screened, parts_of, screen_codes


def screen(
    x: Tensor,
    planes: CodePlanes,
    bound: ScreenBound,
    config: ScreenCodesConfig,
    splits: int | None = None,
) -> tuple[Tensor, ...]:
    """x [H, N, D] -> groups, best, second, error and row_scale, [H, N]."""
    heads, num_rows, _ = x.shape
    parts = parts_of(heads, num_rows, planes, config, splits)

    def empty(dtype: torch.dtype, *of: int) -> Tensor:
        return torch.empty(*of, heads, num_rows, dtype=dtype, device=x.device)

    of_part = (torch.int32, torch.float32, torch.float32)
    screened = Screened(
        *(empty(dtype, parts.splits) for dtype in of_part),
        *(empty(torch.float32) for _ in range(3)),
    )
    screen_codes(x, planes, bound, screened, parts, config)
    group, best, second = screened.groups[0], screened.best[0], screened.second[0]
    for others in zip(screened.groups[1:], screened.best[1:], screened.second[1:], strict=True):
        is_better = others[1] > best
        group = others[0].where(is_better, group)
        second = second.maximum(others[2]).maximum(best.minimum(others[1]))
        best = best.maximum(others[1])
    return group, best, second, screened.error, screened.row_scale
