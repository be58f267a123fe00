"""A quantizer as one safetensors file: tensors, and the arguments that build it as metadata."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from vqtriton._version import __version__
from vqtriton.quantizers import VectorQuantize, check_config
from vqtriton.weights import open_safetensors

FORMAT = "vqtriton.VectorQuantize"


def save(vq: VectorQuantize, path: str | os.PathLike[str]) -> None:
    """Writes a quantizer to one safetensors file: codes, cluster sizes and configuration.

    An existing file is replaced in one step, so it is never half written. `load` builds the
    quantizer from the file alone. A model that contains a quantizer (encoder, quantizer, decoder)
    is saved as any torch model is, with ``model.state_dict()``: the codes are part of that.

    Args:
        vq: the quantizer, not a subclass of `VectorQuantize`.
        path: the file, usually ``*.safetensors``.

    Raises:
        TypeError: ``vq`` is not a `VectorQuantize`, or an argument is not of its type.
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
    if type(vq) is not VectorQuantize:
        raise TypeError(f"vq is a {type(vq).__name__}; it must be a VectorQuantize")
    if vq._is_sharded:
        raise ValueError("vq.codebook is sharded; save a module that has gathered it")
    # projections may have been cast
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in vq.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"vq.{name} holds NaN or infinity; the file would be of no use")
    # an attribute may have been set since it was built
    check_config(vq.config)
    if not vq.is_initialized:
        warnings.warn(
            "vq has no codes yet: the file will be of a quantizer that waits for its k-means start",
            stacklevel=2,
        )
    # a single entry: safetensors writes several in any order, and equal modules give equal files
    metadata = {FORMAT: json.dumps({"version": __version__, **vq.config})}
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


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> VectorQuantize:
    """Builds the quantizer that `save` wrote, in eval mode.

    Files of earlier versions load as well. To go on training, call ``train()`` on the result.

    Args:
        path: the file.
        device: where the tensors go.

    Returns:
        `VectorQuantize`, with the configuration that it was saved with.

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
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} was not written by vqtriton.save: its metadata has no entry {FORMAT!r}"
        )
    vq = _build(path, metadata[FORMAT], tensors)
    vq.load_state_dict(tensors)
    return vq.to(device).eval()


def _build(path: Path, config: str, tensors: dict[str, torch.Tensor]) -> VectorQuantize:
    """A module of the configuration, once the tensors are known to fit it."""
    try:
        arguments = json.loads(config)
        if not isinstance(arguments, dict):
            raise TypeError(f"{arguments!r:.80} are no arguments")
        arguments.pop("version", None)
        # on the meta device a lie about the size costs no memory
        with torch.device("meta"):
            skeleton = VectorQuantize.from_config(arguments)
    # RuntimeError: sizes beyond any memory, JSON nested beyond the stack
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has a configuration that builds no module: {error}") from error
    expected = skeleton.state_dict()
    # an earlier version kept these beside them
    retired = {"is_initialized": torch.empty((), dtype=torch.bool, device="meta")}
    if skeleton.codebook_update == "ema":
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
        return VectorQuantize.from_config(arguments)
