"""The operators ``torch.ops.vqtriton.*``: schema, choice of backend, fake kernels.

They take [N, D] tensors that `vqtriton.functional` has checked, and know nothing of autograd: the
derivatives are `torch.autograd.Function`\\ s around them. One implementation serves every device;
it is opaque to `torch.compile`, which sees the fake kernels.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqtriton import blocked
from vqtriton.planes import prepare_planes, screen_bound
from vqtriton.screening import error_bound, screen_dtype

if TYPE_CHECKING:
    from vqtriton.kernels.nearest_code import NearestCode

PRECISIONS = ("exact", "fast")
BACKENDS = ("auto", "triton", "torch")

_library = torch.library.Library("vqtriton", "DEF")
_library.define("nearest_code(Tensor x, Tensor codebook, str precision, str backend) -> Tensor")
_library.define(
    "gather_codes(Tensor x, Tensor codebook, Tensor indices, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "code_sums(Tensor x, Tensor indices, SymInt codebook_size, str backend) -> (Tensor, Tensor)"
)
_library.define("snapshot(Tensor tensor) -> Tensor")


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


def _nearest_code(x: Tensor, codebook: Tensor, precision: str, backend: str) -> Tensor:
    if x.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    if resolve_backend(backend, x.device) == "torch":
        return blocked.nearest_code(x, codebook, precision)
    return _kernel_nearest_code(x, codebook, exact=precision == "exact").indices[0]


def _kernel_nearest_code(x: Tensor, codebook: Tensor, *, exact: bool) -> NearestCode:
    """Of one head."""
    from vqtriton.kernels.nearest_code import nearest_code, nearest_code_config
    from vqtriton.kernels.screen_codes import ACCUMULATOR_ORDER, architecture, rows_are_aligned

    target = architecture(x.device)
    lanes, vec = ACCUMULATOR_ORDER[target]
    planes = prepare_planes(codebook[None], lanes=lanes, vec=vec)
    config = nearest_code_config(target, planes.codes.shape[2], rows_are_aligned(x[None]))
    return nearest_code(
        x[None],
        codebook[None],
        planes,
        screen_bound(planes, config.screen.block_k),
        error_bound(x.shape[1], torch.float32),
        exact=exact,
        config=config,
    )


def _gather_codes(
    x: Tensor, codebook: Tensor, indices: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if resolve_backend(backend, x.device) == "torch":
        return blocked.gather_codes(x, codebook, indices)
    from vqtriton.kernels import gather_codes as kernel

    return kernel.gather_codes(x, codebook, indices)


def _code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    if resolve_backend(backend, x.device) == "torch":
        return blocked.code_sums(x, indices, codebook_size)
    from vqtriton.kernels import code_sums as kernel

    return kernel.code_sums(x, indices, codebook_size)


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _snapshot_fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _nearest_code_fake(x: Tensor, codebook: Tensor, precision: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _gather_codes_fake(
    x: Tensor, codebook: Tensor, indices: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    # not new_empty, which would keep the order of x's strides
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return quantized, x.new_empty(x.shape[0], dtype=screen_dtype(x, codebook))


def _code_sums_fake(
    x: Tensor, indices: Tensor, codebook_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty(codebook_size, x.shape[1], dtype=dtype)
    return sums, x.new_empty(codebook_size, dtype=torch.int64)


for _name, _implementation, _fake in (
    ("nearest_code", _nearest_code, _nearest_code_fake),
    ("gather_codes", _gather_codes, _gather_codes_fake),
    ("code_sums", _code_sums, _code_sums_fake),
    ("snapshot", _snapshot, _snapshot_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqtriton::{_name}", _fake, lib=_library)

nearest_code = torch.ops.vqtriton.nearest_code.default
gather_codes = torch.ops.vqtriton.gather_codes.default
code_sums = torch.ops.vqtriton.code_sums.default
snapshot = torch.ops.vqtriton.snapshot.default
