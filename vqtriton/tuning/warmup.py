"""Compiles before the first step what a training run needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def warmup(
    module: nn.Module,
    *shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    has_mask: bool = False,
) -> None:
    """Takes a training step and an inference with a copy of a quantizer, on rows that are random.

    The first use of a kernel compiles it, for seconds. Inside a step that others wait for, such as
    the collectives of several ranks, that may look like a hang; so call this first. The module
    and torch's random numbers stay as they are, and no collective is entered. The batch size is
    not compiled for, but tables of tiles (docs/tuning.md) may give another size other kernels.

    Args:
        module: a `VectorQuantize`, on its device.
        shapes: of the x that it will get, a tuple each.
        dtype: of x.
        has_mask: it will get a mask as well.

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
    device = trial.codebook.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for shape in shapes:
            x = torch.randn(*shape, device=device).to(dtype).requires_grad_()
            with torch.no_grad():
                indices = trial.eval()(x).indices
            mask = torch.ones_like(indices, dtype=torch.bool) if has_mask else None
            out = trial.train()(x, mask)
            total = out.loss.sum() + out.quantized.float().sum()
            torch.autograd.grad(total, [x, *trial.parameters()], allow_unused=True)
            with torch.no_grad():
                trial.eval()(x, mask)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
