"""Sums per code: beside other ways to add, and what uneven codes cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import provenance
from bench.devices import Cpu, Cuda, make_device
from bench.gpu_check.check import Check
from bench.measure import quantile
from vqtriton import blocked, ops

# N, K, D
SHAPES = (
    (1 << 20, 1024, 64),
    (1 << 20, 16384, 128),
    (32768, 16384, 8),
    (16384, 1024, 256),
    (4096, 256, 32),
)
DRY_SHAPES = ((300, 7, 8),)
DTYPES = (torch.float16, torch.float32)
REPEATS, DRY_REPEATS = 15, 1
# of a one-hot matrix
MATRIX_BYTES = 8 << 30
# what uneven codes may cost, over even ones
MOST_SKEW = 1.5
OURS = "code_sums"
# x [N, D], indices [N], K -> sums [K, D]
Sums = Callable[[Tensor, Tensor, int], Tensor]


def run(check: Check) -> str:
    # on the path of the parts
    from data import SKEWS

    device = make_device(check.device.type)
    if check.is_dry:
        device.cache_bytes = 1 << 10
    skewed, fastest = [], 0
    cases = [
        (shape, dtype) for shape in (DRY_SHAPES if check.is_dry else SHAPES) for dtype in DTYPES
    ]
    for (n, k, d), dtype in cases:
        name = f"N={n} K={k} D={d} {dtype}".replace("torch.", "")
        if check.time_left() < 0:
            check.expect(False, f"{name}: the time was up")
            continue
        of_ours: dict[str, float] = {}
        for skew, make in SKEWS.items():
            with check.step(f"{name}, {skew}"):
                torch.manual_seed(0)
                x = torch.randn(n, d, device=check.device).to(dtype)
                indices = make(n, k).to(check.device)
                times = compare(check, f"{name}, {skew}", x, indices, k, device)
                of_ours[skew] = times[OURS]
                fastest += min(times, key=lambda who: times[who]) == OURS
        for skew, ms in of_ours.items():
            ratio = ms / of_ours.get("uniform", ms)
            # a CPU's interpreter tells nothing of it
            if ratio > MOST_SKEW and not check.is_dry:
                skewed.append(f"{name}, {skew}: {ratio:.2f}×")
    check.expect(not skewed, f"uneven codes cost more than {MOST_SKEW}×: {'; '.join(skewed)}")
    return f"{len(cases)} cases, {len(SKEWS)} skews each; ours is the fastest in {fastest}"


def subjects(x: Tensor, k: int) -> dict[str, Sums]:
    """Those that can be run on x. All but the first may differ from run to run."""
    found: dict[str, Sums] = {
        OURS: lambda x, i, k: ops.code_sums(x, i, k, "triton")[0],
        "code_sums, atomics": lambda x, i, k: atomic(x, i, k),
        "index_add_": index_add,
    }
    if x.shape[0] * k * x.element_size() <= MATRIX_BYTES:
        found["one-hot matmul"] = one_hot
    if x.is_cuda and provenance.version("flash-kmeans") is not None:
        found["flash-kmeans sorted"] = flash_kmeans
    return found


def atomic(x: Tensor, indices: Tensor, k: int) -> Tensor:
    from vqtriton.kernels.atomic_sums import atomic_sums

    return atomic_sums(x[None], indices[None], k)[0][0]


def index_add(x: Tensor, indices: Tensor, k: int) -> Tensor:
    """What most write; an index that is left out goes to a code of its own."""
    sums = torch.zeros(k + 1, x.shape[1], device=x.device)
    return sums.index_add_(0, indices.where(indices >= 0, k), x.float())[:-1]


def one_hot(x: Tensor, indices: Tensor, k: int) -> Tensor:
    matrix = torch.zeros(len(x), k + 1, dtype=x.dtype, device=x.device)
    matrix.scatter_(1, indices.where(indices >= 0, k)[:, None], 1)
    return (matrix.T @ x)[:-1].float()


def flash_kmeans(x: Tensor, indices: Tensor, k: int) -> Tensor:
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid

    # it takes no index that is left out
    sums = torch.zeros(1, k + 1, x.shape[1], device=x.device)
    triton_centroid_update_sorted_euclid(
        x[None], indices.where(indices >= 0, k)[None], sums, centroid_sums=sums, calculate_new=False
    )
    return sums[0, :-1]


def compare(
    check: Check, name: str, x: Tensor, indices: Tensor, k: int, device: Cpu | Cuda
) -> dict[str, float]:
    """Median milliseconds of each that is right; how wrong each is, is noted."""
    want, _ = blocked.code_sums(x.double(), indices, k)
    magnitude, _ = blocked.code_sums(x.double().abs(), indices, k)
    errors: dict[str, float] = {}
    steps: dict[str, Callable[[], Tensor]] = {}
    for who, sums in subjects(x, k).items():
        step = lambda sums=sums: sums(x, indices, k)  # noqa: E731
        with check.step(f"{name}, {who}"):
            first = step()
            error = ((first.double() - want).abs() / magnitude.clamp(min=1e-30)).max().item()
            errors[who], steps[who] = error, step
            if who.startswith(OURS):
                check.expect(error <= 1.01 * 2.0**-24, f"{name}: {who} is {error:.1e} off")
            if who == OURS:
                check.expect(torch.equal(step(), first), f"{name}: {who} does not repeat")
    times: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(DRY_REPEATS if check.is_dry else REPEATS):
        for who, step in steps.items():
            times[who].append(1e3 * device.seconds(step))
    medians = {who: quantile(of_one, 0.5) for who, of_one in times.items()}
    check.note(case=name, ms=medians, relative_error=errors, device=device.name)
    return medians
