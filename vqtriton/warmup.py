"""Compiles before the first step what a training run needs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def warmup(
    module: nn.Module,
    *shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    has_mask: bool = False,
) -> None:
    """Compiles every kernel that training and inference need, before the first step.

    It runs a training step and an inference with a copy of the quantizer on random rows. The first
    use of a kernel compiles it, which takes seconds. Inside a step that other ranks wait for, this
    may look like a hang, so call `warmup` first. The module and torch's random numbers stay as they
    are, and no collective is entered. The kernels serve every batch size, but with a table of tiles
    (docs/tuning.md) another batch size may use other kernels.

    Args:
        module: a `VectorQuantize`, `ResidualVectorQuantize` or `GroupedResidualVectorQuantize`, on
            the device where it will run.
        shapes: the shapes of ``x`` that it will get, a tuple each.
        dtype: the dtype of ``x``.
        has_mask: whether it will also get a mask.

    Raises:
        TypeError: ``module`` is not such a quantizer, or ``dtype`` is not a floating-point dtype.
        ValueError: no shape is given, one is not a shape, or one does not fit the module.

    Example:
        >>> vq = vqtriton.VectorQuantize(64, 512)
        >>> vqtriton.warmup(vq, (8, 49, 64), dtype=torch.bfloat16)
    """
    from vqtriton.quantizers import VectorQuantize
    from vqtriton.residual.grouped import GroupedResidualVectorQuantize
    from vqtriton.residual.quantizers import ResidualVectorQuantize

    residual = (ResidualVectorQuantize, GroupedResidualVectorQuantize)
    if not isinstance(module, (VectorQuantize, *residual)):
        raise TypeError(
            f"module is a {type(module).__name__}; it must be a VectorQuantize or a residual "
            "quantizer"
        )
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r:.80}; it must be a floating-point torch.dtype")
    if not shapes:
        raise ValueError("shapes is empty; give the shapes of x, a tuple each")
    for shape in shapes:
        if not (isinstance(shape, Sequence) and all(type(n) is int and n >= 0 for n in shape)):
            raise ValueError(f"shapes has {shape!r:.80}; it must be a tuple of ints, of an x")
    device = next(
        part for part in module.modules() if isinstance(part, VectorQuantize)
    ).codebook.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        warnings.catch_warnings(),
    ):
        # of a k-means start: the rows are random, and may be fewer than the codes
        warnings.filterwarnings("ignore", ".*codes are copies of others or unused")
        trial: Any = copy.deepcopy(module)
        for part in trial.modules():
            if isinstance(part, VectorQuantize):
                part.sync_codebook = False
            elif isinstance(part, ResidualVectorQuantize):
                # all levels
                part.quantize_dropout = False
        for shape in shapes:
            x = torch.randn(tuple(shape), dtype=torch.float32, device=device)
            x = x.to(dtype).requires_grad_()
            # forward itself: hooks of the module are not for this; training first, which may have
            # to start the codebook
            mask = None
            for _ in range(1 + has_mask):
                with torch.enable_grad():
                    quantized, _, loss = trial.train().forward(x, mask=mask)
                    leaves = [leaf for leaf in (x, *trial.parameters()) if leaf.requires_grad]
                    # contiguous, as those of a decoder: kernels are compiled for strides
                    upstream = [torch.ones_like(quantized), torch.ones_like(loss)]
                    torch.autograd.grad([quantized, loss], leaves, upstream, allow_unused=True)
                with torch.no_grad():
                    trial.eval().forward(x, mask=mask)
                shape_of_mask = trial._channels_last(x).shape[:-1]
                mask = torch.ones(shape_of_mask, dtype=torch.bool, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
