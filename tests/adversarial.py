"""Every hard case in 1 to 1024 dimensions, beside the float64 oracle.

    .venv/bin/python tests/adversarial.py [--rows N] [--max-codes K] [--backend torch|triton]

Prints, for each case, rows, indices that are wrong, and the rescue rate: what share was in doubt.
The exit status is 1 if any index is wrong.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import data
import oracle
import torch
from torch import Tensor

from vqtriton import blocked, ops

DIMS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1024)
# K·D of a case: what it costs the oracle
CODE_ELEMENTS = 1 << 15


class Tally(NamedTuple):
    rows: int = 0
    mismatches: int = 0
    in_doubt: int = 0

    def __add__(self, other: tuple) -> Tally:
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return f"{self.rows:8} {self.mismatches:10} {self.in_doubt / self.rows:>10.2%}"


def search(x: Tensor, codebook: Tensor, backend: str) -> tuple[Tensor, int]:
    """Indices, and how many rows were in doubt."""
    if backend == "torch":
        return blocked.search(x, codebook, "exact")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = ops.run_kernels(x.to(device), codebook.to(device), exact=True)
    return out.indices[0].cpu(), int(out.num_doubtful)


def check(case: str, dim: int, rows: int, max_codes: int, backend: str) -> Tally:
    # so that a case can be repeated by itself
    torch.manual_seed(zlib.crc32(f"{case} {dim}".encode()))
    size = min(max_codes, max(33, CODE_ELEMENTS // dim))
    x, codebook = data.HARD[case](rows, size, dim)
    indices, in_doubt = search(x, codebook, backend)
    return Tally(rows, int((indices != oracle.nearest_code(x, codebook)).sum()), in_doubt)


def check_all(
    rows: int, max_codes: int, backend: str, dims: Sequence[int] = DIMS
) -> Iterator[tuple[str, Tally]]:
    """At least ``rows`` in total, the same number for each case and D."""
    each = -(-rows // (len(data.HARD) * len(dims)))
    for case in data.HARD:
        tally = Tally()
        for dim in dims:
            tally += check(case, dim, each, max_codes, backend)
        yield case, tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="in total, at least")
    parser.add_argument("--max-codes", type=int, default=1001)
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch")
    options = parser.parse_args()

    print(f"{'':24} {'rows':>8} {'mismatches':>10} {'in doubt':>10}")
    total = Tally()
    for case, tally in check_all(options.rows, options.max_codes, options.backend):
        print(f"{case:24} {tally}", flush=True)
        total += tally
    print(f"{'total':24} {total}")
    return int(total.mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
