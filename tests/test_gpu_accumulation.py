"""How much the tensor cores err when they add, as a part of what the bound allows.

The bound of the screen assumes that tensor cores add as others have found (docs/exactness.md,
"g"). Here rows and codes are built to err the most, and the products are made as the screen makes
them: `tl.dot` of float16 into float32, by tiles. Where the GPU is one of those that the models are
of, each bit is compared with what the model has.
"""

from __future__ import annotations

import pytest
import tensor_cores
import torch
from conftest import DEVICE, REAL_DEVICE
from gpu_check import IS_FULL, note
from torch import Tensor

from vqtriton.planes import TENSOR_CORES, accumulation_bound

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_backend = pytest.importorskip("vqtriton.triton_backend")

UNIT = triton_backend.tensor_core(torch.device(REAL_DEVICE))
INNERS = (16, 32, 64, 112, 128, 256, 512, 1024) if IS_FULL else (16, 112)
ROWS, CODES = (4096, 1024) if IS_FULL else (32, 64)
BLOCK_N = 128 if IS_FULL else 16
DATA = ("spread", "full", "cancelling", "lossy")


@triton.jit
def products_kernel(
    rows_ptr, codes_ptr, out_ptr, K,
    INNER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, INNER, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        a = tl.load(rows_ptr + rows[:, None] * INNER + columns[None, :])
        b = tl.load(codes_ptr + codes[None, :] * INNER + columns[:, None])
        scores = tl.dot(a, b, scores)
    tl.store(out_ptr + rows[:, None] * K + codes[None, :], scores)


def products(rows: Tensor, codes: Tensor, block_n: int = BLOCK_N) -> Tensor:
    """[N, I], [K, I] float16 -> [N, K] float32."""
    inner, block_k = rows.shape[1], 64 if IS_FULL else 32
    out = torch.empty(len(rows), len(codes), dtype=torch.float32, device=rows.device)
    grid = (len(rows) // block_n, len(codes) // block_k)
    block_d = min(64, inner & -inner)
    products_kernel[grid](rows, codes, out, len(codes), inner, block_n, block_k, block_d)
    return out


def spread(rows: int, inner: int) -> Tensor:
    """Of every magnitude: what is aligned to the largest loses its last bits."""
    return torch.randn(rows, inner) * 2.0 ** -torch.randint(0, 12, (rows, inner))


def full(rows: int, inner: int) -> Tensor:
    """Of one sign, with all bits of float16 in use, after one that is large."""
    x = 1 + torch.randint(1024, (rows, inner)) / 1024
    x[:, 0] *= 2.0 ** torch.randint(0, 6, (rows,))
    return x


def cancelling(rows: int, inner: int) -> Tensor:
    """Large ones that add up to zero in the end, so that the accumulator is large meanwhile."""
    x = spread(rows, inner)
    x[:, 0], x[:, -1] = 60.0, 60.0
    return x


def pair(name: str, inner: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(inner)
    if name == "lossy":
        row, code = tensor_cores.lossy(inner, UNIT, 1)
        rows, codes = row.repeat(ROWS, 1), code.repeat(CODES, 1)
        # all but the first, which is large, add to the sum or take from it
        codes[:, 1:] *= 1 - 2 * torch.randint(2, (CODES, 1))
        rows *= 2.0 ** torch.randint(4, (ROWS, 1))
        return rows, codes
    make = {"spread": spread, "full": full, "cancelling": cancelling}[name]
    rows, codes = make(ROWS, inner).half(), make(CODES, inner).half()
    if name == "cancelling":
        codes[:, -1] *= -1
    return rows, codes


def fraction(found: Tensor, rows: Tensor, codes: Tensor) -> float:
    """The largest error over what the bound allows. float64 sums products of float16 exactly."""
    rows, codes = rows.double(), codes.double()
    allowed = accumulation_bound(rows.shape[1], UNIT) * (rows.abs() @ codes.abs().T)
    return ((found.cpu().double() - rows @ codes.T).abs() / allowed).max().item()


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("inner", INNERS)
def test_accumulation_is_within_its_bound(inner: int, name: str) -> None:
    rows, codes = pair(name, inner)
    found = fraction(products(rows.to(DEVICE), codes.to(DEVICE)), rows, codes)
    note("accumulation", inner=inner, data=name, part_of_bound=found)
    assert found <= 1


@pytest.mark.kernel
@pytest.mark.gpu
@pytest.mark.skipif(UNIT not in TENSOR_CORES.values(), reason="needs a GPU with a published model")
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("inner", INNERS)
def test_sums_are_those_of_the_published_model(inner: int, name: str) -> None:
    """In tiles of 128 rows and of 16, for which Triton chooses different instructions."""
    rows, codes = (t[:256] for t in pair(name, inner))
    want = tensor_cores.dot(rows.to(DEVICE), codes.to(DEVICE), UNIT)
    for block_n in (128, 16):
        found = products(rows.to(DEVICE), codes.to(DEVICE), block_n)
        assert torch.equal(found, want)


@pytest.mark.parametrize("inner", [16, 64])
def test_units_that_keep_fewer_bits_are_found(inner: int) -> None:
    """Sums that are cut to 16 bits after each step."""
    rows, codes = pair("full", inner)
    total = torch.zeros(len(rows), len(codes))
    for column in range(inner):
        total += rows[:, column, None].float() * codes[None, :, column].float()
        total = (total.view(torch.int32) & ~0xFF).view(torch.float32)
    assert fraction(total, rows, codes) > 1
