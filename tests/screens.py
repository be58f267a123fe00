"""The screen alone, whose parts are merged here."""

from __future__ import annotations

import torch
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, ScreenBound
from vqtriton.kernels.screen_codes import Screened, classes_of, parts_of, screen_codes
from vqtriton.kernels.screen_tiles import ScreenCodesConfig


def screen(
    x: Tensor,
    planes: CodePlanes,
    bound: ScreenBound,
    config: ScreenCodesConfig,
    splits: int | None = None,
) -> tuple[Tensor, ...]:
    """x [H, N, D] -> groups, best, second, error and row_scale, [H, N]."""
    groups, scores, others, error, row_scale = screen_classes(x, planes, bound, config, splits)
    # a NaN beats everything
    order = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    winner = order.argmax(2, keepdim=True)
    behind = order.scatter(2, winner, -torch.inf).amax(2)
    best = scores.gather(2, winner)[..., 0]
    return groups.gather(2, winner)[..., 0], best, others.maximum(behind), error, row_scale


def screen_classes(
    x: Tensor,
    planes: CodePlanes,
    bound: ScreenBound,
    config: ScreenCodesConfig,
    splits: int | None = None,
) -> tuple[Tensor, ...]:
    """The kept groups and their scores, [H, N, parts·classes]; the largest other score, [H, N]."""
    heads, num_rows, _ = x.shape
    parts = parts_of(heads, num_rows, planes, config, splits)
    classes = planes.lanes * classes_of(planes, config)[1]

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=x.device)

    screened = Screened(
        empty(torch.int32, heads, num_rows, parts.splits, classes),
        empty(torch.float32, heads, num_rows, parts.splits, classes),
        empty(torch.float32, parts.splits, heads, num_rows),
        *(empty(torch.float32, heads, num_rows) for _ in range(3)),
    )
    screen_codes(x, planes, bound, screened, parts, config)
    groups, scores = (t.flatten(2) for t in (screened.groups, screened.scores))
    return groups, scores, screened.others.amax(0), screened.error, screened.row_scale
