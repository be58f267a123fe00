"""The torch backend at the limits of its error bound; and that hard data is as hard as it says."""

from __future__ import annotations

import data
import numpy as np
import oracle
import pytest
import torch

import vqtriton
from vqtriton import torch_backend
from vqtriton.planes import prepare_planes
from vqtriton.screening import centred_codebook


@pytest.mark.once
@pytest.mark.parametrize("case", data.HARD)
def test_parts_of_the_list_change_nothing(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    x, codebook = data.HARD[case](60, 70, 5)
    want = oracle.nearest_code(x, codebook)
    for groups in (1, 3, 10):
        monkeypatch.setattr(torch_backend, "BLOCK_GROUPS", groups)
        assert torch.equal(vqtriton.nearest_code(x, codebook, backend="torch"), want)


# --- the error bound, with the worst that it allows ---


@pytest.mark.once
@pytest.mark.parametrize("case", ["near_ties", "ulp_ties_across_groups", "unit_norm"])
@pytest.mark.parametrize("dim", [33, 128, 1024])
def test_exact_with_the_worst_sums(monkeypatch: pytest.MonkeyPatch, case: str, dim: int) -> None:
    # γ over D products and the half norm, against the nearest code and for all the others
    x, codebook = data.HARD[case](400, 64, dim)
    want = oracle.nearest_code(x, codebook)

    def worst(half, y, codes, *, alpha, out):
        y, codes, half = y.double(), codes.double(), half.double()
        norms = half.where(half < torch.inf, 0)
        # codes as they are: twice the scores, and norms that err as well
        error = -alpha * y.norm(dim=1)[:, None] * codes.norm(dim=0) - alpha * norms
        error *= (dim + 1) * 2.0**-24
        is_nearest = torch.arange(half.numel()) == want[:, None]
        return out.copy_(half + alpha * (y @ codes) + torch.where(is_nearest, error, -error))

    monkeypatch.setattr(torch, "addmm", worst)
    # all rows at once
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", 400 * dim)
    assert torch.equal(vqtriton.nearest_code(x, codebook, backend="torch"), want)


@pytest.mark.once
@pytest.mark.parametrize("case", ["near_ties", "ulp_ties_across_groups", "unit_norm", "lattice"])
@pytest.mark.parametrize("dim", [5, 33, 128])
def test_exact_with_the_worst_differences(monkeypatch, case: str, dim: int) -> None:
    x, codebook = data.HARD[case](150, 40, dim)
    want = oracle.nearest_code(x, codebook)
    for row, nearest in zip(x[:, None], want, strict=True):

        def worst(rows, codes, *, compute_mode, nearest=nearest):
            distances = (rows.double()[:, None] - codes.double()).square().sum(2).sqrt()
            error = ((dim + 3) / 2 + 1) * 2.0**-24
            is_nearest = torch.arange(len(codes)) == nearest
            return (distances * torch.where(is_nearest, 1 + error, 1 - error)).float()

        monkeypatch.setattr(torch, "cdist", worst)
        assert vqtriton.nearest_code(row, codebook, backend="torch").tolist() == [nearest]


@pytest.mark.once
@pytest.mark.parametrize("case", data.HARD)
@pytest.mark.parametrize("dim", [1, 6, 64, 128])
def test_few_rows_at_a_time(case: str, dim: int) -> None:
    x, codebook = data.HARD[case](90, 40, dim)
    want = oracle.nearest_code(x, codebook)
    for number in (128 // dim, 3):
        parts = [vqtriton.nearest_code(part, codebook, backend="torch") for part in x.split(number)]
        assert torch.equal(torch.cat(parts), want)


@pytest.mark.once
def test_squares_that_underflow_decide_nothing() -> None:
    # in float32 the squares of the first code vanish, and that of the second does not
    codebook = torch.zeros(2, 128)
    codebook[0], codebook[1, 0] = 2.5e-23, 1e-22
    x = torch.zeros(1, 128)
    assert oracle.nearest_code(x, codebook).tolist() == [1]
    assert vqtriton.nearest_code(x, codebook, backend="torch").tolist() == [1]


# --- rows in doubt ---


@pytest.mark.once
@pytest.mark.parametrize("number", [20, 2000])
def test_codes_far_from_the_origin_are_centred(number: int) -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(number, 32) + 1000, torch.randn(300, 32) + 1000
    indices, in_doubt = torch_backend.search(x, codebook, "exact")
    assert torch.equal(indices, oracle.nearest_code(x, codebook))
    # as many as without the offset, give or take the rounding of the inputs
    assert in_doubt < number / 40


@pytest.mark.once
def test_rows_in_doubt_are_counted() -> None:
    codebook = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    x = torch.tensor([[0.0], [0.5], [0.9], [2.0], [torch.nan]])
    indices, in_doubt = torch_backend.search(x, codebook, "exact")
    assert indices.tolist() == [0, 0, 2, 2, 0]
    # equal codes, and two middles
    assert in_doubt == 3


@pytest.mark.once
def test_rows_with_very_many_candidates_are_compared_at_once(monkeypatch) -> None:
    # padding: as far from all codes of unit norm, up to rounding
    x, codebook = data.unit_norm(600, 512, 64)
    x[:50] = 0
    pairs = []
    choose = torch_backend._choose
    monkeypatch.setattr(
        torch_backend, "_choose", lambda *args: pairs.append(len(args[2])) or choose(*args)
    )
    indices, in_doubt = torch_backend.search(x, codebook, "exact")
    assert torch.equal(indices, oracle.nearest_code(x, codebook))
    assert in_doubt >= 50
    assert sum(pairs) < 50 * 512


@pytest.mark.once
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_bad_code_leaves_the_screen_to_the_others(bad: float) -> None:
    x, codebook = torch.randn(200, 4), torch.randn(50, 4)
    codebook[3], codebook[4] = bad, -bad
    prepared = centred_codebook(codebook, torch.float32)
    assert 0 < prepared.max_norm < torch.inf
    assert prepared.half_sqnorm.isfinite().sum() == (50 if bad == 3e38 else 48)
    indices, _ = torch_backend.search(x, codebook, "exact")
    assert torch.equal(indices, oracle.nearest_code(x, codebook))


@pytest.mark.once
@pytest.mark.parametrize("long", [1e8, 1e12, 1e15, 1e18, 1e38, torch.inf])
def test_a_long_row_brings_no_other_into_doubt(long: float) -> None:
    x, codebook = torch.randn(400, 16), torch.randn(300, 16)
    _, in_doubt = torch_backend.search(x[1:], codebook, "exact")
    x[0] = long
    indices, with_it = torch_backend.search(x, codebook, "exact")
    assert with_it <= in_doubt + 2
    assert torch.equal(indices, oracle.nearest_code(x, codebook))


# --- the data ---


@pytest.mark.once
@pytest.mark.parametrize("dim", data.DIMS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("ulp_ties_across_groups", np.float32),
        ("ulp_ties_in_a_group", np.float32),
        ("ulp_ties_of_float64", np.float64),
    ],
)
def test_distances_differ_by_few_ulp(case: str, dtype: type, dim: int) -> None:
    x, codebook = data.HARD[case](1000, 64, dim)
    least, second = np.sort(oracle.distances(x, codebook), axis=1)[:, :2].T
    gap = (second - least) / np.spacing(least.astype(dtype))
    assert gap.max() <= 65
    hits = [(np.abs(gap / ulps - 1) < 0.25).any() for ulps in (1, 2, 4, 8, 16, 32, 64)]
    # in one dimension an ulp of the row is several of the float32 distance
    assert sum(hits) >= 3 if dim == 1 or dtype == np.float64 else all(hits[1:])


@pytest.mark.once
@pytest.mark.parametrize("dim", [8, 64, 1024])
@pytest.mark.parametrize(("case", "step"), [("across_groups", 8), ("in_a_group", 1)])
def test_ulp_ties_are_where_they_should_be(case: str, step: int, dim: int) -> None:
    x, codebook = data.HARD[f"ulp_ties_{case}"](500, 64, dim)
    two = np.argsort(oracle.distances(x, codebook), axis=1)[:, :2]
    first, last = two.min(1), two.max(1)
    assert np.mean((last - first == step) & ((first // 8 == last // 8) == (step == 1))) > 0.95


@pytest.mark.once
@pytest.mark.parametrize("dim", [1, 12, 64])
def test_planes_scale_to_the_limits_of_fp16(dim: int) -> None:
    for case in ("rows_at_fp16_limits", "at_fp16_subnormals", "at_fp16_midpoints"):
        x, codebook = data.HARD[case](500, 64, dim)
        planes = prepare_planes(codebook[None])
        assert planes.scale.item() == 2.0**9
        y = (x - planes.mean[0]) * planes.scale
        if case == "rows_at_fp16_limits":
            for low, high in ((65503, 65504), (65504, 65505), (65519, 65520), (65520, 65521)):
                assert ((y.abs() >= low) & (y.abs() <= high)).any()
            assert y.half().isinf().any()
        elif case == "at_fp16_subnormals":
            assert (y.abs() < 2.0**-14).any()
            assert (y.abs() == 2.0**-14).any()
            assert (y.abs() > 2.0**-14).any()
        else:
            ulp = torch.ldexp(torch.ones_like(y), torch.frexp(y).exponent - 11)
            assert ((y - y.half().float()).abs() == ulp / 2).all()
