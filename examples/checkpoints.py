"""Files of a run that are there as a whole or not at all, and checkpoints made of them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# the one entry of the metadata: safetensors writes several in any order
FORMAT = "vqtriton.examples.vqvae"


def write_atomically(path: Path, content: bytes) -> None:
    """An existing file is replaced in one step; a process that is killed leaves the old one."""
    # in the same folder, so that the rename cannot cross file systems
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes a private file; this one is to be like any other
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def save_checkpoint(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Tensors, and whatever JSON can hold, with "arguments" among it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(tensors, {FORMAT: json.dumps(info)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` was given, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it was not written by `save_checkpoint`, or not as a whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if not isinstance(info, dict) or not isinstance(info.get("arguments"), dict):
        raise ValueError(f"{path} is not a checkpoint of train_mnist.py")
    return tensors, info


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a checkpoint whose names begin with the prefix, without it."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
