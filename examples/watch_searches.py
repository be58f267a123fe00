"""The searches inside of a model: what each is given, what it finds, and whether that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
