"""`normalize_rows`: the same bits on every backend."""

from __future__ import annotations

import data
import oracle
import pytest
import torch
from backends import BACKENDS, EXACT_DTYPES, Backend, on_each, on_every_backend
from conftest import INTERPRETED
from hypothesis import assume, given
from hypothesis import strategies as st

import vqtriton
from vqtriton import ops, torch_backend

pytestmark = pytest.mark.kernel


def check(backend: Backend, x: torch.Tensor) -> None:
    want = oracle.normalized(x)
    got = ops.normalize_rows(x.to(backend.device), backend.name)
    assert got.is_contiguous()
    for result in (got.cpu(), vqtriton.reference.normalized(x)):
        torch.testing.assert_close(result, want, rtol=0, atol=0, equal_nan=True)


@on_each(BACKENDS)
@given(
    n=st.sampled_from([1, 33, 127, 128, 129]),
    d=st.sampled_from([1, 2, 3, 7, 8, 9, 31, 100]),
    case=st.sampled_from(sorted(data.HARD)),
    dtype=st.sampled_from(EXACT_DTYPES),
    layout=st.sampled_from(data.LAYOUTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_oracle(backend: Backend, n, d, case, dtype, layout, seed) -> None:
    # Triton's interpreter widens these wrongly
    assume(not (INTERPRETED and dtype == torch.bfloat16 and case == "subnormal"))
    torch.manual_seed(seed)
    check(backend, data.with_layout(data.HARD[case](n, 1, d)[0].to(dtype), layout))


@on_every_backend
def test_zeros_and_what_is_shorter_than_the_least_norm(backend: Backend) -> None:
    x = torch.tensor([[0.0, -0.0], [3e-13, 4e-13], [3e-12, 4e-12], [2.0**-149, 0.0]])
    check(backend, x)
    lengths = ops.normalize_rows(x.to(backend.device), backend.name).cpu().norm(dim=1)
    torch.testing.assert_close(lengths[:3], torch.tensor([0.0, 0.5, 1.0]))
    assert ops.normalize_rows(x[:0].to(backend.device), backend.name).shape == (0, 2)


@pytest.mark.once
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 7)
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", 1)
    check(Backend("torch", "cpu"), x)


@pytest.mark.once
def test_float64_stays_float64() -> None:
    # without the rounding to float32, the order of a sum shows; the squares of some rows overflow
    for dim in (5, 300):
        x = torch.randn(20, dim, dtype=torch.float64) * 10.0 ** torch.randint(-200, 200, (20, 1))
        check(Backend("torch", "cpu"), x)
