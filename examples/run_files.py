"""The folder of a run: one run at a time, and files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# the one entry of the metadata: safetensors writes several in any order
FORMAT = "vqtriton.examples.vqvae"
# any of these in a folder means that a run has been there
RESULTS = ("checkpoint.safetensors", "log.jsonl", "metrics.json")


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
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if not isinstance(info, dict) or not isinstance(info.get("arguments"), dict):
        raise ValueError(f"{path} is not a checkpoint of these examples")
    return tensors, info


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a checkpoint whose names begin with the prefix, without it."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Makes the folder, for this process alone. Unless it resumes, a run that is there is kept.

    It is kept by another name: the whole folder becomes ``<folder>-1``, or the first number that
    is free. A run that has not made a step is not kept.

    Raises:
        OSError: another process has claimed it, or the folder cannot be made or renamed.
    """
    # a path that stays the same when the working directory is renamed
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        run = _what_is_in(folder, resume)
        if not run:
            yield
            return
        if Path.cwd().is_relative_to(folder):
            raise OSError(f"{folder} holds {run}; say --resume, or another --out")
        names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(1))
        kept = next(path for path in names if not path.exists())
        try:
            folder.rename(kept)
        except OSError as error:
            # as where something is mounted
            reason = f"it cannot be renamed ({error.strerror}); say --resume, or another --out"
            raise OSError(f"{folder} holds {run}, and {reason}") from error
    print(f"{folder} held {run}. It is kept: {kept}", flush=True)
    folder.mkdir()
    with _locked(folder):
        yield


def _what_is_in(folder: Path, resume: bool) -> str:
    """Describes the run that has to be kept, or returns "" if nothing has to be kept."""
    checkpoint = folder / RESULTS[0]
    if (resume and checkpoint.exists()) or not any((folder / name).exists() for name in RESULTS):
        return ""
    try:
        _, info = load_checkpoint(checkpoint)
        if info["step"] == 0:
            return ""
        return f"a run of {len(info['log'])} of {info['arguments']['epochs']} epochs"
    except (OSError, ValueError, LookupError, TypeError):
        return "an earlier run"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process can lock the folder. The lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OSError(f"another process is training in {folder}") from None
    finally:
        os.close(descriptor)
