"""The kernels of a residual quantizer against its definition, level by level in float64."""

from __future__ import annotations

import dataclasses
import zlib

import data
import oracle
import pytest
import torch
from backends import EXACT_DTYPES
from conftest import DEVICE, INTERPRETED
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
    depths: Tensor | None = None,
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
        depths=None if depths is None else depths.to(DEVICE),
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


# two planes, a plane with the bias, one without it; K on both sides of the edges of tiles
SHAPES = {
    "two planes": (257, 3, 7),
    "bias": (63, 16, 4),
    "no bias": (65, 64, 1),
    "ragged": (5, 100, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_levels_one_by_one(way: str, shape: str) -> None:
    k, dim, levels = SHAPES[shape]
    # many rows are two tiles
    x, codebooks = make_data("gaussian", 17 if way == "many" else 3, k, dim, levels)
    expect(quantize(x, codebooks, WAYS[way]), x, codebooks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case",
    [
        *("not_finite", "far_from_the_origin", "midpoints", "near_overflow", "beyond_float32"),
        *("subnormal", "lattice", "duplicates", "ulp_ties_of_float64", "permuted_codes"),
        *("very_different_norms", "far_rows", "no_finite_code"),
    ],
)
def test_equals_the_levels_one_by_one_on_hard_data(way: str, case: str) -> None:
    x, codebooks = make_data(case, 12 if way == "many" else 3, 33, 8 if len(case) % 2 else 12, 2)
    expect(quantize(x, codebooks, WAYS[way]), x, codebooks)


@pytest.mark.parametrize("case", ["gaussian", "near_ties", "duplicates"])
def test_exact_when_every_row_is_in_doubt(case: str) -> None:
    x, codebooks = make_data(case, 5, 70, 12, 2)
    expect(quantize(x, codebooks, bound=NO_BOUND), x, codebooks)


def test_exact_when_half_of_the_rows_are_in_doubt() -> None:
    x, codebooks = make_data("near_ties", 16, 100, 16, 2)
    first = codebooks[0]
    # half way between two codes of different groups
    x[::2] = (first[:32:4] + first[20:52:4]) / 2
    expect(quantize(x, codebooks), x, codebooks)
    expect(quantize(x, codebooks, group=8), x, codebooks)


@pytest.mark.parametrize("dim", [16, 100])
def test_tiles_change_nothing(dim: int) -> None:
    x, codebooks = make_data("gaussian", 20, 129, dim, 2)
    out = quantize(x, codebooks)
    for tiles in (STREAMED, dataclasses.replace(TILES, block_n=32, classes=1, finish_ahead=4)):
        assert equal(out, quantize(x, codebooks, dataclasses.replace(MANY, chain=tiles)))


def test_parts_of_the_codes_change_nothing() -> None:
    x, codebooks = make_data("duplicates", 3, 70, 8, 2)
    out = quantize(x, codebooks)
    expect(out, x, codebooks)
    for parts, elements in ((1, 64), (1, 1024), (300, 64)):
        few = ResidualLevelConfig(most_rows=16, most_parts=parts, block_elements=elements)
        assert equal(out, quantize(x, codebooks, dataclasses.replace(FEW, few=few)))


def test_prefix_of_levels_is_the_prefix_of_the_whole() -> None:
    x, codebooks = make_data("gaussian", 7, 70, 16, 5)
    whole = quantize(x, codebooks)
    for config, rows in ((MANY, 7), (FEW, 3)):
        part = quantize(x[:rows], codebooks[:3], config)
        assert torch.equal(part.indices, whole.indices[:rows, :3])
        expect(part, x[:rows], codebooks[:3])


def test_rows_one_by_one_are_those_of_the_batch() -> None:
    x, codebooks = make_data("duplicates", 18, 33, 8, 2)
    together = quantize(x, codebooks)
    for n in (0, 15, 17):
        for config in WAYS.values():
            alone = quantize(x[n : n + 1], codebooks, config)
            assert equal(alone, ResidualQuantized(*(t[n : n + 1] for t in together)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    # the interpreter truncates where a GPU rounds
    "dtype",
    EXACT_DTYPES[:2] if INTERPRETED else EXACT_DTYPES,
)
def test_rows_have_as_many_levels_as_their_depth_and_dtypes_are_kept(
    way: str, dtype: torch.dtype
) -> None:
    x, codebooks = make_data("not_finite", 9, 33, 12, 2)
    # columns one after the other
    x = x.to(dtype).T.contiguous().T
    depths = torch.arange(9) % 3
    out = quantize(x, codebooks, WAYS[way], depths)
    assert out.quantized.dtype == dtype
    for depth in (1, 2):
        rows = depths == depth
        some = ResidualQuantized(*(t[rows] for t in out))
        kept = ResidualQuantized(some[0], *(t[:, :depth] for t in some[1:]))
        expect(kept, x[rows], codebooks[:depth])
    is_left_out = torch.arange(2) >= depths[:, None]
    assert (out.indices[is_left_out] == -1).all()
    assert (out.quantized[depths == 0] == 0).all()
    assert (out.errors[is_left_out] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_rows_have_the_tokens_of_their_values(way: str) -> None:
    x, codebooks = make_data("gaussian", 3, 33, 12, 2)
    x = x.bfloat16()
    out = quantize(x, codebooks, WAYS[way], torch.tensor([2, 0, 2]))
    _, indices, _ = oracle.residual_quantize(x, codebooks)
    assert out.quantized.dtype == torch.bfloat16
    assert torch.equal(out.indices[::2], indices[::2])
    assert (out.indices[1] == -1).all()


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
