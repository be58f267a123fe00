"""The search that a patched module calls, and what it keeps between calls."""

from __future__ import annotations

from torch import Tensor, nn

from vqtriton.functional import nearest_code
from vqtriton.kept import KeptCodebook
from vqtriton.tensors import is_traced

# where a patched module has its `Searches`
ATTRIBUTE = "_vqtriton"
# With more rows than this, preparing the codes is a small part of a search.
FEW_ROWS = 1 << 10


class Searches:
    """What belongs to one patched module: options, and its codes as they were prepared."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        # by head
        self.kept: dict[int, KeptCodebook] = {}
        # for vector-quantize-pytorch: whether the caller reads the scores as well
        self.needs_scores = True

    def __deepcopy__(self, memo: object) -> Searches:
        # what can be made again is not copied
        return Searches(self.backend)


def search(
    module: nn.Module, x: Tensor, codebook: Tensor, *, metric: str = "l2", head: int = 0
) -> Tensor:
    """Indices [N] of the codes [K, D] that are nearest to the rows of x [N, D].

    In eval mode few rows find the codebook as an earlier call prepared it, if its values are still
    the same.
    """
    searches: Searches = module.__dict__[ATTRIBUTE]
    backend = searches.backend
    codebook = codebook.detach()
    if is_traced() or module.training or len(x) > FEW_ROWS:
        return nearest_code(x, codebook, backend=backend)
    kept = searches.kept.setdefault(head, KeptCodebook())
    return nearest_code(x, kept.of(codebook, backend=backend), backend=backend)
