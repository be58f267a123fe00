"""The kernels that prepare planes give what the torch version gives."""

from __future__ import annotations

import dataclasses

import data
import pytest
import torch
from conftest import DEVICE, INTERPRETED
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from vqtriton.planes import (
    CodePlanes,
    column_order,
    group_size,
    inner_size,
    prepare_planes,
)

pytest.importorskip("triton")
from vqtriton.kernels import prepare_planes as kernels
from vqtriton.kernels.prepare_planes import PreparePlanesConfig

# either side of what is split and of the columns for the bias; powers of two and not
DIMS = (1, 5, 12, 64, 150)
# several tiles in a part and several parts, of few codes
SMALL = PreparePlanesConfig(block_elements=2048, most_parts=3)
LARGE = dataclasses.replace(SMALL, most_elements=0)


def prepare(codebook: Tensor, config: PreparePlanesConfig | None = None, **order: int):
    inner, is_split, has_bias_columns = inner_size(codebook.shape[2])
    order = {"group": group_size(codebook.shape[2]), "lanes": 4, "vec": 2} | order
    tensors = kernels.prepare_planes(
        codebook.to(DEVICE), inner, is_split, has_bias_columns, config=config, **order
    )
    return CodePlanes(*(t.cpu() for t in tensors), **order, **flags(is_split, has_bias_columns))


def flags(is_split: bool, has_bias_columns: bool) -> dict[str, bool]:
    return {"is_split": is_split, "has_bias_columns": has_bias_columns}


def check_same(got: CodePlanes, want: CodePlanes) -> None:
    assert got[5:] == want[5:]
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.scale, want.scale)
    # sums in another order, rounded: nearly always the same
    norms, want_norms = got.norms.amax(1), want.norms.amax(1)
    torch.testing.assert_close(norms, want_norms, rtol=2**-22, atol=0)
    for head in range(len(got.scale)):
        least = 2**-50 * want_norms[head, 3].item()
        torch.testing.assert_close(got.offset[head], want.offset[head], rtol=2**-23, atol=least)
    same = got.offset == want.offset
    assert same.double().mean() > 0.99
    assert got.codes.dtype == torch.float16
    # the bias is in some of the columns
    assert torch.equal(got.codes[same], want.codes[same])


def stored_parts(planes: CodePlanes, size: int) -> tuple[Tensor, Tensor]:
    """High and low parts in the planes, [H, K, D] float64, in the order of the codes."""
    order = column_order(planes.codes.shape[1], planes.group, planes.lanes, planes.vec)
    dim = planes.mean.shape[1]
    values = planes.codes[:, order.argsort()[:size]].double()
    if not planes.is_split:
        return values[..., :dim], torch.zeros_like(values[..., :dim])
    values = values.unflatten(2, (-1, 4))[:, :, :dim]
    return values[..., 0], values[..., 1]


def check_bounds(planes: CodePlanes, codebook: Tensor) -> None:
    """Norms are not below those of what is stored, and hardly above."""
    is_finite = codebook.isfinite().all(2, keepdim=True)
    exact = (codebook.double() - planes.mean[:, None].double()) * planes.scale[:, None, None]
    exact = exact.where(is_finite, 0)
    high, low = stored_parts(planes, codebook.shape[1])
    for part in (high, low):
        assert ((part == 0) | (part.abs() >= 2**-14)).all()
    norms = [part.norm(dim=2).amax(1) for part in (exact, low, exact - high - low)]
    bounds = planes.norms.amax(1).double()
    largest = torch.maximum(norms[0], high.norm(dim=2).amax(1))
    # the square of the first is rounded up to ten bits
    for measured, bound, above in zip(
        (largest, *norms[1:]), bounds.T, (2**-9, 1e-6, 1e-6), strict=False
    ):
        assert (measured <= bound).all()
        assert (bound <= measured * (1 + above)).all()
    half_max = exact.square().sum(2).amax(1) / 2
    assert (half_max <= bounds[:, 3]).all()
    assert (bounds[:, 3] <= half_max * (1 + 2**-8)).all()


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("case", data.HARD)
@pytest.mark.parametrize(("config", "dim"), [(SMALL, 5), (LARGE, 12)])
def test_equals_the_torch_version(config: PreparePlanesConfig, case: str, dim: int) -> None:
    codebook = data.HARD[case](1, 70, dim)[1].view(2, 35, dim)
    for is_dot in (False, True):
        planes = prepare(codebook, config, is_dot=is_dot)
        check_same(planes, prepare_planes(codebook, is_dot=is_dot))
        check_bounds(planes, codebook)


@pytest.mark.kernel
@pytest.mark.needs_kernels
@given(
    heads=st.integers(1, 2),
    k=st.sampled_from([1, 2, 7, 63, 65, 255, 256, 257, 300]),
    d=st.sampled_from(DIMS),
    case=st.sampled_from(sorted(data.HARD)),
    order=st.sampled_from([(8, 4, 2), (8, 8, 2), (8, 1, 2), (8, 2, 4), (4, 4, 2), (16, 4, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(data.LAYOUTS),
    block_elements=st.sampled_from([1024, 4096]),
    most_parts=st.sampled_from([1, 4, 256]),
    most_elements=st.sampled_from([0, 1 << 18]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_torch_version_whatever_the_shape(
    heads, k, d, case, order, dtype, layout, block_elements, most_parts, most_elements, seed
) -> None:
    # Triton's interpreter widens these wrongly
    assume(not (INTERPRETED and dtype == torch.bfloat16 and case == "subnormal"))
    torch.manual_seed(seed)
    codebook = data.HARD[case](1, heads * k, d)[1].to(dtype)
    codebook = data.with_layout(codebook, layout).unflatten(0, (heads, k))
    config = PreparePlanesConfig(block_elements, most_elements, most_parts)
    group, lanes, vec = order
    got = prepare(codebook, config, group=group, lanes=lanes, vec=vec)
    check_same(got, prepare_planes(codebook, group=group, lanes=lanes, vec=vec))


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("dim", [300, 1021, 1024])
def test_wide_codes(dim: int) -> None:
    codebook = torch.randn(1, 20, dim)
    codebook[0, 3, -1] = torch.inf
    check_same(prepare(codebook), prepare_planes(codebook))


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("dim", [12])
def test_tiles_of_one_code(dim: int) -> None:
    codebook = torch.randn(1, 9, dim)
    codebook[0, 3] = torch.nan
    config = PreparePlanesConfig(block_elements=1, most_parts=4)
    check_same(prepare(codebook, config), prepare_planes(codebook))


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("dim", [1, 8, 16])
def test_heads_have_nothing_in_common(dim: int) -> None:
    codebook = torch.randn(4, 300, dim) * torch.tensor([1.0, 1e30, 1e-40, 1])[:, None, None]
    codebook[3] = torch.nan
    for config in (SMALL, LARGE):
        together = prepare(codebook, config)
        check_same(together, prepare_planes(codebook))
        for head in range(4):
            alone = prepare(codebook[head : head + 1], config)
            for a, b in zip(together[:5], alone[:5], strict=True):
                assert torch.equal(a[head], b[0])


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    "largest", [0.0, 2.0**-149, 2.0**-127, 2.0**-117, 2.0**-116, 1.0, 2.0**127, 3.4028234e38]
)
def test_scale_of_the_smallest_and_the_largest(largest: float) -> None:
    # the mean is zero; the second pair is farther from zero than float32 reaches
    for values in ([largest, -largest], [largest, largest, largest, -largest]):
        codebook = torch.tensor(values).view(1, -1, 1)
        for config in (SMALL, LARGE):
            check_same(prepare(codebook, config), prepare_planes(codebook))


@pytest.mark.parametrize(("group", "lanes", "vec"), [(8, 64, 2), (6, 4, 2), (8, 4, 16)])
def test_an_order_that_does_not_fit_is_refused(group: int, lanes: int, vec: int) -> None:
    with pytest.raises(ValueError, match=f"group is {group}, lanes {lanes}, vec {vec}"):
        prepare(torch.randn(1, 40, 16), group=group, lanes=lanes, vec=vec)
