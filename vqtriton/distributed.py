"""What the ranks of a process group share. With no process group these are all local.

Asked at call time: a module may be built before `torch.distributed.init_process_group`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(tensors: Sequence[Tensor], *, sync: bool = True) -> list[Tensor]:
    """Sums over the ranks, float32, in a single collective. Every rank gets the same bits."""
    tensors = [t.float() for t in tensors]
    if not sync or world_size() == 1:
        return tensors
    packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(packed)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Overwrites the tensors with those of rank 0, in a single collective."""
    packed = torch.cat([t.detach().float().reshape(-1) for t in tensors])
    dist.broadcast(packed, src=0)
    for tensor, part in zip(tensors, packed.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def sample_rows(
    x: Tensor,
    num_samples: int,
    *,
    keep: Tensor,
    generator: torch.Generator | None = None,
    sync: bool = True,
) -> tuple[Tensor, Tensor]:
    """This rank's share of ``num_samples`` random rows, ready to be summed over the ranks.

    Rank r fills the places r, r + world size, …; a rank with too few rows leaves places empty. No
    shape depends on the data, so nothing waits for the device.

    Args:
        x: [N, D].
        num_samples: places to fill, over all ranks.
        keep: [N] bool, the rows that may be drawn. Drawn without replacement.

    Returns:
        samples, [num_samples, D] float32, zeros where not filled by this rank; is_filled,
        [num_samples] float32, 1 where filled.
    """
    world = world_size() if sync else 1
    rank = dist.get_rank() if world > 1 else 0
    samples = torch.zeros(num_samples, x.shape[1], device=x.device)
    is_filled = torch.zeros(num_samples, device=x.device)
    share = min(len(range(rank, num_samples, world)), x.shape[0])
    keys = torch.empty(x.shape[0], device=x.device).uniform_(generator=generator)
    key, row = keys.masked_fill(~keep, -1).topk(share)
    places = slice(rank, rank + share * world, world)
    samples[places] = x[row].float().masked_fill((key < 0)[:, None], 0)
    is_filled[places] = (key >= 0).float()
    return samples, is_filled


def take_filled(samples: Tensor, is_filled: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Hands the samples that were filled to the places where ``wanted``, in turn.

    Args:
        samples: [K, D], summed over the ranks.
        is_filled: [K], likewise.
        wanted: [K] bool.

    Returns:
        rows, [K, D], of use where ``wanted``; [K] bool, ``wanted``, or all False if no sample was
        filled.
    """
    filled = is_filled > 0
    filled_first = torch.argsort(~filled, stable=True)
    turn = (wanted.cumsum(0) - 1).clamp(min=0) % filled.sum().clamp(min=1)
    return samples[filled_first[turn]], wanted & filled.any()
