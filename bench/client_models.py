"""Quantizers of other projects, built with random codes: what `vqtriton.patch` is tried on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn


class BaseModel(nn.Module):
    """Stands in for that of audiotools, from which no quantizer takes anything."""

    INTERN: list[str] = []  # noqa: RUF012
    EXTERN: list[str] = []  # noqa: RUF012


# packages that only other parts of the projects need
ABSENT = (
    *("torchaudio", "torchaudio.functional", "sentencepiece", "sphn", "aiohttp", "argbind"),
    *("audiotools", "audiotools.ml", "audiotools.core", "audiotools.core.util"),
)


def foreign(name: str) -> ModuleType:
    """A module of another project.

    Raises:
        ModuleNotFoundError: the project is not installed.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    stand_ins = {}
    for other in ABSENT:
        if importlib.util.find_spec(other.partition(".")[0]) is None:
            stand_ins[other] = MagicMock(BaseModel=BaseModel, __spec__=ModuleSpec(other, None))
            stand_ins[other].ml.BaseModel = BaseModel
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(name)
    finally:
        for other in stand_ins:
            del sys.modules[other]


@dataclass(frozen=True)
class ClientModel:
    """A quantizer of another project at the size that its models have."""

    project: str
    # module and class, without the name of the project
    path: str
    codebook_size: int
    dim: int
    # vectors of one frame, and of one batch
    frame: int
    batch: int
    build: Callable[[type, Any], nn.Module]
    method: str
    # from the number of vectors and D to the shape of x
    shape: Callable[[int, int], tuple[int, ...]]
    levels: int = 1

    @property
    def name(self) -> str:
        return f"{self.project} {self.path.rpartition('.')[2]}"

    def module(
        self, codebook_size: int | None = None, dim: int | None = None, levels: int | None = None
    ) -> nn.Module:
        """In eval mode; sizes are those of the model unless they are given."""
        size, width = codebook_size or self.codebook_size, dim or self.dim
        levels = levels or self.levels
        config = SimpleNamespace(
            **{"codebook_size": size, "codebook_dim": width, "num_quantizers": levels},
            **{"vector_quantization_hidden_dimension": width, "hidden_size": width},
            **{"frame_rate": 50, "n_codebooks": levels, "quantizer_dropout": 0},
            **{"num_embeddings": size, "embed_dim": width, "num_patches": 4, "beta": 0.25},
        )
        module_name, _, class_name = f"{self.project}.{self.path}".rpartition(".")
        module = self.build(getattr(foreign(module_name), class_name), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point() and tensor.ndim > 1:
                    tensor.normal_(0, 0.3, generator=generator)
                elif "initialized" in name or "usage" in name:
                    tensor.fill_(1)
        return module.eval()

    def x(self, num_rows: int, dim: int | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape(num_rows, dim or self.dim), generator=generator)

    def run(self, module: nn.Module, x: Tensor) -> Any:
        return module(x) if self.method == "__call__" else getattr(module, self.method)(x)


def _frames(num_rows: int, dim: int) -> tuple[int, ...]:
    return 1, dim, num_rows


def _rows(num_rows: int, dim: int) -> tuple[int, ...]:
    return 1, num_rows, dim


def _map(num_rows: int, dim: int) -> tuple[int, ...]:
    height = max(
        side for side in range(1, num_rows + 1) if side**2 <= num_rows and num_rows % side == 0
    )
    return 1, dim, height, num_rows // height


def _video(num_rows: int, dim: int) -> tuple[int, ...]:
    return 1, *_map(num_rows, dim)


def _of_config(kind: type, config: Any) -> nn.Module:
    return kind(config)


def _of_taming(kind: type, config: Any) -> nn.Module:
    return kind(config.codebook_size, config.codebook_dim, 0.25)


def _of_dac(kind: type, config: Any) -> nn.Module:
    return kind(64, config.n_codebooks, config.codebook_size, config.codebook_dim)


def _of_encodec(kind: type, config: Any) -> nn.Module:
    return kind(
        num_quantizers=config.num_quantizers,
        dim=config.codebook_dim,
        codebook_size=config.codebook_size,
        kmeans_init=False,
    )


def _of_moshi(kind: type, config: Any) -> nn.Module:
    sizes = {"n_q": config.num_quantizers, "bins": config.codebook_size}
    return kind(dimension=config.codebook_dim, **sizes)


def _of_lucidrains(**options: Any) -> Callable[[type, Any], nn.Module]:
    def build(kind: type, config: Any) -> nn.Module:
        return kind(dim=config.codebook_dim, codebook_size=config.codebook_size, **options)

    return build


def _of_residual(kind: type, config: Any) -> nn.Module:
    sizes = {"dim": config.codebook_dim, "codebook_size": config.codebook_size}
    return kind(num_quantizers=config.num_quantizers, **sizes)


def _transformers(name: str, kind: str) -> str:
    return f"models.{name}.modeling_{name}.{kind}"


HIGGS = "higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerResidualVectorQuantization"
ENCODE = _of_config, "encode", _frames
FORWARD = _of_config, "__call__", _map
MODELS = (
    ClientModel(
        "transformers", _transformers("encodec", "EncodecResidualVectorQuantizer"),
        1024, 128, 75, 750, *ENCODE, levels=8,
    ),
    ClientModel(
        "transformers", _transformers("mimi", "MimiResidualVectorQuantizer"),
        2048, 256, 13, 125, *ENCODE, levels=8,
    ),
    ClientModel(
        "transformers", _transformers("dac", "DacResidualVectorQuantizer"),
        1024, 8, 86, 860, _of_config, "__call__", _frames, levels=9,
    ),
    ClientModel(
        "transformers", _transformers("xcodec", "XcodecResidualVectorQuantization"),
        1024, 1024, 50, 500, *ENCODE, levels=8,
    ),
    ClientModel(
        "transformers", _transformers(*HIGGS), 1024, 64, 25, 250, *ENCODE, levels=8
    ),
    ClientModel(
        "transformers", _transformers("wavtokenizer", "WavTokenizerEuclideanCodebook"),
        4096, 512, 40, 400, _of_config, "encode", _rows,
    ),
    ClientModel(
        "transformers", _transformers("chameleon", "ChameleonVQVAEVectorQuantizer"),
        8192, 256, 16, 1024, *FORWARD,
    ),
    ClientModel(
        "transformers", _transformers("janus", "JanusVQVAEVectorQuantizer"),
        16384, 8, 16, 576, *FORWARD,
    ),
    ClientModel(
        "transformers", _transformers("emu3", "Emu3VQVAEVectorQuantizer"),
        32768, 4, 16, 4096, _of_config, "__call__", _video,
    ),
    ClientModel(
        "transformers", _transformers("glm_image", "GlmImageVQVAEVectorQuantizer"),
        16384, 2048, 16, 256, *FORWARD,
    ),
    ClientModel(
        "diffusers", "models.autoencoders.vae.VectorQuantizer",
        16384, 4, 16, 8192, _of_taming, "__call__", _map,
    ),
    ClientModel(
        "encodec", "quantization.core_vq.ResidualVectorQuantization",
        1024, 128, 75, 750, _of_encodec, "encode", _frames, levels=8,
    ),
    ClientModel(
        "dac", "nn.quantize.ResidualVectorQuantize",
        1024, 8, 86, 860, _of_dac, "__call__", lambda n, _: (1, 64, n), levels=9,
    ),
    ClientModel(
        "moshi", "quantization.ResidualVectorQuantizer",
        2048, 256, 13, 125, _of_moshi, "encode", _frames, levels=8,
    ),
    ClientModel(
        "vector_quantize_pytorch", "VectorQuantize",
        1024, 64, 16, 4096, _of_lucidrains(), "__call__", _rows,
    ),
    ClientModel(
        "vector_quantize_pytorch", "ResidualVQ",
        1024, 128, 75, 750, _of_residual, "__call__", _rows, levels=8,
    ),
)  # fmt: skip
