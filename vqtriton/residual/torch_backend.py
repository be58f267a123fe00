"""The ops of a chain in plain torch: level by level, with one residual [N, D] that moves along.

Residuals are float32 (float64 if x or a codebook is). Nothing of size N·Q·D is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vqtriton.tensors import finite_rows, gather, parts_of, screen_dtype
from vqtriton.torch_backend import code_sums, nearest_code, prepare_codebook

# tensors of a codebook that was prepared
PARTS = 4


def residual_quantize(
    x: Tensor,
    codebooks: Sequence[Tensor],
    depths: Tensor | None,
    precision: str,
    prepared: Sequence[Tensor] = (),
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the chosen codes [N, D]; indices [N, Q]; squared errors after each level [N, Q].

    ``depths`` [N] is how many levels a row has. ``prepared`` has what the backend made of each
    codebook, one after the other. ``found`` [N, Q] are indices from elsewhere, -1 where a row has
    no level: then nothing is searched.
    """
    dtype = screen_dtype(x, codebooks[0])
    residual = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    quantized = torch.zeros_like(residual)
    has_gaps = depths is not None or found is not None
    # the levels first, so that each is written in one piece
    indices = torch.empty(len(codebooks), len(x), dtype=torch.int64, device=x.device)
    errors = torch.empty(len(codebooks), len(x), dtype=dtype, device=x.device)
    for level, codebook in enumerate(codebooks):
        if found is None:
            tensors = prepared[level * PARTS : (level + 1) * PARTS]
            chosen = nearest_code(residual, codebook, precision, "l2", tensors)
        else:
            chosen = found[:, level].clone()
        if depths is not None:
            chosen.masked_fill_(depths <= level, -1)
        codes = _codes(codebook, chosen, dtype, has_gaps)
        residual.sub_(codes)
        quantized.add_(codes)
        torch.sum(torch.square(residual, out=codes), 1, out=errors[level])
        if has_gaps:
            errors[level].masked_fill_(chosen < 0, 0)
        indices[level] = chosen
    if has_gaps or not bool(errors[-1:].sum(dtype=torch.float64).isfinite()):
        # an infinite x gives NaN, as a NaN does
        is_wrong = ~finite_rows(x)
        errors.masked_fill_(is_wrong & (indices >= 0), torch.nan)
    return quantized.to(x.dtype), indices.T.contiguous(), errors.T.contiguous()


def residual_prepare(codebooks: Sequence[Tensor]) -> list[Tensor]:
    """What a search makes of each codebook, one after the other."""
    return [tensor for codes in codebooks for tensor in prepare_codebook(codes)]


def prepared_for(tensors: Sequence[Tensor], num_levels: int) -> Sequence[Tensor]:
    """What `residual_prepare` made of the first levels."""
    return tensors[: num_levels * PARTS]


def residual_sums(
    x: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    indices: Tensor,
    places: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sums [ΣK, D] and counts [ΣK] of the residuals that chose each code.

    And the residuals of some rows, whose numbers are the ``places`` of each level.
    """
    sums, counts, samples = [], [], []
    for level, residual in enumerate(residuals(x, codes, sizes, indices)):
        chosen = indices[:, level].contiguous()
        total, count = code_sums(residual, chosen, sizes[level])
        sums.append(total)
        counts.append(count)
        if places:
            samples.append(residual[places[level]])
    return torch.cat(sums), torch.cat(counts), samples


def residual_grad_x(
    grad_quantized: Tensor,
    pulls: Tensor,
    x: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    indices: Tensor,
) -> Tensor:
    """grad_quantized + Σ_q pulls[:, q]·(residual after level q), zero for rows without a level."""
    residual = _residual_of(x, codes, pulls.dtype)
    grad = torch.zeros_like(residual)
    is_masked = indices < 0
    # a GPU is not waited for
    has_gaps = x.device.type != "cpu" or bool(is_masked.any())
    for level, codebook in enumerate(parts_of(codes, sizes)):
        residual.sub_(_codes(codebook, indices[:, level], residual.dtype, has_gaps))
        pull = pulls[:, level, None]
        if has_gaps:
            pull = pull.masked_fill(is_masked[:, level, None], 0)
        grad.addcmul_(residual, pull)
    grad.add_(grad_quantized)
    if has_gaps:
        grad.masked_fill_(is_masked[:, :1], 0)
    return grad.to(x.dtype)


def residual_grad_codes(
    pulls: Tensor, x: Tensor, codes: Tensor, sizes: Sequence[int], indices: Tensor
) -> Tensor:
    """-Σ pulls[:, q]·(residual after level q) over the finite rows of each code, [ΣK, D]."""
    residual = _residual_of(x, codes, pulls.dtype)
    grads = []
    for level, codebook in enumerate(parts_of(codes, sizes)):
        chosen = indices[:, level]
        residual.sub_(_codes(codebook, chosen, residual.dtype, True))
        # what is not finite stays so, and is left out of the sums
        pulled = residual * -pulls[:, level, None]
        total, _ = code_sums(pulled, chosen, len(codebook))
        grads.append(total)
    return torch.cat(grads).to(pulls.dtype)


def residuals(x: Tensor, codes: Tensor, sizes: Sequence[int], indices: Tensor) -> Iterator[Tensor]:
    """What each level quantizes, in one tensor that changes."""
    residual = _residual_of(x, codes, torch.float32)
    for level, codebook in enumerate(parts_of(codes, sizes)):
        yield residual
        residual.sub_(_codes(codebook, indices[:, level], residual.dtype, True))


def _residual_of(x: Tensor, codes: Tensor, least: torch.dtype) -> Tensor:
    dtype = torch.promote_types(screen_dtype(x, codes), least)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _codes(codebook: Tensor, indices: Tensor, dtype: torch.dtype, has_gaps: bool) -> Tensor:
    """[N, D], zeros where the index is -1."""
    codes = gather(codebook, indices) if has_gaps else codebook.index_select(0, indices)
    return codes.to(dtype)
