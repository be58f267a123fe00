"""Inputs that a nearest-code search gets wrong when it is careless."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(k, d)


def far_from_the_origin(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) + 1e3, torch.randn(k, d) + 1e3


def tiny(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) * 1e-5, torch.randn(k, d) * 1e-5


def large(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) * 1e5, torch.randn(k, d) * 1e5


def subnormal(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) * 1e-40, torch.randn(k, d) * 1e-40


def near_overflow(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) * 3e37, torch.randn(k, d) * 3e37


def duplicates(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    codebook = torch.randn(k, d)
    return torch.randn(n, d), codebook[torch.randint(max(k // 4, 1), (k,))]


def collapsed(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(1, d).repeat(k, 1)


def zeros(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, d), torch.zeros(k, d)


def lattice(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-1, 2, (n, d)).float(), torch.randint(-1, 2, (k, d)).float()


def midpoints(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows half way between two codes, give or take a few units in the last place."""
    codebook = torch.randn(k, d)
    a, b = torch.randint(k, (2, n))
    middle = codebook[a].double().add(codebook[b].double()).div(2).float()
    ulps = torch.randint(-4, 5, (n, d))
    return (middle.view(torch.int32) + ulps.int()).view(torch.float32), codebook


def ulp_codes(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes that differ from one another by units in the last place."""
    base = torch.randn(1, d).repeat(k, 1)
    codebook = (base.view(torch.int32) + torch.randint(-4, 5, (k, d)).int()).view(torch.float32)
    return torch.randn(n, d), codebook


def outside_the_hull(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) * 1e6, torch.randn(k, d)


def very_different_norms(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(k, d) * torch.logspace(-6, 6, k)[:, None]


def unit_norm(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    normalize = torch.nn.functional.normalize
    x = normalize(torch.randn(n, d))
    # at the centre all codes are equally far, up to their rounding
    x[::7] = 0
    return x, normalize(torch.randn(k, d))


def codes_among_the_rows(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d)
    return x, x[torch.randint(n, (k,))].clone()


def not_finite(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows and codes with NaN and infinities here and there."""
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    x[1::9, 0] = torch.nan
    x[2::9, -1] = torch.inf
    x[3::9, d // 2] = -torch.inf
    codebook[1::5, -1] = torch.nan
    codebook[2::5, 0] = torch.inf
    return x, codebook


def no_finite_code(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.full((k, d), torch.nan)


HARD = {
    make.__name__: make
    for make in (
        gaussian,
        far_from_the_origin,
        tiny,
        large,
        subnormal,
        near_overflow,
        duplicates,
        collapsed,
        zeros,
        lattice,
        midpoints,
        ulp_codes,
        outside_the_hull,
        very_different_norms,
        unit_norm,
        codes_among_the_rows,
        not_finite,
        no_finite_code,
    )
}

LAYOUTS = ("contiguous", "transposed", "every other", "offset", "expanded")


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    n, d = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every other":
        wide = torch.full((2 * n, 3 * d), torch.nan, dtype=x.dtype, device=x.device)
        wide[::2, 1::3] = x
        return wide[::2, 1::3]
    if layout == "offset":
        flat = torch.full((n * d + 1,), torch.nan, dtype=x.dtype, device=x.device)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(n, d)
    if layout == "expanded" and n > 0 and (x == x[:1]).all():
        return x[:1].expand(n, d)
    return x
