"""The quick interpreter gives the bits of Triton's own, and refuses what that refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import small_cases
import torch
from conftest import DEVICE

pytest.importorskip("triton")
import triton
import triton.language as tl
from quick_interpreter import VERSIONS, own_interpreter

pytestmark = [pytest.mark.kernel, pytest.mark.needs_kernels, pytest.mark.needs_interpreter]


def test_the_version_of_development_is_quick() -> None:
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    assert re.search(r"^triton==(.*)$", constraints, re.M)[1] in VERSIONS


@pytest.mark.parametrize("kernel", ["planes", "rescue_rows", "chunk_sums", "draw_keys"])
def test_bits_are_those_of_the_own_interpreter(kernel: str, monkeypatch) -> None:
    found: list[torch.Tensor] = []
    monkeypatch.setattr(small_cases, "expect", lambda got, want: found.append(got.cpu()))
    small_cases.CASES[kernel](DEVICE)
    quick = [t.clone() for t in found]
    found.clear()
    with own_interpreter():
        small_cases.CASES[kernel](DEVICE)
    assert len(found) == len(quick) > 0
    for own, other in zip(found, quick, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


@triton.jit
def sum_kernel(x_ptr, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x + tl.arange(0, OTHER))


@pytest.mark.parametrize(
    ("block", "other", "message"),
    [(4, 8, "incompatible dimensions"), (6, 6, "power of 2"), (1 << 21, 4, "maximum tensor numel")],
)
def test_refuses_what_the_own_interpreter_refuses(block: int, other: int, message: str) -> None:
    x = torch.zeros(8, dtype=torch.int32).to(DEVICE)
    for _ in range(2):
        with pytest.raises(Exception, match=message):
            sum_kernel[(1,)](x, block, other)
    with own_interpreter(), pytest.raises(Exception, match=message):
        sum_kernel[(1,)](x, block, other)
