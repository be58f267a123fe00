"""The gradients of `vector_quantize` as ops, beside float64."""

from __future__ import annotations

from unittest import mock

import data
import pytest
import torch
from backends import BACKENDS, EXACT_DTYPES, Backend, on_every_backend
from conftest import DEVICE, INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqtriton import ops, torch_backend

pytestmark = pytest.mark.kernel


def grad_x_in_float64(
    grad_quantized: Tensor, grad_loss: Tensor, x: Tensor, codes: Tensor, weight: float
) -> Tensor:
    pull = weight * grad_loss.double()[:, None] * (x.double() - codes.double())
    return grad_quantized.double() + pull


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(
    n=st.sampled_from([0, 1, 15, 17, 64, 65]),
    k=st.sampled_from([1, 2, 17]),
    d=st.sampled_from([1, 3, 16, 65, 300]),
    dtype=st.sampled_from(EXACT_DTYPES),
    codebook_dtype=st.sampled_from(EXACT_DTYPES),
    layout=st.sampled_from(data.LAYOUTS),
    is_expanded=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_are_as_in_float64(
    backend: Backend, n, k, d, dtype, codebook_dtype, layout, is_expanded, seed
) -> None:
    torch.manual_seed(seed)
    x, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(codebook_dtype)
    indices = torch.randint(-1, k, (n,))
    grad_quantized, grad_loss = torch.randn(n, d).to(dtype), torch.randn(n)
    if is_expanded:
        # what `sum` sends back
        grad_quantized, grad_loss = (
            torch.tensor(3.0).to(dtype).expand(n, d),
            torch.ones(1).expand(n),
        )
    x[::5, -1] = torch.nan
    x, codebook, grad_quantized = (
        data.with_layout(t, layout) if t.stride(-1) else t for t in (x, codebook, grad_quantized)
    )
    on_device = [t.to(backend.device) for t in (grad_quantized, grad_loss, x, codebook, indices)]
    # several blocks of the torch backend
    with mock.patch.object(torch_backend, "BLOCK_ELEMENTS", 1):
        got = ops.grad_x(*on_device, 0.5, backend.name).cpu()
    codes = codebook[indices.clamp(min=0)]
    want = grad_x_in_float64(grad_quantized, grad_loss, x, codes, 0.5)
    is_masked = indices < 0
    assert got.dtype == dtype
    assert (got[is_masked] == 0).all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got[~is_masked].double(), want[~is_masked], rtol=eps, atol=4 * 2**-24 * 8, equal_nan=True
    )

    with mock.patch.object(torch_backend, "BLOCK_ELEMENTS", 1):
        got = ops.grad_codebook(*on_device[1:], 2.0, backend.name).cpu()
    is_counted = ~is_masked & x.isfinite().all(1)
    pulls = 2 * grad_loss.double()[:, None] * (codes.double() - x.double())
    want, magnitude = torch.zeros(2, k, d, dtype=torch.float64)
    want.index_add_(0, indices[is_counted], pulls[is_counted])
    magnitude.index_add_(0, indices[is_counted], pulls[is_counted].abs())
    # a difference, two products, and the sum
    assert got.dtype == torch.float32
    assert ((got - want).abs() <= 6 * 2**-24 * magnitude).all()


@on_every_backend
def test_a_code_in_the_middle_of_its_rows(backend: Backend) -> None:
    # n·e and Σx would be 1e9 here, and their difference lost
    n = 300 if INTERPRETED else 100_000
    x = 1e4 + torch.randn(n, 3)
    codebook = x.mean(0, keepdim=True)
    args = torch.ones(n), x, codebook, torch.zeros(n, dtype=torch.int64)
    got = ops.grad_codebook(*(t.to(backend.device) for t in args), 2.0, backend.name).cpu()
    pulls = 2 * (codebook.double() - x.double())
    assert ((got - pulls.sum(0)).abs() <= 6 * 2**-24 * pulls.abs().sum(0)).all()


@pytest.mark.needs_kernels
def test_heads_of_the_kernels() -> None:
    from vqtriton.kernels import vector_quantize_grad as kernels
    from vqtriton.kernels.arguments import Pull

    device = DEVICE
    x, grad_quantized = torch.randn(3, 20, 5, device=device), torch.randn(20, 3, 5).to(device)
    codebook = torch.randn(3, 4, 5, device=device)
    indices = torch.randint(-1, 4, (3, 20), device=device)
    grad_loss = torch.randn(3, 1, device=device).expand(3, 20)
    grad_quantized = grad_quantized.transpose(0, 1)
    pull = Pull(grad_loss, x, codebook, indices, 0.5)
    whole, sums = kernels.grad_x(grad_quantized, pull), kernels.grad_codebook(pull)
    for head in range(3):
        one = slice(head, head + 1)
        pull = Pull(grad_loss[one], x[one], codebook[one], indices[one], 0.5)
        assert torch.equal(kernels.grad_x(grad_quantized[one], pull)[0], whole[head])
        assert torch.equal(kernels.grad_codebook(pull)[0], sums[head])
