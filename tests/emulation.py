"""The tensor-core screen in plain torch, and how many rows it leaves in doubt.

The products of the planes are summed in float64, or as a tensor core sums them, or the error that
a tensor core may add, whatever the sign, is put in by hand. So the certificate is tested against
what hardware does, and against the worst that the bound allows.
``.venv/bin/python tests/emulation.py`` prints the rates that docs/design.md quotes.
"""

from __future__ import annotations

from typing import NamedTuple

import oracle
import tensor_cores
import torch
from torch import Tensor

from vqtriton.planes import (
    BIAS_WEIGHTS,
    TENSOR_CORES,
    WORST_TENSOR_CORE,
    CodePlanes,
    ScreenBound,
    TensorCore,
    accumulation_bound,
    column_order,
    prepare_planes,
    screen_bound,
    to_plane,
)
from vqtriton.screening import error_bound


class Screened(NamedTuple):
    """What `vqtriton.kernels.screen_codes.screen_codes` returns, without heads."""

    groups: Tensor
    best: Tensor
    second: Tensor
    error: Tensor
    row_scale: Tensor
    # [N, K / group], of every group
    by_group: Tensor | None = None

    @property
    def is_certified(self) -> Tensor:
        return self.best - self.second > 2 * self.error


def row_scale_of(x: Tensor, planes: CodePlanes) -> Tensor:
    """x [N, D] -> [N] the scale of the codes, or less where |y| would reach 2**15.

    For dot products, what brings the norm of y below 2**8.
    """
    largest = (x.float() - planes.mean[0]).abs().nan_to_num(nan=torch.inf).amax(1)
    if planes.is_dot:
        bits = (largest * (x.shape[1] ** 0.5 / 64)).view(torch.int32)
        exponent = (255 - (bits >> 23)).clamp(max=254)
        return (exponent << 23).view(torch.float32)
    exponent = torch.frexp(largest).exponent.where(largest < torch.inf, 129)
    fitting = torch.ldexp(torch.ones_like(largest), (15 - exponent).clamp(max=126))
    return torch.minimum(fitting, planes.scale[0])


def ratio_of(row_scale: Tensor, planes: CodePlanes) -> Tensor:
    """[N], the factor of the constants in the scores of a row."""
    return torch.ones_like(row_scale) if planes.is_dot else row_scale / planes.scale[0].cpu()


def row_planes(x: Tensor, planes: CodePlanes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D] -> rows [N, inner] float64; norms of high part, low part and residual, [N]."""
    row_scale = row_scale_of(x, planes)
    ratio = ratio_of(row_scale, planes)
    y = (x.float() - planes.mean[0]) * row_scale[:, None]
    inner, dim = planes.codes.shape[2], x.shape[1]
    high = to_plane(y)
    rest = y - high.float()
    low = torch.zeros_like(high)
    weights = to_plane(torch.tensor(BIAS_WEIGHTS) * ratio[:, None])
    if planes.is_split:
        low = to_plane(rest)
        rest = rest - low.float()
        dims = inner // 4
        columns = torch.zeros(x.shape[0], dims, 4, dtype=torch.float16)
        columns[:, :dim] = torch.stack([low, high, high, torch.zeros_like(high)], 2)
        columns[:, :3, 3] = weights
        rows = columns.flatten(1)
    else:
        rows = torch.zeros(x.shape[0], inner, dtype=torch.float16)
        rows[:, :dim] = high
        if planes.has_bias_columns:
            rows[:, dim : dim + 3] = weights
    norms = (part.double().square().sum(1).sqrt() for part in (high, low, rest))
    return rows.double(), *norms


def screen(
    x: Tensor,
    planes: CodePlanes,
    bound: ScreenBound,
    worst_for: Tensor | None = None,
    unit: TensorCore | None = None,
) -> Screened:
    """Screen x [N, D] with the planes of one codebook.

    Args:
        worst_for: [N] a code per row: its score gets the largest error that is allowed downwards,
            all others upwards. Without it, sums are those of the unit.
        unit: what multiplies. None: the worst there is, or without ``worst_for`` exact sums.
    """
    rows, high, low, rest = row_planes(x, planes)
    order = column_order(planes.codes.shape[1], planes.group, planes.lanes, planes.vec)
    codes, offset = torch.empty_like(planes.codes[0]), torch.empty_like(planes.offset[0])
    codes[order], offset[order] = planes.codes[0], planes.offset[0]
    dots = rows @ codes.double().T
    if worst_for is not None:
        allowed = accumulation_bound(rows.shape[1], unit or WORST_TENSOR_CORE)
        error = allowed * (rows.abs() @ codes.double().abs().T)
        columns = torch.arange(codes.shape[0])
        dots = dots + torch.where(columns == worst_for[:, None], -error, error)
    elif unit is not None:
        # rows that are not finite get any sums; their error is infinite
        dots = tensor_cores.dot(rows, codes, unit)
    scores = dots.float()
    row_scale = row_scale_of(x, planes)
    ratio = ratio_of(row_scale, planes)[:, None]
    if not planes.has_bias_columns:
        scores = scores - offset * ratio
    # a NaN beats everything
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    by_group = scores.view(x.shape[0], -1, planes.group).amax(2)
    best, groups = by_group.max(1)
    others = by_group.scatter(1, groups[:, None], -torch.inf)
    second = others.amax(1).clamp(min=0)

    max_norm, max_low, max_rest, _ = planes.norms[0].amax(0).double()
    norm = high + low + rest
    error = 1.05 * (rest * max_norm + (high + low) * max_rest + low * max_low)
    ratio = ratio[:, 0].double()
    error = error + bound.products * norm * max_norm + bound.bias * max_norm**2 * ratio
    error = error + bound.distances * norm**2 / ratio + bound.tiny
    error = error.nan_to_num(nan=torch.inf).float()
    return Screened(groups, best, second, error, row_scale, by_group)


def rates(x: Tensor, codebook: Tensor, group: int, metric: str = "l2") -> tuple[float, float]:
    """Share of the rows in doubt, and of those whose nearest code is in another group."""
    planes = prepare_planes(codebook[None], group=group, is_dot=metric == "dot")
    result = screen(x, planes, screen_bound(planes, 64 if group < 16 else 128))
    is_wrong = result.groups != oracle.nearest_code(x, codebook, metric=metric) // group
    return 1 - result.is_certified.float().mean().item(), is_wrong.float().mean().item()


def finished(
    x: Tensor, codebook: Tensor, block_k: int, classes: int, unit: TensorCore = WORST_TENSOR_CORE
) -> tuple[float, float, float]:
    """What the finish leaves of finite rows, in tiles of block_k codes.

    Args:
        classes: of groups; see docs/exactness.md.

    Returns:
        Shares of all rows: in doubt; in doubt with a group that is not kept, so that they are
        searched again; whose nearest code is not in the best group.
    """
    planes = prepare_planes(codebook[None])
    result = screen(x, planes, screen_bound(planes, block_k, unit))
    scale, mean = planes.scale[0].double(), planes.mean[0].double()
    row_scale = result.row_scale.double()
    ratio = ratio_of(row_scale, planes)
    y, e = (x.double() - mean) * row_scale[:, None], (codebook.double() - mean) * scale
    half_max = planes.norms[0, :, 3].max().double()
    scores = y @ e.T + ratio[:, None] * (half_max - e.square().sum(1) / 2)
    is_member = torch.arange(len(codebook)) // planes.group == result.groups[:, None]
    winner = scores.where(is_member, -torch.inf).amax(1)
    own = error_bound(x.shape[1], torch.float32)
    norm, max_norm = y.norm(dim=1), e.norm(dim=1).max()
    own_error = own.products * max_norm * (norm + ratio * max_norm / 2)
    threshold = winner - result.error - own_error - own.distances * norm.square() / ratio
    doubt = result.second >= threshold
    # the groups of a tile take turns in the classes
    padding = -result.by_group.shape[1] % classes
    of_class = torch.nn.functional.pad(result.by_group, (0, padding), value=-torch.inf)
    of_class = of_class.view(len(x), -1, classes).topk(2, 1).values
    is_searched = doubt & (of_class[:, 1].amax(1) >= threshold)
    is_wrong = result.groups != oracle.nearest_code(x, codebook) // planes.group
    return tuple(share.double().mean().item() for share in (doubt, is_searched, is_wrong))


def main() -> None:
    """The tables of docs/design.md, for an H200."""
    from vqtriton.clustering import kmeans
    from vqtriton.kernels.screen_tiles import screen_codes_config

    torch.manual_seed(0)
    torch.set_num_threads(1)
    num_rows = 10_000
    print("| D | classes | Gaussian codes, K = 1024 | K = 8192 | k-means, K = 1024 |")
    for dim in (4, 8, 12, 16, 32, 64, 128, 256, 512):
        planes = prepare_planes(torch.randn(1, 8, dim))
        config = screen_codes_config("sm_90", planes.codes.shape[2])
        groups = config.block_k // (planes.group * planes.lanes)
        classes = planes.lanes * min(config.classes, groups)
        cells = []
        for codebook in (
            torch.randn(1024, dim),
            torch.randn(8192, dim),
            kmeans(torch.randn(8192, dim), 1024, iters=5),
        ):
            shares = [
                finished(rows, codebook, config.block_k, classes, TENSOR_CORES[9, 0])
                for rows in torch.randn(num_rows, dim).split(2000)
            ]
            cells.append(", ".join(f"{sum(s) / len(s):.2%}" for s in zip(*shares, strict=True)))
        print(f"| {dim} | {classes} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
