"""Moving averages, smoothing and dead codes in one launch, beside the same in float64."""

from __future__ import annotations

import pytest
import torch
from backends import Backend, on_every_backend
from conftest import INTERPRETED
from torch import Tensor

from vqtriton import VectorQuantize, ops

pytestmark = pytest.mark.kernel

State = tuple[Tensor, Tensor, Tensor | None]


def in_float64(
    state: State, batch: tuple[Tensor, ...], decay: float, eps: float, threshold: float
) -> State:
    """Code by code."""
    size, codebook, embed_sum = (None if t is None else t.double().cpu() for t in state)
    counts, sums, samples, is_filled = (None if t is None else t.double().cpu() for t in batch)
    if counts.sum() > 0:
        size = decay * size + (1 - decay) * counts
        if embed_sum is not None:
            embed_sum = decay * embed_sum + (1 - decay) * sums
    total, count = size.sum(), len(size)
    if embed_sum is not None:
        codebook = codebook.clone()
        for k in range(count):
            rows = (size[k] + eps) / (total + count * eps) * total
            if rows > 0:
                codebook[k] = embed_sum[k] / rows
    if samples is not None:
        filled = [row for row, there in zip(samples, is_filled, strict=True) if there]
        dead = [k for k in range(count) if size[k].float() < threshold]
        for turn, k in enumerate(dead if filled else []):
            codebook[k] = filled[turn % len(filled)]
            size[k] = max(total / count, threshold)
            if embed_sum is not None:
                embed_sum[k] = codebook[k] * size[k]
    return size, codebook, embed_sum


def absolute(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.abs() for t in tensors)


def example(count: int, dim: int, device: str) -> tuple[State, tuple[Tensor, ...]]:
    state = (torch.rand(count) * 4, torch.randn(count, dim), torch.randn(count, dim))
    # quarters, so that no size is within a rounding of the threshold
    state[0].mul_(4).round_().div_(4)
    counts = torch.randint(0, 5, (count,)).float()
    batch = (
        counts,
        torch.randn(count, dim),
        torch.randn(count, dim),
        (torch.rand(count) > 0.3).float(),
    )
    return tuple(t.to(device) for t in state), tuple(t.to(device) for t in batch)


@on_every_backend
@pytest.mark.parametrize("revives", [True, False])
@pytest.mark.parametrize("is_ema", [True, False])
@pytest.mark.parametrize(
    ("count", "dim"), [(1, 1), (7, 3), (300, 5), (40, 64), (9, 300), (2100, 2)]
)
def test_is_that_of_float64(
    backend: Backend, count: int, dim: int, is_ema: bool, revives: bool
) -> None:
    (size, codebook, embed_sum), batch = example(count, dim, backend.device)
    state = (size, codebook, embed_sum if is_ema else None)
    if not revives:
        batch = (*batch[:2], None, None)
    for decay, eps, threshold in (
        *((0.75, 1e-3, 1.1), (0.0, 0.0, 1.1), (1.0, 1e-5, 0.6)),
        # sizes that are the threshold, which is not below it; and a mean that is below it
        *((0.0, 1e-3, 2.0), (0.5, 1e-3, 50.0)),
    ):
        want = in_float64(state, batch, decay, eps, threshold)
        magnitude = in_float64(absolute(state), absolute(batch), decay, eps, threshold)
        got = tuple(None if t is None else t.clone() for t in state)
        ops.ema_update_(*got, *batch, decay, eps, threshold, backend.name)
        for tensor, value, terms in zip(got, want, magnitude, strict=True):
            if tensor is not None:
                # an average of terms that cancel is wrong by roundings of the terms
                error = (tensor.double().cpu() - value).abs()
                assert (error <= 8 * 2.0**-24 * terms).all()


@on_every_backend
def test_totals_are_added_in_float64(backend: Backend) -> None:
    """One code has what swallows the others one by one."""
    count = 3000
    size = torch.ones(count, device=backend.device)
    size[0] = 2.0**24
    codes = torch.ones(count, 1, device=backend.device)
    got = size.clone(), codes.clone(), codes.clone()
    samples, is_filled = codes + 1, torch.ones_like(size)
    ops.ema_update_(*got, size, codes, samples, is_filled, 1.0, 1e-5, 2.0, backend.name)
    # the mean size, which a dead code gets
    assert got[0][1].item() == pytest.approx((2**24 + count - 1) / count, rel=2e-7)


@on_every_backend
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_an_overflow_is_the_largest_sum(backend: Backend, bad: float) -> None:
    state, batch = example(9, 3, backend.device)
    batch[1][4, 1] = bad
    batch[0][4] = 2
    ops.ema_update_(*state, *batch[:2], None, None, 0.5, 1e-3, 0.0, backend.name)
    assert all(tensor.isfinite().all() for tensor in state)
    if bad == bad:
        assert state[2][4, 1].abs() >= 1e38


@on_every_backend
def test_large_sums_are_as_they_are(backend: Backend) -> None:
    """What does not overflow is not changed; what does is the largest."""
    codes = torch.tensor([[1e38, -1e38], [3e38, 2e38]], device=backend.device)
    counts = torch.ones(2, device=backend.device)
    got = counts.clone(), codes.clone(), torch.zeros_like(codes)
    ops.ema_update_(*got, counts, codes, None, None, 0.0, 0.0, 0.0, backend.name)
    assert torch.equal(got[1], codes)
    assert torch.equal(got[2], codes)
    ops.ema_update_(*got, 9 * counts, codes, codes, counts, 0.0, 0.0, 99.0, backend.name)
    assert torch.equal(got[1], codes)
    largest = torch.finfo(torch.float32).max
    assert torch.equal(got[2], largest * codes.sign())


@on_every_backend
def test_a_batch_without_rows_is_no_step(backend: Backend) -> None:
    (size, codebook, embed_sum), batch = example(50, 6, backend.device)
    got = size.clone(), codebook.clone(), embed_sum.clone()
    nothing = [torch.zeros_like(t) for t in batch]
    ops.ema_update_(*got, *nothing, 0.5, 1e-5, 100.0, backend.name)
    assert torch.equal(got[0], size)
    assert torch.equal(got[2], embed_sum)


@on_every_backend
def test_strides_change_nothing(backend: Backend) -> None:
    state, batch = example(50, 6, backend.device)
    plain = [t.clone() for t in state]
    strided = [torch.stack([t, t], -1)[..., 0] for t in state]
    odd = [torch.stack([t, t], -1)[..., 1] for t in batch]
    ops.ema_update_(*plain, *batch, 0.5, 1e-5, 1.1, backend.name)
    ops.ema_update_(*strided, *odd, 0.5, 1e-5, 1.1, backend.name)
    for one, other in zip(plain, strided, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel alone")
# with the second, sizes are the threshold
@pytest.mark.parametrize(("decay", "threshold"), [(0.5, 1.1), (0.0, 2.0)])
def test_number_of_programs_changes_no_bit(monkeypatch, decay, threshold) -> None:
    from vqtriton.kernels import ema_update

    config = ema_update.EmaUpdateConfig(block_scan=16, block_elements=16)
    state, batch = example(70, 3, "cpu")
    results = []
    for programs in (1, 2, 5, 100):
        monkeypatch.setattr(ema_update, "num_processors", lambda device, n=programs: n)
        got = [t.clone() for t in state]
        ema_update.ema_update_(*got, *batch, decay, 1e-3, threshold, config=config)
        results.append(got)
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


@on_every_backend
def test_whoever_saved_the_codebook_is_told(backend: Backend) -> None:
    vq = VectorQuantize(4, 8, backend=backend.name).to(backend.device)
    weight = torch.ones(4, device=backend.device, requires_grad=True)
    product = (vq.codebook * weight).sum()
    vq(torch.randn(20, 4, device=backend.device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
