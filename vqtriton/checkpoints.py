"""Codebooks in the checkpoints of other projects, found by the names of their tensors."""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqtriton.functional import normalize
from vqtriton.quantizers import VectorQuantize
from vqtriton.residual.grouped import GroupedResidualVectorQuantize
from vqtriton.residual.quantizers import ResidualVectorQuantize
from vqtriton.tensors import gather
from vqtriton.weights import Readers, readers_of


class Layout(NamedTuple):
    """Names of the tensors of one codebook, below the path of its module."""

    codes: str
    sizes: str = ""
    # false: waits for k-means
    is_started: tuple[str, ...] = ()
    # a linear map from what is stored to the codes
    transform: str = ""
    has_always_transform: bool = False
    # what is stored is the sum of the vectors of a code, to be divided by the sizes
    is_sum: bool = False
    # names that the module may have; empty: any. Token embeddings have such a tensor as well
    modules: tuple[str, ...] = ()

    def path(self, key: str) -> str | None:
        """The module whose codes the tensor holds, or None: it holds no codes."""
        path, dot, codes = f".{key}".rpartition(f".{self.codes}")
        if not dot or codes or (self.modules and path.rpartition(".")[2] not in self.modules):
            return None
        return path[1:]


LAYOUTS = (
    # vector-quantize-pytorch writes initted, encodec inited
    Layout("_codebook.embed", "_codebook.cluster_size", ("_codebook.initted", "_codebook.inited")),
    # transformers: Encodec, XCodec, Higgs, WavTokenizer
    Layout("codebook.embed", "codebook.cluster_size", ("codebook.inited",)),
    # moshi, and Mimi in transformers
    Layout(
        "_codebook.embedding_sum",
        "_codebook.cluster_usage",
        ("_codebook._initialized",),
        is_sum=True,
    ),
    Layout("codebook.embed_sum", "codebook.cluster_usage", ("codebook.initialized",), is_sum=True),
    # DAC
    Layout("codebook.weight"),
    # SimVQ in vector-quantize-pytorch
    Layout("frozen_codebook", transform="code_transform", has_always_transform=True),
    # taming, diffusers; Chameleon, Emu3, Janus, GLM-Image in transformers. The transform is in the
    # SimVQ that its authors wrote
    Layout(
        "embedding.weight",
        "embedding.cluster_size",
        transform="embedding_proj",
        modules=("quantize", "quantizer", "vector_quantization", "vq", "vq_layer"),
    ),
)
# the path of a level of a residual quantizer
LEVEL = re.compile(r"(?:(?P<parent>.+?)\.)??(?:vq\.)?(?:layers|quantizers)\.(?P<level>\d+)")
# linear maps before the search and after it, of a level or of all levels
PROJECTIONS = (
    ("project_in", "project_out"),
    ("in_proj", "out_proj"),
    ("input_proj", "output_proj"),
)
# length and direction of a weight-normalised weight, by the older function of torch and the newer
WEIGHT_NORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
# with these beside them, the codes are not what is stored, but depend on the input
DEPENDENT = ("_codebook.vq_bridge.", "_codebook.codebook_mean")
# the same, beside the levels of a residual quantizer (QINCo)
DEPENDENT_LEVELS = ("mlps.",)
# sizes of moshi and Mimi are raised to it before the sums are divided by them
LEAST_SIZE = 1e-5


class Projection(NamedTuple):
    """A linear map of vectors: ``torch.nn.functional.linear(x, *projection)``.

    Attributes:
        weight: [out, in] float32.
        bias: [out] float32, or None.

    Example:
        >>> theirs = {"vq._codebook.embed": torch.randn(1, 128, 16)}
        >>> theirs |= torch.nn.Linear(64, 16).state_dict(prefix="vq.project_in.")
        >>> (level,) = vqtriton.load_codebooks(theirs)["vq"].levels
        >>> x = torch.nn.functional.linear(torch.randn(1000, 64), *level.project_in)  # [1000, 16]
        >>> indices = vqtriton.nearest_code(x, level.codebook)
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class LoadedCodebook:
    """The codes of one level of a quantizer, as `load_codebooks` finds them.

    Attributes:
        key: the name of the tensor that the codes were read from.
        codebook: [K, D] float32, or [H, K, D] where each of H heads has codes of its own.
        cluster_size: [K] or [H, K] float32, the rows that choose each code in a step, for
            ``VectorQuantize.set_codebook``; None where the file has none.
        project_in: `Projection` from the vectors of the model to those that are quantized, or None.
        project_out: `Projection` from codes back to vectors of the model, or None.
        heads: H, the number of indices that a vector has. 1 is one index without a dimension.

    Example:
        >>> theirs = {"vq._codebook.embed": torch.randn(1, 128, 16)}
        >>> (level,) = vqtriton.load_codebooks(theirs)["vq"].levels
        >>> indices = vqtriton.nearest_code(torch.randn(1000, 16), level.codebook)
    """

    key: str
    codebook: Tensor
    cluster_size: Tensor | None = None
    project_in: Projection | None = None
    project_out: Projection | None = None

    @property
    def heads(self) -> int:
        """H, the number of indices that a vector has."""
        if self.codebook.ndim == 3:
            return len(self.codebook)
        if self.project_out is None:
            return 1
        return self.project_out.weight.shape[1] // self.codebook.shape[1]

    def decode(self, indices: Tensor) -> Tensor:
        """The vectors that some indices stand for.

        Args:
            indices: [...] int64, or [..., H] with several heads; -1 gives a code of zeros.

        Returns:
            [..., D] float32, after ``project_out``.

        Raises:
            IndexError: an index outside [-1, K).

        Example:
            >>> theirs = {"vq._codebook.embed": torch.randn(1, 128, 16)}
            >>> (level,) = vqtriton.load_codebooks(theirs)["vq"].levels
            >>> vectors = level.decode(torch.randint(128, (8, 49)))  # [8, 49, 16]
        """
        codebook = self.codebook
        low, high = (-1, -1) if indices.numel() == 0 else map(int, indices.aminmax())
        if low < -1 or high >= codebook.shape[-2]:
            raise IndexError(
                f"indices has values from {low} to {high}; they must be in "
                f"[0, {codebook.shape[-2]}), or -1"
            )
        if codebook.ndim == 3:
            # the codes of head h are in rows h·K to h·K + K
            start = torch.arange(self.heads, dtype=torch.int64, device=indices.device)
            start = start * codebook.shape[1]
            codebook, indices = codebook.flatten(0, 1), indices.where(indices < 0, indices + start)
        vectors = gather(codebook, indices)
        if self.heads > 1 or self.codebook.ndim == 3:
            vectors = vectors.flatten(-2)
        return vectors if self.project_out is None else F.linear(vectors, *self.project_out)


@dataclass(frozen=True, eq=False)
class LoadedQuantizer:
    """A quantizer as `load_codebooks` finds it: one level, or the levels of a residual one.

    Attributes:
        levels: tuple of `LoadedCodebook`, in the order in which they are applied: each quantizes
            what the levels before it have left.
        project_in: `Projection` before the first level, or None.
        project_out: `Projection` of the sum of all levels, or None.

    Example:
        >>> theirs = {f"layers.{n}._codebook.embed": torch.randn(1, 128, 16) for n in range(3)}
        >>> quantizer = vqtriton.load_codebooks(theirs)[""]
        >>> residual, indices = torch.randn(1000, 16), []
        >>> for level in quantizer.levels:
        ...     indices.append(vqtriton.nearest_code(residual, level.codebook))
        ...     residual = residual - level.decode(indices[-1])
    """

    levels: tuple[LoadedCodebook, ...]
    project_in: Projection | None = None
    project_out: Projection | None = None

    def decode(self, *indices: Tensor) -> Tensor:
        """The vectors that some indices stand for: the sum over the levels, projected.

        Args:
            indices: those of the first level, then those of the second, and so on, see
                `LoadedCodebook.decode`. The last levels may be left out.

        Returns:
            [..., D] float32.

        Raises:
            ValueError: there are no indices, or more than levels.

        Example:
            >>> theirs = {f"layers.{n}._codebook.embed": torch.randn(1, 128, 16) for n in range(3)}
            >>> quantizer = vqtriton.load_codebooks(theirs)[""]
            >>> indices = torch.randint(128, (8, 49, 3))
            >>> vectors = quantizer.decode(*indices.unbind(-1))  # [8, 49, 16]
        """
        if not 1 <= len(indices) <= len(self.levels):
            raise ValueError(
                f"indices are {len(indices)} tensors; they must be 1 to {len(self.levels)}, one "
                "for each level"
            )
        pairs = zip(self.levels, indices, strict=False)
        vectors = torch.stack([level.decode(chosen) for level, chosen in pairs]).sum(0)
        return vectors if self.project_out is None else F.linear(vectors, *self.project_out)


def load_codebooks(
    state_dict_or_file: Mapping[str, Any] | str | os.PathLike[str],
) -> dict[str, LoadedQuantizer]:
    """Reads the codebooks in a checkpoint of another project.

    Quantizers are recognised by the names of their tensors: those of vector-quantize-pytorch (also
    residual, grouped, SimVQ), encodec, moshi, descript-audio-codec, taming-transformers, and of
    transformers (Encodec, Mimi, DAC, XCodec, Higgs, Chameleon, Emu3, Janus, GLM-Image) and
    diffusers. These projects need not be installed. Only the codebooks, their sizes and their
    projections are read from a safetensors file. Pickled files are read with ``weights_only=True``.

    The codes are those that the other project decodes with: averages are divided by their sizes,
    and transforms are applied. Where it normalises vectors and codes before it searches or decodes
    (DAC, Janus, GLM-Image, cosine similarity), its tensors do not say so, and nothing is normalised
    here.

    Args:
        state_dict_or_file: names and tensors, such as ``module.state_dict()``; or a path: of a
            safetensors file, of the index of several (``*.safetensors.index.json``), of what
            ``torch.save`` wrote, or of a folder that has such a file under its usual name.

    Returns:
        dict, from the path of each quantizer in its model to a `LoadedQuantizer`. The levels of a
        residual one are together: ``quantizer.layers.0`` to ``quantizer.layers.7`` give eight
        levels of ``quantizer``. Lists whose numbers are not 0, 1, 2, … are not taken for levels.

    Raises:
        TypeError: ``state_dict_or_file`` is neither a mapping nor a path, or holds something other
            than tensors under such a name.
        FileNotFoundError: the file does not exist, or the folder has no file with a usual name.
        ValueError: no codebook is found; a tensor has NaN or infinity or a shape that is unknown; a
            projection is not a linear map; or the codes depend on the input (as in QINCo).

    Warns:
        UserWarning: a codebook has not started: it waits for k-means, and its codes mean nothing.

    Example:
        >>> theirs = {"encoder.vq._codebook.embed": torch.randn(1, 128, 16)}
        >>> (loaded,) = vqtriton.load_codebooks(theirs)["encoder.vq"].levels
        >>> vq = vqtriton.VectorQuantize(16, 128)
        >>> vq.set_codebook(loaded.codebook)
    """
    readers = readers_of(state_dict_or_file)
    found: dict[str, LoadedCodebook] = {}
    for layout in LAYOUTS:
        for key in readers:
            if (path := layout.path(key)) is not None:
                if path in found:
                    raise ValueError(
                        f"state_dict_or_file has two codebooks at {path!r}: "
                        f"{found[path].key} and {key}"
                    )
                found[path] = _codebook(readers, key, path, layout)
    if not found:
        names = ", ".join(_join("|".join(one.modules), one.codes) for one in LAYOUTS)
        few = ", ".join(list(readers)[:5]) or "nothing"
        raise ValueError(
            f"state_dict_or_file has no codebook that is known: no name ends with one of {names}; "
            f"it has {len(readers)} names, such as {few}"
        )
    return _by_quantizer(readers, found)


def _by_quantizer(readers: Readers, found: dict[str, LoadedCodebook]) -> dict[str, LoadedQuantizer]:
    """The codebooks of the paths, with the levels of a residual quantizer together."""
    members: dict[str, dict[int, str]] = defaultdict(dict)
    for path in found:
        if match := LEVEL.fullmatch(path):
            numbered, level = members[match["parent"] or ""], int(match["level"])
            if level in numbered:
                both = f"{numbered[level]} and {path}"
                raise ValueError(f"state_dict_or_file has two codebooks for one level: {both}")
            numbered[level] = path
    lists = {
        parent: [paths[level] for level in sorted(paths)]
        for parent, paths in members.items()
        if sorted(paths) == list(range(len(paths)))
    }
    taken = {path for paths in lists.values() for path in paths}
    quantizers = {path: LoadedQuantizer((found[path],)) for path in found if path not in taken}
    for parent, paths in lists.items():
        _refuse_dependent(readers, parent, DEPENDENT_LEVELS)
        if parent in quantizers:
            raise ValueError(f"state_dict_or_file has a codebook at {parent!r} and levels below it")
        levels = tuple(found[path] for path in paths)
        quantizers[parent] = LoadedQuantizer(levels, *_projections(readers, parent))
    return dict(sorted(quantizers.items()))


def _codebook(readers: Readers, key: str, path: str, layout: Layout) -> LoadedCodebook:
    _refuse_dependent(readers, path, DEPENDENT)
    codes = _tensor(readers, key)
    sizes = None
    if layout.sizes and (name := _join(path, layout.sizes)) in readers:
        sizes = _tensor(readers, name)
    elif layout.is_sum:
        raise ValueError(f"{key} is there, but not {name}, by which it has to be divided")
    # a single head has no dimension here; vector-quantize-pytorch writes [1, K, D] and [1, K]
    if codes.ndim == 3 and len(codes) == 1:
        codes, sizes = codes[0], None if sizes is None else sizes.reshape(-1)
    if codes.ndim not in (2, 3) or codes.numel() == 0:
        raise ValueError(f"{key} has shape {tuple(codes.shape)}; it must be [K, D] or [H, K, D]")
    if sizes is not None and sizes.shape != codes.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(sizes.shape)}; with {key} of shape {tuple(codes.shape)} it "
            f"must be {tuple(codes.shape[:-1])}"
        )
    if layout.is_sum and sizes is not None:
        codes = codes / sizes.clamp(min=LEAST_SIZE)[..., None]
    if layout.transform and (transform := _linear(readers, _join(path, layout.transform))):
        codes = F.linear(codes, *transform)
    elif layout.has_always_transform:
        raise ValueError(f"{key} is there, but not {_join(path, layout.transform)}.weight")
    for name in (_join(path, flag) for flag in layout.is_started):
        if name in readers and not bool(readers[name]()):
            warnings.warn(
                f"{key} has not started: {name} is false, so it waits for its k-means start and "
                "its codes mean nothing yet",
                stacklevel=3,
            )
    return LoadedCodebook(key, codes, sizes, *_projections(readers, path))


def _refuse_dependent(readers: Readers, path: str, names: tuple[str, ...]) -> None:
    for name in names:
        start = _join(path, name)
        if other := next((key for key in readers if key.startswith(start)), None):
            raise ValueError(
                f"{other} changes the codes in each forward, so {path or 'the checkpoint'} has no "
                "codebook that could be read"
            )


def _projections(readers: Readers, path: str) -> tuple[Projection | None, Projection | None]:
    """Those beside the codes, or beside all levels."""
    for names in PROJECTIONS:
        before, after = (_linear(readers, _join(path, name)) for name in names)
        if before or after:
            return before, after
    return None, None


def _linear(readers: Readers, path: str) -> Projection | None:
    """A linear layer or a convolution of one vector, weight-normalised or not."""
    present = {key for key in readers if key.startswith(f"{path}.")}
    if not present:
        return None
    weight = bias = None
    if (key := f"{path}.weight") in present:
        weight = _tensor(readers, key)
        present.remove(key)
    for names in WEIGHT_NORMS:
        size, direction = (f"{path}.{name}" for name in names)
        if {size, direction} <= present:
            key = direction
            # the function that torch calls, so the weights have the same bits
            weight = torch._weight_norm(_tensor(readers, direction), _tensor(readers, size), 0)
            present -= {size, direction}
    if f"{path}.bias" in present:
        bias = _tensor(readers, f"{path}.bias")
        present.remove(f"{path}.bias")
    if weight is None or present:
        raise ValueError(
            f"{path} is not a linear map: its tensors are not a weight and a bias, there is "
            f"{sorted(present or {f'{path}.bias'})[0]}"
        )
    if weight.ndim < 2 or weight[0, 0].numel() != 1:
        raise ValueError(
            f"{key} has shape {tuple(weight.shape)}; it must be [out, in] or a convolution with "
            "kernels of size 1"
        )
    return Projection(weight.flatten(1), bias)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensor(readers: Readers, key: str) -> Tensor:
    """A tensor in float32, in memory of its own."""
    value = readers[key]()
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} is a {type(value).__name__}; it must be a tensor")
    tensor = value.detach().to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinity")
    return tensor


@torch.no_grad()
def to_vector_quantize_pytorch(
    vq: VectorQuantize | ResidualVectorQuantize | GroupedResidualVectorQuantize, eps: float = 1e-5
) -> dict[str, Tensor]:
    """The state dict of the same quantizer in vector-quantize-pytorch (1.32).

    There, ``VectorQuantize``, ``ResidualVQ`` or ``GroupedResidualVQ`` of the same sizes and with
    the same ``decay`` takes it. With "gradient", give it ``learnable_codebook=True,
    ema_update=False`` as well. Its averages are made so that its next step starts from these codes.
    The other direction is ``load_state_dict`` of ours, which takes their state dict as it is.

    Args:
        vq: the quantizer.
        eps: the argument ``eps`` that theirs has, by which it smooths the cluster sizes.

    Returns:
        dict: copies, float32, on the device of ``vq``. H is 1 without separate heads. In residual
        quantizers the names begin with ``layers.0.``, in grouped ones with ``rvqs.0.layers.0.``.

        _codebook.initted: [] bool, whether there are codes.
        _codebook.cluster_size: [H, K].
        _codebook.embed_avg: [H, K, D], each code times its smoothed cluster size.
        _codebook.embed: [H, K, D], the codes; of length 1 with ``use_cosine_sim``.
        project_in.*, project_out.*: the projections, if there are any.

    Raises:
        TypeError: ``vq`` is not such a quantizer.
        ValueError: a codebook is sharded.

    Example:
        >>> vq = vqtriton.VectorQuantize(16, 128)
        >>> theirs = vqtriton.to_vector_quantize_pytorch(vq)
        >>> found = vqtriton.VectorQuantize(16, 128).load_state_dict(theirs)
    """
    if not isinstance(vq, (VectorQuantize, ResidualVectorQuantize, GroupedResidualVectorQuantize)):
        raise TypeError(
            f"vq is a {type(vq).__name__}; it must be a VectorQuantize or a residual quantizer"
        )
    state: dict[str, Tensor] = {}
    # a shared codebook once for each of its levels, as theirs
    for path, module in vq.named_modules(remove_duplicate=False):
        if isinstance(module, VectorQuantize):
            tensors = _their_codebook(module, eps)
            state |= {_join(path, f"_codebook.{name}"): tensors[name] for name in tensors}
        elif path.rpartition(".")[2] in ("project_in", "project_out"):
            for name, tensor in module.state_dict(prefix=f"{path}.").items():
                state[name] = tensor.to(torch.float32, copy=True)
    return state


def _their_codebook(vq: VectorQuantize, eps: float) -> dict[str, Tensor]:
    if vq._is_sharded:
        raise ValueError("vq.codebook is sharded; give a module that has gathered it")
    codes, sizes = vq.codebook.detach(), vq.cluster_size
    if not vq.num_codebooks:
        codes, sizes = codes[None], sizes[None]
    total = sizes.sum(-1, keepdim=True)
    smoothed = (sizes + eps) / (total + vq.codebook_size * eps) * total
    return {
        "initted": vq.is_initialized.as_subclass(Tensor).to(codes.device),
        "cluster_size": sizes.clone(),
        "embed_avg": codes * smoothed[..., None],
        "embed": normalize(codes)
        if vq.use_cosine_sim
        else codes.clone(memory_format=torch.contiguous_format),
    }
