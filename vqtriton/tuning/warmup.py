"""Compiles before the first step what a training run needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def warmup(module: nn.Module, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """Takes a training step and an inference with a copy of a quantizer, on rows that are random.

    The first use of a kernel compiles it, for seconds. Inside a step that others wait for, such as
    the collectives of several ranks, that may look like a hang; so call this first. The module
    stays as it is, and no collective is entered. The batch size is not compiled for, but tables of
    tiles (docs/tuning.md) may give another size other kernels.

    Args:
        module: a `VectorQuantize`, on its device.
        shapes: of the x that it will get, a tuple each.
        dtype: of x.

    Raises:
        TypeError: ``module`` is no quantizer.
        ValueError: see `VectorQuantize.forward`; no shape is given.
    """
    from vqtriton.quantizers import VectorQuantize

    if not isinstance(module, VectorQuantize):
        raise TypeError(f"module is a {type(module).__name__}; it must be a VectorQuantize")
    if not shapes:
        raise ValueError("shapes is empty; give the shapes of x, a tuple each")
    trial = copy.deepcopy(module)
    trial.sync_codebook = False
    for shape in shapes:
        x = torch.randn(*shape, device=trial.codebook.device).to(dtype).requires_grad_()
        out = trial.train()(x)
        leaves = [x, *trial.parameters()]
        torch.autograd.grad(out.loss.sum() + out.quantized.float().sum(), leaves, allow_unused=True)
        with torch.no_grad():
            trial.eval()(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
