"""A chain of codebooks as a differentiable function, with all checks of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqtriton import dispatch
from vqtriton.checks import (
    INTEGERS,
    MOST_CODES,
    REDUCTIONS,
    check_arguments,
    check_codebook,
    check_mask,
    check_number,
    check_options,
    check_weight,
)
from vqtriton.functional import Function, apply
from vqtriton.reference import Quantized
from vqtriton.residual import ops
from vqtriton.residual.beam import search_beams
from vqtriton.tensors import finite_rows, gather, has_float64, parts_of, screen_dtype


class PreparedCodebooks(NamedTuple):
    """Copies of the codebooks of all levels with the tensors that a search computes from them.

    Made by `prepare_codebooks`; `residual_quantize` takes it in place of the codebooks.

    Attributes:
        codebooks: Q of [K, D], the copies.
        tensors: what the backend computed from them; each backend has its own.
        backend: "triton" or "torch", the backend that they were prepared for.

    Example:
        >>> prepared = vqtriton.prepare_codebooks(torch.randn(8, 512, 64))
        >>> len(prepared.codebooks)
        8
    """

    codebooks: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    backend: str

    def first(self, num_levels: int) -> PreparedCodebooks:
        """The first levels alone, without copies."""
        if num_levels == len(self.codebooks):
            return self
        module = ops.module_for(self.backend, self.codebooks[0].device)
        tensors = tuple(module.prepared_for(self.tensors, num_levels))
        return PreparedCodebooks(self.codebooks[:num_levels], tensors, self.backend)


Codebooks = Sequence[Tensor] | Tensor | PreparedCodebooks


def prepare_codebooks(
    codebooks: Sequence[Tensor] | Tensor, *, backend: str = "auto"
) -> PreparedCodebooks:
    """Does the codebooks' part of `residual_quantize` once, for many calls: for streams.

    The codebooks are copied, so later changes of them do not reach the result. A
    `ResidualVectorQuantize` that is frozen does this by itself in eval mode, with the kernels.

    Args:
        codebooks: see `residual_quantize`.
        backend: see `nearest_code`. Calls with the result run on this backend.

    Returns:
        `PreparedCodebooks`.

    Raises:
        ValueError, TypeError: see `residual_quantize`.

    Example:
        >>> prepared = vqtriton.prepare_codebooks(torch.randn(8, 512, 64))
        >>> for frame in torch.randn(3, 1, 64):
        ...     tokens = vqtriton.residual_quantize(frame, prepared).indices  # [1, 8]
    """
    if isinstance(codebooks, PreparedCodebooks):
        raise TypeError("codebooks is prepared already")
    levels = _levels_of(codebooks)
    for codes in levels:
        check_codebook(codes, levels[0])
    check_options("exact", backend, *levels)
    backend = dispatch.resolve_backend(backend, levels[0].device)
    copies = [c.detach().clone(memory_format=torch.contiguous_format) for c in levels]
    return PreparedCodebooks(tuple(copies), tuple(ops.residual_prepare(copies, backend)), backend)


def residual_quantize(
    x: Tensor,
    codebooks: Codebooks,
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    depths: Tensor | None = None,
    quant_grad_frac: float = 0.0,
    beam_size: int = 1,
    precision: str = "exact",
    backend: str = "auto",
) -> Quantized:
    """Quantizes in levels: each codebook quantizes what the levels before it have left.

    Equivalent to::

        residual = x.float()
        for q, codebook in enumerate(codebooks):
            indices[..., q] = nearest_code(residual, codebook)
            residual = residual - codebook[indices[..., q]]
            loss[q] = (codebook_weight + commitment_weight) * residual.square().mean()

    where ``quantized`` is the sum of the chosen codes. The residuals define the tokens: they are
    float32, with one subtraction for each level. So the tokens depend neither on the device nor on
    the batch, and the first levels of a long chain give the tokens of a short one.

    The gradient of ``x`` is that of one straight-through estimator over the sum, whatever the
    number of levels, and the pull of each level's commitment term. A level's codebook term reaches
    its own codes only.

    Args:
        x: vectors, [..., D].
        codebooks: Q >= 1 codebooks, [K, D] each; K may differ. Or one tensor [Q, K, D]. Or what
            `prepare_codebooks` made of them, which takes less time and gets no gradient.
        commitment_weight: β of each level.
        codebook_weight: use 0 where the codebooks learn by moving averages.
        reduction: see `vector_quantize`; of each level by itself.
        mask: [...] bool, True for the rows that count. Each other row gets indices -1 and zeros.
        depths: [...] int, how many levels each row is quantized in; all by default. Later levels of
            a row have index -1, and neither a code nor a loss.
        quant_grad_frac: in [0, 1], how much of a level's code later levels treat as moving with
            ``x``: the commitment term of level q pulls ``x`` by (1 - quant_grad_frac)^q.
        beam_size: how many partial sums each row keeps at a level, from 1 to 32. With more than one
            it is a beam search: each goes on with as many of its nearest codes, and those that
            leave the shortest residuals are kept. The error at the last level is lower, and it
            takes about ``beam_size`` times as long. The first levels then are those of this depth.
        precision: see `nearest_code`.
        backend: see `nearest_code`.

    Returns:
        `Quantized`, a named tuple of three.

        quantized: [..., D] in the dtype of ``x``.
        indices: [..., Q] int64.
        loss: [Q] float32, both terms of each level, weighted and added; [..., Q] with
            ``reduction="none"``.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: not a tensor, not a floating-point dtype, or a weight that is not a number.

    Example:
        >>> x, codebooks = torch.randn(8, 75, 128), torch.randn(4, 1024, 128)
        >>> quantized, indices, loss = vqtriton.residual_quantize(x, codebooks)
        >>> indices.shape, loss.shape  # four levels
        (torch.Size([8, 75, 4]), torch.Size([4]))

    References: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1; Lee et al. 2022,
    arXiv:2203.01941.
    """
    return quantize_levels(
        x,
        codebooks,
        None,
        commitment_weight=commitment_weight,
        codebook_weight=codebook_weight,
        reduction=reduction,
        mask=mask,
        depths=depths,
        quant_grad_frac=quant_grad_frac,
        beam_size=beam_size,
        precision=precision,
        backend=backend,
    )


def quantize_levels(
    x: Tensor,
    codebooks: Codebooks,
    joined: Tensor | None,
    *,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    mask: Tensor | None,
    depths: Tensor | None,
    quant_grad_frac: float,
    beam_size: int,
    precision: str,
    backend: str,
) -> Quantized:
    """`residual_quantize`, whose codebooks may be the first parts of one tensor [ΣK, D].

    The gradient then goes to that tensor, with zeros for the levels that are not used.
    """
    codes, prepared, backend = _parts(x, codebooks, mask, precision, backend)
    check_weight("commitment_weight", commitment_weight)
    check_weight("codebook_weight", codebook_weight)
    check_number("quant_grad_frac", quant_grad_frac, float, 0, 1)
    check_number("beam_size", beam_size, int, 1, MOST_CODES)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    flat_depths = _depths(x, mask, depths, len(codes))
    rows = x.reshape(-1, x.shape[-1])
    weights = float(commitment_weight), float(codebook_weight)
    frac, found = float(quant_grad_frac), None
    if beam_size > 1:
        constants = [code.detach() for code in codes]
        found = search_beams(rows.detach(), constants, flat_depths, beam_size, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *codes)):
        sizes = tuple(code.shape[0] for code in codes)
        if joined is None:
            # in one tensor, as a function of autograd takes no list of them
            joined = torch.cat(list(codes)) if len(codes) > 1 else codes[0]
        options = sizes, *weights, reduction, frac, precision, backend
        quantized, loss, indices, _ = apply(
            _ResidualQuantize, rows, joined, flat_depths, found, *options
        )
    else:
        quantized, indices, errors = ops.residual_quantize(
            rows.detach(),
            [code.detach() for code in codes],
            *(flat_depths, precision, prepared, found, backend),
        )
        loss, _ = _reduced(errors, indices, flat_depths, sum(weights), reduction, x.shape[-1])
    levels = *x.shape[:-1], len(codes)
    return Quantized(
        quantized.reshape(x.shape),
        indices.reshape(levels),
        loss.reshape(levels) if reduction == "none" else loss,
    )


def _reduced(
    errors: Tensor,
    indices: Tensor,
    depths: Tensor | None,
    weight: float,
    reduction: str,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each level, from squared errors [N, Q]; what their sums were multiplied by.

    The latter is empty where that follows from the shape.
    """
    if reduction == "none":
        return errors * weight, errors.new_empty(0)
    # float64, so that a sum over millions of rows keeps the digits of float32
    wide = torch.float64 if has_float64(errors.device) else errors.dtype
    loss = errors.sum(0, dtype=wide)
    if reduction == "mean" and depths is None:
        # a number costs no operation, but a compiler would take it for a constant
        share = 1 / max(len(errors) * dim, 1)
        told = errors.new_full((), share) if torch.compiler.is_compiling() else errors.new_empty(0)
        return (loss * (share * weight)).to(errors.dtype), told
    if reduction == "sum":
        return (loss * weight).to(errors.dtype), errors.new_empty(0)
    shares = 1 / ((indices >= 0).sum(0) * dim).clamp(min=1).to(wide)
    return (loss * shares * weight).to(errors.dtype), shares.to(errors.dtype)


def _parts(
    x: Tensor, codebooks: Codebooks, mask: Tensor | None, precision: str, backend: str
) -> tuple[Sequence[Tensor], list[Tensor], str]:
    """The codes of each level, what was prepared of all of them, and the backend."""
    tensors: list[Tensor] = []
    if isinstance(codebooks, PreparedCodebooks):
        if backend not in ("auto", codebooks.backend):
            raise ValueError(
                f"backend is {backend!r}, but codebooks was prepared for {codebooks.backend!r}"
            )
        backend, tensors = codebooks.backend, list(codebooks.tensors)
        codebooks = codebooks.codebooks
    codes = _levels_of(codebooks)
    for code in codes:
        check_arguments(x, code, mask, precision=precision, backend=backend)
    if len({code.dtype for code in codes}) > 1:
        raise TypeError(f"codebooks have dtypes {[c.dtype for c in codes]}; they must be of one")
    return codes, tensors, backend


def _levels_of(codebooks: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    if isinstance(codebooks, Tensor):
        if codebooks.ndim != 3:
            raise ValueError(
                f"codebooks has shape {tuple(codebooks.shape)}; a tensor of them must be [Q, K, D]"
            )
        codebooks = codebooks.unbind(0)
    if len(codebooks) == 0:
        raise ValueError("codebooks is empty; give one codebook for each level")
    return codebooks


def _depths(
    x: Tensor, mask: Tensor | None, depths: Tensor | None, num_levels: int
) -> Tensor | None:
    """[N] how many levels each row has; None: all have all."""
    if depths is None:
        return None if mask is None else mask.reshape(-1) * num_levels
    if not isinstance(depths, Tensor) or depths.dtype not in INTEGERS:
        kind = depths.dtype if isinstance(depths, Tensor) else type(depths).__name__
        raise TypeError(f"depths is {kind}; it must be a tensor of integers")
    if depths.shape != x.shape[:-1] or depths.device != x.device:
        raise ValueError(
            f"depths has shape {tuple(depths.shape)} on {depths.device}; with x of shape "
            f"{tuple(x.shape)} on {x.device} it must be {tuple(x.shape[:-1])} there"
        )
    check_mask(mask, x)
    depths = depths.to(torch.int64)
    return (depths if mask is None else depths * mask).reshape(-1)


class _ResidualQuantize(Function):
    """(x, codes of all levels [ΣK, D]) -> (quantized, loss, indices, share of a row in the loss).

    The loss is [Q], or [N, Q] with "none".
    """

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        depths: Tensor | None,
        found: Tensor | None,
        sizes: tuple[int, ...],
        commitment_weight: float,
        codebook_weight: float,
        reduction: str,
        quant_grad_frac: float,
        precision: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, errors = ops.residual_quantize(
            x, parts_of(codes, sizes), depths, precision, [], found, backend
        )
        weight = commitment_weight + codebook_weight
        loss, share = _reduced(errors, indices, depths, weight, reduction, x.shape[1])
        return quantized, loss, indices, share

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, codes, *_ = inputs
        ctx.sizes, *ctx.weights, ctx.reduction, ctx.frac, _, ctx.backend = inputs[4:]
        _, _, indices, share = output
        ctx.share = 1.0
        if ctx.reduction == "mean" and share.numel() == 0:
            ctx.share /= max(x.numel(), 1)
        ctx.save_for_backward(x, codes, indices, share)
        ctx.mark_non_differentiable(indices, share)
        # no zeros for those
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor | None, grad_loss: Tensor | None, *_: Tensor
    ) -> tuple:
        x, codes, indices, share = ctx.saved_tensors
        if grad_quantized is None:
            grad_quantized = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
        if grad_loss is None:
            dtype = screen_dtype(x, codes)
            grad_loss = torch.zeros(len(ctx.sizes), dtype=dtype, device=x.device)
        elif share.numel():
            grad_loss = grad_loss * share
        commitment_weight, codebook_weight = ctx.weights
        grad_x = grad_codes = None
        if ctx.needs_input_grad[0]:
            pulls = _by_share(2 * commitment_weight * ctx.share * grad_loss, ctx.frac)
            # later levels see codes as constants
            others = codes.detach(), indices, ctx.sizes, ctx.frac, ctx.backend
            grad_x = apply(_GradX, grad_quantized, pulls.expand(indices.shape), x, *others)
        if ctx.needs_input_grad[1]:
            pulls = (2 * codebook_weight * ctx.share * grad_loss).expand(indices.shape)
            grad_codes = apply(
                _GradCodes, pulls, x.detach(), codes, indices, ctx.sizes, ctx.backend
            ).to(codes.dtype)
        return grad_x, grad_codes, *[None] * 9


def _by_share(pulls: Tensor, frac: float) -> Tensor:
    """Multiplies [..., Q] by how much what each level quantizes moves with x."""
    if frac == 0:
        return pulls
    level = torch.arange(pulls.shape[-1], dtype=pulls.dtype, device=pulls.device)
    return pulls * (1 - frac) ** level


class _GradX(Function):
    """grad_quantized + Σ_q pulls[:, q]·(residual after level q), zero for masked rows."""

    @staticmethod
    def forward(
        grad_quantized: Tensor,
        pulls: Tensor,
        x: Tensor,
        codes: Tensor,
        indices: Tensor,
        sizes: tuple[int, ...],
        quant_grad_frac: float,
        backend: str,
    ) -> Tensor:
        return ops.residual_grad_x(grad_quantized, pulls, x, codes, sizes, indices, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, pulls, x, codes, indices, ctx.sizes, ctx.frac, _ = inputs
        ctx.save_for_backward(pulls, x, codes, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pulls, x, codes, indices = ctx.saved_tensors
        grad = grad.masked_fill((indices[:, :1] < 0), 0)
        after = residuals_after(x.to(pulls.dtype), parts_of(codes, ctx.sizes), indices)
        of_pulls = torch.stack([(grad * residual).sum(1) for residual in after], 1)
        of_pulls = of_pulls.masked_fill(indices < 0, 0)
        pulls = _by_share(pulls.masked_fill(indices < 0, 0), ctx.frac)
        of_x = grad * pulls.sum(1, keepdim=True)
        return grad, of_pulls, of_x.to(x.dtype), *[None] * 5


class _GradCodes(Function):
    """-Σ pulls[:, q]·(residual after level q) over the finite rows of each code, [ΣK, D]."""

    @staticmethod
    def forward(
        pulls: Tensor,
        x: Tensor,
        codes: Tensor,
        indices: Tensor,
        sizes: tuple[int, ...],
        backend: str,
    ) -> Tensor:
        grads = ops.residual_grad_codes(pulls, x, codes, sizes, indices, backend)
        unused = len(codes) - len(grads)
        return torch.nn.functional.pad(grads, (0, 0, 0, unused)) if unused else grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pulls, x, codes, indices, ctx.sizes, ctx.backend = inputs
        ctx.save_for_backward(pulls, x, codes, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pulls, x, codes, indices = ctx.saved_tensors
        is_left_out = (indices < 0) | ~finite_rows(x)[:, None]
        after = residuals_after(x.to(pulls.dtype), parts_of(codes, ctx.sizes), indices)
        chain = zip(after, parts_of(grad, ctx.sizes), indices.unbind(1), strict=True)
        of_pulls = torch.stack([-(gather(g, found) * r).sum(1) for r, g, found in chain], 1)
        # a residual falls by as much as its own code rises
        kept = pulls.masked_fill(is_left_out, 0)
        totals = [
            kept.new_zeros(size).index_add(0, found.clamp(min=0), pull)
            for size, found, pull in zip(ctx.sizes, indices.unbind(1), kept.unbind(1), strict=True)
        ]
        totals.append(kept.new_zeros(len(codes) - sum(ctx.sizes)))
        of_codes = grad * torch.cat(totals)[:, None]
        return of_pulls.masked_fill(is_left_out, 0), None, of_codes.to(codes.dtype), *[None] * 3


def residuals_after(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor) -> Iterator[Tensor]:
    """What is left after each level, [N, D]."""
    for codebook, found in zip(codebooks, indices.unbind(1), strict=True):
        x = x - gather(codebook, found)
        yield x
