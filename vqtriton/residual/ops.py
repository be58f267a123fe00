"""The operators of a chain of codebooks, beside those of `vqtriton.ops`.

The Q codebooks are a list of [K, D], whose K may differ, or one tensor [ΣK, D] and the K of each
level. An index is -1 where a row has no code at a level: at level q of a row whose depth is q or
less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vqtriton import dispatch
from vqtriton.ops import prepare_codebook_fake, register
from vqtriton.tensors import screen_dtype

SCHEMAS = (
    "residual_quantize(Tensor x, Tensor[] codebooks, Tensor? depths, str precision, "
    "Tensor[] prepared, Tensor? found, str backend) -> (Tensor, Tensor, Tensor)",
    "residual_prepare(Tensor[] codebooks, str backend) -> Tensor[]",
    "residual_sums(Tensor x, Tensor codes, int[] sizes, Tensor indices, Tensor[] places, "
    "str backend) -> (Tensor, Tensor, Tensor[])",
    "residual_grad_x(Tensor grad_quantized, Tensor pulls, Tensor x, Tensor codes, int[] sizes, "
    "Tensor indices, str backend) -> Tensor",
    "residual_grad_codes(Tensor pulls, Tensor x, Tensor codes, int[] sizes, Tensor indices, "
    "str backend) -> Tensor",
)


def module_for(backend: str, device: torch.device) -> ModuleType:
    """The functions of the ops, by one of the backends."""
    if dispatch.resolve_backend(backend, device) == "torch":
        from vqtriton.residual import torch_backend

        return torch_backend
    from vqtriton.residual import triton_backend

    return triton_backend


def _residual_quantize_fake(
    x: Tensor, codebooks: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    levels = x.shape[0], len(codebooks)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(levels, dtype=torch.int64),
        x.new_empty(levels, dtype=screen_dtype(x, codebooks[0])),
    )


def _residual_prepare_fake(codebooks: Sequence[Tensor], backend: str) -> list[Tensor]:
    if dispatch.resolve_backend(backend, codebooks[0].device) == "torch":
        made = [prepare_codebook_fake(codes, "l2", "torch") for codes in codebooks]
        return [tensor for tensors in made for tensor in tensors]
    size = max(codes.shape[0] for codes in codebooks)
    stacked = codebooks[0].new_empty(len(codebooks), size, codebooks[0].shape[1]).float()
    first, *_ = made = [prepare_codebook_fake(codes, "l2", backend) for codes in stacked]
    return [stacked, *(first[i].expand(len(made), *first[i].shape[1:]).clone() for i in range(5))]


def _residual_sums_fake(
    x: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    indices: Tensor,
    places: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype, size = screen_dtype(x, codes), sum(sizes)
    sums = codes.new_empty(size, codes.shape[1], dtype=dtype)
    samples = [x.new_empty(rows.shape[0], x.shape[1], dtype=dtype) for rows in places]
    return sums, codes.new_empty(size, dtype=torch.int64), samples


def _residual_grad_x_fake(grad_quantized: Tensor, pulls: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _residual_grad_codes_fake(
    pulls: Tensor, x: Tensor, codes: Tensor, sizes: Sequence[int], *_: Any
) -> Tensor:
    return x.new_empty(sum(sizes), x.shape[1], dtype=pulls.dtype)


FAKES: tuple[Callable[..., Any], ...] = (
    _residual_quantize_fake,
    _residual_prepare_fake,
    _residual_sums_fake,
    _residual_grad_x_fake,
    _residual_grad_codes_fake,
)
for _schema, _fake in zip(SCHEMAS, FAKES, strict=True):
    register(_schema, _fake, module_for)

residual_quantize = torch.ops.vqtriton.residual_quantize.default
residual_prepare = torch.ops.vqtriton.residual_prepare.default
residual_sums = torch.ops.vqtriton.residual_sums.default
residual_grad_x = torch.ops.vqtriton.residual_grad_x.default
residual_grad_codes = torch.ops.vqtriton.residual_grad_codes.default
