"""What the ranks of a process group share. With no process group these are all local.

Asked at call time: a module may be built before `torch.distributed.init_process_group`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(
    tensors: Sequence[Tensor], *, sync: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Sums over the ranks, in one dtype and a single collective. Every rank gets the same bits."""
    tensors = [t.to(dtype) for t in tensors]
    if not sync or world_size() == 1:
        return tensors
    packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(packed)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Overwrites the tensors with those of rank 0, in a single collective."""
    if world_size() == 1:
        return
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
    share = min(num_places(num_samples, sync=sync), x.shape[0])
    keys = torch.empty(x.shape[0], device=x.device).uniform_(generator=generator)
    key, row = keys.masked_fill(~keep, -1).topk(share)
    return spread(x[row], key >= 0, num_samples, sync=sync)


def num_places(num_samples: int, *, sync: bool = True) -> int:
    """How many of them this rank has to fill."""
    world = world_size() if sync else 1
    return len(range(dist.get_rank() if world > 1 else 0, num_samples, world))


def spread(
    rows: Tensor, counts: Tensor, num_samples: int, *, sync: bool = True
) -> tuple[Tensor, Tensor]:
    """Puts rows of this rank into its places r, r + world size, … of the samples of all ranks.

    Args:
        rows: [n, D], no more than `num_places`.
        counts: [n] bool, those that may be taken.
        num_samples: places of all ranks.

    Returns:
        See `sample_rows`.
    """
    world = world_size() if sync else 1
    rank = dist.get_rank() if world > 1 else 0
    samples = torch.zeros(num_samples, rows.shape[1], device=rows.device)
    is_filled = torch.zeros(num_samples, device=rows.device)
    places = slice(rank, rank + rows.shape[0] * world, world)
    samples[places] = rows.float().masked_fill(~counts[:, None], 0)
    is_filled[places] = counts.float()
    return samples, is_filled


def take_filled(samples: Tensor, is_filled: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Hands the samples that were filled to the places where ``wanted``, in turn.

    Args:
        samples: [S, D], summed over the ranks.
        is_filled: [S], likewise.
        wanted: [K] bool.

    Returns:
        rows, [K, D], of use where ``wanted``; [K] bool, ``wanted``, or all False if no sample was
        filled.
    """
    filled = is_filled > 0
    filled_first = torch.argsort(~filled, stable=True)
    turn = (wanted.cumsum(0) - 1).clamp(min=0) % filled.sum().clamp(min=1)
    return samples[filled_first[turn]], wanted & filled.any()


class Agreement:
    """Whether all ranks came through a block of code; an error of one is one on all of them.

    Without it the others would wait for its next collective until they time out.
    """

    def __init__(self, sync: bool) -> None:
        self._sync = sync
        self.error: Exception | None = None

    def failed(self, device: torch.device) -> Tensor:
        """[] float32, to be summed over the ranks."""
        return torch.tensor(float(self.error is not None), device=device)

    def raise_if(self, num_failed: Tensor) -> None:
        """
        Raises:
            Exception: of this rank.
            RuntimeError: of another one.
        """
        if num_failed:
            raise self.error or RuntimeError(f"{int(num_failed)} other ranks failed; see there")

    def settle(self, dim: int, device: torch.device) -> int:
        """The D of all ranks, some of which may not know it (0).

        Raises:
            ValueError: they differ.
            Exception: see `raise_if`.
        """
        unknown = -torch.iinfo(torch.int64).max
        found = torch.tensor([self.error is not None, dim, -dim or unknown], device=device)
        if self._sync and world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        failed, largest, least = found.tolist()
        self.raise_if(torch.tensor(failed))
        if largest and -least != largest:
            raise ValueError(f"x has vectors of size {-least} on one rank and {largest} on another")
        return largest


@contextlib.contextmanager
def together(*, sync: bool = True) -> Iterator[Agreement]:
    """Code that may fail on some ranks, before they meet."""
    agreement = Agreement(sync)
    try:
        yield agreement
    except Exception as error:
        if not sync or world_size() == 1:
            raise
        agreement.error = error
