"""Compiles what the other parts use, a process a share: one after the other it would take minutes.

Triton keeps what it has compiled on the disk. Each search is compared with the truth as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.check import nearest_codes
from bench.gpu_check.check import Check
from bench.gpu_check.exactness import DIMS, DTYPES
from bench.provenance import ROOT
from vqtriton import ops

# few rows and many codes: in parts, so that the kernel that merges them is compiled as well
NUM_ROWS, CODEBOOK_SIZE = 33, 600


def run(check: Check) -> str:
    pairs = [(dim, str(dtype).removeprefix("torch.")) for dim in DIMS for dtype in DTYPES]
    if check.is_dry:
        pairs = [(8, "float32"), (12, "float16")]
    workers = min(16, os.cpu_count() or 1, len(pairs))
    shares = [pairs[start::workers] for start in range(workers)]
    seconds = check.time_left()

    def work(share: list[tuple[int, str]]) -> str:
        command = [sys.executable, "-m", "bench.gpu_check.warm_up", check.device.type]
        done = subprocess.run(
            [*command, json.dumps(share)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        print(done.stdout, flush=True)
        return (done.stdout.strip().splitlines() or ["nothing"])[-1] if done.returncode else ""

    late = 0
    with ThreadPoolExecutor(workers) as pool:
        for share, future in [(share, pool.submit(work, share)) for share in shares]:
            with check.step(f"D and dtype {share}"):
                try:
                    error = future.result()
                except subprocess.TimeoutExpired:
                    # on few cores: the parts that need the rest compile it themselves
                    late += 1
                    continue
                check.expect(not error, f"D and dtype {share}: {error}")
    text = f"{len(pairs)} pairs of D and dtype in {workers} processes"
    return text + (f", {late} of which had not the time" if late else "")


def search_one(dim: int, dtype: torch.dtype, device: str) -> None:
    """
    Raises:
        ValueError: an index is wrong.
    """
    torch.manual_seed(dim)
    x, codebook = (torch.randn(n, dim).to(device, dtype) for n in (NUM_ROWS, CODEBOOK_SIZE))
    indices = ops.run_kernels(x, codebook, exact=True).indices[0]
    wrong = int((indices != nearest_codes(x, codebook)).sum())
    if wrong:
        raise ValueError(f"{wrong} of {NUM_ROWS} indices are wrong, D={dim}, {dtype}")


if __name__ == "__main__":
    for dim, name in json.loads(sys.argv[2]):
        search_one(dim, getattr(torch, name), sys.argv[1])
