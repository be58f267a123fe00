"""The screen may refuse a row; a row that it certifies has its nearest code in its best group."""

from __future__ import annotations

from itertools import product

import data
import emulation
import oracle
import pytest
import torch
from conftest import DEVICE, INTERPRETED
from emulation import Screened
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from vqtriton.planes import (
    BIAS_WEIGHTS,
    PAD_CODES,
    PAD_OFFSET,
    TENSOR_CORES,
    WORST_TENSOR_CORE,
    ScreenBound,
    TensorCore,
    column_order,
    inner_size,
    prepare_planes,
    screen_bound,
)

pytest.importorskip("triton")
import screens
import triton

from vqtriton.kernels import grids
from vqtriton.kernels.screen_codes import parts_of
from vqtriton.kernels.screen_tiles import ACCUMULATOR_ORDER, ScreenCodesConfig, choose_splits

# either side of what is split, of the columns for the bias, and of the parts of the inner size
DIMS = (1, 3, 4, 5, 8, 9, 12, 14, 16, 33, 64, 100, 150)
SEEDS = st.integers(0, 2**32 - 1)
SMALL = ScreenCodesConfig(block_n=16, block_k=64, num_stages=1)
UNITS = sorted(set(TENSOR_CORES.values()))


def screen(
    x: Tensor,
    codebook: Tensor,
    config: ScreenCodesConfig = SMALL,
    splits: int | None = None,
    order: tuple[int, int] = (4, 2),
    group: int = 8,
    is_dot: bool = False,
) -> Screened:
    lanes, vec = order
    planes = prepare_planes(
        codebook[None].to(DEVICE), group=group, lanes=lanes, vec=vec, is_dot=is_dot
    )
    bound = screen_bound(planes, config.block_k)
    out = screens.screen(x[None].to(DEVICE), planes, bound, config, splits)
    return Screened(*(t[0].cpu() for t in out))


def check_certified(
    result: Screened, x: Tensor, codebook: Tensor, group: int = 8, metric: str = "l2"
) -> None:
    nearest = oracle.nearest_code(x, codebook, metric=metric)
    wrong = result.is_certified & (result.groups != nearest // group)
    assert not wrong.any()
    assert not (result.is_certified & ~x.isfinite().all(1)).any()


def check_agree(a: Screened, b: Screened) -> None:
    """What both certify is in the same group."""
    both = a.is_certified & b.is_certified
    assert torch.equal(a.groups[both].long(), b.groups[both].long())


# --- the arithmetic, without a kernel ---


# each case in every other dimension, and each dimension with every other case
@pytest.mark.parametrize(
    ("case", "dim"),
    [(case, dim) for place, case in enumerate(data.HARD) for dim in DIMS[place % 2 :: 2]],
)
def test_worst_tensor_core_certifies_nothing_wrong(case: str, dim: int) -> None:
    x, codebook = data.HARD[case](400, 100, dim)
    for metric in ("l2", "dot"):
        planes = prepare_planes(codebook[None], group=8, is_dot=metric == "dot")
        nearest = oracle.nearest_code(x, codebook, metric=metric)
        result = emulation.screen(x, planes, screen_bound(planes, 64))
        check_certified(result, x, codebook, metric=metric)
        for unit in (WORST_TENSOR_CORE, *UNITS):
            result = emulation.screen(x, planes, screen_bound(planes, 64, unit), nearest, unit)
            check_certified(result, x, codebook, metric=metric)


@pytest.mark.parametrize("case", data.HARD)
@pytest.mark.parametrize(("dim", "metric"), [(4, "l2"), (12, "l2"), (12, "dot"), (33, "l2")])
def test_sums_as_tensor_cores_make_them_certify_nothing_wrong(
    case: str, dim: int, metric: str
) -> None:
    x, codebook = data.HARD[case](60, 60, dim)
    planes = prepare_planes(codebook[None], is_dot=metric == "dot")
    for unit in UNITS:
        result = emulation.screen(x, planes, screen_bound(planes, 64, unit), unit=unit)
        check_certified(result, x, codebook, metric=metric)


@pytest.mark.parametrize("dim", [256, 512, 1024])
@pytest.mark.parametrize("unit", [WORST_TENSOR_CORE, *UNITS], ids=str)
def test_half_of_the_bound_would_not_do(unit: TensorCore, dim: int) -> None:
    """Values that fp16 holds: what errs is the accumulation alone, as much as it may."""
    x = torch.ones(1, dim)
    x[0, 0] += 2.0**-10
    codes = torch.ones(17, dim)
    # rivals in different groups; between them others that are far away
    codes[1:8, : dim // 2] = -1
    codes[9:, dim // 2 :] = -1
    codes[0, 1] = codes[8, 0] = -1
    # around the origin, so that the mean rounds nothing
    codebook = torch.cat([codes, -codes])
    planes = prepare_planes(codebook[None], group=8)
    nearest = oracle.nearest_code(x, codebook)
    assert nearest.item() == 0
    bound = screen_bound(planes, 64, unit)
    for share in (1.0, 0.5):
        part = ScreenBound(*(share * b for b in bound))
        result = emulation.screen(x, planes, part, nearest, unit)
        assert result.groups.item() == 1
        assert result.is_certified.item() == (share < 1)


@pytest.mark.parametrize("is_dot", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_error_of_each_score_is_within_the_bound(dim: int, is_dot: bool) -> None:
    for make in (
        data.gaussian,
        data.outside_the_hull,
        data.unit_norm,
        data.one_far_code,
        data.cancelling,
    ):
        x, codebook = make(200, 64, dim)
        # a group of one code each: every score can be seen
        planes = prepare_planes(codebook[None], group=2, lanes=1, vec=2, is_dot=is_dot)
        rows, *_ = emulation.row_planes(x, planes)
        result = emulation.screen(x, planes, screen_bound(planes, 64))
        got = rows @ planes.codes[0, :64].double().T
        scale, mean = planes.scale[0].double(), planes.mean[0].double()
        row_scale = result.row_scale.double()[:, None]
        ratio = emulation.ratio_of(row_scale, planes)
        if not planes.has_bias_columns:
            got = got - planes.offset[0, :64].double() * ratio
        y, e = (x.double() - mean) * row_scale, (codebook.double() - mean) * scale
        sqnorm = torch.zeros(64).double() if is_dot else e.square().sum(1)
        half_max = planes.norms[0, :, 3].max().double()
        want = y @ e.T + (half_max - sqnorm / 2) * ratio
        is_finite = result.error < torch.inf
        errors = (got - want).abs()[is_finite]
        assert (errors <= result.error.double()[is_finite, None]).all()
        # whatever the signs of the products
        assert not is_dot or (want >= 0).all()


@pytest.mark.parametrize("dim", [12, 64, 128])
def test_few_rows_in_doubt_are_searched_again(dim: int) -> None:
    x, codebook = data.gaussian(3000, 1024, dim)
    doubtful, searched, wrong = emulation.finished(x, codebook, 64, 8)
    assert wrong <= doubtful < 0.06
    assert searched < doubtful / 3
    # more classes leave fewer rows that have to be searched again
    assert emulation.finished(x, codebook, 64, 32)[1] < searched < 0.01


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("dim", [4, 12, 64])
def test_most_gaussian_rows_are_certified(dim: int, metric: str) -> None:
    x, codebook = data.gaussian(1000, 1024, dim)
    doubtful, wrong = emulation.rates(x, codebook, 8, metric)
    assert wrong <= doubtful < 0.15


# --- the planes ---


@pytest.mark.parametrize(("group", "lanes", "vec"), [(8, 4, 2), (4, 8, 2), (16, 1, 2), (8, 2, 4)])
def test_a_thread_holds_whole_groups(group: int, lanes: int, vec: int) -> None:
    order = column_order(256, group, lanes, vec)
    assert torch.equal(order.sort().values, torch.arange(256))
    lane = torch.arange(256) // vec % lanes
    for first in range(0, 256, group * lanes):
        for one in range(lanes):
            chunk = slice(first, first + group * lanes)
            held = order[chunk][lane[chunk] == one]
            assert torch.equal(held, torch.arange(group) + first + one * group)


@pytest.mark.parametrize("dim", range(1, 400))
def test_inner_size_holds_the_values_and_the_bias(dim: int) -> None:
    inner, is_split, has_bias_columns = inner_size(dim)
    assert inner >= 16
    values = 4 * max(dim, 3) if is_split else dim + 3 * has_bias_columns
    assert inner >= values
    assert dim <= 8 or inner < max(17, 2 * dim)
    assert inner == dim or dim not in (16, 32, 64, 80, 96, 128, 160, 192, 256, 320, 384)


def test_planes_bound_their_residuals() -> None:
    for dim in (3, 64):
        codebook = torch.randn(2, 70, dim)
        planes = prepare_planes(codebook)
        assert planes.codes.shape == (2, PAD_CODES, inner_size(dim)[0])
        assert planes.codes.is_contiguous()
        exact = (codebook.double() - planes.mean[:, None].double()) * planes.scale[:, None, None]
        assert 2**9 <= exact.abs().max() < 2**10
        values = planes.codes[:, column_order(PAD_CODES, 8, 4, 2).argsort()].double()
        if planes.is_split:
            values = values.view(2, PAD_CODES, -1, 4)
            assert torch.equal(values[..., 0], values[..., 2])
            values = values[..., 0] + values[..., 1]
        residual = (exact - values[:, :70, :dim]).norm(dim=2).amax(1)
        norms = planes.norms.amax(1)
        assert (residual <= norms[:, 2]).all()
        assert (residual >= norms[:, 2] * (1 - 1e-5)).all()
        assert (exact.norm(dim=2).amax(1) <= norms[:, 0]).all()
        # as it is in the offset: a number of few bits, hardly above the largest
        half_max = exact.square().sum(2).amax(1) / 2
        assert (half_max <= norms[:, 3]).all()
        assert (norms[:, 3] <= half_max * (1 + 2**-8)).all()


def test_bias_columns_hold_the_offset() -> None:
    planes = prepare_planes(torch.randn(1, 300, 12))
    assert planes.has_bias_columns
    bias = planes.codes[0, :, 12:15].double() @ torch.tensor(BIAS_WEIGHTS).double()
    error = (bias + planes.offset[0].double()).abs()
    assert (error <= 2**-24 * planes.norms[0].amax(0)[0] ** 2 / 2).all()


def test_padding_and_codes_that_are_not_finite_never_win() -> None:
    codebook = torch.randn(1, 300, 16)
    codebook[0, ::3, 0] = torch.nan
    planes = prepare_planes(codebook)
    order = column_order(512, 8, 4, 2)
    is_code = (order < 300) & (order % 3 != 0)
    assert (planes.offset[0, ~is_code] == PAD_OFFSET).all()
    assert (planes.offset[0, is_code] <= 0).all()
    assert planes.codes.isfinite().all()
    assert (planes.codes[0, ~is_code] == 0).all()


@given(programs=st.integers(1, 10**6), tiles=st.integers(1, 10**5), processors=st.integers(1, 200))
def test_splits_fill_the_processors_and_no_more(programs, tiles, processors) -> None:
    for tile_bytes, inner in product((1024, 1 << 16, 1 << 20), (64, 256)):
        splits = choose_splits(programs, tiles, tile_bytes, processors, inner)
        assert 1 <= splits <= max(1, tiles // 4)
        assert splits == 1 or splits * programs <= (2 if inner == 64 else 1) * processors
        # codes are not parted where a part would take less time than a launch
        of_part = tiles // splits
        assert splits == 1 or of_part >= 64 or of_part * tile_bytes >= 1 << 18


# --- the kernel, in the interpreter or on a GPU ---


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("case", data.HARD)
@pytest.mark.parametrize(("dim", "metric"), [(4, "l2"), (12, "l2"), (64, "l2"), (12, "dot")])
def test_certifies_nothing_wrong(case: str, dim: int, metric: str) -> None:
    x, codebook = data.HARD[case](50, 150, dim)
    is_dot = metric == "dot"
    result = screen(x, codebook, is_dot=is_dot)
    check_certified(result, x, codebook, metric=metric)
    planes = prepare_planes(codebook[None], is_dot=is_dot)
    want = emulation.screen(x, planes, screen_bound(planes, SMALL.block_k))
    check_agree(result, want)
    # the same scores, up to half of what the bound allows both
    finite = want.error < torch.inf
    assert torch.equal(finite, result.error < torch.inf)
    torch.testing.assert_close(result.error, want.error, rtol=1e-5, atol=0)
    close = (result.best - want.best).abs() <= result.error
    assert (close | (want.best <= 0))[finite].all()


@pytest.mark.kernel
@pytest.mark.needs_kernels
@given(
    n=st.sampled_from([1, 15, 17, 33]),
    k=st.sampled_from([1, 2, 8, 9, 63, 65, 255, 257, 300]),
    d=st.sampled_from(DIMS),
    case=st.sampled_from(sorted(data.HARD)),
    block_k=st.sampled_from([64, 128, 256]),
    order=st.sampled_from(sorted(ACCUMULATOR_ORDER.values())),
    group=st.sampled_from([4, 8]),
    splits=st.sampled_from([1, 2, 5]),
    hold_rows=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(data.LAYOUTS),
    seed=SEEDS,
)
def test_nothing_changes_a_certified_row(
    n, k, d, case, block_k, order, group, splits, hold_rows, dtype, layout, seed
) -> None:
    # Triton's interpreter widens these wrongly
    assume(not (INTERPRETED and dtype == torch.bfloat16 and case == "subnormal"))
    torch.manual_seed(seed)
    x, codebook = data.HARD[case](n, k, d)
    x = x.to(dtype)
    # rows of small D are four columns a dimension: there is nothing to stream
    hold_rows = hold_rows or inner_size(d)[1]
    config = ScreenCodesConfig(block_n=16, block_k=block_k, hold_rows=hold_rows, num_stages=1)
    result = screen(data.with_layout(x, layout), codebook, config, splits, order, group)
    check_certified(result, x, codebook, group)
    check_agree(result, screen(x, codebook, SMALL, 1, group=group))
    assert (result.groups >= 0).all()
    assert (result.groups < -(-k // PAD_CODES) * PAD_CODES // group).all()


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("case", ["gaussian", "near_ties", "outside_the_hull", "duplicates"])
@pytest.mark.parametrize(
    ("block_k", "classes", "order", "splits"),
    [
        *((64, 1, (4, 2), 1), (64, 2, (4, 2), 3), (128, 4, (4, 2), 1), (256, 2, (4, 2), 2)),
        *((64, 4, (8, 2), 1), (128, 4, (1, 2), 1), (128, 2, (2, 4), 2)),
    ],
)
def test_no_group_is_above_what_is_kept(case, block_k, classes, order, splits) -> None:
    """Scores of kept groups are those of the codes; all others are below the one that is left."""
    x, codebook = data.HARD[case](30, 500, 12)
    lanes, vec = order
    planes = prepare_planes(codebook[None].to(DEVICE), lanes=lanes, vec=vec)
    config = ScreenCodesConfig(block_n=16, block_k=block_k, num_stages=1, classes=classes)
    bound = screen_bound(planes, block_k)
    of_rows = screens.screen_classes(x[None].to(DEVICE), planes, bound, config, splits)
    groups, scores, others, error, _ = (t[0].cpu() for t in of_rows)
    assert groups.shape[1] == splits * lanes * min(classes, block_k // (8 * lanes))
    on_cpu = prepare_planes(codebook[None], lanes=lanes, vec=vec)
    want = emulation.screen(x, on_cpu, bound).by_group
    is_finite = (error < torch.inf)[:, None]
    # negative scores are in no order, and never matter
    is_right = (scores - want.gather(1, groups.long())).abs() <= error[:, None]
    assert (is_right | (scores <= 0) | ~is_finite).all()
    left = want.scatter(1, groups.long(), 0)
    assert ((left.amax(1) <= others + error) | ~is_finite[:, 0]).all()
    # no group is kept twice, where there are enough of them
    is_kept = scores > 0
    assert all(g[k].unique().numel() == k.sum() for g, k in zip(groups, is_kept, strict=True))


@pytest.mark.kernel
@pytest.mark.needs_kernels
def test_splits_change_no_bit() -> None:
    x, codebook = data.gaussian(40, 1500, 16)
    whole = screen(x, codebook, splits=1)
    for splits in (2, 3, 7, 1000):
        for a, b in zip(screen(x, codebook, splits=splits)[:5], whole[:5], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("block_k", [32, 512])
def test_tiles_that_do_not_fit_are_refused(block_k: int) -> None:
    planes = prepare_planes(torch.randn(1, 40, 16), group=16)
    config = ScreenCodesConfig(block_k=block_k)
    with pytest.raises(ValueError, match=f"block_k is {block_k}"):
        parts_of(1, 4, planes, config, None)


@pytest.mark.kernel
@pytest.mark.needs_kernels
def test_one_bad_row_is_one_bad_row() -> None:
    x, codebook = data.gaussian(40, 100, 16)
    want = screen(x, codebook)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[17, 3] = bad
        got = screen(spoiled, codebook)
        assert got.error[17] == torch.inf
        others = torch.arange(40) != 17
        for a, b in zip(got[:5], want[:5], strict=True):
            assert torch.equal(a[others], b[others])


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("splits", [1, 2])
def test_heads_are_searched_apart(splits: int) -> None:
    # float32 of other magnitudes for each head: a mean or scale of another head would show
    x = torch.randn(3, 20, 12) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    codebook = torch.randn(3, 300, 12) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    planes = prepare_planes(codebook.to(DEVICE))
    bound = screen_bound(planes, SMALL.block_k)
    out = screens.screen(x.to(DEVICE), planes, bound, SMALL, splits)
    for head in range(3):
        alone = screen(x[head], codebook[head])
        assert alone.is_certified.any()
        for a, b in zip(out, alone[:5], strict=True):
            assert torch.equal(a[head].cpu(), b)


@pytest.mark.once
def test_sizes_of_grids_are_those_of_triton() -> None:
    for number in (*range(1, 300), 2**20 - 1, 2**20, 2**20 + 1, 2**40 + 1):
        assert grids.next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 2, 7, 64, 100, 2**21):
            assert grids.cdiv(number, divisor) == triton.cdiv(number, divisor)
