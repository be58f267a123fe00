"""The fastest tiles, by running them."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vqtriton.kernels.screen_tiles import architecture
from vqtriton.tiles.candidates import candidates_of
from vqtriton.tiles.problems import DTYPES, Problem
from vqtriton.tiles.tables import shared_limit
from vqtriton.tuning.outcomes import Found, Outcome, decide
from vqtriton.tuning.predict import Say, to_stderr, usable
from vqtriton.tuning.tunables import TUNABLES, Inputs, Tunable, make_inputs

# of a candidate: steps before the clock, and timed ones
WARM_UP, REPEATS = 2, 9
# of those that are modelled, so many are timed: the best predicted, and the default
MOST_TIMED = 12
# what writing takes longer than it takes to launch a graph: 0.2 ms at 3 TB/s
HEAD_START_BYTES = 1 << 29
# bytes of inputs, beyond which no more copies of them are made
MOST_COPIED = 4 << 30


def measure(problem: Problem, device: torch.device, say: Say = to_stderr) -> Outcome:
    """The fastest tiles of those whose results are right, on memory that was filled with NaN."""
    tunable = TUNABLES[problem.op]
    candidates = candidates_of(problem, architecture(device))
    copies = [make_inputs(problem, device, seed) for seed in range(copies_needed(problem, device))]
    right: list[tuple[Any, dict[str, Any]]] = []
    for config, about in promising(problem, device, candidates, say):
        if still_right(tunable, copies[0], config, say):
            right.append((config, about))
    prepared = [tunable.prepare(copy) for copy in copies]
    times = median_ms(tunable.run, [config for config, _ in right], prepared, device, say)
    found = [
        Found(config, ms, about)
        for (config, about), ms in zip(right, times, strict=True)
        if not math.isnan(ms)
    ]
    found.sort(key=lambda one: one.ms)
    # once more, on other inputs and after many runs: before it may win
    other = make_inputs(problem, device, len(copies))
    while found and not still_right(tunable, other, found[0].config, say):
        del found[0]
    if found and device.type == "cuda":
        step = functools.partial(tunable.run, prepared[0], found[0].config)
        say_whose_time(problem, found[0].ms, wall_ms(step, device), say)
    return decide(problem, candidates, found)


def say_whose_time(problem: Problem, device_ms: float, wall: float, say: Say) -> None:
    """Tiles change the GPU's part alone, which may be the smaller one."""
    if wall > 2 * device_ms:
        say(
            f"{problem}: a call takes {wall:.3f} ms, and the GPU works {device_ms:.3f} ms of it. "
            "Most of the time is the host's, which tiles do not change"
        )


def wall_ms(step: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median of some calls, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        begun = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def promising(
    problem: Problem, device: torch.device, candidates: Sequence[Any], say: Say
) -> list[tuple[Any, dict[str, Any]]]:
    """Candidates that are worth a run, and what their row tells.

    In the interpreter, which does not compile, all of them.
    """
    if device.type != "cuda":
        return [(config, {"shared": 0}) for config in candidates]
    found = usable(problem, architecture(device), candidates, say)
    fitting = [one for one in found if one.about["shared"] <= shared_limit(device)]
    modelled = [one for one in fitting if not math.isnan(one.ms)]
    late = [one.config for one in modelled[MOST_TIMED:] if one.config != candidates[0]]
    return [(one.config, one.about) for one in fitting if one.config not in late]


def still_right(tunable: Tunable, inputs: Inputs, config: Any, say: Say) -> bool:
    """Whether it runs, and its results are right."""
    try:
        with poisoned():
            results = tunable.run(tunable.prepare(inputs), config)
        is_right = tunable.is_right(inputs, results)
    except Exception as error:
        # too much shared memory, or what a compiler does not take
        say(f"left out, {config}: {str(error)[:200]}")
        return False
    if not is_right:
        say(f"left out, it is wrong: {config}")
    return is_right


class poisoned:
    """`torch.empty` is filled with NaN: whatever is left unwritten shows."""

    def __enter__(self) -> None:
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        is_on, only_warns = self._before
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)


def copies_needed(problem: Problem, device: torch.device) -> int:
    """So many inputs that the next one is in no cache."""
    if device.type != "cuda":
        return 1
    size = problem.dim * DTYPES[problem.dtype].itemsize
    of_one = 2 * problem.num_rows * size + 4 * problem.codebook_size * problem.dim
    wanted = min(32, 2 * cache_bytes(device) // of_one + 1)
    return max(1, min(wanted, MOST_COPIED // of_one))


def cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def median_ms(
    run: Callable[[Any, Any], object],
    configs: Sequence[Any],
    prepared: Sequence[Any],
    device: torch.device,
    say: Say,
) -> list[float]:
    """Of each, NaN if it raises. They and the inputs take turns, so none has the quiet minute."""
    is_cuda = device.type == "cuda"
    # written before each step: it empties the cache, and hides the launch of a graph
    written = max(HEAD_START_BYTES, 2 * cache_bytes(device)) if is_cuda else 0
    other = torch.empty(written, device=device, dtype=torch.uint8)
    warm_up, repeats = (WARM_UP, REPEATS) if is_cuda else (0, 1)
    pool = torch.cuda.graph_pool_handle() if is_cuda else None
    steps: dict[tuple[int, int], Callable[[], object]] = {}
    times: list[list[float]] = [[] for _ in configs]
    for turn in range(warm_up + repeats):
        copy = turn % len(prepared)
        for place, (config, of_config) in enumerate(zip(configs, times, strict=True)):
            if math.nan in of_config:
                continue
            try:
                if (place, copy) not in steps:
                    step = functools.partial(run, prepared[copy], config)
                    steps[place, copy] = captured(step, pool) if is_cuda else step
                other.zero_()
                ms = one_ms(steps[place, copy], device)
            except Exception as error:
                say(f"left out, {config}: {str(error)[:200]}")
                of_config[:] = [math.nan]
                continue
            if turn >= warm_up:
                of_config.append(ms)
    return [statistics.median(of_config) for of_config in times]


def captured(step: Callable[[], object], pool: Any = None) -> Callable[[], None]:
    """Replays the step from a CUDA graph, without the host's part of it.

    Args:
        pool: memory that graphs share. They must run one after the other, and nobody may read the
            results of one after another has run.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # what is compiled or looked up at first is not to be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def one_ms(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)
