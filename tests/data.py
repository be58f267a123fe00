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


def beyond_float32(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Differences between codes, and to their mean, are more than float32 can hold."""
    sign = torch.where(torch.rand(k, d) < 0.3, 1.0, -1.0)
    codebook = 3e38 * sign * (0.9 + 0.1 * torch.rand(k, d))
    x = codebook[torch.randint(k, (n,))] * (1 - 1e-7 * torch.rand(n, 1))
    x[::3] = torch.randn(x[::3].shape) * 1e38
    return x.clamp(-3.4e38, 3.4e38), codebook


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


def near_ties(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows off the middle of two codes by every power of two from 1/2 to 2⁻²⁴."""
    codebook = torch.randn(k, d)
    a, b = codebook[torch.randint(k, (2, n))].double().unbind(0)
    off = 2.0 ** -torch.randint(1, 25, (n, 1)).double()
    return ((a + b) / 2 + (a - b) * off).float(), codebook


def one_far_code(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """The bound is that of the longest code; all others are subnormal in fp16 beside it."""
    codebook = torch.randn(k, d) * 1e-6
    codebook[k // 2] = 1.0
    return torch.randn(n, d) * 1e-6, codebook


def cancelling(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Products that are large beside their sum."""
    signs = (-1.0) ** torch.arange(d)
    return 1 + torch.randn(n, d) * 1e-3, signs * (1 + torch.randn(k, d) * 1e-3)


def far_rows(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows 2⁶ to 2⁴⁰ times as far out as the codes: all directions, no distances."""
    return torch.randn(n, d) * 2.0 ** torch.randint(6, 41, (n, 1)), torch.randn(k, d)


def uniform_codes(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """A common initialisation: codes that are tiny beside the rows."""
    return torch.randn(n, d), torch.empty(k, d).uniform_(-1 / k, 1 / k)


def wide_range(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Elements of every magnitude that float32 has, subnormals among them."""
    x, codebook = (
        torch.ldexp(torch.randn(size, d), torch.randint(-140, 120, (size, d))) for size in (n, k)
    )
    return x, codebook


def _pairs(k: int, d: int, across: bool) -> Tensor:
    """Codes in pairs, far apart: j and j + 8 if across groups of eight, else j and j + 1."""
    first = torch.randn(-(-k // 16) * 8, d) * 4
    second = first + torch.randn(first.shape) * (2.0 / d**0.5)
    if across:
        first, second = first.view(-1, 8, d), second.view(-1, 8, d)
    return torch.stack([first, second], 1).reshape(-1, d)[:k]


def _ulp_ties(n: int, codebook: Tensor) -> Tensor:
    """Rows whose two least distances differ by 0, 1, 2, 4, … 64 ulp of the float32 distance.

    Rows are put on the bisector of their two nearest codes, then moved by units in the last place
    of single elements. Where nothing hits, as with one code, rows are what they were.
    """
    k, d = codebook.shape
    codes = codebook.double()
    start = torch.randint(k, (n,))
    x = codes[start] + torch.randn(n, d).double() / d**0.5
    if k == 1:
        return x.float()

    def two_nearest(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [(codes.square().sum(1) - 2 * rows @ codes.T) for rows in x.double().split(1024)]
        nearest = torch.cat([part.topk(2, largest=False).indices for part in parts])
        return codes[nearest[:, 0]], codes[nearest[:, 1]]

    def difference(x: Tensor) -> Tensor:
        return ((x - b) * (x - b) - (x - a) * (x - a)).sum(1)

    a, b = two_nearest(x)
    normal = a - b
    sqnorm = normal.square().sum(1).clamp(min=1e-300)
    x = x - normal * (difference(x) / (2 * sqnorm))[:, None]
    distance = (x - a).square().sum(1).float()
    ulp = (torch.nextafter(distance, torch.tensor(torch.inf)) - distance).double()
    wanted = ulp * 2.0 ** torch.randint(-1, 7, (n,)) * (1 - 2 * torch.randint(2, (n,)))
    x = x.float()
    # the largest steps first; the smallest 64 of them are enough
    step = (torch.nextafter(x.abs(), torch.tensor(torch.inf)) - x.abs()).double()
    change = 2 * normal * step
    order = change.abs().argsort(1, descending=True)[:, -64:]
    rest = wanted - difference(x.double())
    for column in order.T[:, :, None]:
        gain, before = change.gather(1, column), x.gather(1, column)
        steps = (rest[:, None] / gain).round().nan_to_num(0, 0, 0).clamp(-1024, 1024)
        moved = (before + steps * step.gather(1, column)).float()
        x.scatter_(1, column, moved)
        # the move as it was rounded
        rest -= (2 * normal.gather(1, column) * (moved.double() - before))[:, 0]
    nearest = two_nearest(x)[0]
    hit = (nearest == a).all(1) | (nearest == b).all(1)
    hit &= difference(x.double()).abs() < 64.5 * ulp
    return x if not hit.any() else x[hit][torch.arange(n) % hit.sum()]


def ulp_ties_across_groups(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    codebook = _pairs(k, d, across=True)
    return _ulp_ties(n, codebook), codebook


def ulp_ties_in_a_group(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    codebook = _pairs(k, d, across=False)
    return _ulp_ties(n, codebook), codebook


def ulp_ties_of_float64(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Distances that differ by 0, 1, 2, 4, … ulp of float64: codes are nothing beside the rows."""
    x = torch.randint(-1, 2, (n, d)).float()
    x[:, -1] = (1 - 2 * torch.randint(2, (n,))) * 2.0 ** torch.randint(7, (n,))
    codebook = torch.zeros(k, d)
    unit = 2.0 ** (d.bit_length() // 2 - 50)
    codebook[:, -1] = (torch.randperm(k) - k // 2) * unit
    return x, codebook


def permuted_codes(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """One offset in any order: distances from the centre differ by how their sums are rounded."""
    offset = torch.randn(d)
    codebook = offset[torch.rand(k, d).argsort(1)] * (1 - 2 * torch.randint(2, (k, d)))
    return torch.randn(n, 1) * torch.randint(0, 2, (n, 1)) * 2.0**-30 * torch.ones(d), codebook


def _symmetric(values: Tensor, k: int) -> Tensor:
    """[K, D] codes of mean 0 that `vqtriton.planes` scales by 2⁹ exactly: one of them is 1s."""
    values[0] = 1
    return torch.cat([values, -values, torch.zeros_like(values[:1])])[:k]


def _nudged(values: Tensor) -> Tensor:
    """Give or take two units in the last place."""
    ulps = torch.randint(-2, 3, values.shape).int()
    return (values.contiguous().view(torch.int32) + ulps).view(torch.float32)


def rows_at_fp16_limits(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Scaled elements where fp16 overflows: 65504 is its largest, 65520 is rounded to infinity."""
    limits = torch.tensor([65504.0, 65504.0, 65519.996, 65520.0, 65536.0]) / 2**9
    x = _nudged(limits[torch.randint(5, (n, d))]) * (1 - 2 * torch.randint(2, (n, d)))
    # in most rows one element alone is that large
    x = x.where((torch.arange(d) == torch.randint(d, (n, 1))) | (torch.rand(n, 1) < 0.2), 0)
    x = x + torch.randn(n, d) * (x == 0)
    return x, _symmetric(torch.empty(-(-k // 2), d).uniform_(-1, 1), k)


def at_fp16_subnormals(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Scaled elements around 2⁻¹⁴, the smallest that fp16 holds with all its bits."""
    x, codebook = (
        _nudged(torch.full((size, d), 2.0**-23))
        * (1 - 2 * torch.randint(2, (size, d)))
        * 2.0 ** torch.randint(-1, 2, (size, d))
        for size in (n, -(-k // 2))
    )
    return x, _symmetric(codebook, k)


def at_fp16_midpoints(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Scaled elements half way between two of fp16, so that what rounding leaves is largest."""
    x, codebook = (
        (torch.randint(1024, 2048, (size, d)) + 0.5) / 2048 * (1 - 2 * torch.randint(2, (size, d)))
        for size in (n, -(-k // 2))
    )
    return x * 2.0 ** torch.randint(-4, 5, (n, 1)), _symmetric(codebook, k)


HARD = {
    make.__name__: make
    for make in (
        gaussian,
        far_from_the_origin,
        tiny,
        large,
        subnormal,
        near_overflow,
        beyond_float32,
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
        near_ties,
        one_far_code,
        cancelling,
        far_rows,
        uniform_codes,
        wide_range,
        ulp_ties_across_groups,
        ulp_ties_in_a_group,
        ulp_ties_of_float64,
        permuted_codes,
        rows_at_fp16_limits,
        at_fp16_subnormals,
        at_fp16_midpoints,
    )
}


def negative_products(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return -torch.rand(n, d) * 10.0 ** torch.randint(-8, 9, (n, 1)), torch.rand(k, d)


def zeros_among_others(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows and codes of zeros: the products of the others with a row are negative or not."""
    x, codebook = torch.randn(n, d), torch.rand(k, d)
    x[::5], codebook[k // 3 :: 4] = 0, 0
    return x, codebook


def far_codes(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes that have nearly all of themselves in common."""
    return torch.randn(n, d), torch.randn(k, d) + 1e4


def scaled_ties(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows with the same product with two codes up to a few units in the last place."""
    codebook = torch.nn.functional.normalize(torch.randn(k, d))
    a, b = codebook[torch.randint(k, (2, n))].double().unbind(0)
    x = ((a + b) * 10.0 ** torch.randint(-3, 4, (n, 1)).double()).float()
    ulps = torch.randint(-1, 2, (n, d)).int()
    return (x.view(torch.int32) + ulps).view(torch.float32), codebook


def permuted_products(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Products in any order: their sums differ by how float64 rounds them."""
    values = torch.randn(d) * 2.0 ** torch.randint(-60, 1, (d,))
    return torch.ones(n, d) * (1 - 2 * torch.randint(2, (n, 1))), values[
        torch.rand(k, d).argsort(1)
    ]


# hard for dot products and cosines
HARD_PRODUCTS = {
    make.__name__: make
    for make in (negative_products, zeros_among_others, far_codes, scaled_ties, permuted_products)
}

# what the hard cases are searched in
DIMS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1024)

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


# indices [n] of k codes, by how even they are; -1 is left out
SKEWS = {
    "uniform": lambda n, k: torch.randint(k, (n,)),
    "zipf": lambda n, k: torch.multinomial(1 / torch.arange(1, k + 1).double(), n, True),
    "one code": lambda n, k: torch.full((n,), k // 2),
    "one row each": lambda n, k: torch.arange(n) % k,
    "none": lambda n, k: torch.full((n,), -1),
}
