"""A whole training step: its memory, its rounding, and what a skewed batch costs."""

from __future__ import annotations

import pytest
import torch
from backends import Backend, on_every_backend
from conftest import DEVICE, INTERPRETED
from data import SKEWS
from torch import Tensor

from bench.devices import Cuda, allocator_peak
from vqtriton import VectorQuantize, ops, torch_backend

pytestmark = pytest.mark.kernel


# --- memory ---


def peak_bytes(step, device: str) -> int:
    """What torch's allocator hands out at most during a step, results included."""
    return Cuda().peak_memory(step) if device == "cuda" else allocator_peak(step)


def training_step(backend: Backend, n: int, k: int, d: int, update: str, spoil=None):
    vq = VectorQuantize(d, k, codebook_update=update, threshold_ema_dead_code=0.5)
    vq = vq.to(backend.device)
    vq.backend = backend.name
    x = torch.randn(n, d, device=backend.device).requires_grad_()
    grad = torch.randn(n, d, device=backend.device)

    def step():
        quantized, indices, loss = vq(x)
        if spoil:
            spoil(x, vq.codebook)
        leaves = [x, vq.codebook] if update == "gradient" else [x]
        # what is kept for backward is part of the step
        grads = torch.autograd.grad([quantized, loss], leaves, [grad, torch.ones_like(loss)])
        return quantized, indices, loss, grads

    step()
    return step


def shape_and_limit(backend: Backend) -> tuple[tuple[int, int, int], int, int]:
    """N, K, D; the bytes that a step may take; those of the smallest N×K matrix."""
    n, k, d = (384, 2400, 4) if INTERPRETED else (40_000, 6_000, 48)
    outputs = 2 * 4 * n * d + 8 * n + 4
    # a block of scores, twice; and on a GPU the lists of rivals, a few for each processor
    constant = 2 * 4 * torch_backend.BLOCK_SCORES if backend.name == "torch" else 1 << 17
    if backend.device == "cuda":
        constant += 65536 * 4 * torch.cuda.get_device_properties(0).multi_processor_count
    per_row = 64 * n
    return (n, k, d), outputs + 2 * 4 * n * d + 12 * 4 * k * d + per_row + constant, n * k


@on_every_backend
# in the interpreter the second takes seconds, and its kernels take the same memory
@pytest.mark.parametrize("update", ["ema"] if INTERPRETED else ["ema", "gradient"])
# a threshold that revives codes in every step
@pytest.mark.filterwarnings("ignore:threshold_ema_dead_code is:UserWarning")
def test_memory_of_a_step(backend: Backend, update: str) -> None:
    """Outputs, 2·N·D·4 bytes, and O(N + K·D)."""
    shape, limit, matrix = shape_and_limit(backend)
    step = training_step(backend, *shape, update)
    assert peak_bytes(step, backend.device) <= limit < 0.75 * matrix


@pytest.mark.once
@on_every_backend
def test_a_matrix_of_bytes_is_seen(backend: Backend) -> None:
    """One byte for each row and code is more than the limit."""
    (n, k, d), limit, _ = shape_and_limit(backend)

    def spoil(x: Tensor, codebook: Tensor) -> None:
        torch.zeros(n, k, dtype=torch.bool, device=x.device)

    step = training_step(backend, n, k, d, "ema", spoil)
    assert peak_bytes(step, backend.device) > limit


# --- rounding ---


def plain_step(x: Tensor, codebook: Tensor, grad: Tensor, indices: Tensor, decay: float):
    """The step in plain torch, in the dtype of its arguments: what anyone would write."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    codes = codebook[indices]
    loss = 0.25 * (x - codes.detach()).square().mean() + (x.detach() - codes).square().mean()
    quantized = x + (codes - x).detach()
    grads = torch.autograd.grad([quantized, loss], [x, codebook], [grad, torch.ones_like(loss)])
    counts = torch.bincount(indices, minlength=len(codebook)).to(x.dtype)
    sums = torch.zeros_like(codebook).index_add(0, indices, x.detach())
    size = torch.ones_like(counts) * decay + counts * (1 - decay)
    average = codebook.detach() * decay + sums * (1 - decay)
    return {
        "grad_x": grads[0],
        "grad_codebook": grads[1],
        "cluster_size": size,
        "codebook": average / size[:, None],
    }


def our_step(backend: Backend, x: Tensor, codebook: Tensor, grad: Tensor, decay: float):
    found: dict[str, Tensor] = {}
    for update in ("ema", "gradient"):
        vq = VectorQuantize(*codebook.shape[::-1], codebook_update=update, decay=decay)
        vq.backend = backend.name
        with torch.no_grad():
            vq.codebook.copy_(codebook)
        vq.to(backend.device)
        leaf = x.to(backend.device).requires_grad_()
        quantized, indices, loss = vq(leaf)
        leaves = [leaf, vq.codebook] if update == "gradient" else [leaf]
        grads = torch.autograd.grad(
            [quantized, loss], leaves, [grad.to(backend.device), torch.ones_like(loss)]
        )
        found["grad_x"] = grads[0].cpu()
        if update == "gradient":
            found["grad_codebook"] = grads[1].cpu()
        else:
            for name in ("cluster_size", "codebook"):
                found[name] = getattr(vq, name).cpu()
    return found, indices.cpu()


@on_every_backend
@pytest.mark.parametrize("kind", ["gaussian", "offset", "collapsed", "learned"])
def test_errors_are_no_more_than_twice_those_of_torch(backend: Backend, kind: str) -> None:
    """Of gradients and statistics, the largest error beside float64."""
    n, k, d = (150, 12, 5) if INTERPRETED else (20_000, 64, 24)
    x, codebook, grad = torch.randn(n, d), torch.randn(k, d), torch.randn(n, d)
    if kind == "offset":
        x, codebook = x + 1000, codebook + 1000
    if kind == "collapsed":
        codebook[1:] += 100
    if kind == "learned":
        codebook = x[:k] + 1e-3
    ours, indices = our_step(backend, x, codebook, grad, 0.9)
    plain = plain_step(x, codebook, grad, indices, 0.9)
    truth = plain_step(x.double(), codebook.double(), grad.double(), indices, 0.9)
    for name, right in truth.items():
        error, theirs = ((got[name].double() - right).abs().max() for got in (ours, plain))
        # where torch is right by chance: half a unit in the last place of the largest value
        assert error <= 2 * theirs + 2.0**-24 * right.abs().max(), (name, error, theirs)


# --- skew ---


def work(indices: Tensor, k: int, d: int) -> tuple[int, int]:
    """Bytes that the kernels of the sums move, and the most rows or chunks one program adds up.

    Counted from the rule of `kernels/code_sums.py`; `test_chunks_are_as_counted` holds it to that.
    """
    from vqtriton.kernels.code_sums import CodeSumsConfig

    chunk = CodeSumsConfig().chunk(len(indices))
    codes = indices[indices >= 0].sort().values
    borders = torch.arange(chunk, max(len(codes), chunk), chunk)
    crossed = codes[borders - 1][codes[borders - 1] == codes[borders]]
    # a code that crosses n borders has n + 1 partial sums
    crossing, of_each = crossed.unique(return_counts=True)
    # partial sums are float64, written and read; the sums are set to zero first
    moved = 4 * d * (len(codes) + 2 * k) + 8 * d * 2 * (len(crossed) + len(crossing))
    return moved, max(chunk, int(of_each.max()) + 1 if len(of_each) else 0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("n", "k", "d"), [(1 << 20, 1024, 64), (1 << 20, 16384, 128), (4096, 256, 8)]
)
def test_a_skewed_batch_costs_no_more(n: int, k: int, d: int) -> None:
    pytest.importorskip("triton")
    even, _ = work(SKEWS["uniform"](n, k), k, d)
    for name, make in SKEWS.items():
        moved, longest = work(make(n, k), k, d)
        assert moved <= 1.5 * even, name
        # however the rows fall, no program adds up more than the square root of them, or 256
        assert longest <= max(256, 2 * n**0.5), name


@pytest.mark.needs_kernels
@pytest.mark.parametrize("skew", SKEWS)
def test_chunks_are_as_counted(skew: str, monkeypatch) -> None:
    """The launches really have the chunks that the count of the work is made from."""
    from vqtriton.kernels import code_sums as module

    n, k = 1000, 7
    grids = {}
    launch = module.launch

    def note(kernel, grid, *args, **options):
        name = getattr(kernel, "__name__", "")
        grids[name] = grid
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(module, "launch", note)
    indices = SKEWS[skew](n, k)
    x, indices_there = torch.randn(1, n, 3, device=DEVICE), indices[None].to(DEVICE)
    config = module.CodeSumsConfig(least_chunk=4, most_elements=0)
    module.code_sums(x, indices_there, k, config=config)
    # no more than 256
    assert config.chunk(n) == 4
    assert grids["chunk_sums_kernel"] == (250, 1)
    # a program for each border
    assert grids["combine_chunks_kernel"] == (249, 1)


# --- repeats ---


@on_every_backend
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_repeats_are_one(backend: Backend, update: str) -> None:
    """With `torch.use_deterministic_algorithms(True)`, as all of the suite."""
    assert torch.are_deterministic_algorithms_enabled()
    n, k, d = (60, 9, 5) if INTERPRETED else (3000, 50, 17)
    x, grad = torch.randn(n, d), torch.randn(n, d)
    # most rows on few codes
    x[: n // 2] = x[0]
    first = None
    # where programs run one after the other there is little to see
    for _ in range(3 if INTERPRETED else 50):
        torch.manual_seed(1)
        vq = VectorQuantize(d, k, codebook_update=update, threshold_ema_dead_code=0.5)
        vq.backend = backend.name
        vq.to(backend.device)
        leaf = x.to(backend.device).requires_grad_()
        quantized, indices, loss = vq(leaf)
        leaves = [leaf, vq.codebook] if update == "gradient" else [leaf]
        grads = torch.autograd.grad(
            [quantized, loss], leaves, [grad.to(backend.device), torch.ones_like(loss)]
        )
        found = [quantized.detach(), indices, loss.detach(), *grads, *vq.state_dict().values()]
        # of which the last bits may not show in what they are used for
        found += ops.prepare_codebook_op(vq.codebook.detach(), "l2", backend.name)
        found += ops.code_sums(leaf.detach(), indices, k, backend.name)
        first = first or [t.clone() for t in found]
        assert all(map(torch.equal, found, first))
