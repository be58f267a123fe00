"""More elements than an int32 can count, compared with slices of them that are taken apart."""

from __future__ import annotations

import torch
from torch import Tensor

import vqtriton
from bench.check import nearest_codes
from bench.gpu_check.check import Check, Skipped

DIM, CODEBOOK_SIZE = 64, 100
ELEMENTS, DRY_ELEMENTS = (1 << 31) + (1 << 24), 3 << 11
# rows of a slice, and of a block
SLICE, DRY_SLICE = 1 << 16, 20
BLOCK = 1 << 22
# x twice, what is chosen for it, indices and what sorting them takes
NEEDED_BYTES = 24 << 30


def run(check: Check) -> str:
    if check.device.type == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        raise Skipped(f"needs {NEEDED_BYTES >> 30} GiB of free memory")
    rows = (DRY_ELEMENTS if check.is_dry else ELEMENTS) // DIM
    with check.step("rows one after the other"):
        check_layout(check, make_rows(rows, check.device), "rows one after the other")
    # element (n, d) at d·N + n, so that the stride of a column is what is large
    with check.step("columns one after the other"):
        columns = make_rows(rows, check.device).T.contiguous().T
        check_layout(check, columns, "columns one after the other")
    return f"{rows} × {DIM} in float16, in two layouts"


def make_rows(rows: int, device: torch.device) -> Tensor:
    """By blocks: torch's own draws are int32 here and there."""
    torch.manual_seed(0)
    x = torch.empty(rows, DIM, dtype=torch.float16, device=device)
    for block in x.split(BLOCK):
        block.copy_(torch.randn(block.shape, device=device))
    return x


def check_layout(check: Check, x: Tensor, layout: str) -> None:
    rows = x.shape[0]
    codebook = torch.randn(CODEBOOK_SIZE, DIM, device=check.device)
    size = DRY_SLICE if check.is_dry else SLICE
    # either side of the element 2³¹, where offsets of an int32 turn around
    edge = min((1 << 31) // DIM, rows // 2)
    starts = (0, rows // 3, edge - size // 2, rows - size)

    quantized, indices, _ = vqtriton.vector_quantize(x, codebook, backend="triton")
    for start in starts:
        part = x[start : start + size].clone(memory_format=torch.contiguous_format)
        got = indices[start : start + size]
        alone = vqtriton.nearest_code(part, codebook, backend="triton")
        check.expect(torch.equal(got, alone), f"{layout}: rows from {start} differ when alone")
        right = torch.equal(got, nearest_codes(part, codebook))
        check.expect(right, f"{layout}: rows from {start} are not the nearest codes")
        codes = codebook[got].half()
        same = torch.equal(quantized[start : start + size], codes)
        check.expect(same, f"{layout}: codes of the rows from {start} are others")
    del quantized

    sums, counts = vqtriton.code_sums(x, indices, CODEBOOK_SIZE, backend="triton")
    wanted = torch.zeros(CODEBOOK_SIZE, DIM, dtype=torch.float64, device=check.device)
    magnitude = torch.zeros_like(wanted)
    for block, of_block in zip(x.split(BLOCK), indices.split(BLOCK), strict=True):
        wanted.index_add_(0, of_block, block.double())
        magnitude.index_add_(0, of_block, block.double().abs())
    same = torch.equal(counts, torch.bincount(indices, minlength=CODEBOOK_SIZE))
    check.expect(same, f"{layout}: code_sums counts wrongly")
    error = ((sums.double() - wanted).abs() / magnitude.clamp(min=1)).max().item()
    check.expect(error <= 1.01 * 2.0**-24, f"{layout}: code_sums is {error:.1e} off beside float64")
    check.note(layout=layout, elements=x.numel(), starts=starts, code_sums_error=error)
