"""What the ranks of a process group share. With no process group these are all local.

Asked at call time: a module may be built before `torch.distributed.init_process_group`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# between the seeds of ranks: odd, and with many bits
SEED_STEP = 0x9E3779B97F4A7C15


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def meeting_device(device: torch.device) -> torch.device:
    """Where a tensor must be to be summed over the ranks: NCCL meets on GPUs alone."""
    if device.type == "cpu" and world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


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
    # as bytes: whatever the dtypes are, nothing is rounded
    as_bytes = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]
    packed = torch.cat(as_bytes)
    dist.broadcast(packed, src=0)
    parts = packed.split([t.numel() for t in as_bytes])
    for tensor, part in zip(tensors, parts, strict=True):
        # a copy: a part may start where an element of its dtype may not
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def sample_rows(
    x: Tensor, num_samples: int, *, keep: Tensor, sync: bool = True
) -> tuple[Tensor, Tensor]:
    """This rank's share of ``num_samples`` random rows, ready to be summed over the ranks.

    No shape depends on the data, so nothing waits for the device.

    Args:
        x: [N, D].
        num_samples: places to fill, over all ranks.
        keep: [N] bool, the rows that may be drawn. Drawn without replacement.

    Returns:
        See `share_samples`.
    """
    row, is_kept = draw_places(num_samples, keep=keep, sync=sync)
    return share_samples(x[row], is_kept, num_samples, sync=sync)


def draw_places(num_samples: int, *, keep: Tensor, sync: bool = True) -> tuple[Tensor, Tensor]:
    """Which rows are this rank's share of ``num_samples``: [n] int64, and [n] bool, those kept."""
    rank, world = place_among(sync)
    share = min(len(range(rank, num_samples, world)), keep.shape[0])
    # of halves many keys would be equal, and of those the first rows would be drawn
    keys = torch.rand(keep.shape, dtype=torch.float32, device=keep.device).masked_fill_(~keep, -1)
    key, row = keys.topk(share)
    return row, key >= 0


def share_samples(
    rows: Tensor, is_kept: Tensor, num_samples: int, *, sync: bool = True
) -> tuple[Tensor, Tensor]:
    """Places this rank's samples [n, D] among those of all ranks.

    Rank r fills the places r, r + world size, …, as many as any other; with too few rows it leaves
    places empty. So they meet in one collective with whatever else is to be summed.

    Returns:
        samples, [num_samples, D] float32, zeros where not filled by this rank; is_filled,
        [num_samples] float32, 1 where filled.
    """
    rank, world = place_among(sync)
    samples = torch.zeros(num_samples, rows.shape[1], dtype=torch.float32, device=rows.device)
    is_filled = torch.zeros(num_samples, dtype=torch.float32, device=rows.device)
    places = slice(rank, rank + len(rows) * world, world)
    samples[places] = rows.float().masked_fill(~is_kept[:, None], 0)
    is_filled[places] = is_kept.float()
    return samples, is_filled


class Source:
    """Random numbers that differ between the ranks, whether or not their seeds do.

    Args:
        generator: of one process all are drawn from it itself; torch's own by default.
        sync: whether there are other ranks.
    """

    def __init__(self, generator: torch.Generator | None, sync: bool) -> None:
        self._generator = generator
        self._seed: int | None = None
        rank, world = place_among(sync)
        if world > 1:
            device = "cpu" if generator is None else generator.device
            drawn = torch.randint(
                1 << 62, (), generator=generator, dtype=torch.int64, device=device
            )
            self._seed = (int(drawn) + rank * SEED_STEP) % (1 << 63)

    def on(self, device: torch.device) -> torch.Generator | None:
        """For draws on a device, always the same."""
        if self._seed is not None:
            self._generator, self._seed = torch.Generator(device).manual_seed(self._seed), None
        return self._generator


def draw(keys: Tensor, rows: Tensor, num: int, *, sync: bool = True) -> tuple[Tensor, Tensor]:
    """The rows with the largest keys, over all ranks; the same bits on each of them.

    Args:
        keys: [n] float64, the largest of this rank first, n at most ``num``; -inf is no row.
        rows: [n, D] float32, theirs.
        num: how many to draw.

    Returns:
        [num, D] float32, the largest key first, zeros where there are no more; [num] bool, which
        there are.
    """
    rank, world = place_among(sync)
    table = keys.new_zeros(world, num)
    table[rank] = torch.nn.functional.pad(keys, (0, num - len(keys)), value=-torch.inf)
    (table,) = all_reduce([table], sync=sync, dtype=torch.float64)
    key, place = table.view(-1).sort(descending=True, stable=True)
    key, place = key[:num], place[:num]
    is_filled = key > -torch.inf
    is_mine = (is_filled & (place // num == rank)).nonzero()[:, 0]
    samples = rows.new_zeros(num, rows.shape[1])
    samples[is_mine] = rows[place[is_mine] % num]
    (samples,) = all_reduce([samples], sync=sync)
    return samples, is_filled


def place_among(sync: bool) -> tuple[int, int]:
    """Rank and number of ranks; alone without ``sync``."""
    return (dist.get_rank(), world_size()) if sync and world_size() > 1 else (0, 1)


def take_filled(samples: Tensor, is_filled: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Hands the samples that were filled to the places where ``wanted``, in turn.

    Args:
        samples: [S, D], of all ranks.
        is_filled: [S], which there are: bool, or counted.
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
        return torch.tensor(self.error is not None, dtype=torch.float32, device=device)

    def raise_own(self) -> None:
        """
        Raises:
            Exception: of this rank, if there was one.
        """
        if self.error is not None:
            raise self.error

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
        found = torch.tensor([self.error is not None, dim, -dim or unknown], dtype=torch.int64)
        if self._sync and world_size() > 1:
            # a rank that failed may not know of a GPU of its own
            found = found.to(meeting_device(device))
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        failed, largest, least = found.tolist()
        self.raise_if(torch.tensor(failed, dtype=torch.int64))
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
