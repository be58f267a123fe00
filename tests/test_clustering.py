from __future__ import annotations

import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import Backend, on_every_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vqtriton
from vqtriton import clustering
from vqtriton.tensors import has_float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_is_lloyds_algorithm() -> None:
    x = torch.randn(500, 3, dtype=torch.float64).float()
    start = vqtriton.kmeans(x, 7, iters=0, generator=generator())
    # it starts from distinct rows
    assert (start[:, None] == x).all(-1).any(1).all()
    assert start.unique(dim=0).shape[0] == 7
    codes = start.double()
    for _ in range(5):
        nearest = torch.cdist(x.double(), codes).argmin(1)
        codes = torch.stack([x[nearest == k].double().mean(0) for k in range(7)])
    got = vqtriton.kmeans(x, 7, iters=5, generator=generator())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), codes, rtol=1e-5, atol=1e-6)


def test_each_iteration_lowers_the_error() -> None:
    x = torch.randn(800, 4)
    errors = []
    for iters in range(6):
        codebook = vqtriton.kmeans(x, 30, iters=iters, generator=generator())
        codes = codebook[vqtriton.nearest_code(x, codebook)]
        errors.append(vqtriton.metrics.quantization_error(x, codes).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_a_seed_decides() -> None:
    x = torch.randn(300, 4)
    first = vqtriton.kmeans(x, 20, generator=generator(1))
    assert torch.equal(vqtriton.kmeans(x, 20, generator=generator(1)), first)
    assert not torch.equal(vqtriton.kmeans(x, 20, generator=generator(2)), first)


def test_bad_rows_are_left_out() -> None:
    x = torch.randn(300, 4)
    x[::3, 0] = torch.nan
    x[1::3, 1] = torch.inf
    clean = vqtriton.kmeans(x[2::3], 20, generator=generator())
    assert torch.equal(vqtriton.kmeans(x, 20, generator=generator()), clean)


def test_fewer_rows_than_codes() -> None:
    x = torch.randn(3, 4)
    with pytest.warns(
        UserWarning, match="5 of 8 codes are copies of others or unused: x has fewer"
    ):
        codebook = vqtriton.kmeans(x, 8)
    assert codebook.shape == (8, 4)
    assert vqtriton.metrics.quantization_error(x, codebook[vqtriton.nearest_code(x, codebook)]) == 0


def test_shape_of_the_batch_does_not_matter() -> None:
    x = torch.randn(4, 5, 6, 3)
    flat = vqtriton.kmeans(x.reshape(-1, 3), 9, generator=generator())
    assert torch.equal(vqtriton.kmeans(x, 9, generator=generator()), flat)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 4), {}, "no finite row"),
        (torch.full((3, 4), torch.nan), {}, "no finite row"),
        (torch.zeros(3, 4), {"codebook_size": 0}, "codebook_size is 0"),
        (torch.zeros(3, 4), {"iters": -1}, "iters is -1"),
        (torch.zeros(3, 4), {"iters": 1.5}, "iters is 1.5"),
        (torch.zeros(3, 4), {"codebook_size": 2.5}, "codebook_size is 2.5"),
        ([[1.0]], {}, "x is a list"),
        (torch.zeros(3, 0), {}, r"x has shape \(3, 0\)"),
        (torch.zeros(3, 4), {"generator": 3}, "generator is a int"),
        (torch.zeros(3, 4), {"callback": 3}, "callback is a int"),
        (torch.zeros(3, 4), {"device": "nowhere"}, "device is 'nowhere'"),
        (torch.full((3, 4), 1e300, dtype=torch.float64), {}, "no finite row"),
    ],
)
def test_bad_input_is_named(x, options, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        vqtriton.kmeans(x, **{"codebook_size": 2, **options})


# --- batches ---


def blobs(num: int, rows: int, dim: int = 3, seed: int = 5) -> torch.Tensor:
    """Far apart, each of a few rows."""
    source = generator(seed)
    centers = 100 * torch.randn(num, dim, generator=source)
    return centers.repeat(rows, 1) + torch.randn(num * rows, dim, generator=source)


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_batches_change_no_bit(monkeypatch, init) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 64 * 4)
    x = torch.randn(999, 4)
    x[::7, 1] = torch.nan

    def run(rows):
        return vqtriton.kmeans(rows, 20, 4, generator(), init=init)

    want = run(x)
    assert torch.equal(run([x[:1], x[1:1], x[1:500].reshape(-1, 1, 4), x[500:]]), want)
    assert torch.equal(run(lambda: iter(x.split(37))), want)
    loader = torch.utils.data.DataLoader(x, batch_size=150)
    assert torch.equal(run(loader), want)
    # columns one after the other, as in an image map
    assert torch.equal(run(x.T.contiguous().T), want)


def test_layout_changes_no_bit_of_the_inertia() -> None:
    x = torch.randn(3000, 33)

    def run(rows):
        found = []
        vqtriton.kmeans(rows, 8, 2, generator(), callback=lambda *row: found.append(row))
        return found

    columns = x.T.contiguous().T
    assert run(columns) == run(x) == run(list(x.split(700)))
    # the kernels, too, get rows one after the other
    assert all(block.is_contiguous() for block in clustering.Rows(columns))


def test_layout_changes_no_bit_of_a_distance() -> None:
    x, codebook = torch.randn(3000, 33), torch.randn(8, 33)
    found = [
        vqtriton.vector_quantize(rows, codebook, reduction="none", backend="torch").loss
        for rows in (x, x.T.contiguous().T)
    ]
    assert torch.equal(*found)


def test_a_loader_may_use_its_memory_again() -> None:
    x = torch.randn(990, 4)

    def batches():
        memory = torch.empty(99, 4)
        for batch in x.split(99):
            yield memory.copy_(batch)

    want = vqtriton.kmeans(x, 20, 4, generator())
    assert torch.equal(vqtriton.kmeans(batches, 20, 4, generator()), want)


def test_batches_are_not_held(monkeypatch) -> None:
    """Of a stream of 30 batches no more than a few are alive at a time."""
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 100 * 4)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def batches():
        nonlocal most
        for place in range(30):
            batch = torch.randn(100, 4, generator=generator(place))
            alive.add(batch)
            most = max(most, len(alive))
            yield batch

    vqtriton.kmeans(batches, 8, 2, generator())
    assert most <= 4


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (iter([torch.zeros(3, 4)]), TypeError, "can be read only once"),
        ((torch.zeros(3, 4) for _ in range(2)), TypeError, "x is a generator"),
        (7, TypeError, "x is a int"),
        (lambda: None, TypeError, "x returned a NoneType"),
        ("rows", TypeError, "x is a str; it must be a floating-point tensor or numpy array, an"),
        (["rows"], TypeError, "batch 0 of x: x is a str"),
        ({"x": torch.zeros(3, 4)}, TypeError, "x is a dict; it must be a floating-point tensor"),
        ([{"x": torch.zeros(3, 4)}], TypeError, r"batch 0 of x: x is a dict; .*batch\["),
        (np.zeros((3, 4), np.int32), TypeError, "x is a numpy array of int32"),
        (np.zeros((3, 4), np.complex64), TypeError, "x is a numpy array of complex64"),
        (np.array([None]), TypeError, "x is a numpy array of object"),
        (np.ma.zeros((3, 4)), TypeError, r"x is a masked array; give x.filled"),
        (np.zeros((3, 0)), ValueError, r"x has shape \(3, 0\)"),
        (np.array(1.0), ValueError, r"x has shape \(\)"),
        ([np.zeros((3, 4)), np.zeros((3, 4), np.float32)], ValueError, "batch 1 of x .*float32"),
        (np.full((3, 4), np.nan), ValueError, r"x has shape \(3, 4\) and no finite row"),
        ([[1.0, 2.0]], TypeError, "batch 0 of x: x is a list; it must be a floating-point tensor"),
        ([()], TypeError, "batch 0 of x: x is a tuple; it must be"),
        (
            torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.zeros(3, 4), torch.zeros(3))
            ),
            TypeError,
            r"batch 0 of x: x is a list of 2; .*lambda: \(x for x, \*_ in loader\)",
        ),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], ValueError, "batch 1 of x has shape"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).double()], ValueError, "batch 1 of x .*float64"),
        ([torch.zeros(3, 4), (torch.zeros(3, 4), 1)], TypeError, "batch 1 of x: x is a tuple"),
        ([], ValueError, "x has no finite row"),
        (list, ValueError, "x has no finite row"),
        ([torch.zeros(0, 4), torch.full((2, 4), torch.inf)], ValueError, "x has no finite row"),
    ],
)
def test_bad_batches_are_named(x, error, message) -> None:
    with pytest.raises(error, match=message):
        vqtriton.kmeans(x, 2)


def test_what_a_loader_of_tensors_yields(monkeypatch) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 64 * 4)
    x = torch.randn(990, 4)
    want = vqtriton.kmeans(x, 20, 4, generator())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=150)
    assert isinstance(next(iter(loader)), list)
    labelled = torch.utils.data.TensorDataset(x, torch.arange(990))
    of_pairs = torch.utils.data.DataLoader(labelled, batch_size=150)
    for batches in (
        loader,
        [(batch,) for batch in x.split(100)],
        [[batch.numpy()] for batch in x.split(100)],
        # as the error about them says
        lambda: (x for x, *_ in of_pairs),
        lambda: x,
        lambda: x.numpy(),
    ):
        assert torch.equal(vqtriton.kmeans(batches, 20, 4, generator()), want)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_numpy_arrays(monkeypatch, dtype) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 64 * 4)
    x = np.random.default_rng(0).normal(size=(30, 33, 4)).astype(dtype)
    x[::3, 5, 1] = np.nan
    native = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
    want = vqtriton.kmeans(native, 20, 4, generator())
    before = x.copy()
    read_only = x.copy()
    read_only.flags.writeable = False
    for same in (
        x,
        read_only,
        np.asfortranarray(x),
        x[::-1][::-1].reshape(-1, 4),
        list(x),
        [x[:1], x[1:]],
        lambda: iter(np.split(x, 6)),
    ):
        assert torch.equal(vqtriton.kmeans(same, 20, 4, generator()), want)
    np.testing.assert_array_equal(x, before)
    one = x[0, 0]
    assert torch.equal(vqtriton.kmeans(one, 1), native[0, 0][None].float())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(40_000, 16), (200, 200, 16)])
def test_a_memmap_is_read_block_by_block(tmp_path: Path, monkeypatch, shape, order) -> None:
    """Opened to be read only; numpy tells tracemalloc of its memory, torch the dispatcher."""
    x = torch.randn(shape)
    path = tmp_path / "x.bin"
    stored = np.memmap(path, np.float32, "w+", shape=shape, order=order)
    stored[:] = x.numpy()
    stored.flush()
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 500 * 16)
    want = vqtriton.kmeans(x, 8, 2, generator())
    stored = np.memmap(path, np.float32, "r", shape=shape, order=order)
    tracemalloc.start()
    with Largest() as largest:
        found = vqtriton.kmeans(stored, 8, 2, generator())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(found, want)
    assert 500 * 16 * 4 <= peak < x.nbytes / 10
    assert largest.nbytes < x.nbytes / 10


def test_a_device_without_float64_is_left_to_the_cpu() -> None:
    """No such device is at hand, so the test moves no tensor to one."""
    mps = torch.device("mps")
    assert not has_float64(mps)
    assert has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cuda"))
    rows = clustering.Rows(torch.randn(9, 4), "mps")
    assert {block.device.type for block in rows} == {"cpu"}
    assert (rows.device.type, rows.home) == ("cpu", mps)


def test_a_codebook_goes_home(monkeypatch) -> None:
    """Home is another device than that of the computation, which a tensor without values shows."""
    monkeypatch.setattr(clustering, "has_float64", lambda device: device.type != "meta")
    codebook = vqtriton.kmeans(torch.randn(9, 4), 2, device="meta")
    assert codebook.device.type == "meta"
    assert codebook.dtype == torch.float32


def test_a_source_that_runs_dry_is_named() -> None:
    passes = iter([[torch.randn(9, 4)], [torch.randn(9, 4)], []])
    with pytest.raises(ValueError, match="x gave 9 finite rows at first and 0 later"):
        vqtriton.kmeans(lambda: next(passes), 2, iters=3)


@pytest.mark.parametrize("init", ["furthest", None, "k-means"])
def test_an_unknown_start_is_named(init) -> None:
    with pytest.raises(ValueError, match="init is "):
        vqtriton.kmeans(torch.randn(9, 4), 2, init=init)


# --- starts, empty clusters, progress ---


def inertia(x: torch.Tensor, codebook: torch.Tensor) -> float:
    codes = codebook.double()[vqtriton.reference.nearest_code(x, codebook)]
    return (x.double() - codes).square().sum().item()


def test_plus_plus_finds_what_is_far_apart() -> None:
    """A start of one row in each of 40 blobs, which a uniform draw does not give."""
    x = blobs(40, 30)
    within = 3 * len(x)
    for seed in range(3):
        careful = vqtriton.kmeans(x, 40, 0, generator(seed), init="k-means++")
        assert inertia(x, careful) < 4 * within
        assert inertia(x, vqtriton.kmeans(x, 40, 0, generator(seed))) > 40 * within
        # far from the origin it is no different
        moved = vqtriton.kmeans(x + 1e4, 40, 0, generator(seed), init="k-means++")
        assert inertia(x + 1e4, moved) < 4 * within


def test_plus_plus_starts_from_rows_even_if_there_are_few() -> None:
    x = torch.randn(3, 4).repeat(5, 1)
    with pytest.warns(UserWarning, match="5 of 8 codes"):
        codebook = vqtriton.kmeans(x, 8, 2, generator(), init="k-means++")
    assert codebook.unique(dim=0).shape[0] == 3
    assert inertia(x, codebook) == 0


def test_empty_clusters_start_anew() -> None:
    """Half of the rows are one point, of which a uniform draw takes many."""
    x = torch.cat([torch.zeros(300, 3), blobs(60, 5)])
    empty = []
    codebook = vqtriton.kmeans(
        x, 40, 12, generator(), callback=lambda i, inertia, num_empty: empty.append(num_empty)
    )
    assert empty[0] > 5
    assert empty[-1] == 0
    assert codebook.unique(dim=0).shape[0] == 40
    assert vqtriton.nearest_code(x, codebook).unique().numel() == 40


def test_starts_are_drawn_from_all_blocks(monkeypatch) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 16)
    x = torch.arange(1000.0)[:, None].repeat(1, 4)
    starts = vqtriton.kmeans(x, 100, 0, generator())[:, 0]
    # a tenth of them in each tenth of the rows, give or take
    assert starts.unique().numel() == 100
    assert all(2 <= count <= 20 for count in starts.histc(10, 0, 1000))


def test_empty_clusters_start_far_from_codes(monkeypatch) -> None:
    """In proportion to the squared distance, so first of all from the few that are far away."""
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 64 * 4)
    x = torch.cat([torch.zeros(300, 4), 1e-3 * torch.randn(100, 4), 100 * torch.randn(5, 4)])
    x = x[torch.randperm(len(x), generator=generator())]
    far = x[x.abs().amax(1) > 1]
    empty = []
    for seed in range(3):
        codebook = vqtriton.kmeans(
            x, 20, 1, generator(seed), callback=lambda *row: empty.append(row[2])
        )
        assert empty[-1] >= 5
        assert (codebook[:, None] == far).all(-1).any(0).all()


def test_a_cluster_of_one_row_is_not_empty() -> None:
    empty = []
    x = torch.randn(2, 4)
    vqtriton.kmeans(x, 2, 1, generator(), callback=lambda *row: empty.append(row[2]))
    assert empty == [0]


def test_plus_plus_takes_all_rows_where_there_are_no_more() -> None:
    for seed in range(10):
        x = torch.randn(3, 4, generator=generator(seed)).repeat_interleave(2, 0)
        starts = vqtriton.kmeans(x, 3, 0, generator(seed), init="k-means++")
        assert starts.unique(dim=0).shape[0] == 3


def test_rows_whose_sum_overflows_leave_codes_finite() -> None:
    x = torch.full((300, 2), 2e36) + 1e35 * torch.randn(300, 2)
    codebook = vqtriton.kmeans(x, 2, 3, generator())
    assert codebook.isfinite().all()


def test_an_empty_cluster_never_starts_from_a_row_that_is_a_code() -> None:
    # integers, of which the means are exact
    x = torch.tensor([[1.0, 2, 3], [7, 0, -2], [5, 5, 5], [0, -9, 4]]).repeat(50, 1)
    with pytest.warns(UserWarning, match="6 of 10 codes"):
        codebook = vqtriton.kmeans(x, 10, 6, generator())
    assert inertia(x, codebook) == 0
    assert (codebook[:, None] == x[:4]).all(-1).any(1).all()


def iterations(x: torch.Tensor, *args, **options) -> tuple[int, torch.Tensor]:
    """How many k-means took until it settled, and the codebook."""
    seen = []
    codebook = vqtriton.kmeans(x, *args, callback=lambda *row: seen.append(row), **options)
    return len(seen), codebook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [13, 1000])
def test_equal_rows_settle_at_once(count, dtype) -> None:
    x = torch.full((count, 1), 0.1, dtype=dtype)
    with pytest.warns(UserWarning, match="1 of 2 codes"):
        took, codebook = iterations(x, 2, iters=25)
    assert took == 1
    assert (codebook == x[0].float()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_distinct_rows_settle(dtype) -> None:
    """In float64 too, where most rows are at a distance from the float32 code that they are."""
    others = torch.randn(200, 3, dtype=torch.float64).to(dtype)
    x = torch.cat([torch.full((3000, 3), 0.1, dtype=dtype), others])
    x = x[torch.randperm(len(x), generator=generator())]
    with pytest.warns(UserWarning, match="55 of 256 codes are .* \\(256\\)") as warned:
        took, codebook = iterations(x, 256, iters=100, generator=generator())
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert took < 12
    assert codebook.unique(dim=0).shape[0] <= 256
    found = codebook[vqtriton.reference.nearest_code(x, codebook)]
    assert torch.equal(found, x.float())


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_few_rows_are_told_of_without_an_iteration(init) -> None:
    x = torch.randn(5, 2)[torch.arange(7) % 5]
    with pytest.warns(UserWarning, match="3 of 8 codes"):
        vqtriton.kmeans(x, 8, 0, init=init)
    # no warning where every row has a code of its own
    vqtriton.kmeans(x, 4, 0, init=init)
    vqtriton.kmeans(x[:5], 5, 3, init=init)


@pytest.mark.parametrize("block_rows", [64, 1 << 20])
def test_progress_is_the_inertia_of_each_iteration(monkeypatch, block_rows) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", block_rows * 4)
    x = torch.randn(400, 4)
    seen = []
    codebook = vqtriton.kmeans(x, 10, 200, generator(), callback=lambda *row: seen.append(row))
    assert [row[0] for row in seen] == list(range(len(seen)))
    for iteration, found, _ in seen[:5]:
        began = vqtriton.kmeans(x, 10, iteration, generator())
        assert found == pytest.approx(inertia(x, began), rel=1e-6)
    errors = [row[1] for row in seen]
    assert errors == sorted(errors, reverse=True)
    # it settled, and more iterations are none
    assert len(seen) < 200
    assert torch.equal(vqtriton.kmeans(x, 10, len(seen) - 1, generator()), codebook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype) -> None:
    x = blobs(10, 20).to(dtype)
    codebook = vqtriton.kmeans(x, 10, 5, generator(), init="k-means++")
    assert codebook.dtype == torch.float32
    assert inertia(x, codebook) == pytest.approx(
        inertia(x, vqtriton.kmeans(x.float(), 10, 5, generator(), init="k-means++")), rel=1e-3
    )


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_beside_scikit_learn(init) -> None:
    """From a start of the same kind, to an end as good: the best of five of each."""
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(3000, 8, generator=generator(1))
    ours = min(
        inertia(x, vqtriton.kmeans(x, 32, 60, generator(seed), init=init)) for seed in range(5)
    )
    theirs = min(
        cluster.KMeans(32, init=init, n_init=1, max_iter=60, tol=0, random_state=seed)
        .fit(x.numpy())
        .inertia_
        for seed in range(5)
    )
    assert ours < 1.01 * theirs


# --- the kernels ---


@on_every_backend
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_on_every_backend(backend: Backend, monkeypatch, init) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 20 * 3)
    x = blobs(6, 8).to(backend.device)
    empty = []
    codebook = vqtriton.kmeans(
        x,
        9,
        3,
        torch.Generator(backend.device).manual_seed(0),
        init=init,
        callback=lambda i, inertia, num_empty: empty.append(num_empty),
        backend=backend.name,
    )
    assert codebook.device.type == backend.device
    assert 1 <= len(empty) <= 3
    assert min(empty) == empty[-1]
    means = torch.stack([x[k::6].mean(0) for k in range(6)])
    if init == "k-means++":
        assert (torch.cdist(means, codebook).amin(1) < 4).all()
