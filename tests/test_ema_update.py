"""Moving averages, smoothing and dead codes in one launch, beside the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import Backend, on_every_backend
from conftest import INTERPRETED
from torch import Tensor

from vqtriton import VectorQuantize, ops

pytestmark = pytest.mark.kernel

State = tuple[Tensor, Tensor]


def in_float64(
    state: State, batch: tuple[Tensor | None, ...], decay: float, threshold: float
) -> State:
    """Code by code, in numpy: on a stub of a GPU each operation of torch takes long."""
    size, codebook = (t.double().cpu().numpy().copy() for t in state)
    counts, sums, samples, is_filled = (
        None if t is None else t.double().cpu().numpy() for t in batch
    )
    before = size
    if counts.sum() > 0:
        size = decay * size + (1 - decay) * counts
        for k in range(len(size)):
            # a code that no row chose is the average of nothing new
            if sums is not None and counts[k] > 0 and decay < 1:
                codebook[k] = (decay * before[k] * codebook[k] + (1 - decay) * sums[k]) / size[k]
    if samples is not None:
        filled = [row for row, there in zip(samples, is_filled, strict=True) if there]
        dead = [k for k in range(len(size)) if np.float32(size[k]) < np.float32(threshold)]
        mean = size.sum() / len(size)
        for turn, k in enumerate(dead if filled else []):
            codebook[k] = filled[turn % len(filled)]
            size[k] = max(mean, threshold)
    return torch.from_numpy(size), torch.from_numpy(codebook)


def rates(decay: float, threshold: float, device: str) -> Tensor:
    return torch.tensor([1 - decay, threshold], dtype=torch.float32, device=device)


def example(count: int, dim: int, device: str) -> tuple[State, tuple[Tensor, ...]]:
    state = (torch.rand(count) * 4, torch.randn(count, dim))
    # quarters, so that no size is within a rounding of the threshold
    state[0].mul_(4).round_().div_(4)
    counts = torch.randint(0, 5, (count,)).float()
    batch = (
        counts,
        torch.randn(count, dim) * counts[:, None],
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
    state, (counts, sums, *drawn) = example(count, dim, backend.device)
    batch = (counts, sums if is_ema else None, *(drawn if revives else (None, None)))
    for decay, threshold in (
        *((0.75, 1.1), (0.0, 1.1), (1.0, 0.6)),
        # sizes that are the threshold, which is not below it; and a mean that is below it
        *((0.0, 2.0), (0.5, 50.0)),
    ):
        want = in_float64(state, batch, decay, threshold)
        got = tuple(t.clone() for t in state)
        ops.ema_update_(*got, *batch, rates(decay, threshold, backend.device), backend.name)
        # an average is wrong by roundings of what it is the average of
        scale = max(t.abs().max().item() for t in (state[1], sums))
        for tensor, value, largest in zip(got, want, (8, scale), strict=True):
            error = (tensor.double().cpu() - value).abs()
            assert (error <= 8 * 2.0**-24 * largest).all()


@on_every_backend
def test_a_code_that_no_row_chose_stays_bit_for_bit(backend: Backend) -> None:
    (size, codebook), (counts, sums, *_) = example(300, 5, backend.device)
    unused = counts == 0
    before = codebook.clone()
    for decay in (0.0, 0.3, 0.99, 1.0):
        for _ in range(2 if INTERPRETED else 50):
            ops.ema_update_(
                size, codebook, counts, sums, None, None, rates(decay, 0, size.device), backend.name
            )
    assert torch.equal(codebook[unused], before[unused])
    assert not torch.equal(codebook[~unused], before[~unused])


@on_every_backend
@pytest.mark.parametrize("decay", [0.0, 0.4, 0.6, 0.99, 1.0])
def test_codes_that_are_the_means_stay_bit_for_bit(backend: Backend, decay: float) -> None:
    (size, codebook), (counts, *_) = example(40, 7, backend.device)
    # powers of two, so that the sums are exact
    counts = (2**counts).where(counts > 1, 0)
    before = codebook.clone()
    step = rates(decay, 0, size.device)
    ops.ema_update_(
        size, codebook, counts, codebook * counts[:, None], None, None, step, backend.name
    )
    assert torch.equal(codebook, before)


@on_every_backend
def test_a_code_without_a_past_is_the_mean_of_its_rows(backend: Backend) -> None:
    """Whatever the decay, bit for bit: all sizes were zero."""
    (size, codebook), (counts, sums, *_) = example(40, 7, backend.device)
    size.zero_()
    before = codebook.clone()
    ops.ema_update_(
        size, codebook, counts, sums, None, None, rates(0.99, 0, size.device), backend.name
    )
    mean = (sums / counts.clamp(min=1)[:, None]).where(counts[:, None] > 0, before)
    assert torch.equal(codebook, mean)


@on_every_backend
def test_totals_are_added_in_float64(backend: Backend) -> None:
    """One code has what swallows the others one by one."""
    count = 3000
    size = torch.ones(count, device=backend.device)
    size[0] = 2.0**24
    codes = torch.ones(count, 1, device=backend.device)
    got = size.clone(), codes.clone()
    samples, is_filled = codes + 1, torch.ones_like(size)
    step = rates(1.0, 2.0, backend.device)
    ops.ema_update_(*got, size, codes, samples, is_filled, step, backend.name)
    # the mean size, which a dead code gets
    assert got[0][1].item() == pytest.approx((2**24 + count - 1) / count, rel=2e-7)


@on_every_backend
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_an_overflow_is_the_largest_sum(backend: Backend, bad: float) -> None:
    state, batch = example(9, 3, backend.device)
    batch[1][4, 1] = bad
    batch[0][4] = 2
    before = state[1].clone()
    step = rates(0.5, 0.0, backend.device)
    ops.ema_update_(*state, *batch[:2], None, None, step, backend.name)
    assert all(tensor.isfinite().all() for tensor in state)
    moved = state[1][4, 1]
    # a sum that is not known moves nothing
    assert torch.equal(moved, before[4, 1]) if bad != bad else moved.abs() >= 1e37


@on_every_backend
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_codes_at_the_limits_of_float32(backend: Backend, decay: float) -> None:
    """Their difference overflows, their average does not."""
    codes = torch.tensor([[1e38, -3e38], [3e38, 2e38]], device=backend.device)
    counts = torch.ones(2, device=backend.device)
    got = counts.clone(), codes.clone()
    step = rates(decay, 0.0, backend.device)
    ops.ema_update_(*got, counts, codes, None, None, step, backend.name)
    assert torch.equal(got[1], codes)
    ops.ema_update_(*got, counts, -codes, None, None, step, backend.name)
    assert got[1].isfinite().all()
    if decay == 0:
        assert torch.equal(got[1], -codes)


@on_every_backend
def test_a_code_without_rows_stays_bit_for_bit(backend: Backend) -> None:
    codes = torch.tensor([[-0.0, 1e-45, 3e38]] * 2, device=backend.device)
    counts = torch.tensor([1.0, 0.0], device=backend.device)
    got = counts.clone(), codes.clone()
    step = rates(0.5, 0.0, backend.device)
    ops.ema_update_(*got, counts, torch.ones_like(codes), None, None, step, backend.name)
    assert torch.equal(got[1][1].view(torch.int32), codes[1].view(torch.int32))
    assert not torch.equal(got[1][0], codes[0])


@on_every_backend
def test_a_batch_without_rows_is_no_step(backend: Backend) -> None:
    (size, codebook), batch = example(50, 6, backend.device)
    got = size.clone(), codebook.clone()
    nothing = [torch.zeros_like(t) for t in batch]
    ops.ema_update_(*got, *nothing, rates(0.5, 100.0, backend.device), backend.name)
    assert torch.equal(got[0], size)
    assert torch.equal(got[1], codebook)


@on_every_backend
@pytest.mark.parametrize("revives", [True, False])
def test_strides_change_nothing(backend: Backend, revives: bool) -> None:
    state, batch = example(50, 6, backend.device)
    batch = (*batch[:2], *(batch[2:] if revives else (None, None)))
    plain = [t.clone() for t in state]
    strided = [torch.stack([t, t], -1)[..., 0] for t in state]
    odd = [None if t is None else torch.stack([t, t], -1)[..., 1] for t in batch]
    step = rates(0.5, 1.1, backend.device)
    ops.ema_update_(*plain, *batch, step, backend.name)
    ops.ema_update_(*strided, *odd, step, backend.name)
    for one, other in zip(plain, strided, strict=True):
        assert torch.equal(one, other)


@pytest.mark.needs_interpreter
# with the second, sizes are the threshold
@pytest.mark.parametrize(("decay", "threshold"), [(0.5, 1.1), (0.0, 2.0)])
def test_number_of_programs_changes_no_bit(monkeypatch, decay, threshold) -> None:
    from vqtriton.kernels import ema_update
    from vqtriton.kernels.arguments import Update

    config = ema_update.EmaUpdateConfig(block_scan=16, block_elements=16)
    state, batch = example(70, 3, "cpu")
    results = []
    for programs in (1, 2, 5, 100):
        monkeypatch.setattr(ema_update, "num_processors", lambda device, n=programs: n)
        got = [t.clone() for t in state]
        update = Update(*got, *batch, rates(decay, threshold, "cpu"))
        ema_update.ema_update_(update, config=config)
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


@on_every_backend
@pytest.mark.parametrize("revives", [True, False])
def test_several_codebooks_are_updated_as_each_alone(backend: Backend, revives: bool) -> None:
    examples = [example(30, 7, backend.device) for _ in range(3)]
    examples[1][1][0].zero_()
    examples[1][1][1].zero_()
    alone = []
    for state, batch in examples:
        given = batch if revives else (*batch[:2], None, None)
        one = tuple(t.clone() for t in state)
        ops.ema_update_(*one, *given, rates(0.5, 1.1, backend.device), backend.name)
        alone.append(one)
    states, batches = zip(*examples, strict=True)
    state = [torch.stack(tensors) for tensors in zip(*states, strict=True)]
    batch = [torch.stack(tensors) for tensors in zip(*batches, strict=True)]
    given = batch if revives else (*batch[:2], None, None)
    ops.ema_update_(*state, *given, rates(0.5, 1.1, backend.device), backend.name)
    for found, want in zip(state, zip(*alone, strict=True), strict=True):
        assert torch.equal(found.cpu(), torch.stack(want).cpu())
