"""Compares a model's own search for tokens with that of vqtriton: tokens, time and memory.

encode_audio.py and tokenize_images.py share it. Only the quantizers are compared. Both get the same
latents, which the encoder has computed once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vqtriton

# bench is not installed
sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench.devices import Cpu, Cuda
from bench.measure import interleave

BATCH = 8
TURNS = 7
# float64 distances that are held at a time
BLOCK = 1 << 22

# quantizer, latents [B, ...] -> tokens [B, levels, ...]
Quantize = Callable[[Any, Tensor], Tensor]


class Kind(NamedTuple):
    """How a quantizer of another project searches."""

    # the method that searches; its only argument holds the vectors
    method: str
    codebook: Callable[[Any], Tensor]
    # the argument -> [N, D]
    rows: Callable[[Tensor], Tensor] = lambda x: x
    # the result -> indices
    indices: Callable[[Any], Tensor] = lambda result: result
    # whether vectors and codes are normalised before they are compared
    is_normalized: bool = False


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)


# by the name of the class
KINDS = {
    "EncodecEuclideanCodebook": Kind("quantize", lambda m: m.embed),
    "MimiEuclideanCodebook": Kind("quantize", lambda m: m.embed),
    "DacVectorQuantize": Kind(
        "decode_latents", lambda m: m.codebook.weight, _channels_last, lambda r: r[1], True
    ),
    "VectorQuantizer": Kind(
        "forward", lambda m: m.embedding.weight, _channels_last, lambda r: r[2][2]
    ),
}


class Search(NamedTuple):
    """What one level was given, and what it found."""

    rows: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    indices: Tensor  # [N]

    def is_wrong(self) -> Tensor:
        """Whether another code is nearer, bool [N], by float64 distances of the values as given."""
        codebook, size = self.codebook.double(), max(1, BLOCK // len(self.codebook))
        wrong = []
        for rows, chosen in zip(self.rows.split(size), self.indices.split(size), strict=True):
            distances = torch.cdist(
                rows.double(), codebook, compute_mode="donot_use_mm_for_euclid_dist"
            )
            wrong.append(distances.gather(1, chosen[:, None])[:, 0] > distances.amin(1))
        return torch.cat(wrong)


def watch(
    quantizer: nn.Module,
    step: Callable[[], object],
    before: Callable[[nn.Module, Tensor], None] = lambda module, rows: None,
) -> list[Search]:
    """The searches of the levels during a step, in their order.

    Args:
        before: is called before each search, with its module and the vectors that it is given.
    """
    found: list[Search] = []

    def watched(module: nn.Module, kind: Kind) -> Callable[[Tensor], Any]:
        method = getattr(module, kind.method)

        def search(x: Tensor) -> Any:
            rows = kind.rows(x)
            before(module, rows)
            result = method(x)
            codebook, indices = kind.codebook(module), kind.indices(result).flatten()
            if kind.is_normalized:
                rows, codebook = F.normalize(rows), F.normalize(codebook)
            found.append(Search(rows, codebook, indices))
            return result

        return search

    modules = [module for module in quantizer.modules() if type(module).__name__ in KINDS]
    try:
        for module in modules:
            kind = KINDS[type(module).__name__]
            module.__dict__[kind.method] = watched(module, kind)
        step()
    finally:
        for module in modules:
            module.__dict__.pop(KINDS[type(module).__name__].method, None)
    return found


def fill_codebooks(quantizer: nn.Module, quantize: Quantize, latents: Tensor) -> None:
    """Gives the codebooks of an untrained model values, level by level.

    Each code is a vector that the level is given, plus noise of half the deviation of these.
    """

    def fill(module: nn.Module, rows: Tensor) -> None:
        codebook = KINDS[type(module).__name__].codebook(module)
        rows = rows.float()
        chosen = rows[torch.randint(len(rows), (len(codebook),), device=rows.device)]
        codes = chosen + 0.5 * rows.std(0, correction=0) * torch.randn_like(chosen)
        if hasattr(module, "embed_sum"):
            # Mimi divides the sums of the vectors by their number, and keeps the quotient
            module.embed_sum.copy_(codes * module.cluster_usage[:, None])
            module._embed = None
        else:
            codebook.copy_(codes)

    watch(quantizer, lambda: quantize(quantizer, latents), fill)


class Side(NamedTuple):
    """What one of the two searches did. Tokens are int64 [B, levels, ...]."""

    tokens: Tensor
    searches: list[Search]
    # which tokens are not the nearest code, bool [levels, N]
    wrong: Tensor
    # tokens that are not the same in batches of 1 and of `BATCH`
    changed: int
    # of the median turn
    seconds: float
    # peak, above what was there before; None where it cannot be measured
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
    except (NotImplementedError, RuntimeError) as error:
        quantizers, own_error = quantizers[:1], f"{type(error).__name__}: {error}"

    def step(quantizer: nn.Module) -> Tensor:
        return quantize(quantizer, latents)

    # the first turns are not counted
    timed = [lambda q=q: device.time(lambda: step(q)) for q in quantizers]
    turns = [seconds[2:] for seconds in interleave(timed, TURNS + 2)]
    sides = []
    for quantizer, seconds in zip(quantizers, turns, strict=True):
        memory = device.peak_memory(lambda q=quantizer: step(q)) if device.can_weigh() else None
        alone, together = (
            torch.cat([quantize(quantizer, part) for part in latents.split(size)])
            for size in (1, BATCH)
        )
        changed = int((alone != together).sum())
        tokens: list[Tensor] = []
        searches = watch(quantizer, lambda q=quantizer, t=tokens: t.append(step(q)))
        wrong = torch.stack([search.is_wrong() for search in searches])
        sides.append(Side(tokens[0], searches, wrong, changed, median(seconds), memory))
    return Comparison(patched, sides[0], own_error or sides[1])
