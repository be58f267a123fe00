"""The search that a patched module calls."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from vqtriton.functional import nearest_code

# where a patched module has its `Searches`, and where its class has the class that it replaced
ATTRIBUTE, ORIGINAL = "_vqtriton", "_vqtriton_original"


class Searches:
    """How a patched module searches."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        # for vector-quantize-pytorch: the threads whose call of the codebook reads no scores
        self.without_scores: dict[int, bool] = {}

    def __deepcopy__(self, memo: object) -> Searches:
        return Searches(self.backend)


def this_thread() -> int:
    # a compiler traces one call, and takes no question for a thread
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def search(module: nn.Module, x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """Indices [N] of the codes [K, D] that are nearest to the rows of x [N, D]."""
    backend = module.__dict__[ATTRIBUTE].backend
    return nearest_code(x, codebook, metric=metric, backend=backend)
