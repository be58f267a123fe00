"""`nearest_code` by cosine similarity and by dot product."""

from __future__ import annotations

import zlib

import data
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
from stub_device import StubDevice

import vqtriton
from vqtriton import tensors, torch_backend

pytestmark = pytest.mark.kernel

METRICS = ("cosine", "dot")
HARD = data.HARD | data.HARD_PRODUCTS
SIZES = st.sampled_from([1, 2, 15, 16, 17, 33, 65, 129])
DIMS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64, 65])
SEEDS = st.integers(0, 2**32 - 1)
every_metric = pytest.mark.parametrize("metric", METRICS)


def nearest(x: torch.Tensor, codebook: torch.Tensor, backend: Backend, **kwargs) -> torch.Tensor:
    x, codebook = x.to(backend.device), codebook.to(backend.device)
    return vqtriton.nearest_code(x, codebook, backend=backend.name, **kwargs).cpu()


def wrong_rows(backend: Backend, metric: str, case: str, dim: int, n: int, k: int) -> int:
    # so that a case can be repeated by itself
    torch.manual_seed(zlib.crc32(f"{case} {dim}".encode()))
    x, codebook = HARD[case](n, k, dim)
    got = nearest(x, codebook, backend, metric=metric)
    return int((got != oracle.nearest_code(x, codebook, metric=metric)).sum())


# the interpreter is slow, and there the search by cosines is that by distances
OF_COSINES = ("zeros", "not_finite", "subnormal", "unit_norm", "duplicates", "scaled_ties")
PAIRS = [("dot", case) for case in HARD]
PAIRS += [("cosine", case) for case in (OF_COSINES if INTERPRETED else HARD)]


@on_every_backend
@pytest.mark.parametrize(("metric", "case"), PAIRS)
def test_equals_the_oracle_on_hard_data(backend: Backend, metric, case, monkeypatch) -> None:
    # several blocks of rows
    monkeypatch.setattr(torch_backend, "BLOCK_SCORES", 1 << 15)
    dims: tuple[int, ...] = (1, 2, 8, 33, 64, 300)
    if INTERPRETED:
        # both planes, and a plane with the bias
        dims = (3, 12) if case in data.HARD_PRODUCTS else (12,)
    for dim in dims:
        n, k = (33, 70) if INTERPRETED else (130, min(300, max(33, (1 << 15) // dim)))
        assert wrong_rows(backend, metric, case, dim, n, k) == 0, dim


@pytest.mark.slow
@pytest.mark.once
@on_every_backend
@every_metric
def test_equals_the_oracle_on_many_hard_rows(backend: Backend, metric: str) -> None:
    n = 100_000 // (len(HARD) * len(data.DIMS)) + 1
    for case in HARD:
        for dim in data.DIMS:
            k = min(701, max(33, (1 << 15) // dim))
            assert wrong_rows(backend, metric, case, dim, n, k) == 0, (case, dim)


@on_each(BACKENDS)
@every_metric
@given(
    n=SIZES,
    k=SIZES,
    d=DIMS,
    case=st.sampled_from(sorted(HARD)),
    dtypes=st.tuples(st.sampled_from(EXACT_DTYPES), st.sampled_from(EXACT_DTYPES)),
    layouts=st.tuples(st.sampled_from(data.LAYOUTS), st.sampled_from(data.LAYOUTS)),
    seed=SEEDS,
)
def test_equals_the_oracle(backend: Backend, metric, n, k, d, case, dtypes, layouts, seed) -> None:
    # Triton's interpreter widens these wrongly
    assume(not (INTERPRETED and torch.bfloat16 in dtypes and case == "subnormal"))
    torch.manual_seed(seed)
    x, codebook = (t.to(dtype) for t, dtype in zip(HARD[case](n, k, d), dtypes, strict=True))
    want = oracle.nearest_code(x, codebook, metric=metric)
    assert torch.equal(vqtriton.reference.nearest_code(x, codebook, metric=metric), want)
    x, codebook = (data.with_layout(*pair) for pair in zip((x, codebook), layouts, strict=True))
    assert torch.equal(nearest(x, codebook, backend, metric=metric), want)
    prepared = vqtriton.prepare_codebook(
        codebook.to(backend.device), metric=metric, backend=backend.name
    )
    cut = n // 2
    for rows, of_rows in ((x[:cut], want[:cut]), (x[cut:], want[cut:])):
        got = vqtriton.nearest_code(rows.to(backend.device), prepared, metric=metric)
        assert torch.equal(got.cpu(), of_rows)


@on_every_backend
@every_metric
@pytest.mark.parametrize("dim", [100] if INTERPRETED else [100, 300, 1024])
def test_equals_the_oracle_in_many_dimensions(backend: Backend, metric: str, dim: int) -> None:
    x, codebook = torch.randn(65, dim) * 1e3, torch.randn(65, dim) + 1
    want = oracle.nearest_code(x, codebook, metric=metric)
    assert torch.equal(nearest(x, codebook, backend, metric=metric), want)


@on_every_backend
def test_the_scale_of_a_row_changes_no_dot_product(backend: Backend) -> None:
    x, codebook = data.gaussian(130, 70, 16)
    want = nearest(x, codebook, backend, metric="dot")
    scales = 2.0 ** torch.randint(-60, 61, (130, 1))
    assert torch.equal(nearest(x * scales, codebook, backend, metric="dot"), want)


@on_every_backend
def test_the_length_of_a_vector_changes_no_cosine(backend: Backend) -> None:
    x, codebook = data.gaussian(130, 70, 16)
    want = nearest(x, codebook, backend, metric="cosine")
    scaled = (t * 2.0 ** torch.randint(-20, 61, (len(t), 1)) for t in (x, codebook))
    assert torch.equal(nearest(*scaled, backend, metric="cosine"), want)


@on_every_backend
@every_metric
def test_what_has_no_direction_gets_the_first_code_that_is_finite(backend: Backend, metric) -> None:
    codebook = torch.randn(20, 6)
    codebook[0, 2], codebook[1, 3] = torch.nan, torch.inf
    codebook = torch.cat([codebook, codebook])
    x = torch.zeros(4, 6)
    x[1, 0], x[2, 0] = torch.nan, -torch.inf
    got = nearest(x, codebook, backend, metric=metric)
    # no product of the second and the third is finite; unit vectors are equally far from zero
    assert got[1:3].tolist() == [0, 0]
    assert torch.equal(got, oracle.nearest_code(x, codebook, metric=metric))
    assert metric == "cosine" or got[[0, 3]].tolist() == [2, 2]


@on_every_backend
@every_metric
def test_fast_is_close(backend: Backend, metric: str) -> None:
    x, codebook = data.gaussian(130, 70, 16)
    indices = nearest(x, codebook, backend, metric=metric, precision="fast")
    if metric == "cosine":
        x, codebook = oracle.normalized(x), oracle.normalized(codebook)
    products = x.double() @ codebook.double().T
    lost = products.amax(1) - products.gather(1, indices[:, None])[:, 0]
    # the residuals of fp16
    assert (lost <= 2**-9 * x.norm(dim=1) * codebook.norm(dim=1).max()).all()


@on_every_backend
@every_metric
def test_prepared_codebook_stays_as_it_was(backend: Backend, metric: str) -> None:
    x, codebook = data.scaled_ties(40, 70, 12)
    want = oracle.nearest_code(x, codebook, metric=metric)
    codebook = codebook.to(backend.device)
    prepared = vqtriton.prepare_codebook(codebook, metric=metric, backend=backend.name)
    codebook.copy_(codebook.flip(0))
    got = vqtriton.nearest_code(x.to(backend.device), prepared, metric=metric)
    assert torch.equal(got.cpu(), want)


@on_every_real_backend
@every_metric
@pytest.mark.parametrize("is_prepared", [False, True])
def test_compiles_as_one_graph(backend: Backend, metric: str, is_prepared: bool) -> None:
    x, codebook = (t.to(backend.device) for t in data.gaussian(40, 70, 12))
    want = vqtriton.nearest_code(x, codebook, metric=metric, backend=backend.name)
    if is_prepared:
        codebook = vqtriton.prepare_codebook(codebook, metric=metric, backend=backend.name)
    compiled = torch.compile(
        lambda x: vqtriton.nearest_code(x, codebook, metric=metric, backend=backend.name),
        fullgraph=True,
    )
    assert torch.equal(compiled(x), want)


@on_every_real_backend
@every_metric
def test_autocast_and_gradients_change_no_index(backend: Backend, metric: str) -> None:
    x, codebook = (t.to(backend.device) for t in data.gaussian(65, 70, 12))
    want = vqtriton.nearest_code(x, codebook, metric=metric, backend=backend.name)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = vqtriton.nearest_code(
            x.requires_grad_(), codebook.requires_grad_(), metric=metric, backend=backend.name
        )
    assert torch.equal(got, want)
    assert not got.requires_grad


@pytest.mark.once
@every_metric
def test_a_device_without_float64(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(has_float64=False)
    monkeypatch.setattr(tensors, "NO_FLOAT64", (stub.device.type,))
    x, codebook = data.scaled_ties(40, 70, 12)
    want = oracle.nearest_code(x, codebook, metric=metric)
    with stub:
        x, codebook = stub.put(x), stub.put(codebook)
        prepared = vqtriton.prepare_codebook(codebook, metric=metric)
        for codes in (codebook, prepared):
            assert torch.equal(vqtriton.nearest_code(x, codes, metric=metric).cpu(), want)


# torch warns that custom ops are slow under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.once
@every_metric
def test_vmap(metric: str) -> None:
    x, codebook = torch.randn(3, 9, 5), torch.randn(4, 5)
    got = torch.vmap(lambda x: vqtriton.nearest_code(x, codebook, metric=metric))(x)
    assert torch.equal(got, vqtriton.nearest_code(x, codebook, metric=metric))


@pytest.mark.once
@every_metric
@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e100, 1e160, 1e300])
def test_float64(metric: str, scale: float) -> None:
    for case in ("gaussian", "duplicates", "not_finite", "scaled_ties"):
        x, codebook = (t.double() for t in HARD[case](60, 40, 5))
        x = x * (1 + 1e-15 * torch.randn(60, 5).double()) * scale
        for codes in (codebook, codebook.float(), codebook * scale):
            want = oracle.nearest_code(x, codes, metric=metric)
            assert torch.equal(vqtriton.nearest_code(x, codes, metric=metric), want)
            prepared = vqtriton.prepare_codebook(codes, metric=metric)
            assert torch.equal(vqtriton.nearest_code(x, prepared, metric=metric), want)


@pytest.mark.once
@pytest.mark.parametrize("dim", [33, 128, 1024])
@pytest.mark.parametrize("case", ["gaussian", "unit_norm", "scaled_ties"])
def test_exact_with_the_worst_sums(monkeypatch: pytest.MonkeyPatch, case: str, dim: int) -> None:
    # γ over D products, against the best code and for all the others
    x, codebook = HARD[case](400, 64, dim)
    want = oracle.nearest_code(x, codebook, metric="dot")

    def worst(half, y, codes, *, alpha, out):
        y, codes, half = y.double(), codes.double(), half.double()
        error = dim * 2.0**-24 * y.norm(dim=1)[:, None] * codes.norm(dim=0)
        is_best = torch.arange(half.numel()) == want[:, None]
        return out.copy_(half + alpha * (y @ codes) + torch.where(is_best, error, -error))

    monkeypatch.setattr(torch, "addmm", worst)
    # all rows at once
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", 400 * dim)
    assert torch.equal(vqtriton.nearest_code(x, codebook, metric="dot", backend="torch"), want)


@pytest.mark.once
def test_few_gaussian_rows_are_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = data.gaussian(2000, 500, 16)
    for offset in (0.0, 100.0):
        _, in_doubt = torch_backend.search(x, codebook + offset, "exact", "dot")
        assert in_doubt < 20 * (1 + offset)
    # whatever the scales of rows and codes, none of them is compared with all codes
    monkeypatch.setattr(torch_backend, "_nearest_of_all", None)
    for scale in (1e-8, 1e8):
        _, in_doubt = torch_backend.search(x * scale, codebook / scale, "exact", "dot")
        assert in_doubt < 20


@on_every_backend
def test_bad_metrics_are_named(backend: Backend) -> None:
    x, codebook = torch.zeros(4, 3).to(backend.device), torch.zeros(2, 3).to(backend.device)
    for function in (
        lambda: vqtriton.nearest_code(x, codebook, metric="L2"),
        lambda: vqtriton.prepare_codebook(codebook, metric="L2"),
    ):
        with pytest.raises(ValueError, match="metric is 'L2'; it must be one of l2, cosine, dot"):
            function()
    for metric in METRICS:
        prepared = vqtriton.prepare_codebook(codebook, metric=metric, backend=backend.name)
        assert prepared.metric == metric
        with pytest.raises(ValueError, match=f"metric is 'l2', but codebook was .* '{metric}'"):
            vqtriton.nearest_code(x, prepared)
        with pytest.raises(ValueError, match=f"codebook was prepared for '{metric}'"):
            vqtriton.vector_quantize(x, prepared)
    prepared = vqtriton.prepare_codebook(codebook, backend=backend.name)
    with pytest.raises(ValueError, match="metric is 'dot', but codebook was prepared for 'l2'"):
        vqtriton.nearest_code(x, prepared, metric="dot")
