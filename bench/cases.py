"""What is measured: shapes that models train with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One training step of ``num_rows`` (N) vectors."""

    name: str
    num_rows: int
    codebook_size: int
    dim: int

    def __str__(self) -> str:
        return f"{self.name}: N={self.num_rows} K={self.codebook_size} D={self.dim}"


CASES = {
    case.name: case
    for case in (
        # large enough that an [N, K] matrix (512 MiB) leaves every cache
        Case("default", 16384, 8192, 64),
        # VQGAN: 12 images of 16 x 16 tokens
        Case("taming", 3072, 1024, 256),
        # one level of semantic IDs for recommendation
        Case("rq-vae", 640, 256, 32),
        # one level of an audio codec
        Case("encodec", 4800, 1024, 128),
    )
}
