"""Finish and rescue: who is in doubt, and that doubt never costs exactness."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from unittest import mock

import data
import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqtriton.kernels.code_planes import OwnBound
from vqtriton.planes import CodePlanes, ScreenBound, prepare_planes, screen_bound
from vqtriton.screening import error_bound

pytest.importorskip("triton")
import emulation
import screens

from vqtriton.kernels import nearest_code as module
from vqtriton.kernels.nearest_code import NearestCode, NearestCodeConfig, nearest_code
from vqtriton.kernels.rescue_rows import RescueRowsConfig
from vqtriton.kernels.screen_tiles import ScreenCodesConfig

# bench is not installed, and plain `pytest` does not look for modules in the root
sys.path.insert(0, str(Path(__file__).parents[1]))
compiling = importlib.import_module("vqtriton.tuning.compiling")

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs_kernels,
]
SCREEN = ScreenCodesConfig(block_n=16, block_k=64, num_stages=1)
RESCUE = RescueRowsConfig(block_n=16, num_stages=1)
# every row is in doubt, and every code a rival
NO_BOUND = ScreenBound(torch.inf, torch.inf, torch.inf, torch.inf)


def search(
    x: Tensor,
    codebook: Tensor,
    bound: ScreenBound | None = None,
    rescue: RescueRowsConfig = RESCUE,
    is_dot: bool = False,
    **options,
) -> NearestCode:
    """x [H, N, D], codebook [H, K, D]."""
    x, codebook = x.to(DEVICE), codebook.to(DEVICE)
    planes = prepare_planes(codebook, is_dot=is_dot)
    return nearest_code(
        x,
        codebook,
        planes,
        bound or screen_bound(planes, SCREEN.block_k),
        error_bound(x.shape[2], torch.float32),
        **{"exact": True, "config": NearestCodeConfig(SCREEN, rescue=rescue)} | options,
    )


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(
    ("dim", "programs", "chunk_tiles"), [(3, 3, 1), (12, 15, 8), (40, 100, 8), (40, 1, 1)]
)
def test_exact_when_every_row_is_in_doubt(
    dim: int, programs: int, chunk_tiles: int, metric: str
) -> None:
    # three tiles of rows; with 15 programs five parts of the codes, which eight tiles do not fill
    x, codebook = data.gaussian(33, 400, dim)
    # no product with it may win, whatever its sign
    codebook[5, 0] = torch.inf
    # lists hold one tile: the rivals of a second tile fill them, and all rivals count
    rescue = dataclasses.replace(RESCUE, chunk_tiles=chunk_tiles, programs_per_processor=programs)
    out = search(x[None], codebook[None], NO_BOUND, rescue, metric == "dot")
    assert out.num_doubtful.tolist() == [33]
    assert torch.equal(out.indices[0].cpu(), oracle.nearest_code(x, codebook, metric=metric))


@pytest.mark.parametrize("case", ["collapsed", "duplicates", "lattice", "not_finite", "ulp_codes"])
@pytest.mark.parametrize(("chunk_tiles", "programs"), [(1, 1), (8, 1), (8, 7)])
def test_lists_that_overflow_are_worked_off(case: str, chunk_tiles: int, programs: int) -> None:
    # 32 groups of rivals a row: the shorter lists hold 16; ties between the parts of the codes
    x, codebook = data.HARD[case](20, 250, 3)
    rescue = dataclasses.replace(RESCUE, chunk_tiles=chunk_tiles, programs_per_processor=programs)
    out = search(x[None], codebook[None], rescue=rescue)
    assert torch.equal(out.indices[0].cpu(), oracle.nearest_code(x, codebook))


@given(
    n=st.sampled_from([1, 15, 17, 40]),
    k=st.sampled_from([1, 7, 8, 9, 65, 257]),
    d=st.sampled_from([1, 4, 9, 33]),
    case=st.sampled_from(["gaussian", "midpoints", "duplicates", "zeros", "not_finite"]),
    programs=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_how_the_rescue_is_shared_changes_no_bit(n, k, d, case, programs, seed) -> None:
    torch.manual_seed(seed)
    x, codebook = (t[None] for t in data.HARD[case](n, k, d))
    mask = torch.rand(1, n) < 0.8
    rescue = dataclasses.replace(RESCUE, programs_per_processor=programs)
    one = search(x, codebook, gather=True, mask=mask.to(DEVICE))
    other = search(x, codebook, rescue=rescue, gather=True, mask=mask.to(DEVICE))
    for a, b in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.num_doubtful, other.num_doubtful)
    want = oracle.nearest_code(x[0], codebook[0]).where(mask[0], -1)
    assert torch.equal(one.indices[0].cpu(), want)
    # masked rows are nobody's doubt
    assert one.num_doubtful.item() <= mask.sum()


@pytest.mark.parametrize("case", ["gaussian", "duplicates", "not_finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_and_errors_of_certain_and_doubtful_rows(case: str, dtype: torch.dtype) -> None:
    x, codebook = data.HARD[case](50, 70, 20)
    x = x.to(dtype)
    mask = torch.arange(50) % 6 > 0
    out = search(x[None], codebook[None], gather=True, mask=mask[None].to(DEVICE))
    doubtful = out.num_doubtful.item()
    assert doubtful < 50
    # duplicates are in doubt by construction: both ways are looked at
    assert doubtful > 5 or case != "duplicates"
    indices = out.indices[0].cpu()
    assert torch.equal(indices, oracle.nearest_code(x, codebook).where(mask, -1))
    codes = codebook[indices].where(mask[:, None], 0)
    torch.testing.assert_close(out.quantized[0].cpu(), codes.to(dtype), rtol=0, atol=0)
    want = (x.double() - codes.double()).square().sum(1)
    want = want.where(x.isfinite().all(1), torch.nan).where(mask, 0)
    torch.testing.assert_close(
        out.losses[0].cpu(), want.float(), rtol=1e-5, atol=1e-6, equal_nan=True
    )


# without a rescue there is nothing to share
@pytest.mark.parametrize(("exact", "programs"), [(True, 1), (True, 7), (False, 1)])
@pytest.mark.parametrize("splits", [1, 2])
def test_losses_are_added_up(exact: bool, splits: int, programs: int) -> None:
    """Of rows that are certain and in doubt, of each head; those that do not count add nothing."""
    x, codebook = torch.randn(2, 50, 12), torch.randn(2, 300, 12)
    codebook[:, 150:] = codebook[:, :150]
    mask = torch.rand(2, 50) < 0.7
    mask[1] = False
    rescue = dataclasses.replace(RESCUE, programs_per_processor=programs, span_rows=32)
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction, "weight": 0.5, "splits": splits, "exact": exact}
        out = search(x, codebook, rescue=rescue, gather=True, mask=mask.to(DEVICE), **options)
        losses, indices = out.losses.cpu(), out.indices.cpu()
        rows = torch.arange(2)[:, None]
        want = 0.5 * (x - codebook[rows, indices.clamp(min=0)]).square().sum(2).where(mask, 0)
        torch.testing.assert_close(losses, want)
        share = 1.0 if reduction == "sum" else 1 / (12 * mask.sum(1)).clamp(min=1)
        torch.testing.assert_close(out.loss.cpu(), losses.sum(1) * share)
        torch.testing.assert_close(out.share.cpu(), torch.ones(2) * share)


@pytest.mark.parametrize("programs", [1, 7])
def test_rescue_overrules_a_wrong_screen(programs: int) -> None:
    x, codebook = data.gaussian(40, 300, 12)
    screen_codes = module.screen_codes

    def wrong(x, planes, bound, screened, *args, **kwargs) -> None:
        screen_codes(x, planes, bound, screened, *args, **kwargs)
        screened.groups.zero_()
        screened.error.fill_(torch.inf)

    rescue = dataclasses.replace(RESCUE, programs_per_processor=programs)
    with mock.patch.object(module, "screen_codes", wrong):
        # in two parts: the finish has a launch of its own
        out = search(x[None], codebook[None], rescue=rescue, gather=True, splits=2)
    want = oracle.nearest_code(x, codebook)
    assert (want >= 8).any()
    assert torch.equal(out.indices[0].cpu(), want)
    # what the finish had gathered is replaced
    assert torch.equal(out.quantized[0].cpu(), codebook[want])
    losses = (x - codebook[want]).square().sum(1)
    torch.testing.assert_close(out.losses[0].cpu(), losses)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("case", ["near_ties", "ulp_ties_across_groups", "ulp_ties_in_a_group"])
def test_rows_between_kept_groups_are_not_searched_again(case, splits, metric) -> None:
    x, codebook = data.HARD[case](60, 300, 12)
    out = search(x[None], codebook[None], is_dot=metric == "dot", splits=splits, gather=True)
    want = oracle.nearest_code(x, codebook, metric=metric)
    assert torch.equal(out.indices[0].cpu(), want)
    assert torch.equal(out.quantized[0].cpu(), codebook[want])
    if metric == "l2":
        # a tile has no more than four rows with a list
        known = out.num_doubtful.item() - out.num_searched.item()
        assert 5 <= known <= 16


def test_rows_that_no_list_has_room_for_are_searched_again() -> None:
    # all groups are rivals; with one class for each lane most are not kept
    x, codebook = data.HARD["duplicates"](40, 300, 12)
    for classes in (1, 4):
        config = NearestCodeConfig(dataclasses.replace(SCREEN, classes=classes), rescue=RESCUE)
        out = search(x[None], codebook[None], config=config)
        assert torch.equal(out.indices[0].cpu(), oracle.nearest_code(x, codebook))
        # four rows of each tile of 16 have a list
        known = out.num_doubtful.item() - out.num_searched.item()
        assert known <= 12
    # every row is nearest to two codes, in groups of different classes
    assert known == 12


def searched_parts(change, x: Tensor, codebook: Tensor) -> tuple[NearestCode, dict]:
    """A search in two parts, whose screen is changed; and what the rescue was launched with."""
    screen_codes, launches = module.screen_codes, []

    def changed(x, planes, bound, screened, *args, **kwargs) -> None:
        screen_codes(x, planes, bound, screened, *args, **kwargs)
        change(screened, planes)

    class Noting(compiling.Recorder):
        def __getitem__(self, grid):
            note = super().__getitem__(grid)

            def run(*args, **kwargs):
                note(*args, **kwargs)
                kernel[grid](*args, **kwargs)

            return run

    kernel = module.rescue_rows_kernel
    with (
        mock.patch.object(module, "screen_codes", changed),
        mock.patch.object(module, "rescue_rows_kernel", Noting(kernel, launches)),
    ):
        out = search(x[None], codebook[None], splits=2)
    return out, launches[0].values


def test_parts_with_an_unknown_rival_are_searched_again() -> None:
    x, codebook = data.gaussian(40, 300, 12)
    out, _ = searched_parts(lambda screened, _: screened.others.fill_(torch.inf), x, codebook)
    assert out.num_searched.tolist() == [40]
    assert torch.equal(out.indices[0].cpu(), oracle.nearest_code(x, codebook))


def test_rows_with_more_rivals_than_a_list_holds_are_searched_again() -> None:
    x, codebook = data.unit_norm(40, 300, 12)

    def all_are_rivals(screened, planes) -> None:
        # what is not kept is below any threshold, and the kept groups of both parts are above
        screened.others.zero_()
        screened.error.fill_(0.9 * planes.norms[0, :, 3].max().item())

    out, _ = searched_parts(all_are_rivals, x, codebook)
    # 16 kept groups, and room for 8
    assert out.num_searched.item() > 30
    assert torch.equal(out.indices[0].cpu(), oracle.nearest_code(x, codebook))


@pytest.mark.parametrize("dim", [3, 12, 40])
def test_thresholds_hold_the_error_of_the_finish_itself(dim: int) -> None:
    """Of the screen's errors nothing is left; beside them half of its own would not show."""
    x, codebook = data.gaussian(60, 300, dim)

    def no_error(screened, _) -> None:
        screened.others.fill_(torch.inf)
        screened.error.zero_()

    _, values = searched_parts(no_error, x, codebook)
    planes = prepare_planes(codebook[None].to(DEVICE))
    bound = screen_bound(planes, SCREEN.block_k)
    _, threshold, error = expected(x, codebook, planes)
    of_screen = screens.screen(x[None].to(DEVICE), planes, bound, SCREEN)[3]
    own = error - of_screen[0].cpu().double()
    # the whole threshold without the screen's error
    want = threshold + (error - own)
    tiles = -(-len(x) // SCREEN.block_n)
    rows = values["rows_ptr"].cpu()[: tiles * SCREEN.block_n].view(tiles, -1).long()
    got = values["thresholds_ptr"].cpu()[: tiles * SCREEN.block_n].view(tiles, -1).double()
    unknown = values["unknown_ptr"].cpu()[:tiles, None]
    is_searched = SCREEN.block_n - 1 - torch.arange(SCREEN.block_n) < unknown
    rows, got = rows[is_searched], got[is_searched]
    assert len(rows) == len(x)
    # the last term of a threshold, for its own rounding
    want = want - 2.0**-22 * (want + own).abs()
    assert ((got - want[rows]).abs() <= 0.35 * own[rows]).all()


def test_heads_have_codebooks_and_doubts_of_their_own() -> None:
    # another magnitude for each head: a mean or scale of another head would show
    scales = torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    x, codebook = torch.randn(3, 20, 12) * scales, torch.randn(3, 300, 12) * scales
    # the second head alone has every row in doubt
    codebook[1, 150:] = codebook[1, :150]
    # strided as [N, H, D] is
    x = x.movedim(0, 1).contiguous().movedim(1, 0)
    out = search(x, codebook, gather=True)
    assert out.num_doubtful.tolist()[1] == 20
    assert max(out.num_doubtful.tolist()[::2]) < 10
    for head in range(3):
        want = oracle.nearest_code(x[head], codebook[head])
        assert torch.equal(out.indices[head].cpu(), want)
        assert torch.equal(out.quantized[head].cpu(), codebook[head][want])


# --- what the certificate and the thresholds are, from float64 ---


def expected(x: Tensor, codebook: Tensor, planes: CodePlanes) -> tuple[Tensor, Tensor, Tensor]:
    """How far each row is from being in doubt, what it is compared with, and its threshold."""
    bound, own = screen_bound(planes, SCREEN.block_k), error_bound(x.shape[1], torch.float32)
    groups, _, second, error, row_scale = (
        t[0].cpu().double() for t in screens.screen(x[None].to(DEVICE), planes, bound, SCREEN)
    )
    mean, scale = (t[0].cpu().double() for t in (planes.mean, planes.scale))
    ratio = emulation.ratio_of(row_scale, planes)
    y, e = (x.double() - mean) * row_scale[:, None], (codebook.double() - mean) * scale
    sqnorm = torch.zeros(len(e)).double() if planes.is_dot else e.square().sum(1)
    half_max = planes.norms[0, :, 3].max().cpu().double()
    scores = y @ e.T + ratio[:, None] * (half_max - sqnorm / 2)
    is_member = torch.arange(codebook.shape[0]) // 8 == groups[:, None]
    members = scores.where(is_member, -torch.inf).topk(2, 1).values
    own_error = own_bound(y, e, ratio, own, planes.is_dot)
    if codebook.shape[0] <= 8:
        second = torch.full_like(second, -torch.inf)
    outside = (members[:, 0] - second) / (error + own_error)
    if planes.is_dot:
        inside = (members[:, 0] - members[:, 1]) / (2 * own_error)
    else:
        sq_distances = (y[:, None] - ratio[:, None, None] * e).square().sum(2)
        nearest, next_one = sq_distances.where(is_member, torch.inf).topk(2, 1, largest=False)[0].T
        inside = (next_one - nearest) / (2.1 * (x.shape[1] + 12) * 2.0**-24 * nearest + own.tiny)
    return torch.minimum(outside, inside), members[:, 0] - error - own_error, error + own_error


def own_bound(y: Tensor, e: Tensor, ratio: Tensor, own: OwnBound, is_dot: bool) -> Tensor:
    """docs/exactness.md, of the scores that the finish makes in float32."""
    norm, max_norm = y.norm(dim=1), e.norm(dim=1).max()
    if is_dot:
        return own.products * max_norm * norm + own.tiny
    products = own.products * max_norm * (norm + ratio * max_norm / 2)
    return products + own.distances * norm.square() / ratio + own.tiny


def along_a_line(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows between neighbours, nearer and nearer to the middle: margins of every size."""
    codebook = torch.zeros(k, d)
    codebook[:, 0] = torch.arange(k)
    codebook += torch.randn(k, d) * 0.1
    # most of them near the origin, where float32 is finer
    first = ((k - 1) * torch.rand(n) ** 4).long()
    t = 0.5 - 2.0 ** -(torch.arange(n) % 26 + 2).double()[:, None] * torch.rand(n, 1)
    return torch.lerp(codebook[first].double(), codebook[first + 1].double(), t).float(), codebook


def between_unit_codes(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows between a code and the one with the next largest product: margins of every size."""
    codebook = torch.nn.functional.normalize(torch.randn(k, d).double())
    products = (codebook @ codebook.T).fill_diagonal_(-torch.inf)
    first = torch.randint(k, (n,))
    a, b = codebook[first], codebook[products.argmax(1)[first]]
    t = 2.0 ** -(torch.arange(n) % 22 + 2).double()[:, None] * torch.rand(n, 1)
    lengths = 10.0 ** torch.randint(-9, 10, (n, 1)).double()
    return ((a + b + (a - b) * t) * lengths).float(), codebook.float()


# a group alone, whatever its planes; then rivals in other groups, in each kind of planes
@pytest.mark.parametrize(("size", "dim"), [(8, 12), *((60, dim) for dim in (3, 12, 40))])
@pytest.mark.parametrize("far", [1.0, 1e6, None])
def test_doubt_and_thresholds_are_what_the_bounds_say(
    size: int, far: float | None, dim: int
) -> None:
    is_dot = far is None
    if is_dot:
        x, codebook = between_unit_codes(400, size, dim)
    else:
        x, codebook = along_a_line(400, size, dim)
        x[::2, -1] *= far
    planes = prepare_planes(codebook[None].to(DEVICE), is_dot=is_dot)
    margin, threshold, error = expected(x, codebook, planes)
    launches = []
    recorder = compiling.Recorder(module.rescue_rows_kernel, launches)
    with mock.patch.object(module, "rescue_rows_kernel", recorder):
        search(x[None], codebook[None], is_dot=is_dot)
    values = launches[0].values
    tiles = -(-len(x) // SCREEN.block_n)
    # each tile of rows has its own list: rows with known rivals first, the others at the end
    place = torch.arange(SCREEN.block_n)
    known, unknown = (values[f"{name}_ptr"].cpu()[:tiles, None] for name in ("known", "unknown"))
    is_searched = SCREEN.block_n - 1 - place < unknown
    is_listed = (place < known) | is_searched
    rows = values["rows_ptr"].cpu()[: is_listed.numel()].view(is_listed.shape).long()
    searched, rows = rows[is_searched], rows[is_listed]
    is_doubtful = torch.zeros(len(x), dtype=torch.bool)
    is_doubtful[rows] = True
    # what is rounded takes less than a third of the bounds; half of these would show
    assert ((margin > 0.4) & (margin < 0.65)).any()
    assert is_doubtful[margin < 0.65].all()
    assert not is_doubtful[margin > 1.35].any()
    assert is_doubtful.any()
    assert not is_doubtful.all()
    got = values["thresholds_ptr"].cpu()[: is_listed.numel()].view(is_listed.shape)
    got = got[is_searched].double()
    assert ((got - threshold[searched]).abs() <= 0.35 * error[searched]).all()
