"""A training step, as `repeats`, `graphs` and `compiled` take it."""

from __future__ import annotations

import torch
from torch import Tensor

from vqtriton import VectorQuantize

UPDATES = ("ema", "gradient")
LEARNING_RATE = 0.1
Tensors = dict[str, Tensor]


class Training:
    """A quantizer, and steps of it: forward, gradients, what the codebook learns."""

    def __init__(self, update: str, dim: int, codebook_size: int, device: torch.device) -> None:
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
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
