"""Peak memory of the search on the CPU: ``python tests/peak_memory.py N K D CASE...``.

Prints, as JSON, the bytes that each case of `data.HARD` takes above its inputs, indices included,
whoever allocated them: VmHWM after the search minus VmRSS before it. Linux only. Needs a process of
its own, where nothing else is freed or reused.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import sys
from pathlib import Path

import data
import torch

from vqtriton import blocked


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_memory(case: str, n: int, k: int, d: int) -> int:
    torch.manual_seed(0)
    x, codebook = data.HARD[case](n, k, d)
    # hand back what is free, then forget the peak so far
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    indices = blocked.nearest_code(x, codebook, "exact")
    peak = resident("VmHWM") - before
    assert indices.shape == (n,)
    return peak


def main() -> None:
    n, k, d = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    # code, thread pools and the buffers of the BLAS are paid for once a process
    for make in data.HARD.values():
        blocked.nearest_code(*make(64, 32, d), "exact")
    square = torch.ones(1024, 1024)
    square @ square
    del square
    print(json.dumps({case: peak_memory(case, n, k, d) for case in sys.argv[4:]}))


if __name__ == "__main__":
    main()
