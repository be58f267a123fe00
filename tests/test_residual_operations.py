"""What a step of a residual quantizer asks of a device, whatever the number of its levels."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vqtriton
from vqtriton import ops

pytest.importorskip("triton")
host = importlib.import_module("bench.host")
# these ask for nothing
FREE = {"detach", "view", "as_strided", "expand", "split_with_sizes", "slice", "unbind", "select"}
FREE |= {"t", "transpose", "numpy_T", "reshape", "contiguous", "flatten", "to", "alias"}
FREE |= {"empty", "new_empty", "_unsafe_view"}


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        if func.namespace == "vqtriton":
            # the op itself
            with self:
                return ops.IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        if name.partition(".")[0] not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(levels: int, is_training: bool = True, **options: Any) -> Counter[str]:
    from triton.runtime.jit import JITFunction

    device = Counts()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: Any, **others: Any) -> None:
        device.counts[kernel.__name__] += 1

    rvq = vqtriton.ResidualVectorQuantize(16, 8, levels, backend="triton", **options)
    rvq.train(is_training)
    x, grads = torch.zeros(96, 16, requires_grad=is_training), [torch.ones(96, 16)]
    grads.append(torch.ones(levels))

    def step() -> None:
        quantized, _, loss = rvq(x)
        if is_training:
            torch.autograd.grad([quantized, loss], [x, *rvq.parameters()], grads)

    with host.only_kernels(), mock.patch.object(JITFunction, "run", launch):
        # what is done once is not of a step
        step()
        with device:
            device.counts.clear()
            step()
    return device.counts


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 12), ({"codebook_update": "gradient"}, 10), ({"is_training": False}, 7)],
)
def test_no_level_asks_for_operations_of_its_own(options: dict[str, Any], most: int) -> None:
    few, many = (operations(levels, **options) for levels in (2, 32))
    assert few == many
    assert many["residual_quantize_kernel"] == 1
    assert many.total() <= most, many
