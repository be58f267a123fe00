"""A quantizer as one safetensors file: tensors, and the arguments that build it as metadata."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vqtriton._version import __version__
from vqtriton.quantizers import VectorQuantize

FORMAT = "vqtriton.VectorQuantize"


def save(vq: VectorQuantize, path: str | os.PathLike[str]) -> None:
    """Writes codebook, statistics and configuration; an existing file is replaced in one step.

    Raises:
        TypeError: ``vq`` is not a `VectorQuantize`.
        ValueError: a tensor holds NaN or infinity, or an argument is not of its type: `load`
            would refuse it.
    """
    if not isinstance(vq, VectorQuantize):
        raise TypeError(f"vq is a {type(vq).__name__}; it must be a VectorQuantize")
    tensors = {name: t.detach().cpu().contiguous() for name, t in vq.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"vq.{name} holds NaN or infinity; the file would be of no use")
    _check_types(vq.config)
    metadata = {"format": FORMAT, "version": __version__, "config": json.dumps(vq.config)}
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
    """Builds the quantizer that `save` wrote, in training mode as a new module is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, truncated, tensors that do not fit its configuration, or
            values that are not finite. The message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by vqtriton.save: its metadata has format "
            f"{metadata.get('format')!r}, not {FORMAT!r}"
        )
    vq = _build(path, metadata.get("config", ""), tensors)
    vq.load_state_dict(tensors)
    return vq.to(device)


def _build(path: Path, config: str, tensors: dict[str, torch.Tensor]) -> VectorQuantize:
    """A module of the configuration, once the tensors are known to fit it."""
    try:
        arguments = json.loads(config)
        _check_types(arguments)
        # on the meta device a lie about the size costs no memory
        with torch.device("meta"):
            skeleton = VectorQuantize(**arguments)
    # RuntimeError: sizes beyond any memory, JSON nested beyond the stack
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has a configuration that builds no module: {error}") from error
    expected = skeleton.state_dict()
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
    return VectorQuantize(**arguments)


def _check_types(arguments: Any) -> None:
    """The constructor checks what it can compare; "no" for a bool or 2.5 for an int gets past it.

    Raises:
        ValueError: an argument is not of its type, or not finite.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"{arguments!r:.80} are no arguments")
    for name, kind in get_type_hints(VectorQuantize.__init__).items():
        if name not in arguments:
            continue
        value = arguments[name]
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{name} is {value!r:.80}; it must be of type {kind.__name__}")
        if kind is float and not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} is {value!r:.80}; it must be finite")
