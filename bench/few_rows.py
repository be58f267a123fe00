"""A search of few rows on a CPU: ``python -m bench.few_rows``.

What a codec or a tokenizer asks for as it runs: few vectors, and codes that stay as they are.
Beside it, addmm and argmin with everything that only the codes decide computed before. They take
turns, and find in the caches what the others have left there. It prints a table of
docs/benchmarks.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import vqtriton
from bench.measure import interleave, quantile

SHAPES = ((256, 32), (1024, 8), (1024, 64), (1024, 128), (2048, 256), (8192, 256), (16384, 64))
ROWS = (1, 10, 100)
REPEATS = 201


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(size: int, dim: int, num_rows: int, repeats: int = REPEATS) -> list[float]:
    """Median seconds of three: addmm and argmax, a prepared search, and a module in eval mode."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(size, dim, generator=generator)
    x = codebook[torch.randint(size, (num_rows,), generator=generator)]
    x = x + 0.3 * torch.randn(num_rows, dim, generator=generator)
    prepared = vqtriton.prepare_codebook(codebook)
    half_sqnorm = codebook.square().sum(1) / 2
    vq = vqtriton.VectorQuantize(dim, size).eval()
    vq.set_codebook(codebook)
    steps = (
        lambda: torch.addmm(half_sqnorm, x, codebook.T, alpha=-1).argmin(1),
        lambda: vqtriton.nearest_code(x, prepared),
        lambda: vq(x),
    )
    taken = [lambda step=step: seconds(step) for step in steps]
    interleave(taken, 3)
    return [quantile(times, 0.5) for times in interleave(taken, repeats)]


@torch.no_grad()
def main() -> None:
    print("| N, K, D | addmm and argmin | prepared search | | module in eval mode | |")
    print("|---|---|---|---|---|---|")
    for size, dim in SHAPES:
        for num_rows in ROWS:
            plain, *ours = measure(size, dim, num_rows)
            cells = [f"{1e6 * t:.0f} µs | {t / plain:.1f}×" for t in ours]
            print(f"| {num_rows}, {size}, {dim} | {1e6 * plain:.0f} µs | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
