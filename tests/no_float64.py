"""A device that has no float64, as Apple's GPUs, played on a CPU.

Whatever torch is asked to do with its tensors is done with CPU tensors behind them, and refused
where it makes a float64 tensor there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vqtriton import ops

# one whose name torch takes without having it
DEVICE = torch.device("lazy")


class Elsewhere(Tensor):
    """On the device; `behind` is on the CPU."""

    behind: Tensor

    @staticmethod
    def __new__(cls, behind: Tensor) -> Elsewhere:
        if behind.dtype == torch.float64:
            raise TypeError("the device has no float64")
        tensor = Tensor._make_wrapper_subclass(
            cls, behind.shape, strides=behind.stride(), dtype=behind.dtype, device=DEVICE
        )
        tensor.behind = behind
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with NoFloat64():
            return func(*args, **(kwargs or {}))


class NoFloat64(TorchDispatchMode):
    """Where the device is there: also for what is made on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "vqtriton":
            # the op itself, with what it is given
            with self:
                return ops.IMPLEMENTATIONS[func.name().removeprefix("vqtriton::")](*args, **kwargs)
        flat = _pytree.tree_leaves((args, kwargs))
        is_there = any(isinstance(value, Elsewhere) for value in flat)
        # not to be taken for a copy from the device to the CPU
        device = kwargs.get("device")
        if device is not None:
            is_there = torch.device(device).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        args, kwargs = _pytree.tree_map_only(Elsewhere, lambda t: t.behind, (args, kwargs))
        results = func(*args, **kwargs)
        if func._schema.is_mutable:
            # in place: what was given comes back
            return flat[0]
        if device is not None:
            # from one device to another nothing is shared
            results = _pytree.tree_map_only(Tensor, torch.clone, results)
        return _pytree.tree_map_only(Tensor, Elsewhere, results) if is_there else results
