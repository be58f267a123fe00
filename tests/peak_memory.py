"""Peak memory of a search on the CPU: ``.venv/bin/python tests/peak_memory.py k K D CASE=N...``.

Prints, as JSON, the bytes that each case of `data.HARD` takes above its inputs, indices included,
whoever allocated them: see `bench.devices`. Linux only. Needs a process of its own, where nothing
else is freed or reused.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import data
import torch

from vqtriton import torch_backend

# bench is not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
devices = importlib.import_module("bench.devices")


def search(x: torch.Tensor, codebook: torch.Tensor, number: int) -> None:
    if number == 1:
        torch_backend.nearest_code(x, codebook, "exact")
    else:
        torch_backend.nearest_codes(x, codebook, number, "l2", False)


def peak_memory(device: devices.Cpu, case: str, number: int, n: int, k: int, d: int) -> int:
    torch.manual_seed(0)
    x, codebook = data.HARD[case](n, k, d)
    return device.peak_memory(lambda: search(x, codebook, number))


def main() -> None:
    number, k, d = map(int, sys.argv[1:4])
    rows = {case: int(n) for case, n in (word.split("=") for word in sys.argv[4:])}
    torch.set_num_threads(1)
    # code, thread pools and the buffers of the BLAS are paid for once a process
    for make in data.HARD.values():
        search(*make(64, 32, d), number)
    square = torch.ones(1024, 1024)
    square @ square
    del square
    device = devices.Cpu()
    print(
        json.dumps({case: peak_memory(device, case, number, n, k, d) for case, n in rows.items()})
    )


if __name__ == "__main__":
    main()
