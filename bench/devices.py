"""How a device tells time and memory, and what it reaches at best."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench import provenance
from vqtriton.tuning.machines import Rates

Step = Callable[[], object]
# what is written between steps is no larger, whatever the cache
MOST_EVICTED = 1 << 29


def allocator_peak(step: Step) -> int:
    """Bytes that torch's allocator hands out on a CPU at most during a step, results included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _result = step()
    held = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class Device(ABC):
    """Base of both: caches are emptied in the same way."""

    def __init__(self, name: str, cache_bytes: int) -> None:
        self.device = torch.device(name)
        self.cache_bytes = cache_bytes
        self._other: torch.Tensor | None = None

    def seconds(self, step: Step) -> float:
        """Of one step, on caches that hold nothing of an earlier one."""
        if self._other is None:
            size = min(2 * self.cache_bytes, MOST_EVICTED)
            self._other = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._other.zero_()
        return self.time(step)

    @abstractmethod
    def time(self, step: Step) -> float:
        """Seconds of one step, on caches as they are."""

    def _rates(self, megabytes: int, side: int, dtype: torch.dtype) -> Rates:
        """The best of several copies and square matmuls."""
        source = torch.ones(megabytes << 20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = min(self.time(lambda: target.copy_(source)) for _ in range(5))
        a = torch.ones(side, side, dtype=dtype, device=self.device)
        b, out = a.clone(), torch.empty_like(a)
        matmul = min(self.time(lambda: torch.mm(a, b, out=out)) for _ in range(5))
        return Rates(dot=2 * side**3 / matmul, memory=2 * (megabytes << 20) / copy)


class Cpu(Device):
    # memory is told by the process as a whole, so each subject is weighed in one of its own
    shares_memory = False
    # products of the float64 check that take a few seconds
    check_products = 1 << 36

    def __init__(self) -> None:
        super().__init__("cpu", _last_level_cache())
        self.name, self.driver = provenance.processor(), None

    def time(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def rates(self) -> Rates:
        return self._rates(256, 2048, torch.float32)

    def can_weigh(self) -> bool:
        return Path("/proc/self/clear_refs").exists()

    def peak_memory(self, step: Step) -> int:
        """Bytes of the process while the step runs, above what it held before.

        Free heap is handed back, the kernel forgets the peak so far (5 written to
        /proc/self/clear_refs), and VmHWM after the step, less VmRSS before it, is what it took,
        results included, whoever allocated it. For processes that did nothing large before, of
        which something could be left to be used again.
        """
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        _result = step()
        return _resident("VmHWM") - before


class Cuda(Device):
    shares_memory = True
    check_products = 1 << 43

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        super().__init__("cuda", properties.L2_cache_size)
        self.name, self.driver = properties.name, provenance.driver()

    def time(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # what was queued before gives the host a head start, so that launches are not timed
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def rates(self) -> Rates:
        # the fastest product that an exact search may use, whatever the dtype of its inputs
        return self._rates(1024, 8192, torch.float16)

    def can_weigh(self) -> bool:
        return True

    def peak_memory(self, step: Step) -> int:
        """Bytes that torch's allocator hands out at most during a step, above those before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _result = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def make_device(name: str) -> Cpu | Cuda:
    return {"cpu": Cpu, "cuda": Cuda}[name]()


def _last_level_cache() -> int:
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    return max(sizes, default=32 << 20)


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
