"""Differentiable functions of tensors, with all checks of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqtriton import dispatch, ops
from vqtriton.checks import (
    REDUCTIONS,
    check_arguments,
    check_codebook,
    check_k,
    check_metric,
    check_options,
    check_sums,
    check_weight,
)
from vqtriton.kernels.constants import LEAST_NORM
from vqtriton.reference import Quantized
from vqtriton.tensors import finite_rows, gather, is_traced, screen_dtype

# what the ops do for each metric, after rows and codes are normalized for "cosine"
OP_METRICS = {"l2": "l2", "cosine": "l2", "dot": "dot"}


class PreparedCodebook(NamedTuple):
    """A copy of a codebook with the tensors that a search first computes from it.

    Made by `prepare_codebook`. `nearest_code` takes it in place of a codebook, and so does
    `vector_quantize` if the metric is "l2".

    Attributes:
        codebook: [K, D], the copy. For "cosine" it holds the normalized codes.
        tensors: what the backend computed from it; each backend has its own.
        backend: "triton" or "torch", the backend that it was prepared for.
        metric: "l2", "cosine" or "dot", the metric that it was prepared for.

    Example:
        >>> prepared = vqtriton.prepare_codebook(torch.randn(512, 64))
        >>> prepared.codebook.shape
        torch.Size([512, 64])
    """

    codebook: Tensor  # [K, D], a copy; normalized for "cosine"
    tensors: tuple[Tensor, ...]  # what the backend makes of it
    backend: str  # "triton" or "torch"
    metric: str = "l2"


def prepare_codebook(
    codebook: Tensor, *, metric: str = "l2", backend: str = "auto"
) -> PreparedCodebook:
    """Does the codebook's part of a search once, for many calls of `nearest_code`.

    Use it for a codebook that stays as it is. The codebook is copied, so later changes of it do not
    reach the result. `VectorQuantize` does this by itself in eval mode, see docs/codebook.md.

    Args:
        codebook: [K, D], a floating-point tensor with K >= 1 and D >= 1.
        metric: see `nearest_code`, which must be given the same.
        backend: see `nearest_code`. Searches with the result run on this backend.

    Returns:
        `PreparedCodebook`.

    Raises:
        ValueError: K == 0, D == 0, or an unknown metric or backend.
        TypeError: not a tensor, or not a floating-point dtype.

    Example:
        >>> prepared = vqtriton.prepare_codebook(torch.randn(512, 64))
        >>> for x in (torch.randn(100, 64), torch.randn(7, 64)):
        ...     indices = vqtriton.nearest_code(x, prepared)
    """
    check_codebook(codebook, codebook)
    check_metric(metric)
    check_options("exact", backend, codebook)
    backend = dispatch.resolve_backend(backend, codebook.device)
    codes = codebook.detach()
    if metric == "cosine":
        copy = ops.normalize_rows(codes, backend)
    else:
        copy = codes.clone(memory_format=torch.contiguous_format)
    tensors = ops.prepare_codebook_op(copy, OP_METRICS[metric], backend)
    return PreparedCodebook(copy, tuple(tensors), backend, metric)


def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    metric: str = "l2",
    precision: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Index of the nearest code by squared L2 distance, cosine similarity or dot product.

    Equivalent to ``torch.cdist(x.double(), codebook.double()).argmin(-1)`` without the [N, K]
    matrix, and without the rounding of its square root. With ``metric="dot"``, equivalent to
    ``(x.double() @ codebook.double().T).argmax(-1)``.

    Args:
        x: vectors, [..., D], float32 / float16 / bfloat16 (float64 with the torch backend).
        codebook: [K, D], same device, K >= 1. Its dtype may differ from that of ``x``. A
            `PreparedCodebook` gives the same indices in less time.
        metric: "l2" looks for the least squared L2 distance, and "dot" for the largest dot product.
            "cosine" is "l2" between vectors that are first divided by their lengths and rounded to
            float32 (float64 stays float64), as `vqtriton.reference.normalized` does it; it needs
            memory for a normalized copy of ``x``.
        precision: "exact" gives the argmin of the float64 distances of the values as given, or the
            argmax of the float64 dot products, so the indices depend neither on the device nor on
            the batch. "fast" skips the check of close calls, so these may go to either code.
        backend: "triton" runs the kernels (GPU). "torch" runs blocked torch code (any device).
            "auto" takes the kernels where the device of ``x`` can run them; with a
            `PreparedCodebook` it takes the backend of that. The kernels take at most 4094
            dimensions.

    Returns:
        indices, [...], the shape of ``x`` without its last dim, int64 in [0, K). The lowest index
        wins a tie. A distance or a dot product that is not finite ranks last. A row with no finite
        one gets index 0.

    Raises:
        ValueError: the last dim of ``x`` is not D, K == 0, D == 0, an unknown option, or a
            codebook that was prepared for another metric or backend.
        TypeError: not a tensor, or not a floating-point dtype.

    Example:
        >>> x, codebook = torch.randn(8, 49, 64), torch.randn(512, 64)
        >>> vqtriton.nearest_code(x, codebook).shape
        torch.Size([8, 49])

    Reference: van den Oord et al. 2017, arXiv:1711.00937, equation 1.
    """
    codes, prepared, backend = _parts_for(metric, codebook, backend)
    check_arguments(x, codes, precision=precision, backend=backend)
    flat = _flat(x.detach() if x.requires_grad else x)
    if metric == "cosine":
        flat = ops.normalize_rows(flat, backend)
    options = precision, OP_METRICS[metric], backend
    if isinstance(codebook, PreparedCodebook):
        indices = ops.nearest_code_prepared(flat, codes, *options, prepared)
    else:
        codes = codes.detach() if codes.requires_grad else codes
        if metric == "cosine":
            codes = ops.normalize_rows(codes, backend)
        search: Any = ops.nearest_code
        if not ops.is_watched(flat, codes):
            search = ops.IMPLEMENTATIONS["nearest_code"]
        indices = search(flat, codes, *options)
    return indices if x.ndim == 2 else indices.reshape(x.shape[:-1])


def nearest_codes(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    k: int,
    *,
    metric: str = "l2",
    return_distances: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Indices of the k nearest codes, the nearest first: `nearest_code` for more than one code.

    Equivalent to ``torch.cdist(x.double(), codebook.double()).topk(k, largest=False)`` without the
    [N, K] matrix, and without the rounding of its square root. It is exact: the order is that of
    the float64 distances of the values as given, so the result depends neither on the device nor on
    the batch.

    Args:
        x: vectors, [..., D], see `nearest_code`.
        codebook: [K, D], or a `PreparedCodebook`, see `nearest_code`.
        k: how many codes, from 1 to 32 and at most K.
        metric: "l2", "cosine" or "dot", see `nearest_code`.
        return_distances: also return the distances, which takes additional time.
        backend: see `nearest_code`. The kernels look for one code only: with "triton" and k > 1,
            blocked torch code runs on the GPU, which waits for the device.

    Returns:
        indices, [..., k], int64 in [0, K), in ascending order of distance. The lower index goes
        first in a tie. Codes whose distance is not finite rank last, in the order of their indices.
        With k = 1 it is the index that `nearest_code` gives.

        With ``return_distances``, a tuple of these and of the distances, [..., k], float32 (float64
        for float64). They are what codes are ranked by: squared L2 distances, for "cosine" between
        normalized vectors, and for "dot" the opposites of the dot products. They are computed in
        float64 and rounded once, so they are in ascending order too, and equal on every backend.
        What is not finite is +inf. No gradient passes through them.

    Raises:
        ValueError: k < 1, k > 32, k > K, and those of `nearest_code`.
        TypeError: k is not an int, and those of `nearest_code`.

    Example:
        >>> x, codebook = torch.randn(8, 49, 64), torch.randn(512, 64)
        >>> indices, distances = vqtriton.nearest_codes(x, codebook, 4, return_distances=True)
        >>> indices.shape
        torch.Size([8, 49, 4])
    """
    codes, _, backend = _parts_for(metric, codebook, backend)
    check_arguments(x, codes, precision="exact", backend=backend)
    check_k(k, codes)
    if not isinstance(return_distances, bool):
        raise TypeError(f"return_distances is {return_distances!r:.80}; it must be True or False")
    flat, codes = _flat(x.detach()), codes.detach()
    if metric == "cosine":
        flat = ops.normalize_rows(flat, backend)
        if not isinstance(codebook, PreparedCodebook):
            codes = ops.normalize_rows(codes, backend)
    indices, distances = ops.nearest_codes(
        flat, codes, k, OP_METRICS[metric], return_distances, backend
    )
    indices = indices.reshape(*x.shape[:-1], k)
    return (indices, distances.reshape(indices.shape)) if return_distances else indices


def _parts_for(
    metric: str, codebook: Tensor | PreparedCodebook, backend: str
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """`_parts` of a codebook that must be for the metric."""
    check_metric(metric)
    if isinstance(codebook, PreparedCodebook) and metric != codebook.metric:
        raise ValueError(f"metric is {metric!r}, but codebook was prepared for {codebook.metric!r}")
    return _parts(codebook, backend)


def _flat(x: Tensor) -> Tensor:
    """[N, D]"""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _parts(
    codebook: Tensor | PreparedCodebook, backend: str
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """Codes, what was prepared of them, and the backend that it was prepared for."""
    if not isinstance(codebook, PreparedCodebook):
        return codebook, (), backend
    if backend not in ("auto", codebook.backend):
        raise ValueError(
            f"backend is {backend!r}, but codebook was prepared for {codebook.backend!r}"
        )
    return codebook.codebook, codebook.tensors, codebook.backend


def vector_quantize(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
) -> Quantized:
    """Replaces each vector by its nearest code, with the straight-through estimator and the loss.

    Equivalent to::

        indices = torch.cdist(x.double(), codebook.double()).argmin(-1)
        codes = codebook[indices]
        quantized = x + (codes - x).detach()
        codebook_term = (x.detach() - codes).square().mean()
        commitment_term = (x - codes.detach()).square().mean()
        loss = codebook_weight * codebook_term + commitment_weight * commitment_term

    The two terms of the loss have the same value, up to their weights. They differ in who gets the
    gradient: the first moves the codes, the second moves ``x``.

    Args:
        x: vectors, [..., D].
        codebook: [K, D]. It gets a gradient from the codebook term only. A `PreparedCodebook`
            gets none.
        commitment_weight: β of the paper.
        codebook_weight: use 0 where the codebook learns by moving averages.
        reduction: "mean" divides the sum of the squared differences by the number of elements (not
            of rows) that count, which is D times the rows that are not masked. "sum" does not
            divide. "none" gives the sum of each row, [...].
        mask: [...] bool, True for the rows that count. Each other row gets index -1 and zeros, and
            adds nothing to the loss or to a gradient.
        precision: see `nearest_code`.
        backend: see `nearest_code`.

    Returns:
        `Quantized`, a named tuple of three.

        quantized: [..., D] in the dtype of ``x``; zeros where masked.
        indices: [...] int64; -1 where masked.
        loss: both terms, weighted and added: [] float32 (float64 for float64), or [...] with
            ``reduction="none"``. With every row masked it is 0.

        A row that is not finite has index 0 and a NaN loss, and adds nothing to the codebook's
        gradient.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: not a tensor, not a floating-point dtype, or a weight that is not a number.

    Example:
        >>> x = torch.randn(8, 49, 64, requires_grad=True)
        >>> codebook = torch.nn.Parameter(torch.randn(512, 64))
        >>> quantized, indices, loss = vqtriton.vector_quantize(x, codebook)
        >>> (quantized.square().mean() + loss).backward()  # both x and codebook get a gradient

    Reference: van den Oord et al. 2017, arXiv:1711.00937, equation 3.
    """
    if isinstance(codebook, PreparedCodebook) and codebook.metric != "l2":
        raise ValueError(f"codebook was prepared for {codebook.metric!r}; it must be for 'l2'")
    codes, prepared, backend = _parts(codebook, backend)
    check_arguments(x, codes, mask, precision=precision, backend=backend)
    check_weight("commitment_weight", commitment_weight)
    check_weight("codebook_weight", codebook_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    quantized, loss, indices, _ = apply(
        _VectorQuantize,
        _flat(x),
        codes,
        None if mask is None else mask.reshape(-1),
        float(commitment_weight),
        float(codebook_weight),
        reduction,
        precision,
        backend,
        prepared,
    )
    return _in_shape_of(x, quantized, indices, loss)


def vector_quantize_update_(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cluster_size: Tensor,
    rates: Tensor,
    *,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    averages: bool,
    revives: bool,
    precision: str,
    backend: str,
) -> Quantized:
    """`vector_quantize`, and then a step of the moving averages and of dead codes in place.

    One op, for one process: ranks have to meet between the two. See `vqtriton.ops.ema_update_`.
    """
    check_arguments(x, codebook, mask, precision=precision, backend=backend)
    quantized, loss, indices, *_ = apply(
        _VectorQuantizeUpdate,
        _flat(x),
        codebook,
        None if mask is None else mask.reshape(-1),
        cluster_size,
        rates,
        float(commitment_weight),
        float(codebook_weight),
        reduction,
        averages,
        revives,
        precision,
        backend,
    )
    return _in_shape_of(x, quantized, indices, loss)


def _in_shape_of(x: Tensor, quantized: Tensor, indices: Tensor, loss: Tensor) -> Quantized:
    if x.ndim == 2:
        return Quantized(quantized, indices, loss)
    indices = indices.reshape(x.shape[:-1])
    if loss.ndim > 0:
        loss = loss.reshape(x.shape[:-1])
    return Quantized(quantized.reshape(x.shape), indices, loss)


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    deterministic: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of the vectors, and their number, per code.

    Equivalent to ``one_hot(indices, K).T @ x`` and ``bincount(indices, minlength=K)`` without the
    [N, K] matrix. Bitwise repeatable. Differentiable with respect to ``x``. Sums are computed in
    float64 and then rounded to float32 once, however many rows they have.

    Args:
        x: vectors, [..., D].
        indices: [...] int64. Rows with an index outside [0, K) are left out, and so are rows of
            ``x`` that are not finite.
        codebook_size: K >= 1.
        deterministic: False lets the kernels add with atomics in float64, which needs no sort. Then
            a last bit may differ from run to run, and additions to one code wait for each other. It
            has no effect under `torch.use_deterministic_algorithms` or with the torch backend.
        backend: see `nearest_code`.

    Returns:
        A tuple of two.

        sums: [K, D] float32 (float64 for float64).
        counts: [K] int64.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: not a tensor, ``x`` is not a float, ``indices`` is not int64.

    Example:
        >>> x, indices = torch.randn(1000, 64), torch.randint(512, (1000,))
        >>> sums, counts = vqtriton.code_sums(x, indices, 512)
        >>> means = sums / counts.clamp(min=1)[:, None]  # [512, 64]
    """
    check_sums(x, indices, codebook_size, deterministic, backend)
    rows = _flat(x)
    arguments = codebook_size, backend, deterministic, False
    return apply(_CodeSums, rows, indices.reshape(-1), *arguments)


def normalize(x: Tensor, backend: str = "auto") -> Tensor:
    """`vqtriton.reference.normalized`, with its gradient. x is [..., D]."""
    return apply(_Normalize, _flat(x), backend).reshape(x.shape)


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` with its gradient going to x, which has its shape."""
    return apply(_ValuesOf, quantized.detach(), x)


def rotate(x: Tensor, quantized: Tensor, backend: str = "auto") -> Tensor:
    """``quantized`` [..., D] with the gradient of the rotation trick for x.

    It is that of R·x, where R, taken for a constant, rotates x to the direction of ``quantized``
    and scales it to its length. ``quantized`` itself gets none.

    Reference: Fifty et al. 2024, arXiv:2410.06424, section 4.2.
    """
    return apply(_Rotate, _flat(x), _flat(quantized.detach()), backend).reshape(quantized.shape)


def snapshot(tensor: Tensor) -> Tensor:
    """A copy that stays as it is when ``tensor`` is then changed in place.

    As `torch.clone`, which `torch.compile` may put off until backward, after the change: the
    gradient is then silently wrong (pytorch/pytorch#197039). It does not put off an op of ours.
    """
    return apply(_Snapshot, tensor)


class Function(torch.autograd.Function):
    """One that `torch.func` takes as well, and `eager`, which does the same in less time."""

    generate_vmap_rule = True
    eager: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        # `apply` asks for it in each call
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

        def forward(ctx: Any, *args: Any) -> Any:
            # what is registered for an op by itself has nothing to add
            with torch._C._AutoDispatchBelowAutograd():
                results = cls.forward(*args)
            cls.setup_context(ctx, args, results)
            return results

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.eager = type(f"{cls.__name__}Eager", (torch.autograd.Function,), methods)


def apply(function: type[Function], *args: Any) -> Any:
    if is_traced():
        return function.apply(*args)
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return function.eager.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function.forward(*args)


class _ValuesOf(Function):
    """The values of one tensor, with the gradient going to another."""

    @staticmethod
    def forward(values: Tensor, tensor: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, grad


class _Snapshot(Function):
    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return ops.snapshot(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Normalize(Function):
    @staticmethod
    def forward(x: Tensor, backend: str) -> Tensor:
        return ops.normalize_rows(x, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        wide = x.to(grad.dtype)
        # of large or small numbers the squares would leave the range
        scale = wide.detach().abs().amax(1, keepdim=True).clamp(min=LEAST_NORM)
        wide = wide / scale
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp(min=LEAST_NORM)
        unit = wide / length
        length = length * scale
        # a short row is divided by a constant
        across = grad - unit * (grad * unit).sum(1, keepdim=True)
        grad = torch.where(length < LEAST_NORM, grad / LEAST_NORM, across / length)
        return grad.to(x.dtype), None


class _Rotate(Function):
    """(x, quantized) -> quantized, which is λRx."""

    @staticmethod
    def forward(x: Tensor, quantized: Tensor, backend: str) -> Tensor:
        return quantized.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, quantized, ctx.backend = inputs
        ctx.save_for_backward(x, quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, quantized = ctx.saved_tensors
        return apply(_RotateGrad, grad, x, quantized, False, ctx.backend), None, None


class _RotateGrad(Function):
    """λRᵀ·grad, or λR·grad if it is not transposed."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, quantized: Tensor, is_forward: bool, backend: str
    ) -> Tensor:
        return ops.rotate_grad(grad, x, quantized, is_forward, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, quantized, ctx.is_forward, ctx.backend = inputs
        ctx.save_for_backward(x, quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, quantized = ctx.saved_tensors
        # R is a constant
        turned = apply(_RotateGrad, grad, x, quantized, not ctx.is_forward, ctx.backend)
        return turned, None, None, None, None


class _CodeSums(Function):
    @staticmethod
    def forward(
        x: Tensor,
        indices: Tensor,
        codebook_size: int,
        backend: str,
        deterministic: bool,
        double: bool,
    ) -> tuple[Tensor, Tensor]:
        return ops.code_sums(x, indices, codebook_size, backend, deterministic, double)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, indices, ctx.codebook_size, *_ = inputs
        ctx.save_for_backward(x, indices)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple:
        x, indices = ctx.saved_tensors
        is_counted = (indices < ctx.codebook_size) & finite_rows(x)
        grad_x = gather(grad_sums, indices.where(is_counted, -1)).to(x.dtype)
        return grad_x, None, None, None, None, None


class _VectorQuantize(Function):
    """(x, codebook, mask) -> (quantized, loss, indices, what the loss was multiplied by).

    Backward can be differentiated again, with the stop-gradients of the paper where they belong.
    """

    @staticmethod
    def forward(
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        commitment_weight: float,
        codebook_weight: float,
        reduction: str,
        precision: str,
        backend: str,
        prepared: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = commitment_weight, codebook_weight
        arguments = x, codebook, mask, *weights, reduction, precision, backend
        if prepared:
            return ops.vector_quantize_prepared(*arguments, prepared)
        # torch.vmap takes no op that has a list of tensors
        return ops.vector_quantize(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, codebook, mask, commitment, ctx.codebook_weight, reduction, _, backend, *_ = inputs
        # the op has one less
        ctx.num_others = len(inputs) - 2
        ctx.learned = None
        _save(ctx, x, codebook, mask, commitment, reduction, backend, output)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor | None, grad_loss: Tensor | None, *_: Tensor
    ) -> tuple:
        x, codebook, indices, of_rows = _of_rows(ctx, grad_loss)
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_x(ctx, grad_quantized, of_rows, x, codebook, indices)
        if ctx.needs_input_grad[1]:
            weight = 2 * ctx.codebook_weight * ctx.share
            grad_codebook = apply(
                _GradCodebook, of_rows, x.detach(), codebook, indices, weight, ctx.backend
            )
            if grad_codebook.dtype != codebook.dtype:
                grad_codebook = grad_codebook.to(codebook.dtype)
        return grad_x, grad_codebook, *[None] * ctx.num_others


class _VectorQuantizeUpdate(_VectorQuantize):
    """`_VectorQuantize`, in an op that also makes a step of the codes and keeps them as they were.

    The gradient is that of the codes as they were.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        cluster_size: Tensor,
        rates: Tensor,
        commitment_weight: float,
        codebook_weight: float,
        reduction: str,
        averages: bool,
        revives: bool,
        precision: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        # by name: a compiler of torch 2.13 takes no *args here
        state = cluster_size, rates, commitment_weight, codebook_weight, reduction
        options = averages, revives, precision, backend
        return ops.vector_quantize_update_(x, codebook, mask, *state, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, _, mask, _, _, commitment, ctx.codebook_weight, reduction, _, _, _, backend = inputs
        ctx.num_others = len(inputs) - 2
        # the codes that are changed: what is differentiated again belongs to them
        ctx.learned = inputs[1] if inputs[1].requires_grad else None
        *found, before = output
        _save(ctx, x, before, mask, commitment, reduction, backend, found)
        ctx.mark_non_differentiable(*output[2:])


def _save(
    ctx: Any,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    reduction: str,
    backend: str,
    output: Sequence[Tensor],
) -> None:
    """What backward needs of `_VectorQuantize`."""
    _, _, indices, share = output
    ctx.commitment_weight, ctx.backend = commitment_weight, backend
    # what a row's part of the loss was multiplied by: where it is a number, it costs nothing; but a
    # compiler would take it for a constant
    is_counted = reduction == "mean" and (mask is not None or torch.compiler.is_compiling())
    ctx.share = 1.0 if reduction != "mean" or is_counted else 1.0 / max(x.numel(), 1)
    ctx.save_for_backward(x, codebook, indices, *([share] if is_counted else []))
    ctx.mark_non_differentiable(indices, share)
    # no zeros for those
    ctx.set_materialize_grads(False)


def _of_rows(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, codebook, indices, and the gradient of each row's part of the loss, [N]."""
    x, codebook, indices, *counted = ctx.saved_tensors
    if ctx.learned is not None and torch.is_grad_enabled():
        codebook = apply(_ValuesOf, codebook, ctx.learned)
    if grad_loss is None:
        grad_loss = torch.zeros((), dtype=screen_dtype(x, codebook), device=x.device)
    for share in counted:
        grad_loss = grad_loss * share
    return x, codebook, indices, grad_loss.expand(indices.shape)


def _grad_x(
    ctx: Any,
    grad_quantized: Tensor | None,
    of_rows: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
) -> Tensor:
    if grad_quantized is None:
        grad_quantized = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    weight = 2 * ctx.commitment_weight * ctx.share
    return apply(
        _GradX, grad_quantized, of_rows, x, codebook.detach(), indices, weight, ctx.backend
    )


class _GradX(Function):
    """grad_quantized + weight·grad_loss·(x - codes), zero for masked rows."""

    @staticmethod
    def forward(
        grad_quantized: Tensor,
        grad_loss: Tensor,
        x: Tensor,
        codebook: Tensor,
        indices: Tensor,
        weight: float,
        backend: str,
    ) -> Tensor:
        return ops.grad_x(grad_quantized, grad_loss, x, codebook, indices, weight, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, grad_loss, x, codebook, indices, ctx.weight, _ = inputs
        ctx.save_for_backward(grad_loss, x, codebook, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_loss, x, codebook, indices = ctx.saved_tensors
        grad = grad.masked_fill((indices < 0)[:, None], 0)
        pull = ctx.weight * (x.to(grad_loss.dtype) - gather(codebook, indices))
        of_x = (ctx.weight * grad_loss[:, None] * grad).to(x.dtype)
        return grad, (grad * pull).sum(1), of_x, None, None, None, None


class _GradCodebook(Function):
    """Sum of weight·grad_loss·(code - x) over the finite rows of each code, in the loss's dtype."""

    @staticmethod
    def forward(
        grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, weight: float, backend: str
    ) -> Tensor:
        return ops.grad_codebook(grad_loss, x, codebook, indices, weight, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad_loss, x, codebook, indices, ctx.weight, ctx.backend = inputs
        ctx.save_for_backward(grad_loss, x, codebook, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_loss, x, codebook, indices = ctx.saved_tensors
        is_left_out = (indices < 0) | ~finite_rows(x)
        pull = ctx.weight * (gather(codebook, indices).to(grad.dtype) - x)
        of_loss = (gather(grad, indices) * pull).sum(1).masked_fill(is_left_out, 0)
        rows = grad_loss.masked_fill(is_left_out, 0)[:, None]
        num_codes = codebook.shape[0]
        total, _ = apply(_CodeSums, rows, indices, num_codes, ctx.backend, True, False)
        return of_loss, None, (ctx.weight * grad * total).to(codebook.dtype), None, None, None


# An exported program calls the ops themselves, on tensors that may require a gradient.
ops.differentiate("vector_quantize", _VectorQuantize)
ops.differentiate("code_sums", _CodeSums)
