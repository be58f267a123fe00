from __future__ import annotations

import functools
import zlib

import data
import oracle
import pytest
import torch
from backends import BACKENDS, EXACT_DTYPES, Backend, on_every_backend, on_every_real_backend
from conftest import DEVICE, INTERPRETED
from hypothesis import assume, given
from hypothesis import strategies as st

import vqtriton
from vqtriton import torch_backend

pytestmark = pytest.mark.kernel

# either side of the edges of every block
SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129])
DIMS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64, 65])
SEEDS = st.integers(0, 2**32 - 1)


def nearest(x: torch.Tensor, codebook: torch.Tensor, backend: Backend, **kwargs) -> torch.Tensor:
    x, codebook = x.to(backend.device), codebook.to(backend.device)
    return vqtriton.nearest_code(x, codebook, backend=backend.name, **kwargs).cpu()


def check_hard_data(backend: Backend, case: str, dim: int, n: int, k: int) -> None:
    # so that a case can be repeated by itself
    torch.manual_seed(zlib.crc32(f"{case} {dim}".encode()))
    x, codebook = data.HARD[case](n, k, dim)
    assert torch.equal(nearest(x, codebook, backend), oracle.nearest_code(x, codebook)), dim


@on_every_backend
@pytest.mark.parametrize("case", data.HARD)
def test_equals_the_oracle_on_hard_data(backend: Backend, case: str, monkeypatch) -> None:
    # several blocks of rows
    monkeypatch.setattr(torch_backend, "BLOCK_SCORES", 1 << 15)
    # both planes, a plane with the bias, a plane without it
    for dim in (3, 12, 64) if INTERPRETED else data.DIMS:
        n, k = (33, 70) if INTERPRETED else (300, min(700, max(33, (1 << 15) // dim)))
        check_hard_data(backend, case, dim, n, k)


@pytest.mark.slow
@pytest.mark.once
@on_every_backend
@pytest.mark.parametrize("case", data.HARD)
def test_equals_the_oracle_on_a_million_hard_rows(backend: Backend, case: str) -> None:
    for dim in data.DIMS:
        n = 1_000_000 // (len(data.HARD) * len(data.DIMS)) + 1
        check_hard_data(backend, case, dim, n, min(1001, max(33, (1 << 15) // dim)))


@on_every_backend
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("codebook_dtype", EXACT_DTYPES)
def test_equals_the_oracle_in_every_pair_of_dtypes(backend: Backend, dtype, codebook_dtype) -> None:
    x, codebook = torch.randn(130, 33).to(dtype), torch.randn(70, 33).to(codebook_dtype)
    assert torch.equal(nearest(x, codebook, backend), oracle.nearest_code(x, codebook))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(
    n=SIZES,
    k=SIZES,
    d=DIMS,
    case=st.sampled_from(sorted(data.HARD)),
    dtype=st.sampled_from(EXACT_DTYPES),
    layouts=st.tuples(st.sampled_from(data.LAYOUTS), st.sampled_from(data.LAYOUTS)),
    seed=SEEDS,
)
def test_equals_the_oracle(backend: Backend, n, k, d, case, dtype, layouts, seed) -> None:
    # Triton's interpreter widens these wrongly
    assume(not (INTERPRETED and dtype == torch.bfloat16 and case == "subnormal"))
    torch.manual_seed(seed)
    x, codebook = (t.to(dtype) for t in data.HARD[case](n, k, d))
    want = oracle.nearest_code(x, codebook)
    got = nearest(data.with_layout(x, layouts[0]), data.with_layout(codebook, layouts[1]), backend)
    assert torch.equal(got, want)


@on_every_backend
@pytest.mark.parametrize("dim", [100, 256, 1024])
def test_equals_the_oracle_in_many_dimensions(backend: Backend, dim: int) -> None:
    x, codebook = torch.randn(65, dim), torch.randn(65, dim)
    assert torch.equal(nearest(x, codebook, backend), oracle.nearest_code(x, codebook))


@on_every_backend
def test_shape_of_the_batch_is_kept(backend: Backend) -> None:
    x, codebook = torch.randn(2, 3, 5, 8), torch.randn(7, 8)
    want = oracle.nearest_code(x, codebook)
    assert torch.equal(nearest(x, codebook, backend), want)
    assert torch.equal(nearest(x[0, 0, 0], codebook, backend), want[0, 0, 0])
    # a map with the channels first, seen with the channels last
    fmap = x.movedim(-1, 1).contiguous().movedim(1, -1)
    assert torch.equal(nearest(fmap, codebook, backend), want)


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_batch(backend: Backend, shape: tuple[int, ...]) -> None:
    indices = nearest(torch.randn(shape), torch.randn(5, 8), backend)
    assert indices.shape == shape[:-1]
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(n=SIZES, k=SIZES, d=DIMS, case=st.sampled_from(sorted(data.HARD)), seed=SEEDS)
def test_does_not_depend_on_the_batch(backend: Backend, n, k, d, case, seed) -> None:
    torch.manual_seed(seed)
    x, codebook = data.HARD[case](n, k, d)
    together = nearest(x, codebook, backend)
    cut = int(torch.randint(n + 1, ()))
    apart = [nearest(part, codebook, backend) for part in (x[:cut], x[cut:])]
    assert torch.equal(torch.cat(apart), together)
    order = torch.randperm(n)
    assert torch.equal(nearest(x[order], codebook, backend), together[order])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(n=SIZES, k=SIZES, d=DIMS, seed=SEEDS)
def test_permuting_codes_permutes_indices(backend: Backend, n, k, d, seed) -> None:
    torch.manual_seed(seed)
    x, codebook = data.gaussian(n, k, d)
    order = torch.randperm(k)
    assert torch.equal(order[nearest(x, codebook[order], backend)], nearest(x, codebook, backend))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(n=SIZES, k=SIZES, d=DIMS, seed=SEEDS, shift=st.integers(-1000, 1000))
def test_shifting_both_changes_nothing(backend: Backend, n, k, d, seed, shift) -> None:
    torch.manual_seed(seed)
    # multiples of 1/64: the shift rounds nothing, and there are ties
    x, codebook = torch.randint(-128, 128, (n, d)) / 64, torch.randint(-128, 128, (k, d)) / 64
    shifted = nearest(x + shift, codebook + shift, backend)
    assert torch.equal(shifted, nearest(x, codebook, backend))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(k=SIZES, d=DIMS, case=st.sampled_from(["gaussian", "duplicates", "ulp_codes"]), seed=SEEDS)
def test_a_code_maps_to_its_first_equal(backend: Backend, k, d, case, seed) -> None:
    torch.manual_seed(seed)
    _, codebook = data.HARD[case](1, k, d)
    equal = (codebook[:, None] == codebook[None]).all(-1)
    assert torch.equal(nearest(codebook, codebook, backend), equal.int().argmax(1))


@on_every_backend
def test_one_bad_row_is_one_bad_row(backend: Backend) -> None:
    x, codebook = torch.randn(128, 16), torch.randn(65, 16)
    want = nearest(x, codebook, backend)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[17, 3] = bad
        got = nearest(spoiled, codebook, backend)
        assert got[17] == 0
        got[17] = want[17]
        assert torch.equal(got, want)


@on_every_backend
def test_fast_is_close_and_in_range(backend: Backend) -> None:
    x, codebook = data.gaussian(130, 70, 16)
    indices = nearest(x, codebook, backend, precision="fast")
    distances = torch.from_numpy(oracle.distances(x, codebook))
    excess = distances.gather(1, indices[:, None])[:, 0] - distances.amin(1)
    # twice the error of two float32 scores of D products
    assert (excess <= 4 * (16 + 8) * 2**-24 * distances.amax(1)).all()


@on_every_backend
def test_fast_gives_ties_to_the_lowest_index(backend: Backend) -> None:
    x, codebook = data.collapsed(65, 130, 8)
    assert (nearest(x, codebook, backend, precision="fast") == 0).all()


@pytest.mark.once
def test_exact_where_matmuls_round_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    # what torch may do with float32_matmul_precision="medium" on hardware that has bfloat16
    addmm = torch.addmm

    def rounded(half, y, codes, *, alpha, out):
        return addmm(half, y.bfloat16().float(), codes.bfloat16().float(), alpha=alpha, out=out)

    x, codebook = data.gaussian(2000, 500, 16)
    want = oracle.nearest_code(x, codebook)
    monkeypatch.setattr(torch, "addmm", rounded)
    assert not torch.equal(vqtriton.nearest_code(x, codebook, backend="torch"), want)
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    before = matmul.fp32_precision if matmul else torch.get_float32_matmul_precision()

    def set_precision(value: str) -> None:
        # torch 2.8 has the older setting alone; later ones do not let it be mixed with the newer
        if matmul:
            matmul.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(value)

    try:
        set_precision("bf16" if matmul else "medium")
        got = vqtriton.nearest_code(x, codebook, backend="torch")
    finally:
        set_precision(before)
    assert torch.equal(got, want)


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "codebook"),
    [
        ([[1e200]], [[-1e200], [1e200]]),
        ([[1.0]], [[5.0], [1.0], [1e160]]),
        ([[1e308]], [[-1e308], [1e307]]),
        ([[1e-200]], [[1e-180], [2e-200], [1e-200]]),
        # no distance is finite, though one code is
        ([[1e200]], [[float("nan")], [1.0]]),
        ([[1.0, 1e155]], [[float("inf"), 0.0], [0.0, 0.0]]),
    ],
)
def test_float64_beyond_the_range_of_its_squares(x, codebook) -> None:
    x = torch.tensor(x, dtype=torch.float64)
    codebook = torch.tensor(codebook, dtype=torch.float64)
    want = oracle.nearest_code(x, codebook)
    assert torch.equal(vqtriton.nearest_code(x, codebook, backend="torch"), want)


@on_every_backend
def test_inputs_are_left_alone(backend: Backend) -> None:
    x, codebook = data.not_finite(33, 17, 5)
    before = x.clone(), codebook.clone()
    nearest(x, codebook, backend)
    torch.testing.assert_close((x, codebook), before, rtol=0, atol=0, equal_nan=True)


X, CODEBOOK = torch.zeros(4, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("x", "codebook", "options", "error", "message"),
    [
        (X[:, :2], CODEBOOK, {}, ValueError, "codebook has 3 columns but x has 2"),
        (X, CODEBOOK[:0], {}, ValueError, r"codebook has shape \(0, 3\)"),
        (X[:, :0], CODEBOOK[:, :0], {}, ValueError, r"x has shape \(4, 0\)"),
        (X[0, 0], CODEBOOK, {}, ValueError, r"x has shape \(\)"),
        (X, CODEBOOK[0], {}, ValueError, r"codebook has shape \(3,\)"),
        (X.int(), CODEBOOK, {}, TypeError, "x is a torch.int32 tensor"),
        (X, CODEBOOK.to(torch.complex64), {}, TypeError, "codebook is a torch.complex64 tensor"),
        (X.tolist(), CODEBOOK, {}, TypeError, "x is a list"),
        (X, None, {}, TypeError, "codebook is a NoneType"),
        (X, CODEBOOK.to("meta"), {}, ValueError, "codebook is on meta but x is on cpu"),
        (X, CODEBOOK, {"precision": "exakt"}, ValueError, "precision is 'exakt'"),
        (X, CODEBOOK, {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_bad_input_is_named(x, codebook, options, error, message) -> None:
    with pytest.raises(error, match=message):
        vqtriton.nearest_code(x, codebook, **options)


@pytest.mark.once
def test_kernels_refuse_cpu_tensors() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu tensors"):
        vqtriton.nearest_code(X, CODEBOOK, backend="triton")


@pytest.mark.needs_interpreter
def test_kernels_refuse_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        vqtriton.nearest_code(X.double(), CODEBOOK, backend="triton")


# --- prepared codebooks ---


@on_every_backend
@pytest.mark.parametrize("case", ["gaussian", "duplicates", "not_finite", "far_from_the_origin"])
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_prepared_codebook_changes_no_index(backend: Backend, case: str, dtype) -> None:
    x, codebook = data.HARD[case](40, 70, 12)
    codebook = codebook.to(dtype)
    prepared = vqtriton.prepare_codebook(codebook.to(backend.device), backend=backend.name)
    want = oracle.nearest_code(x, codebook)
    for rows in (x, x[:7], x[:0]):
        got = vqtriton.nearest_code(rows.to(backend.device), prepared)
        assert torch.equal(got.cpu(), want[: rows.shape[0]])


@on_every_backend
def test_prepared_codebook_stays_as_it_was(backend: Backend) -> None:
    x, codebook = data.midpoints(40, 70, 12)
    want = oracle.nearest_code(x, codebook)
    codebook = codebook.to(backend.device)
    prepared = vqtriton.prepare_codebook(codebook, backend=backend.name)
    # on the same device `to` makes no copy; rows in doubt look at the codebook itself
    codebook.copy_(codebook.flip(0))
    assert torch.equal(vqtriton.nearest_code(x.to(backend.device), prepared).cpu(), want)


@on_every_real_backend
def test_prepared_codebook_compiles(backend: Backend) -> None:
    x, codebook = (t.to(backend.device) for t in data.gaussian(40, 70, 12))
    prepared = vqtriton.prepare_codebook(codebook, backend=backend.name)
    compiled = torch.compile(lambda x: vqtriton.nearest_code(x, prepared), fullgraph=True)
    assert torch.equal(compiled(x), vqtriton.nearest_code(x, prepared))


@pytest.mark.once
def test_codebook_prepared_for_another_precision() -> None:
    x, codebook = data.midpoints(200, 70, 12)
    prepared = vqtriton.prepare_codebook(codebook, backend="torch")
    want = oracle.nearest_code(x.double() * (1 + 2**-40), codebook)
    got = vqtriton.nearest_code(x.double() * (1 + 2**-40), prepared)
    assert torch.equal(got, want)


@on_every_backend
def test_bad_preparation_is_named(backend: Backend) -> None:
    name, device = backend
    other = "torch" if name == "triton" else "triton"
    for bad in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3)):
        with pytest.raises(ValueError, match="codebook has shape"):
            vqtriton.prepare_codebook(bad.to(device), backend=name)
    with pytest.raises(TypeError, match="codebook is a list"):
        vqtriton.prepare_codebook([[1.0]], backend=name)
    x = X.to(device)
    prepared = vqtriton.prepare_codebook(CODEBOOK.to(device), backend=name)
    with pytest.raises(ValueError, match=f"backend is '{other}', but codebook was prepared for"):
        vqtriton.nearest_code(x, prepared, backend=other)
    with pytest.raises(ValueError, match="codebook has 3 columns but x has 2"):
        vqtriton.nearest_code(x[:, :2], prepared)


@pytest.mark.needs_kernels
def test_more_dimensions_than_the_bound_covers_are_refused(monkeypatch) -> None:
    if INTERPRETED:
        from vqtriton.kernels import prepare_planes as module

        # eight programs instead of 64, each of which looks at all codes
        tiles = functools.partial(module.PreparePlanesConfig, block_elements=1 << 17)
        monkeypatch.setattr(module, "PreparePlanesConfig", tiles)
    # a code in the middle of others that fill fp16: its bias would not fit, and its rows go wrong
    for dim in (4094, 4095):
        corners = torch.sign(torch.randn(16, dim)) * 1.9999
        codebook = torch.cat([torch.zeros(1, dim), corners, -corners])
        x = torch.stack([codebook[12] * 0.4, codebook[25] * 0.45])
        device = DEVICE
        args = x.to(device), codebook.to(device)
        if dim == 4094:
            assert vqtriton.nearest_code(*args, backend="triton").tolist() == [0, 0]
            continue
        for function in (vqtriton.nearest_code, vqtriton.vector_quantize):
            with pytest.raises(ValueError, match="codebook has 4095 columns"):
                function(*args, backend="triton")
        with pytest.raises(ValueError, match="codebook has 4095 columns"):
            vqtriton.prepare_codebook(args[1], backend="triton")


@pytest.mark.once
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_repeated_codes_under_autocast(dtype, autocast) -> None:
    codebook = torch.tensor([[0.0, 1.0]]).repeat(64, 1).to(dtype)
    codebook[0] = 5
    x = torch.zeros(4, 2)
    with torch.autocast("cpu", dtype=autocast):
        assert vqtriton.nearest_code(x, codebook).tolist() == [1] * 4
        assert vqtriton.vector_quantize(x, codebook).indices.tolist() == [1] * 4
