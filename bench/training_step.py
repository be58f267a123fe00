"""A CPU training step (forward with EMA update, backward to x): checked, timed, weighed.

Every subject gets the same x, the same codebook and the same statistics before each step.

Check: before anything is timed, the indices of each subject are held to the float64 argmin. One
that promises exactness may have no wrong index; another may be wrong where the two distances are
closer than float32 can tell. A subject that fails is not timed.

Time: all subjects in one process, turn by turn, in an order that turns around each time, so that
what else the machine does falls on all of them. The check is the warm-up.

Memory: each subject in a process of its own, so that none can reuse what another left behind.
There a tiny step and a product of matrices come first: code, thread pools and the buffers of the
BLAS are paid for once a process and are none of the subject's doing. Then inputs and module are
made, free heap is handed back (``malloc_trim``), the kernel is told to forget the peak so far (5
written to ``/proc/self/clear_refs``), and one step runs. Its peak is VmHWM after it minus VmRSS
before it: resident memory above inputs and module, results included, whoever allocated it. Linux
only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import vqtriton
from bench.cases import Case

ROOT = Path(__file__).parents[1]
OURS = "vqtriton"
PEER = "vector-quantize-pytorch"
DECAY = 0.99


class Inputs(NamedTuple):
    """What every subject starts from."""

    x: Tensor  # [N, D] float32, requires grad
    codebook: Tensor  # [K, D] float32
    grad_quantized: Tensor  # [N, D] float32, what a decoder would send back


@dataclass(frozen=True)
class Subject:
    """Something that can take a training step."""

    name: str
    version: str
    is_exact: bool
    # puts codebook and statistics back where they started
    reset: Callable[[], None]
    # one training step -> indices, [N]
    step: Callable[[], Tensor]


@dataclass(frozen=True)
class Result:
    """What one subject did in one case."""

    subject: str
    version: str
    mismatches: int
    seconds: tuple[float, ...]
    # bytes above inputs and module; None where it cannot be measured
    peak_memory: int | None

    def quantile(self, q: float) -> float:
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(q).item()


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        torch.randn(case.num_rows, case.dim, generator=generator).requires_grad_(),
        torch.randn(case.codebook_size, case.dim, generator=generator),
        torch.randn(case.num_rows, case.dim, generator=generator),
    )


def _step(module: torch.nn.Module, inputs: Inputs) -> Tensor:
    # a batch of one: what vector-quantize-pytorch takes for [N, D] is [N, 1, D]
    quantized, indices, loss = module(inputs.x[None])
    torch.autograd.grad(
        [quantized, loss], inputs.x, [inputs.grad_quantized[None], torch.ones_like(loss)]
    )
    return indices[0]


def make_ours(inputs: Inputs) -> Subject:
    size, dim = inputs.codebook.shape
    module = vqtriton.VectorQuantize(dim, size, decay=DECAY)

    def reset() -> None:
        module.codebook.copy_(inputs.codebook)
        module.embed_sum.copy_(inputs.codebook)
        module.cluster_size.fill_(1)

    return Subject(OURS, vqtriton.__version__, True, reset, lambda: _step(module, inputs))


def make_peer(inputs: Inputs) -> Subject:
    from vector_quantize_pytorch import VectorQuantize

    size, dim = inputs.codebook.shape
    module = VectorQuantize(dim=dim, codebook_size=size, decay=DECAY, rotation_trick=False)

    def reset() -> None:
        state = module._codebook
        state.embed.copy_(inputs.codebook)
        state.embed_avg.copy_(inputs.codebook)
        state.cluster_size.fill_(1)

    return Subject(PEER, version(PEER), False, reset, lambda: _step(module, inputs))


MAKERS = {OURS: make_ours, PEER: make_peer}


def available() -> list[str]:
    """Subjects that are installed."""
    return [OURS, *([PEER] if find_spec("vector_quantize_pytorch") else [])]


def count_mismatches(subject: Subject, inputs: Inputs, indices: Tensor) -> int:
    """Rows whose index is not the float64 argmin.

    Raises:
        ValueError: more of them, or worse ones, than the subject may have.
    """
    size, dim = inputs.codebook.shape
    x, codebook = inputs.x.detach().double(), inputs.codebook.double()
    if indices.shape != x.shape[:1] or indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"{subject.name}: indices are not one of {size} codes for each row")
    nearest = torch.cat(
        [
            torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            for rows in x.split(max(1, (1 << 22) // size))
        ]
    )
    # without the square root, which can make a tie of two distances
    chosen_distance = (x - codebook[indices]).square().sum(1)
    least_distance = (x - codebook[nearest]).square().sum(1)
    gap = chosen_distance - least_distance
    is_wrong = (gap > 0) | ((gap == 0) & (indices > nearest))
    mismatches = int(is_wrong.sum())
    # ‖x‖² - 2x·c + ‖c‖² in float32 and its root, for either of the two codes
    scale = (x.norm(dim=1) + codebook.norm(dim=1).max()).square()
    bound = 0.0 if subject.is_exact else 2 * (dim + 6) * 2.0**-24 * scale
    inexcusable = int((is_wrong & (gap >= bound)).sum())
    if inexcusable:
        raise ValueError(
            f"{subject.name}: {mismatches} of {len(x)} indices are not the nearest code, "
            f"{inexcusable} of them beyond what its precision excuses; it is not timed"
        )
    return mismatches


def time_steps(
    subjects: Sequence[Subject], inputs: Inputs, repeats: int
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Mismatches, and seconds of each step, by the name of the subject.

    Raises:
        ValueError: see `count_mismatches`; nothing has been timed then.
    """
    mismatches = {}
    for subject in subjects:
        subject.reset()
        mismatches[subject.name] = count_mismatches(subject, inputs, subject.step())
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    turns = list(subjects)
    for _ in range(repeats):
        for subject in turns:
            subject.reset()
            start = time.perf_counter()
            subject.step()
            seconds[subject.name].append(time.perf_counter() - start)
        turns.reverse()
    return mismatches, seconds


def can_measure_memory() -> bool:
    return Path("/proc/self/clear_refs").exists()


def peak_memory(name: str, case: Case) -> int | None:
    """Bytes that one step of the subject takes above inputs and module; None if not on Linux."""
    if not can_measure_memory():
        return None
    sizes = map(str, (case.num_rows, case.codebook_size, case.dim))
    done = subprocess.run(
        [sys.executable, "-m", "bench.training_step", name, *sizes],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def measure(
    case: Case,
    names: Sequence[str],
    repeats: int,
    makers: dict[str, Callable[[Inputs], Subject]] | None = None,
) -> list[Result]:
    """Check, time, weigh.

    Raises:
        ValueError: see `count_mismatches`.
    """
    inputs = make_inputs(case)
    subjects = [(makers or MAKERS)[name](inputs) for name in names]
    mismatches, seconds = time_steps(subjects, inputs, repeats)
    return [
        Result(s.name, s.version, mismatches[s.name], tuple(seconds[s.name]), peak)
        for s in subjects
        for peak in [peak_memory(s.name, case)]
    ]


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def _weigh(name: str, case: Case) -> int:
    """Peak of one step in this process, which has to be a fresh one."""
    tiny = MAKERS[name](make_inputs(Case("tiny", 64, 32, case.dim)))
    tiny.reset()
    tiny.step()
    square = torch.ones(1024, 1024)
    square @ square
    del tiny, square

    inputs = make_inputs(case)
    subject = MAKERS[name](inputs)
    subject.reset()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    subject.step()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    subject_name, *case_sizes = sys.argv[1:]
    print(json.dumps(_weigh(subject_name, Case("in a process of its own", *map(int, case_sizes)))))
