"""A quantizer as one safetensors file: tensors, and the arguments that build it as metadata."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vqtriton._version import __version__
from vqtriton.quantizers import VectorQuantize, check_config
from vqtriton.residual.grouped import GroupedResidualVectorQuantize
from vqtriton.residual.quantizers import ResidualVectorQuantize
from vqtriton.weights import open_safetensors

Quantizer = VectorQuantize | ResidualVectorQuantize | GroupedResidualVectorQuantize
# the entry of the metadata that holds the configuration, and the class that it builds
FORMAT = "vqtriton.VectorQuantize"
CLASSES: dict[str, type[Quantizer]] = {
    FORMAT: VectorQuantize,
    "vqtriton.ResidualVectorQuantize": ResidualVectorQuantize,
    "vqtriton.GroupedResidualVectorQuantize": GroupedResidualVectorQuantize,
}


def save(vq: Quantizer, path: str | os.PathLike[str]) -> None:
    """Writes a quantizer to one safetensors file: codes, cluster sizes and configuration.

    An existing file is replaced in one step, so it is never half written. `load` builds the
    quantizer from the file alone. A model that contains a quantizer (encoder, quantizer, decoder)
    is saved as any torch model is, with ``model.state_dict()``: the codes are part of that.

    Args:
        vq: a `VectorQuantize`, `ResidualVectorQuantize` or `GroupedResidualVectorQuantize`, not a
            subclass of these. The options of the levels are those of the first one.
        path: the file, usually ``*.safetensors``.

    Raises:
        TypeError: ``vq`` is not such a quantizer, or an argument is not of its type.
        ValueError: a tensor holds NaN or infinity, an argument is out of its range, or the codebook
            is sharded. `load` would refuse such a file.

    Warns:
        UserWarning: the quantizer has no codes yet, as it waits for its k-means start.

    Example:
        >>> vq = vqtriton.VectorQuantize(16, 128)
        >>> vqtriton.save(vq, "codebook.safetensors")
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), vq)
        >>> torch.save(model.state_dict(), "model.pt")  # the whole model
    """
    # not a subclass either: `load` could not build it
    name_of_format = next((name for name, kind in CLASSES.items() if type(vq) is kind), None)
    if name_of_format is None:
        raise TypeError(
            f"vq is a {type(vq).__name__}; it must be a VectorQuantize or a residual quantizer"
        )
    levels = [module for module in vq.modules() if isinstance(module, VectorQuantize)]
    if any(level._is_sharded for level in levels):
        raise ValueError("vq.codebook is sharded; save a module that has gathered it")
    state, names = vq.state_dict(), _names(vq)
    # projections may have been cast
    tensors = {
        name: state[name].detach().float().cpu().contiguous().clone()
        for name in state
        if names.get(name, name) == name
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"vq.{name} holds NaN or infinity; the file would be of no use")
    # an attribute may have been set since it was built
    if isinstance(vq, VectorQuantize):
        check_config(vq.config)
    else:
        with torch.device("meta"):
            type(vq).from_config(vq.config)
    if not vq.is_initialized:
        warnings.warn(
            "vq has no codes yet: the file will be of a quantizer that waits for its k-means start",
            stacklevel=2,
        )
    # a single entry: safetensors writes several in any order, and equal modules give equal files
    metadata = {name_of_format: json.dumps({"version": __version__, **vq.config})}
    target = Path(path)
    # in the same folder, so that the rename cannot cross file systems
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, partial, metadata)
        umask = os.umask(0)
        os.umask(umask)
        Path(partial).chmod(0o666 & ~umask)
        Path(partial).replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(partial).unlink()
        raise


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Builds the quantizer that `save` wrote, in eval mode.

    Files of earlier versions load as well. To go on training, call ``train()`` on the result.

    Args:
        path: the file.
        device: where the tensors go.

    Returns:
        The quantizer, of the class and with the configuration that it was saved with.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: ``path`` is a directory.
        ValueError: the file was not written by `save`, is truncated, or holds tensors that do not
            fit its configuration or are not finite. The message says which.

    Example:
        >>> vqtriton.save(vqtriton.VectorQuantize(16, 128), "codebook.safetensors")
        >>> vq = vqtriton.load("codebook.safetensors")
        >>> indices = vq(torch.randn(100, 16)).indices  # [100]
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name_of_format = next((name for name in CLASSES if name in metadata), None)
    if name_of_format is None:
        raise ValueError(
            f"{path} was not written by vqtriton.save: its metadata has no entry {FORMAT!r}"
        )
    vq = _build(path, CLASSES[name_of_format], metadata[name_of_format], tensors)
    vq.load_state_dict(
        tensors | {name: tensors[first] for name, first in _names(vq).items() if first in tensors}
    )
    return vq.to(device).eval()


def _names(vq: torch.nn.Module) -> dict[str, str]:
    """The name of each tensor in a file, by its name in the state dict.

    They differ for a codebook that levels share: it is written once. Levels that somebody has tied
    are written one by one, as they come back untied.
    """
    part = vq.rvqs[0] if isinstance(vq, GroupedResidualVectorQuantize) else vq
    if not getattr(part, "shared_codebook", False):
        return {name: name for name in vq.state_dict()}
    first: dict[int, str] = {}
    state = vq.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _build(
    path: Path, kind: type[Quantizer], config: str, tensors: dict[str, torch.Tensor]
) -> Quantizer:
    """A module of the configuration, once the tensors are known to fit it."""
    try:
        arguments = json.loads(config)
        if not isinstance(arguments, dict):
            raise TypeError(f"{arguments!r:.80} are no arguments")
        arguments.pop("version", None)
        if kind is not VectorQuantize:
            _check_numbers(arguments, len(tensors))
        # on the meta device a lie about the size costs no memory
        with torch.device("meta"):
            skeleton = kind.from_config(arguments)
    # RuntimeError: sizes beyond any memory, JSON nested beyond the stack
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has a configuration that builds no module: {error}") from error
    state, names = skeleton.state_dict(), _names(skeleton)
    expected = {name: state[name] for name in state if names[name] == name}
    # an earlier version kept these beside them
    retired = {"is_initialized": torch.empty((), dtype=torch.bool, device="meta")}
    if isinstance(skeleton, VectorQuantize) and skeleton.codebook_update == "ema":
        retired["embed_sum"] = skeleton.codebook
    expected |= {name: tensor for name, tensor in retired.items() if name in tensors}
    if tensors.keys() != expected.keys():
        raise ValueError(f"{path} holds {sorted(tensors)}; expected {sorted(expected)}")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}; its configuration "
                f"says {tuple(want.shape)} {want.dtype}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    # its random codes are overwritten: they must not cost the caller random numbers
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return kind.from_config(arguments)


def _check_numbers(arguments: dict[str, Any], num_tensors: int) -> None:
    """Groups and levels have tensors of their own, so a lie about their number is found at once."""
    sizes, groups = arguments.get("codebook_size"), arguments.get("groups", 1)
    if not isinstance(sizes, list):
        raise TypeError(f"codebook_size is {sizes!r:.80}; it must be a list, of each level")
    levels = 1 if arguments.get("shared_codebook") else len(sizes)
    for name, number in (("codebook_size", levels), ("groups", groups)):
        if isinstance(number, int) and number > num_tensors:
            raise ValueError(f"{name} is for {number} parts; the file has {num_tensors} tensors")
