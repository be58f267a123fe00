"""Float64 distances of listed pairs of a row and a code, and what the lists need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Groups whose codes are listed at a time: hard data can have all of them in doubt.
BLOCK_GROUPS = 1 << 14
# Rows with more candidates than this part of the groups are compared with all codes.
CROWDED = 8
# Elements of the vectors whose float64 distances are evaluated at a time.
BLOCK_PAIRS_ELEMENTS = 1 << 17


def parts(
    row: Tensor, column: Tensor, num_rows: int, block: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs in the order of their rows, ``block`` at a time; those of a row stay together."""
    if len(row) <= block:
        return [(row, column)]
    per_row = torch.bincount(row, minlength=num_rows)
    part_of_row = (per_row.cumsum(0) - per_row) // block
    sizes = torch.bincount(part_of_row[row]).tolist()
    return zip(row.split(sizes), column.split(sizes), strict=True)


def distances_of_pairs(
    x: Tensor,
    codebook: Tensor,
    row: Tensor,
    code: Tensor,
    metric: str,
    sums: Callable[[Tensor], Tensor],
) -> Tensor:
    """[P] float64 distances between x[row] and codebook[code]."""
    # made first: what is kept between blocks would cut up the memory of their tensors
    distances = torch.empty(len(row), dtype=torch.float64, device=x.device)
    block = max(256, BLOCK_PAIRS_ELEMENTS // x.shape[1])
    pairs = zip(distances.split(block), row.split(block), code.split(block), strict=True)
    for out, i, k in pairs:
        rows, codes = x[i].double(), codebook[k]
        terms = rows.mul_(codes) if metric == "dot" else rows.sub_(codes).square_()
        out.copy_(sums(terms))
    return distances.neg_() if metric == "dot" else distances


def sums_in_any_order(terms: Tensor) -> Tensor:
    return terms.sum(-1)


def sums_in_order(terms: Tensor) -> Tensor:
    """[..., D] -> [...], in the order of operations that `vqtriton.reference` lays down."""
    # a copy with the dimensions first, so that each step reads contiguous memory
    terms = terms.movedim(-1, 0).contiguous()
    sums = torch.zeros_like(terms[0])
    for term in terms:
        sums += term
    return sums


def distances_to_all(x: Tensor, columns: Tensor, metric: str) -> Tensor:
    """x [N, D], codes as ``columns`` [D, K] float64 -> [N, K] canonical distances.

    What is not finite is +inf. The caller sees to it that there are few.
    """
    # with the dimensions first, so that each step reads contiguous memory
    of_rows = x.T.double().contiguous()[:, :, None]
    distances = torch.zeros(len(x), columns.shape[1], dtype=torch.float64, device=x.device)
    term = torch.empty_like(distances)
    # in the order of operations that `vqtriton.reference` lays down
    for of_row, column in zip(of_rows, columns, strict=True):
        if metric == "dot":
            distances -= torch.mul(of_row, column, out=term)
        else:
            torch.sub(of_row, column, out=term)
            distances += term.mul_(term)
    return distances.nan_to_num_(torch.inf, posinf=torch.inf, neginf=torch.inf)


def equals_before(codebook: Tensor) -> Tensor:
    """[K] int64: how many codes with the same values have a lower index."""
    # halves fail under autocast to the other half (torch 2.13); widening changes no equality
    codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    _, kind, number = torch.unique(codebook, dim=0, return_inverse=True, return_counts=True)
    index = torch.arange(codebook.shape[0], dtype=torch.int64, device=codebook.device)
    order = kind.argsort(stable=True)
    start = number.cumsum(0) - number
    return torch.empty_like(index).index_put_((order,), index - start[kind[order]])
