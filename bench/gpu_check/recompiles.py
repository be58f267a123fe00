"""A new batch size compiles nothing: each kernel once for 50 values of N."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.gpu_check.check import Check
from vqtriton import ops

# 1 and multiples of 16 are what Triton makes programs of their own for
SIZES = (1, 2, 15, 16, 17, 64, 256, 4096, 100_000, *(33 + 613 * i for i in range(41)))
CODEBOOK_SIZE = 600


def run(check: Check) -> str:
    # 12: a stride that 16 does not divide
    dims = (12,) if check.is_dry else (12, 64)
    counts: Counter[tuple[str, str]] = Counter()
    with compile_only() if check.is_dry else contextlib.nullcontext():
        for dim in dims:
            for name, work in works(dim, check.device).items():
                with check.step(f"{name}, D={dim}"), counted() as programs:
                    for rows in SIZES:
                        work(rows)
                    check.sync()
                    check.note(step=name, dim=dim, sizes=len(SIZES), programs=dict(programs))
                    for kernel, count in programs.items():
                        check.expect(count == 1, f"{name}, D={dim}: {kernel} compiled {count} ×")
                        counts[kernel, name] += count
    check.expect(counts, "nothing was compiled, so nothing was counted")
    where = "for sm_90, nothing was launched" if check.is_dry else "launched"
    return f"{sum(counts.values())} programs for {len(SIZES)} sizes, {where}"


def works(dim: int, device: torch.device) -> dict[str, Callable[[int], object]]:
    codebook = torch.randn(CODEBOOK_SIZE, dim, device=device)

    def vectors(rows: int) -> torch.Tensor:
        return torch.zeros(rows, dim, device=device)

    def indices(rows: int) -> torch.Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=device)

    def masked(rows: int) -> object:
        mask = torch.ones(rows, dtype=torch.bool, device=device)
        return ops.run_kernels(vectors(rows), codebook, exact=True, mask=mask, gather=True)

    def sums(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        from vqtriton.kernels.code_sums import code_sums

        return code_sums(vectors(rows)[None], indices(rows)[None], CODEBOOK_SIZE)

    def gradients(rows: int) -> object:
        from vqtriton.kernels.vector_quantize_grad import grad_codebook, grad_x

        x, one_head = vectors(rows)[None], codebook[None]
        grads = (torch.ones(1, rows, device=device), x, one_head, indices(rows)[None], 1.0)
        return grad_x(x, *grads), grad_codebook(*grads)

    def update(rows: int) -> None:
        from vqtriton.kernels.ema_update import ema_update_

        (of_codes,), (counts,) = sums(rows)
        rows_per_code = counts.float()
        ema_update_(
            *(t.clone() for t in (rows_per_code, codebook)),
            rows_per_code,
            of_codes,
            # what may stand for a dead code, all of it there
            codebook,
            torch.ones_like(rows_per_code),
            torch.tensor([0.1, 0.5], device=device),
        )

    return {
        "nearest_code": lambda rows: ops.run_kernels(vectors(rows), codebook, exact=True),
        "vector_quantize": masked,
        "code_sums": sums,
        "gradients": gradients,
        "update": update,
        "fast": lambda rows: ops.run_kernels(vectors(rows), codebook, exact=False),
    }


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Programs that Triton makes, from disk or anew, by kernel."""
    programs: Counter[str] = Counter()
    knobs = triton.knobs.runtime
    before = knobs.jit_post_compile_hook
    knobs.jit_post_compile_hook = lambda **given: programs.update([given["fn"].name])
    try:
        yield programs
    finally:
        knobs.jit_post_compile_hook = before


class CompileOnly:
    """As much of a driver as Triton needs to compile for an H100 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Launches compile what they would launch, and end there: outputs stay unwritten.

    The driver stays: there is none to go back to, and the process ends with the part.
    """
    launch = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(CompileOnly())
    with mock.patch.object(JITFunction, "run", warm_up):
        yield
