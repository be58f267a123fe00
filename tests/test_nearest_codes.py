"""`nearest_codes`: the k nearest codes, in order."""

from __future__ import annotations

import zlib
from functools import partial

import data
import numpy as np
import oracle
import pytest
import torch
from backends import (
    BACKENDS,
    EXACT_DTYPES,
    Backend,
    on_each,
    on_every_backend,
    on_every_real_backend,
)
from conftest import INTERPRETED
from hypothesis import assume, given
from hypothesis import strategies as st

import vqtriton
from vqtriton import ops, several_codes

pytestmark = pytest.mark.kernel

METRICS = ("l2", "cosine", "dot")
HARD = data.HARD | data.HARD_PRODUCTS
# the interpreter is slow, and has kernels for k = 1 alone
SIZES = st.sampled_from([1, 7, 33] if INTERPRETED else [1, 2, 7, 16, 33, 65, 129, 300])
KS = st.sampled_from([1, 2, 3, 8, 31, 32])
DIMS = st.sampled_from([1, 2, 3, 8, 17, 64])
SEEDS = st.integers(0, 2**32 - 1)


def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small searches take the path of large ones, in several blocks."""
    monkeypatch.setattr(several_codes, "FEW_SCORES", 0)
    monkeypatch.setattr(several_codes, "MANY_CODES", several_codes.GROUP)
    monkeypatch.setattr(several_codes, "BLOCK_SCORES", 1 << 14)


def costs(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> np.ndarray:
    if metric == "cosine":
        x, codebook = oracle.normalized(x), oracle.normalized(codebook)
    return (oracle.costs_of_dots if metric == "dot" else oracle.distances)(x, codebook)


def wanted(x: torch.Tensor, codebook: torch.Tensor, k: int, metric: str = "l2") -> torch.Tensor:
    """A stable sort keeps the order of equal distances, and of those that are not finite."""
    order = costs(x, codebook, metric).argsort(axis=1, kind="stable")
    return torch.from_numpy(order[:, :k].copy())


def nearest(x, codebook, k: int, backend: Backend, **options):
    x, codebook = x.to(backend.device), codebook.to(backend.device)
    found = vqtriton.nearest_codes(x, codebook, k, backend=backend.name, **options)
    return found.cpu() if isinstance(found, torch.Tensor) else tuple(t.cpu() for t in found)


# --- against the oracle ---


@pytest.mark.once
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(
    ("metric", "case"),
    [
        *(("l2", case) for case in data.HARD),
        *(("dot", case) for case in ("gaussian", "lattice", "not_finite", *data.HARD_PRODUCTS)),
        *(("cosine", case) for case in ("not_finite", "duplicates", "scaled_ties")),
    ],
)
def test_equals_the_oracle_on_hard_data(metric, case, is_grouped, monkeypatch) -> None:
    if is_grouped:
        in_groups(monkeypatch)
    for dim in (1, 16, 100):
        torch.manual_seed(zlib.crc32(f"{case} {dim}".encode()))
        x, codebook = HARD[case](120, 300, dim)
        for k in (2, 32):
            got = vqtriton.nearest_codes(x, codebook, k, metric=metric)
            assert torch.equal(got, wanted(x, codebook, k, metric)), (dim, k)


@on_each(BACKENDS)
@given(
    n=SIZES,
    size=SIZES,
    k=KS,
    d=DIMS,
    metric=st.sampled_from(METRICS),
    case=st.sampled_from(sorted(HARD)),
    dtypes=st.tuples(st.sampled_from(EXACT_DTYPES), st.sampled_from(EXACT_DTYPES)),
    layouts=st.tuples(st.sampled_from(data.LAYOUTS), st.sampled_from(data.LAYOUTS)),
    is_grouped=st.booleans(),
    seed=SEEDS,
)
def test_equals_the_oracle(
    backend, n, size, k, d, metric, case, dtypes, layouts, is_grouped, seed
) -> None:
    # Triton's interpreter widens these wrongly
    assume(not (INTERPRETED and torch.bfloat16 in dtypes and case == "subnormal"))
    torch.manual_seed(seed)
    x, codebook = (t.to(dtype) for t, dtype in zip(HARD[case](n, size, d), dtypes, strict=True))
    k = min(k, size)
    want = wanted(x, codebook, k, metric)
    assert torch.equal(vqtriton.reference.nearest_codes(x, codebook, k, metric=metric), want)
    x, codebook = (data.with_layout(*pair) for pair in zip((x, codebook), layouts, strict=True))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if is_grouped:
            in_groups(monkeypatch)
        assert torch.equal(nearest(x, codebook, k, backend, metric=metric), want)
        # one code is the first of several
        one = vqtriton.nearest_code(
            x.to(backend.device), codebook.to(backend.device), metric=metric, backend=backend.name
        )
        assert torch.equal(one.cpu(), want[:, 0])


@pytest.mark.once
@pytest.mark.parametrize("size", [16, 100, 511, 1024, 1030])
def test_all_codes_in_order(size: int) -> None:
    x, codebook = torch.randn(300, 9), torch.randn(size, 9)
    k = min(size, 32)
    assert torch.equal(vqtriton.nearest_codes(x, codebook, k), wanted(x, codebook, k))


@pytest.mark.once
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [4, 128])
def test_large_searches(metric: str, dim: int) -> None:
    # in groups, with the constants as they are
    x, codebook = torch.randn(500, dim), torch.randn(1030, dim)
    # so that most rows are in doubt
    codebook[::3] = codebook[1] + torch.randn(344, dim) * 1e-6
    got = vqtriton.nearest_codes(x, codebook, 8, metric=metric)
    assert torch.equal(got, wanted(x, codebook, 8, metric))


@pytest.mark.once
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("case", ["gaussian", "near_ties", "ulp_ties_across_groups", "unit_norm"])
@pytest.mark.parametrize("dim", [33, 128])
def test_exact_with_the_worst_sums(monkeypatch, case: str, dim: int, is_grouped: bool) -> None:
    # γ over D products and the half norm, against every other code in the order of distances
    if is_grouped:
        in_groups(monkeypatch)
    x, codebook = data.HARD[case](200, 64, dim)
    rank = wanted(x, codebook, 64).argsort(1)
    # all rows at once
    monkeypatch.setattr(several_codes, "BLOCK_SCORES", 1 << 21)

    def worst(half, y, codes, *, alpha, out):
        y, codes, half = y.double(), codes.double(), half.double()
        norms = half.where(half < torch.inf, 0)
        # codes as they are: twice the scores, and norms that err as well
        error = -alpha * y.norm(dim=1)[:, None] * codes.norm(dim=0) - alpha * norms
        error *= (dim + 1) * 2.0**-24
        return out.copy_(half + alpha * (y @ codes) + error * (1 - 2 * (rank % 2)))

    monkeypatch.setattr(torch, "addmm", worst)
    for k in (2, 3, 8):
        got = vqtriton.nearest_codes(x, codebook, k, backend="torch")
        assert torch.equal(got, rank.argsort(1)[:, :k])


@pytest.mark.once
def test_exact_where_matmuls_round_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    addmm = torch.addmm

    def rounded(half, y, codes, *, alpha, out):
        return addmm(half, y.bfloat16().float(), codes.bfloat16().float(), alpha=alpha, out=out)

    x, codebook = data.gaussian(400, 300, 16)
    want = wanted(x, codebook, 4)
    monkeypatch.setattr(torch, "addmm", rounded)
    assert not torch.equal(vqtriton.nearest_codes(x, codebook, 4), want)
    monkeypatch.setattr(several_codes, "matmul_input_roundoff", lambda *_: 2.0**-9)
    assert torch.equal(vqtriton.nearest_codes(x, codebook, 4), want)


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "codebook"),
    [
        ([[1e200]], [[-1e200], [1e200], [1.0]]),
        ([[1.0]], [[5.0], [1.0], [1e160], [2e160]]),
        ([[1e308], [1.0]], [[-1e308], [1e307], [0.0]]),
        ([[1e-200]], [[1e-180], [2e-200], [1e-200]]),
        ([[1e200]], [[float("nan")], [1.0], [2.0]]),
        ([[1.0, 1e155]], [[float("inf"), 0.0], [0.0, 0.0], [0.0, 1e155]]),
    ],
)
def test_float64_beyond_the_range_of_its_squares(x, codebook) -> None:
    x = torch.tensor(x, dtype=torch.float64)
    codebook = torch.tensor(codebook, dtype=torch.float64)
    for k in range(1, len(codebook) + 1):
        assert torch.equal(vqtriton.nearest_codes(x, codebook, k), wanted(x, codebook, k))


# --- ties, and what is not finite ---


@on_every_backend
def test_ties_go_to_the_lower_index(backend: Backend) -> None:
    x, codebook = data.collapsed(40, 300, 8)
    codebook[17], codebook[299] = x[0], x[0]
    got = nearest(x, codebook, 5, backend)
    assert got[0].tolist() == [17, 299, 0, 1, 2]
    assert torch.equal(got, wanted(x, codebook, 5))


@on_every_backend
def test_codes_that_are_not_finite_come_last(backend: Backend) -> None:
    codebook = torch.tensor([[torch.nan], [3.0], [torch.inf], [1.0], [torch.nan]])
    x = torch.tensor([[0.0], [4.0], [torch.nan], [torch.inf]])
    want = [[3, 1, 0, 2], [1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    for k in (1, 2, 3, 4):
        got, distances = nearest(x, codebook, k, backend, return_distances=True)
        assert got.tolist() == [row[:k] for row in want]
        assert torch.equal(distances[:, 2:], torch.full((4, max(k - 2, 0)), torch.inf))
    assert nearest(x, codebook[::2], 3, backend).tolist() == [[0, 1, 2]] * 4


@on_every_backend
def test_one_bad_row_is_one_bad_row(backend: Backend) -> None:
    x, codebook = torch.randn(128, 16), torch.randn(300, 16)
    want = nearest(x, codebook, 3, backend)
    for bad in (torch.nan, -torch.inf, 1e30):
        spoiled = x.clone()
        spoiled[17, 3] = bad
        got = nearest(spoiled, codebook, 3, backend)
        assert torch.equal(got[17], wanted(spoiled, codebook, 3)[17])
        got[17] = want[17]
        assert torch.equal(got, want)


# --- invariance ---


@on_each(BACKENDS)
@given(n=SIZES, size=SIZES, k=KS, d=DIMS, case=st.sampled_from(sorted(data.HARD)), seed=SEEDS)
def test_does_not_depend_on_the_batch(backend: Backend, n, size, k, d, case, seed) -> None:
    torch.manual_seed(seed)
    x, codebook = data.HARD[case](n, size, d)
    options = {"k": min(k, size), "backend": backend, "return_distances": True}
    together = nearest(x, codebook, **options)
    cut, order = int(torch.randint(n + 1, ())), torch.randperm(n)
    parts = [nearest(part, codebook, **options) for part in (x[:cut], x[cut:])]
    for whole, apart, shuffled in zip(
        together,
        map(torch.cat, zip(*parts, strict=True)),
        nearest(x[order], codebook, **options),
        strict=True,
    ):
        assert torch.equal(apart, whole)
        assert torch.equal(shuffled, whole[order])


@pytest.mark.once
@pytest.mark.parametrize("case", ["gaussian", "duplicates", "lattice", "not_finite", "ulp_codes"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    x, codebook = data.HARD[case](50, 140, 6)
    want = wanted(x, codebook, 4)
    monkeypatch.setattr(several_codes, "FEW_SCORES", 0)
    for scores in (1, 1 << 12, 1 << 21):
        for pairs in (1, 200):
            monkeypatch.setattr(several_codes, "BLOCK_SCORES", scores)
            monkeypatch.setattr(several_codes, "BLOCK_PAIRS_ELEMENTS", pairs)
            assert torch.equal(vqtriton.nearest_codes(x, codebook, 4), want)


@pytest.mark.once
def test_codes_far_from_the_origin_are_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = torch.randn(200, 32) + 1000, torch.randn(300, 32) + 1000
    pairs = []
    resolve = several_codes.distances_of_pairs
    monkeypatch.setattr(
        several_codes,
        "distances_of_pairs",
        lambda *args: pairs.append(len(args[2])) or resolve(*args),
    )
    assert torch.equal(vqtriton.nearest_codes(x, codebook, 4), wanted(x, codebook, 4))
    assert sum(pairs) < 200


# --- distances ---


@on_every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", ["gaussian", "far_from_the_origin", "not_finite", "near_overflow"])
def test_distances_are_rounded_once(backend: Backend, metric: str, case: str) -> None:
    x, codebook = data.HARD[case](60, 300, 12)
    for k in (1, 4):
        got, distances = nearest(x, codebook, k, backend, metric=metric, return_distances=True)
        want = np.take_along_axis(costs(x, codebook, metric), got.numpy(), axis=1)
        assert distances.dtype == torch.float32
        assert torch.equal(distances, torch.from_numpy(want).float())
        assert torch.equal(distances, distances.sort(dim=1).values)
        theirs = vqtriton.reference.nearest_codes(
            x, codebook, k, metric=metric, return_distances=True
        )
        assert all(map(torch.equal, theirs, (got, distances)))


@pytest.mark.once
def test_distances_of_float64() -> None:
    x, codebook = torch.randn(20, 5, dtype=torch.float64), torch.randn(50, 5)
    for search in (vqtriton.nearest_codes, vqtriton.reference.nearest_codes):
        indices, distances = search(x, codebook, 3, return_distances=True)
        want = np.take_along_axis(oracle.distances(x, codebook), indices.numpy(), axis=1)
        assert torch.equal(distances, torch.from_numpy(want))


# --- shapes, options, errors ---


@on_every_backend
def test_shape_of_the_batch_is_kept(backend: Backend) -> None:
    x, codebook = torch.randn(2, 3, 5, 8), torch.randn(7, 8)
    want = wanted(x.reshape(-1, 8), codebook, 3).view(2, 3, 5, 3)
    assert torch.equal(nearest(x, codebook, 3, backend), want)
    assert torch.equal(nearest(x[0, 0, 0], codebook, 3, backend), want[0, 0, 0])
    fmap = x.movedim(-1, 1).contiguous().movedim(1, -1)
    got, distances = nearest(fmap, codebook, 3, backend, return_distances=True)
    assert torch.equal(got, want)
    assert distances.shape == want.shape
    for shape in ((0, 8), (3, 0, 8)):
        for k in (1, 3):
            got, distances = nearest(
                torch.randn(shape), codebook, k, backend, return_distances=True
            )
            assert got.shape == distances.shape == (*shape[:-1], k)
            assert got.dtype == torch.int64


@on_every_backend
@pytest.mark.parametrize("metric", METRICS)
def test_prepared_codebook_changes_no_index(backend: Backend, metric: str) -> None:
    x, codebook = data.not_finite(40, 70, 12)
    device = backend.device
    prepared = vqtriton.prepare_codebook(codebook.to(device), metric=metric, backend=backend.name)
    for k in (1, 5):
        got = vqtriton.nearest_codes(x.to(device), prepared, k, metric=metric)
        assert torch.equal(got.cpu(), wanted(x, codebook, k, metric))


@on_every_backend
def test_inputs_are_left_alone_and_get_no_gradient(backend: Backend) -> None:
    x, codebook = data.not_finite(33, 17, 5)
    before = x.clone(), codebook.clone()
    x.requires_grad_()
    codebook.requires_grad_()
    _, distances = nearest(x, codebook, 4, backend, return_distances=True)
    assert not distances.requires_grad
    torch.testing.assert_close((x.data, codebook.data), before, rtol=0, atol=0, equal_nan=True)


X, CODEBOOK = torch.zeros(4, 3), torch.zeros(40, 3)


@pytest.mark.parametrize(
    ("k", "options", "error", "message"),
    [
        (0, {}, ValueError, r"k is 0; it must be in \[1, 32\]"),
        (33, {}, ValueError, r"k is 33; it must be in \[1, 32\]"),
        (8, {"codebook": CODEBOOK[:7]}, ValueError, "k is 8 but codebook has 7 codes"),
        (2.0, {}, TypeError, "k is 2.0; it must be an int"),
        (True, {}, TypeError, "k is True; it must be an int"),
        (2, {"x": X[:, :2]}, ValueError, "codebook has 3 columns but x has 2"),
        (2, {"x": X.int()}, TypeError, "x is a torch.int32 tensor"),
        (2, {"codebook": CODEBOOK[0]}, ValueError, r"codebook has shape \(3,\)"),
        (2, {"metric": "l1"}, ValueError, "metric is 'l1'"),
        (2, {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        (2, {"return_distances": 1}, TypeError, "return_distances is 1"),
        (
            *(2, {"codebook": vqtriton.prepare_codebook(CODEBOOK, metric="dot", backend="torch")}),
            *(ValueError, "metric is 'l2', but codebook was prepared for 'dot'"),
        ),
    ],
)
def test_bad_input_is_named(k, options, error, message) -> None:
    options = {"x": X, "codebook": CODEBOOK, **options}
    with pytest.raises(error, match=message):
        vqtriton.nearest_codes(options.pop("x"), options.pop("codebook"), k, **options)


# --- the rest of torch ---


@on_every_real_backend
def test_opcheck(backend: Backend) -> None:
    x, codebook = torch.randn(9, 5, device=backend.device), torch.randn(6, 5, device=backend.device)
    for args in (
        (x, codebook, 3, "l2", False, backend.name),
        (x.T.contiguous().T, codebook.half(), 6, "dot", True, backend.name),
        (x[:0], codebook, 1, "l2", True, backend.name),
        (x, codebook, 1, "l2", True, backend.name),
    ):
        torch.library.opcheck(ops.nearest_codes, args)
        places = {t.untyped_storage().data_ptr() for t in ops.nearest_codes(*args) if t.numel()}
        assert not places & {t.untyped_storage().data_ptr() for t in (x, codebook)}


@on_every_real_backend
def test_compiles_as_one_graph(backend: Backend) -> None:
    search = partial(vqtriton.nearest_codes, k=3, return_distances=True, backend=backend.name)
    compiled = torch.compile(search, fullgraph=True, dynamic=True)
    codebook = torch.randn(8, 5, device=backend.device)
    for n in (9, 17):
        x = torch.randn(n, 2, 5, device=backend.device, requires_grad=True)
        assert all(map(torch.equal, compiled(x, codebook), search(x, codebook)))


@on_every_real_backend
def test_autocast_changes_no_index(backend: Backend) -> None:
    x, codebook = torch.randn(65, 32, device=backend.device), torch.randn(300, 32)
    codebook = codebook.to(backend.device)
    want = vqtriton.nearest_codes(x, codebook, 4, return_distances=True, backend=backend.name)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = vqtriton.nearest_codes(x, codebook, 4, return_distances=True, backend=backend.name)
    assert all(map(torch.equal, got, want))
