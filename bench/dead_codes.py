"""How to choose threshold_ema_dead_code: ``python -m bench.dead_codes``.

A codebook of K codes learns from a mixture of Gaussians whose centres move for half of the steps,
as the vectors of an encoder do that learns. The threshold is a fraction of the rows per code, which
are the rows of a step divided by K. After the last step, new rows tell how many codes are used, the
perplexity, and the quantization error over that of k-means. It takes some twenty minutes on two
cores and prints the table of docs/codebook.md.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import vqtriton

CODES, DIM, CENTRES, STEPS = 256, 16, 1024, 2000
TEST_ROWS = 64 * CODES
ROWS_PER_CODE = (0.25, 1, 4, 16)
FRACTIONS = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1, 2, 8)


class Mixture:
    """Gaussians of unequal weight, around centres that move from one place to another."""

    def __init__(self, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._from, self._to = torch.randn(2, CENTRES, DIM, generator=self._draw)
        # the vectors of an encoder are not centred, and its codes start around zero
        offset = 2 * torch.randn(DIM, generator=self._draw)
        self._from, self._to = self._from + offset, self._to + offset
        self._weights = 1 / torch.arange(10, CENTRES + 10)

    def rows(self, count: int, progress: float) -> torch.Tensor:
        chosen = torch.multinomial(self._weights, count, replacement=True, generator=self._draw)
        centres = torch.lerp(self._from[chosen], self._to[chosen], min(1.0, 2 * progress))
        return centres + 0.3 * torch.randn(count, DIM, generator=self._draw)


def train(rows_per_code: float, fraction: float, seed: int) -> tuple[float, float, float]:
    """Usage, perplexity, and error over that of k-means, after all steps."""
    torch.manual_seed(seed)
    data = Mixture(seed)
    threshold = fraction * rows_per_code
    vq = vqtriton.VectorQuantize(DIM, CODES, threshold_ema_dead_code=threshold)
    for step in range(STEPS):
        vq(data.rows(round(rows_per_code * CODES), step / STEPS))
    x = data.rows(TEST_ROWS, 1.0)
    quantized, indices, _ = vq.eval()(x)
    counts = vqtriton.metrics.counts(indices, CODES)
    best = vqtriton.kmeans(data.rows(TEST_ROWS, 1.0), CODES, 20)
    least = vqtriton.metrics.quantization_error(x, best[vqtriton.nearest_code(x, best)])
    error = vqtriton.metrics.quantization_error(x, quantized) / least
    return (
        vqtriton.metrics.usage(counts).item(),
        vqtriton.metrics.perplexity(counts).item(),
        error.item(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dead_codes", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="medians are over so many")
    parser.add_argument("--rows-per-code", type=float, nargs="+", default=ROWS_PER_CODE)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    heads = (f"{n:g} row{'s' * (n != 1)} per code |" for n in asked.rows_per_code)
    print("| threshold / rows per code |", *heads)
    print("|---|" + "---|" * len(asked.rows_per_code))
    for fraction in asked.fractions:
        cells = []
        for rows_per_code in asked.rows_per_code:
            runs = [train(rows_per_code, fraction, seed) for seed in range(asked.seeds)]
            used, perplexity, error = map(statistics.median, zip(*runs, strict=True))
            cells.append(f"{used:.0%}, {perplexity:.0f}, {error:.2f} |")
        print(f"| {fraction:g} |", *cells, flush=True)


if __name__ == "__main__":
    main()
