"""A device that is not there, played on a CPU.

Whatever torch is asked to do with its tensors is done with the CPU tensors behind them. What a
device refuses is refused: an operation on tensors of two devices; on Apple's GPUs, float64.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vqtriton import ops

# one whose name torch takes without having it
LAZY = torch.device("lazy")
# they take tensors of two devices
BETWEEN = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "set_data")

# they ask a device for nothing
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias"}
FREE |= {"lift_fresh", "_unsafe_view"}


class Elsewhere(Tensor):
    """A tensor on the device; `behind` is on the CPU."""

    behind: Tensor
    stub: StubDevice

    @staticmethod
    def __new__(cls, behind: Tensor, stub: StubDevice) -> Elsewhere:
        if behind.dtype == torch.float64 and not stub.has_float64:
            raise TypeError("the device has no float64")
        tensor = Tensor._make_wrapper_subclass(
            cls, behind.shape, strides=behind.stride(), dtype=behind.dtype, device=stub.device
        )
        tensor.behind, tensor.stub = behind, stub
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = _pytree.tree_leaves((args, kwargs))
        with next(value.stub for value in flat if isinstance(value, cls)):
            return func(*args, **(kwargs or {}))

    # what torch does not pass on

    def data_ptr(self) -> int:
        return self.behind.data_ptr()

    def tolist(self) -> Any:
        return self.behind.tolist()


class StubDevice(TorchDispatchMode):
    """Where the device is there: also for what is made on it."""

    def __init__(self, device: torch.device = LAZY, *, has_float64: bool = True) -> None:
        super().__init__()
        self.device, self.has_float64 = device, has_float64
        self.lifted_before: list[bool] = []

    def __enter__(self) -> StubDevice:
        # `torch.tensor` makes a tensor on the CPU, and the mode sees how it gets to the device
        self.lifted_before.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self.lifted_before.pop())
        super().__exit__(*error)

    def put(self, tensor: Tensor) -> Elsewhere:
        return Elsewhere(tensor, self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().partition("::")[2]
        if func.namespace == "vqtriton":
            # the op itself, with what it is given
            with self:
                return ops.IMPLEMENTATIONS[name](*args, **kwargs)
        tensors = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = {id(t.behind): t for t in tensors if isinstance(t, Elsewhere)}
        is_there = bool(there)
        is_mixed = is_there and any(t.dim() and not isinstance(t, Elsewhere) for t in tensors)
        if is_mixed and name.partition(".")[0] not in BETWEEN:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        # not to be taken for a copy from the device to the CPU
        device = kwargs.get("device")
        if device is not None:
            is_there = torch.device(device).type == self.device.type
            kwargs["device"] = torch.device("cpu")
        args, kwargs = _pytree.tree_map_only(Elsewhere, lambda t: t.behind, (args, kwargs))
        results = func(*args, **kwargs)
        if device is not None:
            # from one device to another nothing is shared
            results = _pytree.tree_map_only(Tensor, torch.clone, results)

        def placed(result: Tensor) -> Tensor:
            if not is_there:
                return result
            # what was changed in place comes back as it was given
            return there[id(result)] if id(result) in there else self.put(result)

        return _pytree.tree_map_only(Tensor, placed, results)


class CountingDevice(StubDevice):
    """Counts what the device is asked for: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.name().partition("::")[2].partition(".")[0]
        given = func._schema.arguments
        is_view = any(arg.alias_info and not arg.alias_info.is_write for arg in given)
        values = _pytree.tree_leaves((results, args, kwargs))
        is_there = any(isinstance(value, Elsewhere) for value in values)
        # an op of ours is what it does inside
        if is_there and not is_view and name not in FREE and func.namespace != "vqtriton":
            self.counts[name] += 1
        return results
