"""The operators ``torch.ops.vqtriton.*``: schema, choice of backend, fake kernels.

They take [N, D] tensors that `vqtriton.functional` has checked. The derivatives are its
`torch.autograd.Function`\\ s around them, which `torch.func` takes as well; ops that an exported
program calls are given theirs too. One implementation serves every device; it is opaque to
`torch.compile`, which sees the fake kernels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from vqtriton import blocked
from vqtriton.planes import (
    CodePlanes,
    planes_of,
    prepare_planes,
    prepare_planes_with_kernels,
    screen_bound,
)
from vqtriton.screening import error_bound, has_float64, prepare_codebook, screen_dtype
from vqtriton.tuning import tables, trace

if TYPE_CHECKING:
    from vqtriton.kernels.nearest_code import NearestCode, NearestCodeConfig

PRECISIONS = ("exact", "fast")
BACKENDS = ("auto", "triton", "torch")
# elements between rows from which on Triton knows that loads are aligned
ALIGNMENT = 16
# codes whose scores the kernels reduce together
GROUP = 8

_library = torch.library.Library("vqtriton", "DEF")
_library.define("nearest_code(Tensor x, Tensor codebook, str precision, str backend) -> Tensor")
_library.define(
    "nearest_code.prepared(Tensor x, Tensor codebook, Tensor[] prepared, str precision, "
    "str backend) -> Tensor"
)
_library.define("prepare_codebook(Tensor codebook, str backend) -> Tensor[]")
_library.define(
    "vector_quantize(Tensor x, Tensor codebook, Tensor? mask, float commitment_weight, "
    "float codebook_weight, str precision, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "vector_quantize.prepared(Tensor x, Tensor codebook, Tensor? mask, float commitment_weight, "
    "float codebook_weight, str precision, str backend, Tensor[] prepared) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "code_sums(Tensor x, Tensor indices, SymInt codebook_size, str backend, "
    "bool deterministic=True, bool double=False) -> (Tensor, Tensor)"
)
_library.define(
    "grad_x(Tensor grad_quantized, Tensor grad_loss, Tensor x, Tensor codebook, Tensor indices, "
    "float weight, str backend) -> Tensor"
)
_library.define(
    "grad_codebook(Tensor grad_loss, Tensor x, Tensor codebook, Tensor indices, float weight, "
    "str backend) -> Tensor"
)
_library.define(
    "ema_update_(Tensor(a!) cluster_size, Tensor(b!) codebook, Tensor counts, Tensor? sums, "
    "Tensor? samples, Tensor? is_filled, Tensor rates, str backend) -> ()"
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


def may_run_kernels(backend: str, device: torch.device) -> bool:
    return backend != "torch" and (device.type == "cuda" or interpreter_is_on())


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
    return _nearest_code_prepared(x, codebook, (), precision, backend)


def _nearest_code_prepared(
    x: Tensor, codebook: Tensor, prepared: Sequence[Tensor], precision: str, backend: str
) -> Tensor:
    """``prepared``: what `_prepare_codebook` gave for the same backend, or nothing."""
    if x.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    trace.record("nearest_code", x, codebook.shape[0])
    if resolve_backend(backend, x.device) == "torch":
        return blocked.nearest_code(x, codebook, precision, prepared)
    return run_kernels(x, codebook, prepared, exact=precision == "exact").indices[0]


def _prepare_codebook(codebook: Tensor, backend: str) -> list[Tensor]:
    if resolve_backend(backend, codebook.device) == "torch":
        return list(prepare_codebook(codebook, screen_dtype(codebook, codebook)))
    return list(_prepare_planes(codebook).tensors)


def _vector_quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    precision: str,
    backend: str,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes; the loss of each row; indices, -1 where ``mask`` [N] is false.

    ``prepared``: as in `_nearest_code_prepared`. The two terms of the loss have one value, the
    squared distance; the weights part where it is differentiated.
    """
    is_triton = resolve_backend(backend, x.device) == "triton"
    if x.shape[0] > 0 and is_triton:
        trace.record("nearest_code", x, codebook.shape[0])
        out = run_kernels(x, codebook, prepared, exact=precision == "exact", mask=mask, gather=True)
        assert out.quantized is not None
        assert out.sq_error is not None
        indices, quantized, sq_error = out.indices[0], out.quantized[0], out.sq_error[0]
    else:
        indices = _nearest_code_prepared(x, codebook, prepared, precision, backend)
        if mask is not None:
            indices = indices.where(mask, -1)
        quantized, sq_error = blocked.gather_codes(x, codebook, indices)
    return quantized, sq_error * (commitment_weight + codebook_weight), indices


def run_kernels(
    x: Tensor,
    codebook: Tensor,
    prepared: Sequence[Tensor] = (),
    *,
    exact: bool,
    mask: Tensor | None = None,
    gather: bool = False,
) -> NearestCode:
    """`vqtriton.kernels.nearest_code` for one head; N >= 1."""
    from vqtriton.kernels.nearest_code import nearest_code, nearest_code_config
    from vqtriton.kernels.screen_codes import architecture, rows_are_aligned

    planes = _prepare_planes(codebook, prepared)
    is_aligned = rows_are_aligned(x[None])
    config = nearest_code_config(architecture(x.device), planes.codes.shape[2], is_aligned)
    # tables are of contiguous rows, whose addresses are as well aligned as D allows
    is_as_tuned = is_aligned or x.shape[1] % ALIGNMENT != 0
    screen = _tiles("nearest_code", x, codebook.shape[0]) if is_as_tuned else None

    def search(config: NearestCodeConfig) -> NearestCode:
        return nearest_code(
            x[None],
            codebook[None],
            planes,
            screen_bound(planes, config.screen.block_k),
            error_bound(x.shape[1], torch.float32),
            exact=exact,
            mask=None if mask is None else mask[None],
            gather=gather,
            config=config,
        )

    if screen is not None:
        from triton.runtime.errors import OutOfResources

        try:
            return search(replace(config, screen=screen))
        except OutOfResources:
            tables.reject(screen)
    return search(config)


def _tiles(op: str, x: Tensor, codebook_size: int) -> Any:
    """Tiles for an op on x [N, D] from the tables; None: the default."""
    return tables.choose(op, x.dtype, x.shape[1], codebook_size, x.shape[0], x.device)


def _prepare_planes(codebook: Tensor, prepared: Sequence[Tensor] = ()) -> CodePlanes:
    """Of one head, for the device that the codebook is on."""
    from vqtriton.kernels.screen_codes import ACCUMULATOR_ORDER, architecture

    lanes, vec = ACCUMULATOR_ORDER[architecture(codebook.device)]
    if prepared:
        return planes_of(prepared, codebook.shape[1], group=GROUP, lanes=lanes, vec=vec)
    return prepare_planes_with_kernels(codebook[None], group=GROUP, lanes=lanes, vec=vec)


def _code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    backend: str,
    deterministic: bool = True,
    double: bool = False,
) -> tuple[Tensor, Tensor]:
    """``double``: the sums in float64, for who divides them before they are rounded."""
    if resolve_backend(backend, x.device) == "torch":
        trace.record("code_sums", x, codebook_size)
        return blocked.code_sums(x, indices, codebook_size, double)
    if not (deterministic or torch.are_deterministic_algorithms_enabled()):
        from vqtriton.kernels.atomic_sums import atomic_sums

        sums, counts = atomic_sums(x[None], indices[None], codebook_size, double=double)
        return sums[0], counts[0]
    from vqtriton.kernels import code_sums as kernel

    trace.record("code_sums", x, codebook_size)
    tiles = _tiles("code_sums", x, codebook_size)
    sums, counts = kernel.code_sums(
        x[None], indices[None], codebook_size, double=double, config=tiles
    )
    return sums[0], counts[0]


def _grad_x(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    weight: float,
    backend: str,
) -> Tensor:
    """grad_quantized + weight·grad_loss·(x - codebook[indices]), zero where the index is -1."""
    trace.record("grad_x", x, codebook.shape[0])
    if resolve_backend(backend, x.device) == "torch":
        return blocked.grad_x(grad_quantized, grad_loss, x, codebook, indices, weight)
    from vqtriton.kernels import vector_quantize_grad as kernels

    tensors = (t[None] for t in (grad_quantized, grad_loss, x, codebook, indices))
    return kernels.grad_x(*tensors, weight, config=_tiles("grad_x", x, codebook.shape[0]))[0]


def _grad_codebook(
    grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, weight: float, backend: str
) -> Tensor:
    """Σ weight·grad_loss·(codebook[k] - x) over the finite rows of each code, as `code_sums`."""
    trace.record("code_sums", x, codebook.shape[0])
    if resolve_backend(backend, x.device) == "torch":
        return blocked.grad_codebook(grad_loss, x, codebook, indices, weight)
    from vqtriton.kernels import vector_quantize_grad as kernels

    tensors = (t[None] for t in (grad_loss, x, codebook, indices))
    tiles = _tiles("code_sums", x, codebook.shape[0])
    return kernels.grad_codebook(*tensors, weight, config=tiles)[0]


def _ema_update_(cluster_size: Tensor, codebook: Tensor, *others: Any) -> None:
    """See `blocked.ema_update_`; the last of ``others`` is the backend."""
    *arguments, backend = others
    # the statistics are float32, and the batch is no part of it
    trace.record("ema_update", codebook, codebook.shape[0])
    if resolve_backend(backend, codebook.device) == "torch":
        blocked.ema_update_(cluster_size, codebook, *arguments)
    else:
        from vqtriton.kernels import ema_update as kernel

        tiles = _tiles("ema_update", codebook, codebook.shape[0])
        kernel.ema_update_(cluster_size, codebook, *arguments, config=tiles)
    # whoever saved one of them for backward is to be told that it has changed
    changed = [t for t in (cluster_size, codebook) if not t.is_inference()]
    torch.autograd.graph.increment_version(changed)


def _ema_update_fake(*args: object) -> None:
    pass


def _snapshot(tensor: Tensor) -> Tensor:
    """Of the codes that a step learns from. Here, where a compiler has no way around it, that step
    is refused inside a backward."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "VectorQuantize learns in forward, and activation checkpointing runs forward again in "
            "backward, where it would choose from other codes and learn twice: leave it out of "
            "the checkpointed part, or freeze it (vq.frozen = True)"
        )
    return tensor.clone(memory_format=torch.contiguous_format)


def _snapshot_fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _nearest_code_fake(x: Tensor, codebook: Tensor, precision: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _nearest_code_prepared_fake(
    x: Tensor, codebook: Tensor, prepared: Sequence[Tensor], precision: str, backend: str
) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _prepare_codebook_fake(codebook: Tensor, backend: str) -> list[Tensor]:
    if resolve_backend(backend, codebook.device) == "torch":
        return list(prepare_codebook(codebook, screen_dtype(codebook, codebook)))
    return list(prepare_planes(codebook[None], group=GROUP).tensors)


def _vector_quantize_fake(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    precision: str,
    backend: str,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        # not new_empty, which would keep the order of x's strides
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(x.shape[0], dtype=screen_dtype(x, codebook)),
        x.new_empty(x.shape[0], dtype=torch.int64),
    )


def _code_sums_fake(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    backend: str,
    deterministic: bool = True,
    double: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if double or x.dtype == torch.float64 else torch.float32
    sums = x.new_empty(codebook_size, x.shape[1], dtype=dtype)
    return sums, x.new_empty(codebook_size, dtype=torch.int64)


def _grad_x_fake(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    weight: float,
    backend: str,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _grad_codebook_fake(
    grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, weight: float, backend: str
) -> Tensor:
    return torch.empty(codebook.shape, dtype=grad_loss.dtype, device=x.device)


# a kernel's first launch compiles it, so Triton parses its source. Two threads of Python 3.11 must
# not parse at once, and Triton's interpreter cannot run two kernels at once
_launching = threading.RLock()


def _one_thread_launches(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, for which a thread waits while another launches kernels."""
    arguments = [argument.name for argument in _schema(name).arguments]
    if "backend" not in arguments:
        return implementation
    place = arguments.index("backend")

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not may_run_kernels(args[place], device):
            return implementation(*args)
        with _launching:
            return implementation(*args)

    return run


def _schema(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.vqtriton, packet), overload or "default")._schema


def _where_float64_is(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, which takes a detour by way of the CPU for devices without float64."""
    is_changed = [argument.is_write for argument in _schema(name).arguments]

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if has_float64(device):
            return implementation(*args)
        on_cpu = _pytree.tree_map_only(Tensor, Tensor.cpu, args)
        results = implementation(*on_cpu)
        for arg, moved, changed in zip(args, on_cpu, is_changed, strict=False):
            if changed:
                arg.copy_(moved)
        return _pytree.tree_map_only(Tensor, lambda result: result.to(device), results)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
for _name, _implementation, _fake in (
    ("nearest_code", _nearest_code, _nearest_code_fake),
    ("nearest_code.prepared", _nearest_code_prepared, _nearest_code_prepared_fake),
    ("prepare_codebook", _prepare_codebook, _prepare_codebook_fake),
    ("vector_quantize", _vector_quantize, _vector_quantize_fake),
    ("vector_quantize.prepared", _vector_quantize, _vector_quantize_fake),
    ("code_sums", _code_sums, _code_sums_fake),
    ("grad_x", _grad_x, _grad_x_fake),
    ("grad_codebook", _grad_codebook, _grad_codebook_fake),
    ("ema_update_", _ema_update_, _ema_update_fake),
    ("snapshot", _snapshot, _snapshot_fake),
):
    _implementation = _where_float64_is(_name, _one_thread_launches(_name, _implementation))
    IMPLEMENTATIONS[_name] = _implementation
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqtriton::{_name}", _fake, lib=_library)


def differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Gives an op the derivative of a function that has the same arguments."""
    torch.library.register_autograd(
        f"vqtriton::{name}",
        function.backward,
        setup_context=function.setup_context,
        lib=_library,
    )


nearest_code = torch.ops.vqtriton.nearest_code.default
nearest_code_prepared = torch.ops.vqtriton.nearest_code.prepared
prepare_codebook_op = torch.ops.vqtriton.prepare_codebook.default
vector_quantize = torch.ops.vqtriton.vector_quantize.default
vector_quantize_prepared = torch.ops.vqtriton.vector_quantize.prepared
code_sums = torch.ops.vqtriton.code_sums.default
grad_x = torch.ops.vqtriton.grad_x.default
grad_codebook = torch.ops.vqtriton.grad_codebook.default
ema_update_ = torch.ops.vqtriton.ema_update_.default
snapshot = torch.ops.vqtriton.snapshot.default
