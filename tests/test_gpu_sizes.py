"""Batches of any size: one program for all of them, and more elements than an int32 can count."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from gpu_check import IS_FULL, KERNELS, note
from torch import Tensor

import vqtriton

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
checks = importlib.import_module("bench.check")

DIM, CODEBOOK_SIZE = 64, 100
# rows of x, of a slice that is looked at, and of a block
ROWS, SLICE = (((1 << 31) + (1 << 24)) // DIM, 1 << 16) if IS_FULL else (96, 20)
BLOCK = 1 << 22
# x twice, what is chosen for it, indices and what sorting them takes
NEEDED_BYTES = 24 << 30


# kernels that have two programs
TWO_WAYS = {"screen_codes_kernel", "rescue_rows_kernel", "chunk_sums_kernel"}
TWO_WAYS |= {"combine_chunks_kernel"}


@pytest.mark.kernel
@pytest.mark.once
def test_a_new_batch_size_compiles_nothing() -> None:
    pytest.importorskip("triton")
    # on a GPU they are launched; elsewhere, compiled for one
    command = [sys.executable, str(ROOT / "tests" / "count_programs.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        note("programs", **row)
        # few rows have tiles of their own, and so have those whose sort is torch's
        most = {name: 1 + (name in TWO_WAYS) for name in row["programs"]}
        assert all(row["programs"][name] <= most[name] for name in most), row
    assert {name for row in rows for name in row["programs"]} == KERNELS - {
        "atomic_sums_kernel",
        # with options that are not looked at there
        *("code_peaks_kernel", "draw_keys_kernel", "count_rows_kernel"),
        *("finish_parts_kernel", "reduce_losses_kernel", "normalize_rows_kernel"),
        *("rotate_grad_kernel", "residual_grad_x_kernel"),
        *("residual_quantize_kernel", "residual_level_kernel"),
    }


def make_rows() -> Tensor:
    """By blocks: torch's own draws are int32 here and there."""
    torch.manual_seed(0)
    x = torch.empty(ROWS, DIM, dtype=torch.float16, device=DEVICE)
    for block in x.split(BLOCK):
        block.copy_(torch.randn(block.shape, device=DEVICE if IS_FULL else "cpu"))
    return x


@pytest.mark.kernel
@pytest.mark.needs_kernels
# with "columns", element (n, d) is at d·N + n: the offsets of whole columns are large
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_more_elements_than_an_int32_counts(layout: str) -> None:
    if IS_FULL and torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free memory")
    x = make_rows()
    if layout == "columns":
        x = x.T.contiguous().T
    codebook = torch.randn(CODEBOOK_SIZE, DIM).to(DEVICE)
    # either side of the element 2³¹, where offsets of an int32 turn around
    edge = min((1 << 31) // DIM, ROWS // 2)
    quantized, indices, _ = vqtriton.vector_quantize(x, codebook, backend="triton")
    for start in (0, ROWS // 3, edge - SLICE // 2, ROWS - SLICE):
        part = x[start : start + SLICE].clone(memory_format=torch.contiguous_format)
        got = indices[start : start + SLICE]
        alone = vqtriton.nearest_code(part, codebook, backend="triton")
        assert bool((got == alone).all())
        assert bool((got == checks.nearest_codes(part, codebook)).all())
        assert bool((quantized[start : start + SLICE] == codebook[got].half()).all())
    del quantized

    sums, counts = vqtriton.code_sums(x, indices, CODEBOOK_SIZE, backend="triton")
    wanted = torch.zeros(CODEBOOK_SIZE, DIM, dtype=torch.float64, device=DEVICE)
    magnitude = torch.zeros_like(wanted)
    for block, of_block in zip(x.split(BLOCK), indices.split(BLOCK), strict=True):
        wanted.index_add_(0, of_block, block.double())
        magnitude.index_add_(0, of_block, block.double().abs())
    assert bool((counts == torch.bincount(indices, minlength=CODEBOOK_SIZE)).all())
    error = ((sums.double() - wanted).abs() / magnitude.clamp(min=1)).max().item()
    note("large", layout=layout, elements=x.numel(), code_sums_error=error)
    assert error <= 1.01 * 2.0**-24


@pytest.mark.once
@pytest.mark.parametrize(
    "change", [("screen_codes_kernel", 2), ("screen_codes_kernel", 0), ("another_kernel", 1)]
)
def test_a_program_too_many_or_too_few_is_found(monkeypatch, change: tuple[str, int]) -> None:
    programs = dict.fromkeys(KERNELS - {"atomic_sums_kernel"}, 1) | dict([change])
    programs = {name: count for name, count in programs.items() if count}
    printed = json.dumps({"step": "all", "dim": 12, "programs": programs})
    done = subprocess.CompletedProcess([], 0, printed, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(AssertionError):
        test_a_new_batch_size_compiles_nothing()


@pytest.mark.kernel
@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", ["vector_quantize", "code_sums"])
def test_a_row_that_an_int32_would_lose_is_found(monkeypatch, name: str) -> None:
    right = getattr(vqtriton, name)

    def wrong(x: Tensor, *args: object, **options: object) -> tuple:
        """The last row is taken for the first."""
        x = torch.cat([x[:-1], x[:1]])
        return right(x, *args, **options)

    monkeypatch.setattr(vqtriton, name, wrong)
    with pytest.raises(AssertionError):
        test_more_elements_than_an_int32_counts("rows")
