"""What the checks of a GPU share: `make gpu-check`, and tests/test_gpu_*.py.

With a GPU they are large. Without one they walk through tiny inputs in Triton's interpreter, so
that each of them is known to work before a GPU is at hand.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import data
import torch
from conftest import INTERPRETED
from torch import Tensor

from vqtriton import VectorQuantize

ROOT = Path(__file__).parents[1]
IS_FULL = torch.cuda.is_available() and not INTERPRETED
# where what was found goes, a line of JSON each
TABLE = "GPU_CHECK_TABLE"
# every kernel in the folder kernels/
KERNELS = {
    name
    for path in (ROOT / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
UPDATES = ("ema", "gradient")
LEARNING_RATE = 0.1
Tensors = dict[str, Tensor]


def note(part: str, **row: Any) -> None:
    """A line of the table, written at once: what is killed keeps what it found."""
    line = json.dumps({"part": part, **row})
    print(line, flush=True)
    if name := os.environ.get(TABLE):
        # a single write, since other processes append as well
        with Path(name).open("a") as file:
            file.write(line + "\n")


def hard_data(
    case: str, rows: int, codes: int, dim: int, device: torch.device | str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    if torch.device(device).type != "cuda":
        x, codebook = data.HARD[case](rows, codes, dim)
        return x.to(device), codebook.to(device)
    # made where it is searched: there may be many rows
    with torch.device(device):
        return data.HARD[case](rows, codes, dim)


class Training:
    """A quantizer, and steps of it: forward, gradients, what the codebook learns."""

    def __init__(self, update: str, dim: int, codebook_size: int, device: torch.device | str):
        torch.manual_seed(0)
        self.module = VectorQuantize(
            dim, codebook_size, codebook_update=update, backend="triton"
        ).to(device)
        with torch.no_grad():
            self.module.codebook.normal_()
        self._start = self.state()
        # what `torch.compile` replaces
        self.forward = self.module.__call__

    def step(self, x: Tensor, grad_quantized: Tensor) -> Tensors:
        leaf = x.detach().requires_grad_()
        quantized, indices, loss = self.forward(leaf)
        wanted = [leaf, *self.module.parameters()]
        grads = [grad_quantized, torch.ones_like(loss)]
        grad_x, *of_codebook = torch.autograd.grad([quantized, loss], wanted, grads)
        outputs = {"quantized": quantized, "indices": indices, "loss": loss, "grad_x": grad_x}
        for grad in of_codebook:
            with torch.no_grad():
                self.module.codebook.sub_(LEARNING_RATE * grad)
            outputs["grad_codebook"] = grad
        return {name: value.detach() for name, value in outputs.items()}

    def state(self) -> Tensors:
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def reset(self) -> None:
        self.set(self._start)

    def set(self, state: Tensors) -> None:
        """In place: a CUDA graph keeps the addresses."""
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                value.copy_(state[name])


def differing(first: Tensors, second: Tensors) -> list[str]:
    """Names of those that differ in a bit; a NaN equals itself."""
    if first.keys() != second.keys():
        return sorted(first.keys() ^ second.keys())
    return [name for name in first if not same_bits(first[name], second[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
