"""The operators ``torch.ops.vqtriton.*``: their schemas, and what is common to both backends.

They take [N, D] tensors that `vqtriton.functional` has checked. The derivatives are its
`torch.autograd.Function`\\ s around them, which `torch.func` takes as well; ops that an exported
program calls are given theirs too. One implementation serves every device; it is opaque to
`torch.compile`, which sees the fake kernels.

Without the backend, an op's arguments are those of the function of the same name in
`vqtriton.torch_backend` and in `vqtriton.triton_backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from vqtriton.dispatch import backend_for, resolve_backend
from vqtriton.planes import inner_size, prepare_planes
from vqtriton.tensors import has_float64, is_traced, screen_dtype
from vqtriton.tiles import trace

_library = torch.library.Library("vqtriton", "DEF")
# the metric is "l2" or "dot": cosines are distances of normalized rows
_library.define(
    "nearest_code(Tensor x, Tensor codebook, str precision, str metric, str backend) -> Tensor"
)
_library.define(
    "nearest_code.prepared(Tensor x, Tensor codebook, str precision, str metric, str backend, "
    "Tensor[] prepared) -> Tensor"
)
_library.define(
    "nearest_codes(Tensor x, Tensor codebook, int k, str metric, bool return_distances, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define("prepare_codebook(Tensor codebook, str metric, str backend) -> Tensor[]")
_library.define("normalize_rows(Tensor x, str backend) -> Tensor")
_library.define(
    "vector_quantize(Tensor x, Tensor codebook, Tensor? mask, float commitment_weight, "
    "float codebook_weight, str reduction, str precision, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "vector_quantize.prepared(Tensor x, Tensor codebook, Tensor? mask, float commitment_weight, "
    "float codebook_weight, str reduction, str precision, str backend, Tensor[] prepared) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "vector_quantize_update_(Tensor x, Tensor(a!) codebook, Tensor? mask, Tensor(b!) cluster_size, "
    "Tensor rates, float commitment_weight, float codebook_weight, str reduction, bool averages, "
    "bool revives, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    "rotate_grad(Tensor grad, Tensor x, Tensor quantized, bool is_forward, str backend) -> Tensor"
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

# what `vqtriton.tiles.trace` notes of an op: the rows, the number of codes, and for what it asks
# tiles. Those of the update are of the codebook: the batch is no part of it.
Traced = tuple[Tensor, int, tuple[str, ...]]
TRACED: dict[str, Callable[..., list[Traced]]] = {
    "nearest_code": lambda x, codebook, *_: [(x, len(codebook), ("nearest_code",))],
    "vector_quantize": lambda x, codebook, *_: [(x, len(codebook), ("nearest_code",))],
    "vector_quantize_update_": lambda x, codebook, *_: [
        (x, len(codebook), ("nearest_code", "code_sums")),
        (codebook, len(codebook), ("ema_update",)),
    ],
    "code_sums": lambda x, indices, size, *_: [(x, size, ("code_sums",))],
    "grad_x": lambda grad, loss, x, codebook, *_: [(x, len(codebook), ("grad_x",))],
    "grad_codebook": lambda loss, x, codebook, *_: [(x, len(codebook), ("code_sums",))],
    "ema_update_": lambda size, codebook, *_: [
        (codebook if codebook.ndim == 2 else codebook[0], codebook.shape[-2], ("ema_update",))
    ],
}


def refuse_backward() -> None:
    """In the ops of a step that learns, where a compiler has no way around it."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "VectorQuantize learns in forward, and activation checkpointing runs forward again in "
            "backward, where it would choose from other codes and learn twice: leave it out of "
            "the checkpointed part, or freeze it (vq.frozen = True)"
        )


def _snapshot(tensor: Tensor) -> Tensor:
    """Of the codes that a step learns from."""
    refuse_backward()
    return tensor.clone(memory_format=torch.contiguous_format)


def _snapshot_fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _nearest_code_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _nearest_codes_fake(
    x: Tensor, codebook: Tensor, k: int, metric: str, return_distances: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if return_distances else 0, k)
    distances = x.new_empty(shape, dtype=screen_dtype(x, codebook))
    return x.new_empty(x.shape[0], k, dtype=torch.int64), distances


def prepare_codebook_fake(codebook: Tensor, metric: str, backend: str) -> list[Tensor]:
    if resolve_backend(backend, codebook.device) == "torch":
        dtype, (size, dim) = screen_dtype(codebook, codebook), codebook.shape
        shapes = (size, dim), (size,), (dim,), (2,)
        return [torch.empty(shape, dtype=dtype, device=codebook.device) for shape in shapes]
    from vqtriton.kernels.prepare_planes import norms_of

    *tensors, norms = prepare_planes(codebook[None]).tensors
    rows = norms_of(*codebook.shape, inner_size(codebook.shape[1])[0])
    return [*tensors, norms.new_empty(1, rows, 4)]


def _normalize_rows_fake(x: Tensor, backend: str) -> Tensor:
    return torch.empty(x.shape, dtype=screen_dtype(x, x), device=x.device)


def _vector_quantize_fake(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    is_whole = reduction == "none"
    dtype = screen_dtype(x, codebook)
    return (
        # not new_empty, which would keep the order of x's strides
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(x.shape[:1] if is_whole else (), dtype=dtype),
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty((0,) if is_whole else (), dtype=dtype),
    )


def _vector_quantize_update_fake(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cluster_size: Tensor,
    rates: Tensor,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    *_: Any,
) -> tuple[Tensor, ...]:
    weights = commitment_weight, codebook_weight
    found = _vector_quantize_fake(x, codebook, mask, *weights, reduction)
    return *found, torch.empty(codebook.shape, dtype=codebook.dtype, device=codebook.device)


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


def _grad_x_fake(grad_quantized: Tensor, grad_loss: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rotate_grad_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _grad_codebook_fake(grad_loss: Tensor, x: Tensor, codebook: Tensor, *_: Any) -> Tensor:
    return torch.empty(codebook.shape, dtype=grad_loss.dtype, device=x.device)


def _ema_update_fake(*_: Any) -> None:
    pass


def _implementation(
    name: str, module_for: Callable[[str, torch.device], ModuleType]
) -> Callable[..., Any]:
    """An op, by the function of its name in the backend that it is asked for."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.vqtriton, packet), overload or "default")
    arguments = op._schema.arguments
    place = next(i for i, argument in enumerate(arguments) if argument.name == "backend")
    changed = [i for i, argument in enumerate(arguments) if argument.is_write]
    traced = TRACED.get(packet)

    def run(*args: Any) -> Any:
        device = (args[0] if isinstance(args[0], Tensor) else args[0][0]).device
        if not has_float64(device):
            return _on_cpu(run, changed, args)
        others = (*args[:place], *args[place + 1 :])
        if traced is not None and trace.is_on():
            for x, size, names in traced(*others):
                for traced_name in names:
                    trace.record(traced_name, x, size)
        if packet == "vector_quantize_update_":
            refuse_backward()
        with torch._C._AutoDispatchBelowAutograd():
            results = getattr(module_for(args[place], device), packet)(*others)
        if changed:
            # whoever saved one of them for backward is to be told that it has changed
            tensors = [args[i] for i in changed if not args[i].is_inference()]
            torch.autograd.graph.increment_version(tensors)
        return results

    return run


def is_watched(*tensors: Tensor) -> bool:
    """Whether anything but its implementation has a say in a call of an op.

    That is a compiler, a transform, a mode, a profiler, or a subclass of tensors. Without one, the
    implementation can be called by itself, which takes less time.
    """
    return (
        is_traced()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd._profiler_enabled()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def _on_cpu(run: Callable[..., Any], changed: Sequence[int], args: Sequence[Any]) -> Any:
    """The detour of an op for devices without float64."""
    device = args[0].device
    moved = _pytree.tree_map_only(Tensor, Tensor.cpu, args)
    results = run(*moved)
    for i in changed:
        args[i].copy_(moved[i])
    return _pytree.tree_map_only(Tensor, lambda result: result.to(device), results)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def _implement(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    IMPLEMENTATIONS[name] = run
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqtriton::{name}", fake, lib=_library)


def register(
    schema: str,
    fake: Callable[..., Any],
    module_for: Callable[[str, torch.device], ModuleType],
) -> None:
    """Defines an op that the functions of its name in other modules compute."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _implement(name, _implementation(name, module_for), fake)


for _name, _fake in (
    ("nearest_code", _nearest_code_fake),
    ("nearest_code.prepared", _nearest_code_fake),
    ("nearest_codes", _nearest_codes_fake),
    ("prepare_codebook", prepare_codebook_fake),
    ("normalize_rows", _normalize_rows_fake),
    ("vector_quantize", _vector_quantize_fake),
    ("vector_quantize.prepared", _vector_quantize_fake),
    ("vector_quantize_update_", _vector_quantize_update_fake),
    ("code_sums", _code_sums_fake),
    ("grad_x", _grad_x_fake),
    ("rotate_grad", _rotate_grad_fake),
    ("grad_codebook", _grad_codebook_fake),
    ("ema_update_", _ema_update_fake),
    ("snapshot", _snapshot_fake),
):
    _run = _snapshot if _name == "snapshot" else _implementation(_name, backend_for)
    _implement(_name, _run, _fake)


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
nearest_codes = torch.ops.vqtriton.nearest_codes.default
prepare_codebook_op = torch.ops.vqtriton.prepare_codebook.default
normalize_rows = torch.ops.vqtriton.normalize_rows.default
vector_quantize = torch.ops.vqtriton.vector_quantize.default
vector_quantize_update_ = torch.ops.vqtriton.vector_quantize_update_.default
vector_quantize_prepared = torch.ops.vqtriton.vector_quantize.prepared
code_sums = torch.ops.vqtriton.code_sums.default
grad_x = torch.ops.vqtriton.grad_x.default
rotate_grad = torch.ops.vqtriton.rotate_grad.default
grad_codebook = torch.ops.vqtriton.grad_codebook.default
ema_update_ = torch.ops.vqtriton.ema_update_.default
snapshot = torch.ops.vqtriton.snapshot.default
