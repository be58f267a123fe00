"""Compares a model's own search for tokens with that of vqtriton: tokens, time and memory.

Only the quantizers are compared. Both get the same latents, which the encoder has computed once.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from watch_searches import Quantize, Search, watch

import vqtriton

# bench is not installed
sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench.devices import Cpu, Cuda
from bench.measure import interleave

BATCH = 8
TURNS = 7


class Side(NamedTuple):
    """What one of the two searches did. Tokens are int64 [B, levels, ...]."""

    tokens: Tensor
    searches: list[Search]
    # which tokens are not the nearest code, bool [levels, N]
    wrong: Tensor
    # tokens that are not the same in batches of 1 and of `BATCH`
    changed: int
    # medians of `TURNS`
    seconds: float
    # the peak above what was there before, in bytes; None where it cannot be measured
    memory: int | None


class Comparison(NamedTuple):
    patched: vqtriton.Patched
    ours: Side
    # the model's own search; if it cannot run, why
    own: Side | str


def compare(model: nn.Module, name: str, quantize: Quantize, latents: Tensor) -> Comparison:
    """Measures the quantizer ``name`` of a model, and patches the model.

    Raises:
        ValueError: nothing in the model could be patched.
    """
    device = Cuda() if latents.is_cuda else Cpu()
    own, own_error = copy.deepcopy(model.get_submodule(name)), ""
    patched = vqtriton.patch(model)
    if not patched.modules:
        raise ValueError(f"no quantizer of the model is known: {patched}")
    quantizers = [model.get_submodule(name), own]
    try:
        # a search may lack a dtype only where it is given few vectors
        quantize(own, latents)
        quantize(own, latents[:1])
    except RuntimeError as error:
        quantizers, own_error = quantizers[:1], f"{type(error).__name__}: {error}"

    def step(quantizer: nn.Module) -> Tensor:
        return quantize(quantizer, latents)

    # the first turns are not counted
    timed = [lambda q=q: device.time(lambda: step(q)) for q in quantizers]
    turns = [seconds[2:] for seconds in interleave(timed, TURNS + 2)]
    sides = []
    for quantizer, seconds in zip(quantizers, turns, strict=True):
        weighings = TURNS if device.can_weigh() else 0
        peaks = [device.peak_memory(lambda q=quantizer: step(q)) for _ in range(weighings)]
        alone, together = (
            torch.cat([quantize(quantizer, part) for part in latents.split(size)])
            for size in (1, BATCH)
        )
        changed = int((alone != together).sum())
        tokens: list[Tensor] = []
        searches = watch(quantizer, lambda q=quantizer, t=tokens: t.append(step(q)))
        wrong = torch.stack([search.is_wrong() for search in searches])
        sides.append(
            Side(tokens[0], searches, wrong, changed, median(seconds), median(peaks or [None]))
        )
    return Comparison(patched, sides[0], own_error or sides[1])
