"""Which of the two backends runs an op: the kernels, or blocked torch code."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

METRICS = ("l2", "cosine", "dot")
PRECISIONS = ("exact", "fast")
BACKENDS = ("auto", "triton", "torch")


def triton_is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def interpreter_is_on() -> bool:
    """Triton reads this when it decorates a kernel, so set it before the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "torch" for tensors on ``device``.

    Raises:
        ValueError: no such backend, or the kernels cannot run on ``device``.
        ModuleNotFoundError: the kernels were asked for by name and Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    if backend == "auto":
        return "triton" if device.type == "cuda" and triton_is_installed() else "torch"
    if not triton_is_installed():
        raise ModuleNotFoundError("backend='triton' needs Triton: pip install 'vqtriton[triton]'")
    if device.type != "cuda" and not (device.type == "cpu" and interpreter_is_on()):
        raise ValueError(
            f"backend='triton' cannot run on {device.type} tensors; move them to a GPU, use "
            "backend='auto', or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    return backend


def backend_for(backend: str, device: torch.device) -> ModuleType:
    """`vqtriton.torch_backend` or `vqtriton.triton_backend`: the same functions in both.

    Raises:
        ValueError, ModuleNotFoundError: see `resolve_backend`.
    """
    return _imported(resolve_backend(backend, device))


@functools.cache
def _imported(backend: str) -> ModuleType:
    # by name: what has no Triton can import but one of them
    return importlib.import_module(f"vqtriton.{backend}_backend")
