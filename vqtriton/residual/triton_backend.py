"""The ops of a chain by kernels: the levels are heads, where they have as many codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqtriton import triton_backend
from vqtriton.kernels.arguments import Pull
from vqtriton.kernels.code_sums import CodeSumsConfig, segment_sums
from vqtriton.kernels.residual_grad_x import residual_grad_x as residual_grad_x_kernel
from vqtriton.kernels.residual_quantize import GROUP, config_for
from vqtriton.kernels.residual_quantize import residual_quantize as residual_quantize_kernels
from vqtriton.kernels.screen_tiles import ACCUMULATOR_ORDER, architecture
from vqtriton.planes import CodePlanes, planes_of, prepare_planes_with_kernels, screen_bound
from vqtriton.residual import torch_backend
from vqtriton.screening import error_bound
from vqtriton.tensors import finite_rows


def residual_quantize(
    x: Tensor,
    codebooks: Sequence[Tensor],
    depths: Tensor | None,
    precision: str,
    prepared: Sequence[Tensor] = (),
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vqtriton.residual.torch_backend`; exact searches go through all levels in one launch."""
    if found is not None or len(x) == 0:
        return torch_backend.residual_quantize(x, codebooks, depths, precision, found=found)
    if precision == "exact":
        return _chain(x, codebooks, depths, prepared)
    return _level_by_level(x, codebooks, depths, precision)


def residual_prepare(codebooks: Sequence[Tensor]) -> list[Tensor]:
    """All codes, [Q, K, D], and their planes."""
    stacked = _in_one_tensor(codebooks).clone()
    return [stacked, *_planes(stacked).tensors]


def prepared_for(tensors: Sequence[Tensor], num_levels: int) -> Sequence[Tensor]:
    """See `vqtriton.residual.torch_backend`."""
    return [tensor[:num_levels] for tensor in tensors]


def _planes(stacked: Tensor, tensors: Sequence[Tensor] = ()) -> CodePlanes:
    """Of all levels, for the device that they are on."""
    lanes, vec = ACCUMULATOR_ORDER[architecture(stacked.device)]
    if tensors:
        return planes_of(tensors, stacked.shape[2], group=GROUP, lanes=lanes, vec=vec)
    return prepare_planes_with_kernels(stacked, group=GROUP, lanes=lanes, vec=vec)


def _chain(
    x: Tensor,
    codebooks: Sequence[Tensor],
    depths: Tensor | None,
    prepared: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    stacked, *tensors = prepared or [_in_one_tensor(codebooks)]
    planes = _planes(stacked, tensors)
    config = config_for(x, planes.codes.shape[2])
    bound = screen_bound(planes, config.chain.block_k, triton_backend.tensor_core(x.device))
    own_bound = error_bound(x.shape[1], torch.float32)
    return residual_quantize_kernels(
        x, stacked, planes, bound, own_bound, depths=depths, config=config
    )


def _in_one_tensor(codebooks: Sequence[Tensor]) -> Tensor:
    """[Q, K, D] float32; infinite where a level has fewer codes, as those are never chosen."""
    first, *others = codebooks
    size = max(codes.shape[0] for codes in codebooks)
    if all(codes.shape[0] == size for codes in codebooks):
        step, start = first.numel(), first.storage_offset()
        are_parts = (
            first.dtype == torch.float32
            and first.is_contiguous()
            and first._base is not None
            and all(
                codes._base is first._base
                and codes.stride() == first.stride()
                and codes.storage_offset() == start + level * step
                for level, codes in enumerate(others, 1)
            )
        )
        if are_parts:
            # as a step of all levels has them
            return first.as_strided((len(codebooks), *first.shape), (step, *first.stride()))
        return torch.stack([codes.float() for codes in codebooks])
    stacked = codebooks[0].new_full(
        (len(codebooks), size, codebooks[0].shape[1]), torch.inf, dtype=torch.float32
    )
    for level, codes in zip(stacked, codebooks, strict=True):
        level[: codes.shape[0]] = codes
    return stacked


def _level_by_level(
    x: Tensor,
    codebooks: Sequence[Tensor],
    depths: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One search a level."""
    residual = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    quantized = torch.zeros_like(residual)
    indices, errors = [], []
    for level, codebook in enumerate(codebooks):
        mask = None if depths is None else depths > level
        codes, error, chosen, _ = triton_backend.vector_quantize(
            residual, codebook, mask, 1.0, 0.0, "none", precision
        )
        residual = residual - codes
        quantized += codes
        indices.append(chosen)
        errors.append(error)
    chosen = torch.stack(indices, 1)
    # an infinite x gives NaN, as a NaN does
    is_wrong = ~finite_rows(x)[:, None] & (chosen >= 0)
    return quantized.to(x.dtype), chosen, torch.stack(errors, 1).masked_fill_(is_wrong, torch.nan)


def residual_sums(
    x: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    indices: Tensor,
    places: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `vqtriton.residual.torch_backend`."""
    stacked = _stacked(codes, sizes)
    if stacked is None or len(x) == 0:
        return torch_backend.residual_sums(x, codes, sizes, indices, places)
    rows = x.expand(len(sizes), *x.shape)
    sums, counts = segment_sums(rows, indices.T, sizes[0], config=CodeSumsConfig(), chain=stacked)
    samples = []
    if places:
        residuals = torch_backend.residuals(x, codes, sizes, indices)
        samples = [residual[rows] for residual, rows in zip(residuals, places, strict=True)]
    return sums.flatten(0, 1), counts.flatten(), samples


def residual_grad_x(
    grad_quantized: Tensor,
    pulls: Tensor,
    x: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    indices: Tensor,
) -> Tensor:
    """See `vqtriton.residual.torch_backend`."""
    stacked = _stacked(codes, sizes)
    if stacked is None:
        return torch_backend.residual_grad_x(grad_quantized, pulls, x, codes, sizes, indices)
    return residual_grad_x_kernel(grad_quantized, pulls, x, stacked, indices.contiguous())


def residual_grad_codes(
    pulls: Tensor, x: Tensor, codes: Tensor, sizes: Sequence[int], indices: Tensor
) -> Tensor:
    """See `vqtriton.residual.torch_backend`."""
    stacked = _stacked(codes, sizes)
    if stacked is None or len(x) == 0:
        return torch_backend.residual_grad_codes(pulls, x, codes, sizes, indices)
    rows = x.expand(len(sizes), *x.shape)
    pull = Pull(pulls.T, rows, stacked, indices.T, 1.0)
    sums, _ = segment_sums(
        rows, indices.T, sizes[0], config=CodeSumsConfig(), pull=pull, chain=stacked
    )
    return sums.flatten(0, 1)


def _stacked(codes: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """[Q, K, D]; None if the levels have other sizes."""
    if len(set(sizes)) > 1:
        return None
    return codes[: sum(sizes)].contiguous().view(len(sizes), sizes[0], codes.shape[1])
