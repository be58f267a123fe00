"""What is measured: searches, a step of which models train with, and the roofline's."""

from __future__ import annotations

from dataclasses import dataclass

from vqtriton.tuning.machines import SHAPES, Shape

SCOPES = ("assign", "inference", "forward", "training")


@dataclass(frozen=True)
class Case:
    """Vectors of one step (N), codes (K), and the size of both (D)."""

    name: str
    num_rows: int
    codebook_size: int
    dim: int
    # of vectors and codes, as some models have them
    is_unit_norm: bool = False
    # searches like this one that a step of the model makes; one of them is measured
    codebooks: int = 1

    def __str__(self) -> str:
        return f"{self.name}: N={self.num_rows} K={self.codebook_size} D={self.dim}"

    @property
    def products(self) -> int:
        return self.num_rows * self.codebook_size * self.dim

    @property
    def matrix_bytes(self) -> int:
        """Of the [N, K] matrix in float32."""
        return 4 * self.num_rows * self.codebook_size

    def least_bytes(self, scope: str, element_size: int) -> int:
        """What has to be read or written once, however it is done."""
        vectors = self.num_rows * self.dim * element_size
        codebook = 4 * self.codebook_size * self.dim
        # the index, and quantized; then grad in and grad out
        moved = {"assign": 1, "inference": 2, "forward": 2, "training": 4}[scope] * vectors
        # where codes learn, codebook and sums are read and written
        state = codebook if scope in ("assign", "inference") else 4 * codebook
        return moved + state + 8 * self.num_rows


def _roofline(shape: Shape) -> Case:
    rows = f"{shape.num_rows >> 20}M" if shape.num_rows >> 20 else f"{shape.num_rows >> 10}K"
    name = f"roofline-{rows}-{shape.codebook_size}-{shape.dim}"
    return Case(name, shape.num_rows, shape.codebook_size, shape.dim)


CASES = {
    case.name: case
    for case in (
        # an [N, K] matrix of 512 MiB, and one of 1 GiB, leaves every cache
        Case("square", 16384, 8192, 64),
        Case("wide", 4096, 65536, 16),
        # image tokenizers: tokens of a batch
        Case("taming", 3072, 1024, 256),
        Case("rotation-f8", 16384, 16384, 4),
        Case("rotation-f4", 65536, 8192, 3),
        Case("vit-vqgan", 32768, 8192, 32),
        Case("llamagen", 32768, 16384, 8, is_unit_norm=True),
        Case("ibq", 2048, 262144, 256),
        Case("simvq", 16384, 262144, 128),
        Case("titok", 4096, 4096, 12),
        Case("ta-titok", 4096, 8192, 64),
        # 16 images of 680 tokens, over ten scales
        Case("var", 10880, 4096, 32, codebooks=10),
        # audio codecs
        Case("encodec", 4800, 1024, 128, codebooks=32),
        Case("dac", 2376, 1024, 8, is_unit_norm=True, codebooks=9),
        # 16 windows of 12 s, 12.5 frames a second
        Case("mimi", 2400, 2048, 256, codebooks=32),
        Case("wavtokenizer", 9000, 4096, 512),
        # semantic IDs for recommendation
        Case("rq-vae", 640, 256, 32, codebooks=3),
        *map(_roofline, SHAPES),
    )
}

# what `make bench` measures: minutes on two cores
MODELS = ("taming", "titok", "encodec", "dac", "rq-vae")
DEFAULT = {
    "assign": ("square", "wide"),
    "inference": MODELS,
    "forward": MODELS,
    "training": MODELS,
}
DEFAULT_SCOPES = ("assign", "training")
