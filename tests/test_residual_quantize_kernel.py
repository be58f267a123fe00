"""The kernels of a residual quantizer against its definition, level by level in float64."""

from __future__ import annotations

import dataclasses
import zlib

import data
import oracle
import pytest
import torch
from backends import EXACT_DTYPES
from conftest import DEVICE
from torch import Tensor

from vqtriton.planes import ScreenBound, prepare_planes, screen_bound
from vqtriton.screening import error_bound

pytest.importorskip("triton")
from vqtriton.kernels.residual_level import ResidualLevelConfig
from vqtriton.kernels.residual_quantize import (
    GROUP,
    ResidualQuantizeConfig,
    ResidualQuantized,
    residual_quantize,
)
from vqtriton.kernels.screen_tiles import ScreenCodesConfig

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs_kernels,
]
TILES = ScreenCodesConfig(block_n=16, block_k=64, num_stages=1)
STREAMED = dataclasses.replace(TILES, block_k=128, block_d=32, hold_rows=False)
# rows go through all levels in one launch; or each level has a launch, whose programs share codes
MANY = ResidualQuantizeConfig(TILES, ResidualLevelConfig(most_rows=0))
FEW = ResidualQuantizeConfig(
    TILES, ResidualLevelConfig(most_rows=16, most_parts=3, block_elements=512)
)
WAYS = {"many": MANY, "few": FEW}
# every row is in doubt, and every code a rival
NO_BOUND = ScreenBound(torch.inf, torch.inf, torch.inf, torch.inf)


def make_data(case: str, n: int, k: int, d: int, levels: int) -> tuple[Tensor, Tensor]:
    """x [N, D]; codebooks [Q, K, D], whose codes are as hard at each level."""
    # so that a case can be repeated by itself
    torch.manual_seed(zlib.crc32(f"{case} {d}".encode()))
    pairs = [data.HARD[case](n, k, d) for _ in range(levels)]
    return pairs[0][0], torch.stack([codebook for _, codebook in pairs])


def quantize(
    x: Tensor,
    codebooks: Tensor,
    config: ResidualQuantizeConfig = MANY,
    mask: Tensor | None = None,
    bound: ScreenBound | None = None,
    group: int = GROUP,
) -> ResidualQuantized:
    codebooks = codebooks.to(DEVICE)
    planes = prepare_planes(codebooks, group=group)
    out = residual_quantize(
        x.to(DEVICE),
        codebooks,
        planes,
        bound or screen_bound(planes, config.chain.block_k),
        error_bound(x.shape[1], torch.float32),
        mask=None if mask is None else mask.to(DEVICE),
        config=config,
    )
    return ResidualQuantized(*(t.cpu() for t in out))


def expect(out: ResidualQuantized, x: Tensor, codebooks: Tensor) -> None:
    quantized, indices, errors = oracle.residual_quantize(x, codebooks)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized, rtol=0, atol=0, equal_nan=True)
    # a sum of D squares in float32, where squares may overflow or underflow
    errors, rtol, atol = errors.float(), (x.shape[1] + 4) * 2.0**-24, x.shape[1] * 2.0**-126
    torch.testing.assert_close(out.errors, errors, rtol=rtol, atol=atol, equal_nan=True)


def equal(one: ResidualQuantized, other: ResidualQuantized) -> bool:
    """Whether tokens and codes are the same; the order of the sums of errors may differ."""
    torch.testing.assert_close(one.errors, other.errors, rtol=1e-5, atol=0, equal_nan=True)
    return all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))


@pytest.mark.parametrize(
    ("case", "k", "dim", "levels"),
    [
        *(("gaussian", 257, 3, 7), ("gaussian", 65, 8, 4), ("gaussian", 300, 16, 4)),
        *(("gaussian", 64, 64, 1), ("gaussian", 70, 100, 4), ("gaussian", 5, 8, 4)),
        *(("gaussian", 1, 16, 2), ("duplicates", 70, 16, 4), ("lattice", 65, 3, 7)),
        *(("not_finite", 70, 8, 4), ("far_from_the_origin", 65, 64, 2), ("midpoints", 129, 16, 2)),
        *(("near_overflow", 65, 16, 2), ("beyond_float32", 65, 8, 2), ("subnormal", 65, 16, 2)),
        *(("collapsed", 33, 16, 2), ("ulp_ties_of_float64", 65, 8, 2), ("far_rows", 65, 16, 2)),
        *(("permuted_codes", 33, 8, 2), ("very_different_norms", 65, 16, 2)),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_levels_one_by_one(way: str, case: str, k: int, dim: int, levels: int) -> None:
    x, codebooks = make_data(
        case, 33 if way == "many" and case == "gaussian" else 5, k, dim, levels
    )
    expect(quantize(x, codebooks, WAYS[way]), x, codebooks)


@pytest.mark.parametrize("case", ["gaussian", "near_ties", "duplicates"])
@pytest.mark.parametrize("dim", [8, 100])
def test_exact_when_every_row_is_in_doubt(case: str, dim: int) -> None:
    x, codebooks = make_data(case, 5, 70, dim, 2)
    expect(quantize(x, codebooks, bound=NO_BOUND), x, codebooks)


def test_exact_when_half_of_the_rows_are_in_doubt() -> None:
    x, codebooks = make_data("near_ties", 40, 100, 16, 3)
    first = codebooks[0]
    # half way between two codes of different groups
    x[::2] = (first[:80:4] + first[20:100:4]) / 2
    expect(quantize(x, codebooks), x, codebooks)
    expect(quantize(x, codebooks, group=8), x, codebooks)


@pytest.mark.parametrize("dim", [16, 100])
def test_tiles_change_nothing(dim: int) -> None:
    x, codebooks = make_data("gaussian", 40, 257, dim, 3)
    out = quantize(x, codebooks)
    expect(out, x, codebooks)
    for tiles in (STREAMED, dataclasses.replace(TILES, block_n=32, classes=1, finish_ahead=4)):
        assert equal(out, quantize(x, codebooks, dataclasses.replace(MANY, chain=tiles)))


def test_parts_of_the_codes_change_nothing() -> None:
    x, codebooks = make_data("duplicates", 3, 257, 16, 3)
    out = quantize(x, codebooks)
    for parts, elements in ((1, 64), (1, 8192), (9, 256), (300, 64)):
        few = ResidualLevelConfig(most_rows=16, most_parts=parts, block_elements=elements)
        assert equal(out, quantize(x, codebooks, dataclasses.replace(FEW, few=few)))


def test_prefix_of_levels_is_the_prefix_of_the_whole() -> None:
    x, codebooks = make_data("gaussian", 20, 70, 16, 5)
    whole = quantize(x, codebooks)
    for config, rows in ((MANY, 20), (FEW, 4)):
        part = quantize(x[:rows], codebooks[:3], config)
        assert torch.equal(part.indices, whole.indices[:rows, :3])
        expect(part, x[:rows], codebooks[:3])


def test_rows_one_by_one_are_those_of_the_batch() -> None:
    x, codebooks = make_data("duplicates", 18, 70, 8, 3)
    together = quantize(x, codebooks)
    for n in (0, 3, 16, 17):
        for config in WAYS.values():
            alone = quantize(x[n : n + 1], codebooks, config)
            assert equal(alone, ResidualQuantized(*(t[n : n + 1] for t in together)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_masked_rows_get_nothing_and_dtypes_are_kept(way: str, dtype: torch.dtype) -> None:
    x, codebooks = make_data("not_finite", 9, 70, 12, 2)
    # columns one after the other
    x = x.to(dtype).T.contiguous().T
    mask = torch.arange(9) % 3 > 0
    out = quantize(x, codebooks, WAYS[way], mask)
    assert out.quantized.dtype == dtype
    expect(ResidualQuantized(*(t[mask] for t in out)), x[mask], codebooks)
    assert (out.indices[~mask] == -1).all()
    assert (out.quantized[~mask] == 0).all()
    assert (out.errors[~mask] == 0).all()
    nothing = quantize(x, codebooks, WAYS[way], torch.zeros_like(mask))
    assert (nothing.indices == -1).all()
    assert (nothing.quantized == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_codebooks_of_different_sizes_are_filled_up_with_infinities(way: str) -> None:
    x, codebooks = make_data("gaussian", 5, 70, 8, 2)
    x[0] = torch.nan
    codebooks[1, 30:] = torch.inf
    out = quantize(x, codebooks, WAYS[way])
    _, first, _ = oracle.residual_quantize(x, codebooks[:1])
    left = x - codebooks[0, first[:, 0]]
    second = oracle.nearest_code(left, codebooks[1, :30])
    assert torch.equal(out.indices, torch.stack([first[:, 0], second], 1))


@pytest.mark.parametrize("way", WAYS)
def test_sum_of_codes_keeps_the_sign_of_zeros(way: str) -> None:
    codebooks = torch.full((3, 4, 8), -0.0)
    out = quantize(torch.zeros(2, 8), codebooks, WAYS[way])
    assert out.quantized.signbit().all()


def test_tiles_must_fit_the_planes() -> None:
    x, codebooks = make_data("gaussian", 3, 70, 8, 1)
    tiles = dataclasses.replace(MANY, chain=dataclasses.replace(TILES, block_k=96))
    with pytest.raises(ValueError, match="block_k is 96"):
        quantize(x, codebooks, tiles)
