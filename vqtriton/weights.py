"""Tensors by name, in a state dict or in the files that models are saved in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# functions that read a tensor, by its name: a file is read only for the tensors that are needed
Readers = Mapping[str, Callable[[], Any]]
# in what trainers save, the weights of the model are under one of these
NESTED = ("state_dict", "model_state_dict", "best_state", "model")
# in a folder, the first of these that it has
NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    "pytorch_model.bin",
)


def readers_of(source: Mapping[str, Any] | str | os.PathLike[str]) -> Readers:
    """Functions that read the tensors of a state dict or of a file, by name."""
    if isinstance(source, Mapping):
        return _of_mapping(source)
    if not isinstance(source, (str, os.PathLike)):
        hint = "; give its state_dict()" if isinstance(source, torch.nn.Module) else ""
        raise TypeError(
            f"state_dict_or_file is a {type(source).__name__}; it must be a mapping from names to "
            f"tensors, or a path{hint}"
        )
    path = Path(source)
    if path.is_dir():
        names = [name for name in NAMES if (path / name).is_file()]
        if not names:
            raise FileNotFoundError(f"{path} has none of the files {', '.join(NAMES)}")
        path /= names[0]
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix == ".json":
        return _of_index(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # a broken pickle can raise anything
    except Exception as error:
        raise ValueError(f"{path} is not a file of torch.save that can be read: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; it must hold a state dict")
    return _of_mapping(loaded)


def _of_mapping(mapping: Mapping[str, Any]) -> Readers:
    while nested := next((n for n in NESTED if isinstance(mapping.get(n), Mapping)), None):
        mapping = mapping[nested]
    return {str(key): partial(mapping.__getitem__, key) for key in mapping}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors arrive on the CPU.

    Raises:
        ValueError: it is not a whole one.
    """
    try:
        # safetensors 0.5 reads to the device that is set as the default, whatever it is asked for
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _of_safetensors(path: Path) -> Readers:
    with open_safetensors(path) as file:
        names = list(file.keys())
    return {name: partial(_from_safetensors, path, name) for name in names}


def _from_safetensors(path: Path, name: str) -> Tensor:
    with open_safetensors(path) as file:
        return file.get_tensor(name)


def _of_index(path: Path) -> Readers:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {name: path.parent / file for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
    return {name: partial(_from_shard, file, name) for name, file in names.items()}


def _from_shard(path: Path, name: str) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}, which has {name}")
    readers = _of_safetensors(path)
    if name not in readers:
        raise ValueError(f"{path} has no tensor {name}, which the index says is there")
    return readers[name]()
