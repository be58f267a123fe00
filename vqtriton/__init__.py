"""Exact, deterministic vector quantization on GPUs."""

from pathlib import Path

# in a checkout the kernels are beside this folder; where they are installed, they are in it
if (Path(__file__).parents[1] / "kernels" / "nearest_code.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

from vqtriton import metrics, reference
from vqtriton._version import __version__
from vqtriton.checkpoints import (
    LoadedCodebook,
    LoadedQuantizer,
    Projection,
    load_codebooks,
    to_vector_quantize_pytorch,
)
from vqtriton.clients.patching import Patched, patch, unpatch
from vqtriton.clustering import kmeans
from vqtriton.functional import (
    PreparedCodebook,
    code_sums,
    nearest_code,
    nearest_codes,
    prepare_codebook,
    vector_quantize,
)
from vqtriton.plain import PlainQuantizer
from vqtriton.quantizers import VectorQuantize
from vqtriton.residual.functional import PreparedCodebooks, prepare_codebooks, residual_quantize
from vqtriton.residual.grouped import GroupedResidualVectorQuantize, GroupedResidualVQ
from vqtriton.residual.quantizers import QuantizedLevels, ResidualVectorQuantize, ResidualVQ
from vqtriton.serialization import load, save
from vqtriton.warmup import warmup

__all__ = [
    "GroupedResidualVQ",
    "GroupedResidualVectorQuantize",
    "LoadedCodebook",
    "LoadedQuantizer",
    "Patched",
    "PlainQuantizer",
    "PreparedCodebook",
    "PreparedCodebooks",
    "Projection",
    "QuantizedLevels",
    "ResidualVQ",
    "ResidualVectorQuantize",
    "VectorQuantize",
    "__version__",
    "code_sums",
    "kmeans",
    "load",
    "load_codebooks",
    "metrics",
    "nearest_code",
    "nearest_codes",
    "patch",
    "prepare_codebook",
    "prepare_codebooks",
    "reference",
    "residual_quantize",
    "save",
    "to_vector_quantize_pytorch",
    "unpatch",
    "vector_quantize",
    "warmup",
]
