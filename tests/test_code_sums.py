from __future__ import annotations

import data
import oracle
import pytest
import torch
from backends import BACKENDS, EXACT_DTYPES, Backend, on_every_backend
from conftest import DEVICE, INTERPRETED
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vqtriton
from vqtriton import ops

pytestmark = pytest.mark.kernel


# limits with which the rows are sorted, as they are where they are many: by counting, and by torch
SORTED = ({"most_elements": 0}, {"most_elements": 0, "most_counted": 0})


def code_sums(x, indices, size, backend: Backend, **limits):
    x, indices = x.to(backend.device), indices.to(backend.device)
    if limits and backend.name == "triton":
        from vqtriton.kernels import code_sums as module

        config = module.CodeSumsConfig(**limits)
        sums, counts = module.code_sums(x[None], indices[None], size, config=config)
        return sums[0].cpu(), counts[0].cpu()
    sums, counts = vqtriton.code_sums(x, indices, size, backend=backend.name)
    return sums.cpu(), counts.cpu()


def skewed(skew: str, n: int, k: int) -> torch.Tensor:
    if skew == "one code":
        return torch.full((n,), k - 1)
    if skew == "zipf":
        weights = 1 / torch.arange(1, k + 1)
        return torch.multinomial(weights, n, replacement=True) if n else torch.zeros(0).long()
    if skew == "one row each":
        return torch.arange(n) % k
    # everything that means "leave it out" as well
    return torch.randint(-1, k + 1, (n,))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(
    n=st.sampled_from([0, 1, 15, 17, 64, 255, 256, 257, 600]),
    k=st.sampled_from([1, 2, 17, 64] if INTERPRETED else [1, 2, 17, 64, 300]),
    d=st.sampled_from([1, 3, 16, 65, 130]),
    dtype=st.sampled_from(EXACT_DTYPES),
    layout=st.sampled_from(data.LAYOUTS),
    skew=st.sampled_from(["uniform", "zipf", "one code", "one row each"]),
    is_bad=st.booleans(),
    limits=st.sampled_from([{}, {"most_programs": 3}, *SORTED]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_oracle(
    backend: Backend, n, k, d, dtype, layout, skew, is_bad, limits, seed
) -> None:
    torch.manual_seed(seed)
    x, indices = torch.randn(n, d).to(dtype), skewed(skew, n, k)
    if is_bad:
        x[::5, 0] = torch.nan
        x[1::7, -1] = torch.inf
    sums, counts = code_sums(data.with_layout(x, layout), indices, k, backend, **limits)
    want_sums, want_counts = oracle.code_sums(x, indices, k)
    assert torch.equal(counts, want_counts)
    assert sums.dtype == torch.float32
    magnitude, _ = oracle.code_sums(x.abs(), indices, k)
    # the bound of a sum in pairs grows with log₂ n; this one does not
    assert ((sums - want_sums).abs() <= 1.01 * 2**-24 * magnitude).all()


@on_every_backend
def test_a_long_sum_does_not_drift(backend: Backend) -> None:
    n = 3_000 if INTERPRETED else 1_000_000
    x = torch.full((n, 1), 1.0001)
    sums, counts = code_sums(x, torch.zeros(n, dtype=torch.int64), 1, backend)
    assert counts.item() == n
    assert abs(sums.item() / (n * x[0, 0].double().item()) - 1) <= 2**-22


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    ("n", "small", "tiles"),
    [
        # within a chunk, over the rows of a tile, and over the chunks: 1 and then what 1 swallows
        (600, 2**-25, {"least_chunk": 1024, "block_elements": 1, **SORTED[0]}),
        (64, 2**-25, {"least_chunk": 64, "block_elements": 64, **SORTED[0]}),
        (600, 2**-30, {"least_chunk": 32, "block_elements": 1, **SORTED[0]}),
        (600, 2**-30, {"block_elements": 1}),
        (64, 2**-25, {"block_elements": 64}),
    ],
)
def test_what_is_rounded_away_is_kept(n: int, small: float, tiles: dict) -> None:
    from vqtriton.kernels.code_sums import CodeSumsConfig
    from vqtriton.kernels.code_sums import code_sums as kernel

    x = torch.full((1, n, 1), small, device=DEVICE)
    x[0, 0] = 1
    indices = torch.zeros(1, n, dtype=torch.int64, device=x.device)
    sums, _ = kernel(x, indices, 1, config=CodeSumsConfig(**tiles))
    assert abs(sums.item() - x.double().sum().item()) <= 1.01 * 2**-24


@on_every_backend
@pytest.mark.parametrize("deterministic", [True, False])
# the interpreter takes seconds for the programs of so many codes
@pytest.mark.parametrize(
    "k", [1, 254, 255, 256, 257, *([] if INTERPRETED else [32766, 32767, 32768])]
)
def test_what_is_left_out_is_in_no_code(backend: Backend, k: int, deterministic: bool) -> None:
    """However the indices that are none look when they are narrowed; every second of a tensor."""
    torch.use_deterministic_algorithms(False)
    values = [0, k - 1, -1, k, 2**31, 2**32, -(2**32), 2**32 + k - 1, 2**62, -(2**62), 256, 65536]
    indices = torch.tensor(values).repeat_interleave(2).to(backend.device)[::2]
    x = torch.randn(len(values), 2)
    sums, counts = vqtriton.code_sums(
        x.to(backend.device), indices, k, deterministic=deterministic, backend=backend.name
    )
    want = oracle.code_sums(x, torch.tensor(values), k)
    assert torch.equal(counts.cpu(), want[1])
    torch.testing.assert_close(sums.cpu().double(), want[0].double(), rtol=1e-6, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("deterministic", [True, False])
def test_chunks_do_not_overflow_where_the_sum_does_not(backend, deterministic) -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.cat([torch.full((256, 1), 2e36), torch.full((256, 1), -2e36)]).to(backend.device)
    indices = torch.zeros(512, dtype=torch.int64, device=backend.device)
    options = {"deterministic": deterministic, "backend": backend.name}
    assert vqtriton.code_sums(x, indices, 1, **options)[0].item() == 0


@pytest.mark.once
def test_float64_is_kept() -> None:
    x = 1 + 2.0**-40 * torch.arange(8, dtype=torch.float64)[:, None]
    sums, _ = vqtriton.code_sums(x, torch.zeros(8, dtype=torch.int64), 1)
    assert sums.item() == 8 + 28 * 2.0**-40


@on_every_backend
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_sums_that_are_not_rounded(backend: Backend, deterministic: bool, dtype) -> None:
    """Of one chunk, of several, and of none; rounded they are what one gets by default."""
    torch.use_deterministic_algorithms(False)
    x = torch.randn(600, 5).to(dtype)
    x[7, 2] = torch.nan
    indices = torch.where(torch.arange(600) < 550, 0, torch.arange(600) % 3)
    arguments = x.to(backend.device), indices.to(backend.device), 4, backend.name
    sums, counts = ops.code_sums(*arguments, deterministic, True)
    assert sums.dtype == torch.float64
    keep = x.double().isfinite().all(1)
    want = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, indices[keep], x[keep].double())
    torch.testing.assert_close(sums.cpu(), want, rtol=1e-13, atol=1e-13)
    rounded, same_counts = ops.code_sums(*arguments)
    assert rounded.dtype == torch.float32
    assert torch.equal(counts, same_counts)
    if deterministic:
        assert torch.equal(sums.float(), rounded)
    # sums of a few half-precision rows are exact in float32
    assert dtype != torch.float32 or not torch.equal(rounded.double(), sums)


@on_every_backend
@pytest.mark.parametrize("d", [5, 1030])
def test_an_overflow_is_infinite_and_stays_where_it_is(backend: Backend, d: int) -> None:
    x = torch.full((40, d), 2e38)
    x[20:] = 1
    # a row that is not finite is left out, wherever it has its NaN
    x[21, -1] = torch.nan
    sums, counts = code_sums(x, torch.arange(40) // 20, 2, backend)
    assert counts.tolist() == [20, 19]
    assert (sums[0] == torch.inf).all()
    assert (sums[1] == 19).all()


@pytest.mark.needs_kernels
@pytest.mark.parametrize("limits", [{}, *SORTED])
@pytest.mark.parametrize("config", [{}, {"least_chunk": 4, "block_elements": 32, "block_d": 4}])
def test_heads_and_chunks_of_the_kernels(config: dict, limits: dict) -> None:
    from vqtriton.kernels.code_sums import CodeSumsConfig
    from vqtriton.kernels.code_sums import code_sums as kernel

    device = DEVICE
    # heads are not neighbours in memory, nor rows, nor dimensions
    x = torch.randn(7, 50, 3).permute(2, 1, 0)
    x[1, 17, 6] = torch.nan
    indices = torch.stack([skewed(skew, 50, 5) for skew in ("uniform", "one code", "zipf")])
    config = CodeSumsConfig(**config, **limits)
    sums, counts = kernel(x.to(device), indices.to(device), 5, config=config)
    for head in range(3):
        want_sums, want_counts = oracle.code_sums(x[head], indices[head], 5)
        assert torch.equal(counts[head].cpu(), want_counts)
        magnitude, _ = oracle.code_sums(x[head].abs(), indices[head], 5)
        assert ((sums[head].cpu() - want_sums).abs() <= 1.01 * 2**-24 * magnitude).all()


@on_every_backend
def test_gradient_is_a_gather(backend: Backend) -> None:
    x = torch.randn(4, 5, 3)
    x[0, 0, 1] = torch.nan
    x.requires_grad_()
    # one to the left and one to the right of what counts
    indices = torch.randint(-1, 8, (4, 5))
    sums, _ = code_sums(x, indices, 7, backend)
    weights = torch.randn(7, 3)
    (grad,) = torch.autograd.grad((sums * weights).sum(), x)
    counts = (indices >= 0) & (indices < 7) & x.isfinite().all(-1)
    assert torch.equal(grad, weights[indices.clamp(0, 6)] * counts[..., None])
    reference_sums, _ = vqtriton.reference.code_sums(x, indices, 7)
    torch.testing.assert_close(sums, reference_sums)


@pytest.mark.needs_kernels
@given(
    heads=st.sampled_from([1, 3]),
    n=st.sampled_from([1, 2, 63, 256, 300]),
    # to either side of what a byte and two of a key hold
    k=st.sampled_from([1, 2, 85, 254, 255, 256, 32766, 32767, 32768]),
    most_counted=st.sampled_from([0, 1000]),
    skew=st.sampled_from(list(data.SKEWS)),
    seed=st.integers(0, 2**32 - 1),
)
@example(heads=1, n=64, k=255, most_counted=0, skew="uniform", seed=0)
@example(heads=1, n=64, k=256, most_counted=0, skew="uniform", seed=0)
@example(heads=1, n=64, k=32767, most_counted=0, skew="uniform", seed=0)
@example(heads=1, n=64, k=32768, most_counted=0, skew="uniform", seed=0)
def test_rows_are_sorted_by_code(heads, n, k, most_counted, skew, seed) -> None:
    """By counting and by torch, which keep the order of the rows of a code."""
    from vqtriton.kernels.code_sums import CodeSumsConfig, sort_rows

    torch.manual_seed(seed)
    indices = torch.stack([data.SKEWS[skew](n, k) for _ in range(heads)])
    # left out, as -1 is
    indices = indices.where(torch.rand(indices.shape) < 0.9, k)
    sums, counts = torch.ones(heads, k, 3), torch.ones(heads, k, dtype=torch.int64)
    of_device = [t.to(DEVICE) for t in (indices, sums, counts)]
    config = CodeSumsConfig(most_counted=most_counted)
    order, segments = sort_rows(of_device[0], k, tuple(of_device[1:]), config)
    first = torch.arange(heads)[:, None] * k
    keys = (indices + first).where((indices >= 0) & (indices < k), heads * k).view(-1)
    want, want_order = keys.sort(stable=True)
    assert torch.equal(order.cpu().long(), want_order)
    assert torch.equal(segments.cpu().long(), want)
    # for the kernels that come after
    assert not any(t.any() for t in of_device[1:])


@pytest.mark.needs_kernels
@pytest.mark.parametrize("skew", data.SKEWS)
def test_lists_of_codes_do_not_meet(skew: str, monkeypatch) -> None:
    """Programs write them side by side; the interpreter, with one at a time, shows no clash."""
    from vqtriton.kernels import code_sums as module

    lists, launch = [], module.launch

    def note(kernel, grid, *args, **options):
        lists.append(args[4])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(module, "launch", note)
    indices = torch.stack([data.SKEWS[skew](90, 7), torch.randint(-1, 8, (90,))])
    config = module.CodeSumsConfig(block_n=16, most_programs=3)
    module.code_sums(torch.randn(2, 90, 3).to(DEVICE), indices.to(DEVICE), 7, config=config)
    for of_head, listed in zip(indices, lists[0].cpu().view(2, 90).long(), strict=True):
        rows = listed[: int(((of_head >= 0) & (of_head < 7)).sum())]
        assert len(rows.unique()) == len(rows)
        # codes in their order
        assert (of_head[rows].diff() >= 0).all()


@pytest.mark.needs_kernels
@given(
    n=st.sampled_from([1, 2, 63, 64, 65, 200]),
    k=st.sampled_from([1, 2, 5, 60]),
    chunk=st.sampled_from([1, 2, 8, 64]),
    block=st.sampled_from([1, 4, 64]),
    limits=st.sampled_from([{"block_n": 4}, {"block_n": 64, "most_programs": 2}, *SORTED]),
    skew=st.sampled_from(list(data.SKEWS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_may_end_anywhere(n, k, chunk, block, limits, skew, seed) -> None:
    """At a border of chunks or of tiles, within one, or after many."""
    from vqtriton.kernels.code_sums import CodeSumsConfig
    from vqtriton.kernels.code_sums import code_sums as kernel

    torch.manual_seed(seed)
    # whole numbers: every sum is exact
    x, indices = torch.randint(-9, 9, (1, n, 2)).float(), data.SKEWS[skew](n, k)[None]
    config = CodeSumsConfig(least_chunk=chunk, block_elements=2 * block, block_d=2, **limits)
    sums, counts = kernel(x.to(DEVICE), indices.to(DEVICE), k, config=config)
    want_sums, want_counts = oracle.code_sums(x[0], indices[0], k)
    assert torch.equal(sums[0].cpu(), want_sums.float())
    assert torch.equal(counts[0].cpu(), want_counts)


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    ("limits", "launches", "others"),
    [
        ({"most_elements": 120, "most_pairs": 280}, 1, []),
        ({"most_elements": 119}, 3, []),
        ({"most_pairs": 279, "most_counted": 40}, 3, []),
        ({"most_pairs": 0, "most_counted": 39}, 3, ["aten.sort.stable"]),
    ],
)
def test_launches_of_a_sum(limits: dict, launches: int, others: list[str]) -> None:
    """For small batches it is launches that take the time."""
    x, indices = torch.randn(1, 40, 3), torch.randint(7, (1, 40))
    arguments = x.to(DEVICE), indices.to(DEVICE), 7
    from vqtriton.kernels import code_sums as module

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            noted.append(str(function))
            return function(*args, **(kwargs or {}))

    launched, noted = [], []
    names = [name for name in vars(module) if name.endswith("_kernel")]
    with pytest.MonkeyPatch.context() as patch, Noted():
        for name in names:
            patch.setattr(module, name, Silent())
        module.code_sums(*arguments, config=module.CodeSumsConfig(**limits))
    assert len(launched) == launches
    no_launch = ("aten.empty", "aten.view", "aten.slice", "aten.fill_")
    assert [name for name in noted if not name.startswith(no_launch)] == others


@pytest.mark.needs_kernels
@pytest.mark.parametrize("config", [{}, {"block_elements": 32, "block_d": 4}])
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_sums_by_atomics(config: dict, dtype: torch.dtype) -> None:
    from vqtriton.kernels.atomic_sums import AtomicSumsConfig, atomic_sums

    device = DEVICE
    x = torch.randn(7, 50, 3).to(dtype).permute(2, 1, 0)
    x[1, 17, 6] = torch.nan
    x[0, 3, 0] = torch.inf
    indices = torch.stack([skewed(skew, 50, 5) for skew in ("uniform", "one code", "zipf")])
    sums, counts = atomic_sums(
        x.to(device), indices.to(device), 5, config=AtomicSumsConfig(**config) if config else None
    )
    assert sums.dtype == torch.float32
    for head in range(3):
        want_sums, want_counts = oracle.code_sums(x[head], indices[head], 5)
        assert torch.equal(counts[head].cpu(), want_counts)
        magnitude, _ = oracle.code_sums(x[head].abs(), indices[head], 5)
        assert ((sums[head].cpu() - want_sums).abs() <= 1.01 * 2**-24 * magnitude).all()


@on_every_backend
def test_atomics_only_on_request(backend: Backend, monkeypatch) -> None:
    """And even then not where torch is told to be deterministic."""
    used = []
    if backend.name == "triton":
        from vqtriton.kernels import atomic_sums as module

        atomic_sums = module.atomic_sums
        monkeypatch.setattr(
            module, "atomic_sums", lambda *a, **k: used.append(True) or atomic_sums(*a, **k)
        )
    x, indices = torch.randn(40, 3), torch.randint(-1, 6, (40,))
    arguments = x.to(backend.device), indices.to(backend.device), 5
    want = vqtriton.reference.code_sums(x, indices, 5)
    for is_told, deterministic, may_be_atomic in (
        (True, False, False),
        (False, True, False),
        (False, False, backend.name == "triton"),
    ):
        torch.use_deterministic_algorithms(is_told)
        found = vqtriton.code_sums(*arguments, deterministic=deterministic, backend=backend.name)
        torch.testing.assert_close(tuple(t.cpu() for t in found), want)
        assert bool(used) == may_be_atomic
    empty = vqtriton.code_sums(x[:0], indices[:0], 5, deterministic=False, backend="auto")
    assert not any(t.any() for t in empty)
    with pytest.raises(TypeError, match="deterministic is 0"):
        vqtriton.code_sums(x, indices, 5, deterministic=0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("indices", "size", "error", "message"),
    [
        (torch.zeros(3).long(), 2, ValueError, r"indices has shape \(3,\)"),
        (torch.zeros(4), 2, TypeError, "indices is a torch.float32 tensor"),
        (torch.zeros(4).int(), 2, TypeError, "indices is a torch.int32 tensor"),
        ([0, 1, 2, 3], 2, TypeError, "indices is a list"),
        (torch.zeros(4).long(), 0, ValueError, "codebook_size is 0"),
        (torch.zeros(4).long(), 2.0, TypeError, "codebook_size is 2.0"),
    ],
)
def test_bad_input_is_named(indices, size, error, message) -> None:
    with pytest.raises(error, match=message):
        vqtriton.code_sums(torch.zeros(4, 3), indices, size)
