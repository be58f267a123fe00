"""The ops by kernels: the functions of `vqtriton.torch_backend`, with tiles and launches.

Tensors are on one GPU (or anywhere in Triton's interpreter), and none is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from vqtriton import dispatch, torch_backend
from vqtriton.kernels import atomic_sums, ema_update, vector_quantize_grad
from vqtriton.kernels import code_sums as sums_kernels
from vqtriton.kernels.arguments import Pull, Update
from vqtriton.kernels.draw_rows import MOST_COMPARED, draw_rows
from vqtriton.kernels.nearest_code import (
    NearestCode,
    NearestCodeConfig,
    config_for,
)
from vqtriton.kernels.nearest_code import (
    nearest_code as nearest_code_kernels,
)
from vqtriton.kernels.normalize_rows import normalize_rows as normalize_rows_kernel
from vqtriton.kernels.replay import replayed
from vqtriton.kernels.rotate_grad import rotate_grad as rotate_grad_kernel
from vqtriton.kernels.screen_tiles import ACCUMULATOR_ORDER, architecture, row_unit, unit_of
from vqtriton.planes import (
    TENSOR_CORES,
    WORST_TENSOR_CORE,
    CodePlanes,
    TensorCore,
    planes_of,
    prepare_planes_with_kernels,
    screen_bound,
)
from vqtriton.screening import error_bound
from vqtriton.tiles import tables

# codes, loss, indices, what the sum of the losses was multiplied by
Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


@replayed
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    precision: str,
    metric: str = "l2",
    prepared: Sequence[Tensor] = (),
) -> Tensor:
    if x.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    exact, is_dot = precision == "exact", metric == "dot"
    return run_kernels(x, codebook, prepared, exact=exact, is_dot=is_dot).indices[0]


def nearest_codes(
    x: Tensor, codebook: Tensor, k: int, metric: str, return_distances: bool
) -> tuple[Tensor, Tensor]:
    """Only k = 1 has kernels: for more codes this is torch code on the tensors' device.

    It is right on any GPU, but slow, and it waits for the device: no CUDA graph can hold it. The
    distances are computed by torch code in any case.
    """
    if k > 1:
        return torch_backend.nearest_codes(x, codebook, k, metric, return_distances)
    indices = nearest_code(x, codebook, "exact", metric)[:, None]
    listed = indices if return_distances else indices[:0]
    return indices, torch_backend.distances_of(x, codebook, listed, metric)


def prepare_codebook(codebook: Tensor, metric: str = "l2") -> list[Tensor]:
    return list(_prepare_planes(codebook, is_dot=metric == "dot").tensors)


@replayed
def normalize_rows(x: Tensor) -> Tensor:
    return normalize_rows_kernel(x)


@replayed
def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    precision: str,
    prepared: Sequence[Tensor] = (),
) -> Quantized:
    if x.shape[0] == 0:
        return torch_backend.vector_quantize(
            x, codebook, mask, commitment_weight, codebook_weight, reduction, precision
        )
    out = run_kernels(
        x,
        codebook,
        prepared,
        exact=precision == "exact",
        mask=mask,
        gather=True,
        reduction=reduction,
        weight=commitment_weight + codebook_weight,
    )
    assert out.quantized is not None
    assert out.losses is not None
    if out.loss is None or out.share is None:
        # nothing was multiplied
        return out.quantized[0], out.losses[0], out.indices[0], out.losses.new_empty(0)
    return out.quantized[0], out.loss[0], out.indices[0], out.share[0]


def vector_quantize_update_(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cluster_size: Tensor,
    rates: Tensor,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    averages: bool,
    revives: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = commitment_weight, codebook_weight
    state = codebook, mask, cluster_size, rates, *weights, reduction, averages
    if x.shape[0] == 0:
        return torch_backend.vector_quantize_update_(x, *state, revives, precision)
    # on the device: a replayed graph draws anew
    seed = torch.empty(1, dtype=torch.int64, device=x.device).random_(1 << 62) if revives else None
    return _learn(x, *state, seed, precision)


@replayed
def _learn(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cluster_size: Tensor,
    rates: Tensor,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    averages: bool,
    seed: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize_update_`; rows are drawn for dead codes where there is a seed."""
    weights = commitment_weight, codebook_weight
    found = vector_quantize(x, codebook, mask, *weights, reduction, precision)
    indices = found[2]
    sums = counts = drawn = None
    if averages or len(x) * len(codebook) > MOST_COMPARED:
        sums, counts = _code_sums(x, indices, len(codebook), False)
    if seed is not None:
        drawn = draw_rows(x, indices, cluster_size, seed, counts)
        counts = drawn.counts
    before = torch.empty(codebook.shape, dtype=codebook.dtype, device=codebook.device)
    sums = sums if averages else None
    ema_update.ema_update_(
        Update(cluster_size, codebook, counts, sums, None, None, rates),
        before=before,
        drawn=drawn,
        config=_tiles("ema_update", codebook, len(codebook)),
    )
    return *found, before


def run_kernels(
    x: Tensor,
    codebook: Tensor,
    prepared: Sequence[Tensor] = (),
    *,
    exact: bool,
    is_dot: bool = False,
    mask: Tensor | None = None,
    gather: bool = False,
    reduction: str = "none",
    weight: float = 1.0,
) -> NearestCode:
    """`vqtriton.kernels.nearest_code` for one head; N >= 1."""
    planes = _prepare_planes(codebook, prepared, is_dot=is_dot)
    unit = tensor_core(x.device)
    config = config_for(x[None], planes.codes.shape[2])
    # tables are of contiguous rows, whose addresses are as well aligned as D allows
    is_as_tuned = row_unit(x[None]) == unit_of(x.shape[1])
    screen = _tiles("nearest_code", x, codebook.shape[0]) if is_as_tuned else None

    def search(config: NearestCodeConfig) -> NearestCode:
        return nearest_code_kernels(
            x[None],
            codebook[None],
            planes,
            screen_bound(planes, config.screen.block_k, unit),
            error_bound(x.shape[1], torch.float32),
            exact=exact,
            mask=None if mask is None else mask[None],
            gather=gather,
            reduction=reduction,
            weight=weight,
            config=config,
        )

    if screen is not None:
        try:
            return search(replace(config, screen=screen))
        except OutOfResources:
            tables.reject(screen)
    return search(config)


def tensor_core(device: torch.device) -> TensorCore:
    """What multiplies for kernels on ``device``, or the worst there is if that is not known."""
    # AMD's GPUs have capabilities as well, gfx90a that of Hopper
    if device.type != "cuda" or torch.version.hip or dispatch.interpreter_is_on():
        return WORST_TENSOR_CORE
    return TENSOR_CORES.get(torch.cuda.get_device_capability(device), WORST_TENSOR_CORE)


def _tiles(op: str, x: Tensor, codebook_size: int) -> Any:
    """Tiles for an op on x [N, D] from the tables; None: the default."""
    return tables.choose(op, x.dtype, x.shape[1], codebook_size, x.shape[0], x.device)


def _prepare_planes(
    codebook: Tensor, prepared: Sequence[Tensor] = (), *, is_dot: bool = False
) -> CodePlanes:
    """Of one head, for the device that the codebook is on."""
    lanes, vec = ACCUMULATOR_ORDER[architecture(codebook.device)]
    kind: dict[str, Any] = {"lanes": lanes, "vec": vec, "is_dot": is_dot}
    if prepared:
        return planes_of(prepared, codebook.shape[1], **kind)
    return prepare_planes_with_kernels(codebook[None], **kind)


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    deterministic: bool = True,
    double: bool = False,
) -> tuple[Tensor, Tensor]:
    if not (deterministic or torch.are_deterministic_algorithms_enabled()):
        sums, counts = atomic_sums.atomic_sums(x[None], indices[None], codebook_size, double=double)
        return sums[0], counts[0]
    return _code_sums(x, indices, codebook_size, double)


@replayed
def _code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, double: bool
) -> tuple[Tensor, Tensor]:
    tiles = _tiles("code_sums", x, codebook_size)
    sums, counts = sums_kernels.code_sums(
        x[None], indices[None], codebook_size, double=double, config=tiles
    )
    return sums[0], counts[0]


@replayed
def grad_x(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    weight: float,
) -> Tensor:
    pull = Pull(grad_loss[None], x[None], codebook[None], indices[None], weight)
    tiles = _tiles("grad_x", x, codebook.shape[0])
    return vector_quantize_grad.grad_x(grad_quantized[None], pull, config=tiles)[0]


@replayed
def rotate_grad(grad: Tensor, x: Tensor, quantized: Tensor, is_forward: bool) -> Tensor:
    return rotate_grad_kernel(grad, x, quantized, is_forward)


@replayed
def grad_codebook(
    grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> Tensor:
    pull = Pull(grad_loss[None], x[None], codebook[None], indices[None], weight)
    tiles = _tiles("code_sums", x, codebook.shape[0])
    return vector_quantize_grad.grad_codebook(pull, config=tiles)[0]


def ema_update_(
    cluster_size: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor | None,
    samples: Tensor | None,
    is_filled: Tensor | None,
    rates: Tensor,
) -> None:
    tiles = _tiles(
        "ema_update", codebook if codebook.ndim == 2 else codebook[0], codebook.shape[-2]
    )
    update = Update(cluster_size, codebook, counts, sums, samples, is_filled, rates)
    ema_update.ema_update_(update, config=tiles)
