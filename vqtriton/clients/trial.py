"""Whether a module does what it is taken to do: its own method and the new one, side by side.

Both run on a twin of the module with few and random codes, so that the values of the module, such
as the zeros of one that is not yet loaded, do not matter and nothing in it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from vqtriton.clients.search import ATTRIBUTE, Searches, this_thread
from vqtriton.clients.table import Client, shell_of

NUM_CODES = 64


def disagreement(module: nn.Module, base: type, client: Client, codebook: Tensor) -> str | None:
    """Why a module is not what ``client`` describes, as a clause; None if it is."""
    if client.wrong_release() is not None:
        return f"its release is {client.wrong_release()}"
    if not client.shape:
        return None
    name, method = next(iter(client.methods.items()))
    size, dim = codebook.shape[-2:]
    heads = codebook.shape[:-2]
    shape = [dim if length == -1 else length for length in client.shape]
    devices = [codebook.device] if codebook.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        x = torch.randn(*heads, *shape, dtype=torch.float32, device=codebook.device)
        try:
            twin = _twin(module, client.codebook.split("."), size)
            twin.__dict__[ATTRIBUTE] = searches = Searches("auto")
            searches.without_scores[this_thread()] = True
            theirs = _results(vars(base)[name], twin, x)
        except Exception as error:
            return f"its {name} raised {type(error).__name__} in a trial: {error}"
        try:
            ours = _results(method, twin, x)
        except Exception as error:
            return f"its {name} is another: the new one raised {type(error).__name__}: {error}"
    theirs, ours = theirs[: client.num_results], ours[: client.num_results]
    if len(theirs) != len(ours) or not all(map(_agree, theirs, ours)):
        return f"its {name} gives other results than that of {client.project}"
    return None


def _results(method: Callable[..., Any], twin: nn.Module, x: Tensor) -> list[Any]:
    torch.manual_seed(0)
    results = method(twin, x.clone())
    # None is a result
    return _pytree.tree_flatten(results, is_leaf=lambda part: part is None)[0]


def _agree(theirs: Any, ours: Any) -> bool:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        return theirs is ours
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3)


def _twin(module: nn.Module, path: list[str], size: int) -> nn.Module:
    """A module with the same attributes, in eval mode, and its codebook of other values."""
    twin = shell_of(module)
    # a hook may have put another here
    twin.__dict__.pop("forward", None)
    twin.__dict__.update({"training": False, "_forward_hooks": {}, "_forward_pre_hooks": {}})
    for tensors in ("_parameters", "_buffers"):
        held = twin.__dict__[tensors]
        held.update({name: _other(tensor, size) for name, tensor in held.items()})
    # what is computed from the codebook, once
    for name in ("_embed", "_embedding"):
        if name in twin.__dict__:
            twin.__dict__[name] = None
        if name in twin._buffers:
            twin._buffers[name] = None
    child = twin._modules.get(path[0]) if path else None
    if child is not None:
        twin._modules[path[0]] = _twin(child, path[1:], size)
    return twin


def _other(tensor: Tensor | None, size: int) -> Tensor | None:
    """Random values, and True; at most `NUM_CODES` along the first dimension that is K."""
    if tensor is None:
        return None
    # the last of three, or more, is D, which may be as large
    places = tensor.shape[:-1] if tensor.ndim > 2 else tensor.shape
    if size in places:
        tensor = tensor.narrow(list(places).index(size), 0, min(size, NUM_CODES))
    if not tensor.is_floating_point():
        # a flag says that k-means has been done
        return torch.ones_like(tensor) if tensor.dtype == torch.bool else tensor.clone()
    other = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    # sizes of clusters are positive
    return other.normal_() if other.ndim > 1 else other.uniform_(0.5, 1.5)
