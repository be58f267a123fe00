"""The quantizers of other projects that `vqtriton.patch` knows, by the shape of their classes.

Nothing here imports those projects. A row says how a class is recognised. Whether a module does
what the row takes it to do is tried before it is patched: `vqtriton.clients.trial`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch import Tensor, nn

from vqtriton.clients import methods


def shell_of(module: nn.Module) -> nn.Module:
    """Another with the same tensors and modules; what is set on it is not set on the first."""
    # not by a __new__ of its class, which may build a whole module
    shell = object.__new__(module.__class__)
    shell.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell


class Client(NamedTuple):
    """A kind of quantizer."""

    project: str
    # a pattern for the name of the class
    name: str
    # where a module has its codebook
    codebook: str
    # what is replaced; the first is tried
    methods: dict[str, Callable[..., Any]]
    # the shape of what is given to it when it is tried: -1 stands for D
    shape: tuple[int, ...]
    # how many of its results are compared
    num_results: int | None = None
    # a list of levels, and the codebook of each: what has to be patched before this is
    levels: str = ""
    # the package and its release, where more is replaced than can be tried
    package: str = ""
    release: str = ""

    def fits(self, base: type) -> bool:
        """Whether the class has this name and these methods of its own."""
        package = base.__module__.partition(".")[0]
        return (
            re.fullmatch(self.name, base.__name__) is not None
            and self.package in ("", package)
            and self.methods.keys() <= vars(base).keys()
        )

    def codebook_of(self, module: nn.Module) -> Tensor | None:
        try:
            # asked of a shell, since Mimi and moshi store the codes when they are asked for them
            codebook = reduce(getattr, self.codebook.split("."), shell_of(module))
        except AttributeError:
            return None
        return codebook if isinstance(codebook, Tensor) and codebook.ndim in (2, 3) else None

    def codebooks_inside(self, module: nn.Module) -> list[nn.Module]:
        """The modules around which this one only passes vectors on."""
        if self.levels:
            return [level.codebook for level in getattr(module, self.levels)]
        return [] if self.shape else [module.get_submodule(self.codebook.partition(".")[0])]

    def wrong_release(self) -> str | None:
        """What is installed in place of the release that is known."""
        if not self.release:
            return None
        try:
            found = version(self.package.replace("_", "-"))
        except PackageNotFoundError:
            found = "unknown"
        is_known = f"{found}.".startswith(f"{self.release}.")
        return None if is_known else f"{found}; {self.release} is known"


ROWS, LATENTS, MAP, VIDEO = (24, -1), (2, -1, 12), (2, -1, 3, 4), (1, 2, -1, 3, 4)
VECTOR_QUANTIZE_PYTORCH = "vector_quantize_pytorch", "1.32"

CLIENTS = (
    Client(
        "Mimi of transformers",
        "MimiEuclideanCodebook",
        "embed",
        {"quantize": methods.quantize_rows_in_float32},
        ROWS,
    ),
    Client(
        "EnCodec and its descendants",
        r"\w*EuclideanCodebook",
        "embed",
        {"quantize": methods.quantize_rows},
        ROWS,
    ),
    Client(
        "Encodec of transformers, all levels",
        "EncodecResidualVectorQuantizer",
        "layers.0.codebook.embed",
        {"encode": methods.encode_of_encodec},
        LATENTS,
        levels="layers",
    ),
    Client(
        "XCodec of transformers, all levels",
        "XcodecResidualVectorQuantization",
        "quantizers.0.codebook.embed",
        {"encode": methods.encode_of_xcodec},
        LATENTS,
        levels="quantizers",
    ),
    Client(
        "moshi",
        "EuclideanCodebook",
        "embedding",
        {"_quantize": methods.quantize_rows_of_moshi},
        ROWS,
    ),
    Client(
        "DAC",
        r"\w*VectorQuantize",
        "codebook.weight",
        {"decode_latents": methods.decode_latents},
        LATENTS,
    ),
    Client(
        "Chameleon and Janus",
        r"(Chameleon|Janus)VQVAEVectorQuantizer",
        "embedding.weight",
        {"forward": methods.forward_of_chameleon},
        MAP,
    ),
    Client(
        "GLM-Image",
        "GlmImageVQVAEVectorQuantizer",
        "embedding.weight",
        {"forward": methods.forward_of_glm},
        MAP,
    ),
    Client(
        "Emu3",
        r"Emu3VQVAEVectorQuantizer",
        "embedding.weight",
        {"forward": methods.forward_of_emu3},
        VIDEO,
    ),
    Client(
        "diffusers",
        "VectorQuantizer",
        "embedding.weight",
        {"forward": methods.forward_of_diffusers},
        MAP,
    ),
    Client(
        "taming-transformers",
        "VectorQuantizer2",
        "embedding.weight",
        {"forward": methods.forward_of_taming},
        MAP,
    ),
    Client(
        "vector-quantize-pytorch",
        "Codebook",
        "embed",
        {
            "forward": methods.forward_of_codebook,
            "track_cluster_size_and_embed_avg": methods.track_cluster_size_and_embed_avg,
            "update_indices": methods.update_indices,
            "update_ema_indices": methods.update_indices,
        },
        (2, 12, -1),
        2,
        "",
        *VECTOR_QUANTIZE_PYTORCH,
    ),
    Client(
        "vector-quantize-pytorch",
        "VectorQuantize",
        "_codebook.embed",
        {"forward": methods.forward_of_vector_quantize},
        (),
        0,
        "",
        *VECTOR_QUANTIZE_PYTORCH,
    ),
)
