"""Whether arguments fit together; errors name the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqtriton import dispatch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
# as many codes as a search may be asked for
MOST_CODES = 32
REDUCTIONS = ("mean", "sum", "none")
LARGEST_WEIGHT = torch.finfo(torch.float32).max


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_arguments(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, precision: str, backend: str
) -> None:
    """Whether they fit together; the errors are those of `vector_quantize`."""
    check_x(x)
    check_codebook(codebook, x)
    check_options(precision, backend, x, codebook)
    check_mask(mask, x)


def check_x(x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{name} is {_kind(x)}; it must be a floating-point tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has the layout {x.layout}; it must be a dense tensor")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {_shape(x)}; it must be [..., D] with D >= 1")


def check_codebook(codebook: Tensor, x: Tensor) -> None:
    if not isinstance(codebook, Tensor) or codebook.dtype not in FLOATS:
        raise TypeError(f"codebook is {_kind(codebook)}; it must be a floating-point tensor")
    if codebook.layout != torch.strided:
        raise TypeError(f"codebook has the layout {codebook.layout}; it must be a dense tensor")
    if codebook.ndim != 2 or codebook.numel() == 0:
        raise ValueError(
            f"codebook has shape {_shape(codebook)}; it must be [K, D] with K >= 1 and D >= 1"
        )
    if codebook.shape[1] != x.shape[-1]:
        raise ValueError(
            f"codebook has {codebook.shape[1]} columns but x has {x.shape[-1]} in its last dim"
        )
    if codebook.device != x.device:
        raise ValueError(f"codebook is on {codebook.device} but x is on {x.device}")


def check_options(precision: str, backend: str, *tensors: Tensor) -> None:
    if precision not in dispatch.PRECISIONS:
        raise ValueError(
            f"precision is {precision!r}; it must be one of {', '.join(dispatch.PRECISIONS)}"
        )
    resolved = dispatch.resolve_backend(backend, tensors[0].device)
    if resolved == "triton" and any(t.dtype == torch.float64 for t in tensors):
        raise TypeError("the kernels take no float64 tensors; use backend='torch'")


def check_metric(metric: str) -> None:
    if metric not in dispatch.METRICS:
        raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(dispatch.METRICS)}")


def check_k(k: int, codebook: Tensor) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k is {k!r:.80}; it must be an int")
    if not 1 <= k <= MOST_CODES:
        raise ValueError(f"k is {k}; it must be in [1, {MOST_CODES}]")
    if k > codebook.shape[0]:
        raise ValueError(f"k is {k} but codebook has {codebook.shape[0]} codes")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask is {_kind(mask)}; it must be a bool tensor")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask has shape {_shape(mask)}; with x of shape {_shape(x)} "
            f"it must be {tuple(x.shape[:-1])}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} but x is on {x.device}")


def check_sums(
    x: Tensor, indices: Tensor, codebook_size: int, deterministic: bool, backend: str
) -> None:
    """The errors are those of `vqtriton.code_sums`."""
    check_x(x)
    check_options("exact", backend, x)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices is {_kind(indices)}; it must be an int64 tensor")
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"indices has shape {_shape(indices)}; with x of shape {_shape(x)} "
            f"it must be {tuple(x.shape[:-1])}"
        )
    if indices.device != x.device:
        raise ValueError(f"indices is on {indices.device} but x is on {x.device}")
    if isinstance(codebook_size, bool) or not isinstance(codebook_size, (int, torch.SymInt)):
        raise TypeError(f"codebook_size is {codebook_size!r}; it must be an int")
    if codebook_size < 1:
        raise ValueError(f"codebook_size is {codebook_size}; it must be at least 1")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic is {deterministic!r:.80}; it must be True or False")


def check_number(
    name: str, value: Any, kind: type, least: float, most: float | None = None
) -> None:
    """
    Raises:
        TypeError: the argument is not of its type.
        ValueError: it is out of its range.
    """
    kinds = (int, float) if kind is float else (kind,)
    # True is an int to Python, 1 a float to everybody
    if not any(isinstance(value, kind) for kind in kinds) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.80}; it must be of type {kind.__name__}")
    # float32, as the statistics and the loss that it is for
    if not least <= value <= (torch.finfo(torch.float32).max if most is None else most):
        wanted = f"finite and at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} is {value!r:.80}; it must be {wanted}")


def check_weight(name: str, weight: Any) -> None:
    """
    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite in float32.
    """
    # tuples of types, as torch 2.8 compiles no `int | float`
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"{name} is {weight!r:.80}; it must be a number")
    if not abs(weight) <= LARGEST_WEIGHT:
        raise ValueError(f"{name} is {weight!r:.80}; it must be finite in float32")
