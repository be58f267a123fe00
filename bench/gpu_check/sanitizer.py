"""compute-sanitizer over all kernels on small cases, where the program is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import vqtriton
from bench.check import nearest_codes
from bench.gpu_check.check import Check, Skipped
from bench.provenance import ROOT

# reads of memory that nobody wrote are what the tests' NaN-filled allocations are for
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 99
# rows held and streamed, planes split or not, strided or not
DIMS, DRY_DIMS = (8, 12, 64, 100, 512), (8,)


def run(check: Check) -> str:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    cases = [sys.executable, "-m", "bench.gpu_check.sanitizer", check.device.type]
    # once without it: what fails then is not the tool's to find, and everything is compiled
    done = subprocess.run(cases, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise ValueError(f"the cases fail by themselves: {done.stderr.strip()[-200:]}")
    if not Path(program).exists():
        raise Skipped("compute-sanitizer is not installed; its cases ran without it")
    if check.is_dry:
        raise Skipped("compute-sanitizer needs a GPU; its cases ran without it")
    clean = []
    for place, tool in enumerate(TOOLS):
        with check.step(tool):
            if run_tool(check, program, tool, cases, check.time_left() / (len(TOOLS) - place)):
                clean.append(tool)
    return f"clean: {', '.join(clean) or 'none'}"


def run_tool(check: Check, program: str, tool: str, cases: list[str], seconds: float) -> bool:
    status, printed = run_within(
        max(seconds, 1),
        [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *cases],
        # each tensor an allocation of its own, so that it is seen where one ends
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    print(f"--- {tool}\n{printed[-8000:]}", flush=True)
    if "Device not supported" in printed:
        raise Skipped("compute-sanitizer does not support this device")
    lines = [line for line in printed.splitlines() if "SUMMARY" in line]
    summary = lines[-1] if lines else "no summary"
    check.note(tool=tool, status=status, summary=summary)
    # without a summary it has looked at nothing
    is_clean = status == 0 and bool(lines)
    check.expect(is_clean, f"{tool}: exit status {status}, {summary}")
    return is_clean


def run_within(seconds: float, command: list[str], **env: str) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and what it printed until then."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            # what the tool has started ends with the part
            process.kill()
            process.wait()
        output.seek(0)
        return status, output.read()


def run_cases(device: str) -> None:
    """Every kernel, with rows in doubt, ragged tiles, masks, strides and several parts of codes."""
    for dim in DRY_DIMS if device == "cpu" else DIMS:
        torch.manual_seed(dim)
        codebook = torch.randn(300, dim, device=device)
        # ties, and rows that are certain
        x = torch.cat([codebook[:40] + codebook[1:41], torch.randn(37, dim, device=device)]) / 2
        x[3, 0] = torch.nan
        strided = torch.empty(dim, 77, device=device).copy_(x.T).T
        mask = torch.arange(77, device=device) % 5 > 0
        for rows in (x, strided, x.half()):
            indices = vqtriton.nearest_code(rows, codebook, backend="triton")
            if not torch.equal(indices, nearest_codes(rows, codebook)):
                raise ValueError(f"indices are wrong, D={dim}")
            leaves = rows.clone().requires_grad_(), codebook.clone().requires_grad_()
            out = vqtriton.vector_quantize(*leaves, mask=mask, backend="triton")
            torch.autograd.grad(out.loss + out.quantized.sum(), leaves)
            vqtriton.code_sums(rows, out.indices, 300, backend="triton")
        learns = vqtriton.VectorQuantize(dim, 300, threshold_ema_dead_code=0.5, backend="triton")
        learns.to(device)(x)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"cases on {device} are right")


if __name__ == "__main__":
    run_cases(sys.argv[1])
