"""Beam search over the levels of a chain: tokens whose codes together come nearer to x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqtriton import ops
from vqtriton.tensors import gather, screen_dtype


@torch.no_grad()
def search_beams(
    x: Tensor, codebooks: Sequence[Tensor], depths: Tensor | None, beam_size: int, backend: str
) -> Tensor:
    """The tokens of each row whose last residual is the shortest of those that were followed.

    At each level every beam goes on with its nearest codes, and those that leave the shortest
    residuals are kept: by float64 distances rounded to float32, and by the order in which they were
    found where these are equal. With one beam this is `vqtriton.residual_quantize`.

    Args:
        x: [N, D].
        codebooks: Q of [K, D].
        depths: [N] int64, how many levels each row has; None: all.
        beam_size: B, the number of beams.

    Returns:
        [N, Q] int64, -1 where a row has no level. The memory is O(N·B·(B + D + Q)).
    """
    dtype = screen_dtype(x, codebooks[0])
    num_rows, dim = x.shape
    residuals = x.to(dtype)[:, None]  # [N, B, D], one beam at first
    paths = torch.empty(num_rows, 1, 0, dtype=torch.int64, device=x.device)
    for level, codebook in enumerate(codebooks):
        beams, k = residuals.shape[1], min(beam_size, codebook.shape[0])
        rows = residuals.reshape(-1, dim)
        found, distances = ops.nearest_codes(rows, codebook, k, "l2", True, backend)
        # stable, so that the order is the same wherever it is done
        ranked = distances.reshape(num_rows, beams * k).sort(dim=1, stable=True).indices
        ranked = ranked[:, :beam_size]
        beam = ranked // k
        chosen = found.reshape(num_rows, beams * k).gather(1, ranked)
        if depths is not None:
            # a row that has no more levels keeps its beams as they are, the best one first
            is_done = (depths <= level)[:, None]
            place = torch.arange(ranked.shape[1], dtype=torch.int64, device=x.device)
            beam = beam.where(~is_done, place.clamp(max=beams - 1))
            chosen = chosen.masked_fill(is_done, -1)
        at = beam[..., None]
        residuals = residuals.gather(1, at.expand(-1, -1, dim)) - gather(codebook, chosen).to(dtype)
        paths = paths.gather(1, at.expand(-1, -1, level))
        paths = torch.cat([paths, chosen[..., None]], 2)
    return paths[:, 0].contiguous()
