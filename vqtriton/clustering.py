"""k-means on the two ops of vector quantization: `nearest_code` and `code_sums`."""

from __future__ import annotations

import torch
from torch import Tensor

from vqtriton import distributed
from vqtriton.functional import check_x, code_sums, nearest_code
from vqtriton.screening import finite_rows


def kmeans(
    x: Tensor,
    codebook_size: int,
    iters: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lloyd's k-means from randomly drawn rows.

    Deterministic for a seed. A code that no row chose stays where it is. With fewer rows than
    codes, rows are drawn more than once.

    Args:
        x: vectors, [..., D]. Rows that are not finite are left out.
        codebook_size: K >= 1.
        iters: Lloyd iterations, >= 0.
        generator: source of the draw, on ``x``'s device; torch's own by default.

    Returns:
        codebook, [K, D] float32.

    Raises:
        ValueError: no finite row, or a number out of range.
        TypeError: ``x`` is not a float tensor, or a number is not an int.
    """
    check_x(x)
    for name, number in (("codebook_size", codebook_size), ("iters", iters)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is {number!r:.80}; it must be an int")
    if codebook_size < 1:
        raise ValueError(f"codebook_size is {codebook_size}; it must be at least 1")
    if iters < 0:
        raise ValueError(f"iters is {iters}; it must be at least 0")
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[finite_rows(rows)]
    if rows.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} and no finite row to start from")
    codebook, _, _ = lloyd(rows, codebook_size, iters, generator, sync=False)
    return codebook


@torch.no_grad()
def lloyd(
    rows: Tensor,
    codebook_size: int,
    iters: int,
    generator: torch.Generator | None = None,
    *,
    sync: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """k-means over the finite rows [N, D] of this rank, or of all ranks.

    Returns:
        codebook, [K, D] float32, the same bits on every rank; counts, [K] float32, of the last
        assignment; whether there was any row, [] bool. Without one, zeros.
    """
    everywhere = torch.ones(codebook_size, dtype=torch.bool, device=rows.device)
    keep = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    drawn = distributed.sample_rows(rows, codebook_size, keep=keep, generator=generator, sync=sync)
    samples, is_filled = distributed.all_reduce(drawn, sync=sync)
    codebook, _ = distributed.take_filled(samples, is_filled, everywhere)
    counts = torch.zeros(codebook_size, device=rows.device)
    for _ in range(iters):
        indices = nearest_code(rows, codebook, backend=backend)
        local = code_sums(rows, indices, codebook_size, backend=backend)
        sums, counts = distributed.all_reduce(local, sync=sync)
        codebook = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), codebook)
    return codebook, counts, is_filled.any()
