"""Runs a function on every rank of a gloo process group, each rank a process of its own."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def join(rank: int, world_size: int, meeting_point: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=20),
    )


def _main(function, rank: int, world_size: int, meeting_point: str, results) -> None:
    torch.set_num_threads(1)
    try:
        result = function(rank, world_size, meeting_point)
        # a rank that leaves while another still connects to it ends that one as well
        dist.barrier()
        # by value: a tensor in shared memory dies with its process
        results.put((rank, {name: t.numpy().copy() for name, t in result.items()}, None))
    except BaseException as error:
        results.put((rank, None, repr(error)))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(
    function: Callable[[int, int, str], dict[str, torch.Tensor]],
    folder: Path,
    world_size: int = 2,
    seconds: float = 40,
) -> list[dict[str, torch.Tensor]]:
    """What ``function(rank, world_size, meeting_point)`` returned on each rank.

    It calls `join` when it wants to. A rank that fails or hangs fails the test, and none survives.
    """
    # a server that has imported torch once is forked for each rank
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "vqtriton", "torch._dynamo"])
    results: Any = context.Queue()
    arguments = (world_size, str(folder / "meeting_point"), results)
    processes = [
        context.Process(target=_main, args=(function, rank, *arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    values: dict[int, dict[str, torch.Tensor]] = {}
    try:
        while len(values) < world_size:
            try:
                rank, value, error = results.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(world_size)) - set(values))
                raise AssertionError(f"ranks {missing} hang") from None
            assert error is None, f"rank {rank}: {error}"
            values[rank] = {name: torch.from_numpy(array) for name, array in value.items()}
    finally:
        for process in processes:
            process.join(timeout=5 if len(values) == world_size else 0)
            process.kill()
    return [values[rank] for rank in range(world_size)]
