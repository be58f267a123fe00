"""A GPU, played on a CPU, for kernels that Triton interprets.

As Triton does on a GPU, it refuses to launch a kernel on a tensor of the CPU. So the tests show
that they put their tensors where a GPU needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from stub_device import Elsewhere, StubDevice
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from vqtriton import dispatch


@contextlib.contextmanager
def stub_gpu() -> Iterator[StubDevice]:
    stub = StubDevice()
    launch_here, resolve_here = GridExecutor.__call__, dispatch.resolve_backend

    def behind(name: int | str, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, Elsewhere):
            raise ValueError(f"pointer argument {name} is a tensor of the CPU")
        return value.behind if isinstance(value, Elsewhere) else value

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        behinds = [behind(place, value) for place, value in enumerate(args)]
        launch_here(self, *behinds, **{name: behind(name, value) for name, value in kwargs.items()})

    def resolve_backend(backend: str, device: torch.device) -> str:
        has_kernels = backend == "triton" and device.type == stub.device.type
        return backend if has_kernels else resolve_here(backend, device)

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(dispatch, "resolve_backend", resolve_backend),
        stub,
    ):
        yield stub
