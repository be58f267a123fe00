"""The search that a patched module calls."""

from __future__ import annotations

from torch import Tensor, nn

from vqtriton.functional import nearest_code

# where a patched module has its `Searches`
ATTRIBUTE = "_vqtriton"


class Searches:
    """How a patched module searches."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        # for vector-quantize-pytorch: whether the caller reads the scores as well
        self.needs_scores = True


def search(module: nn.Module, x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """Indices [N] of the codes [K, D] that are nearest to the rows of x [N, D]."""
    backend = module.__dict__[ATTRIBUTE].backend
    return nearest_code(x, codebook, metric=metric, backend=backend)
