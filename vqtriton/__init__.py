"""Exact, deterministic vector quantization on GPUs."""

from vqtriton import metrics, reference
from vqtriton._version import __version__
from vqtriton.clustering import kmeans
from vqtriton.functional import code_sums, nearest_code, vector_quantize
from vqtriton.quantizers import VectorQuantize
from vqtriton.serialization import load, save

__all__ = [
    "VectorQuantize",
    "__version__",
    "code_sums",
    "kmeans",
    "load",
    "metrics",
    "nearest_code",
    "reference",
    "save",
    "vector_quantize",
]
