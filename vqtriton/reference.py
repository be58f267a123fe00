"""The definition of what is right: every op in plain torch and float64.

It is slow and holds the [N, K] matrix. The functions have the signatures of the public ones, so
that one can stand in for the other; here ``precision`` and ``backend`` have no effect. The tests
hold the fast code to these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from vqtriton.kernels.constants import LEAST_NORM


class Quantized(NamedTuple):
    """What `vqtriton.vector_quantize`, `VectorQuantize` and the reference return.

    Attributes:
        quantized: the code of each vector, in the shape and dtype of ``x``. Gradients pass straight
            through it to ``x``.
        indices: int64, the chosen codes; -1 where masked.
        loss: the weighted terms, [] unless ``reduction="none"``.

    Example:
        >>> vq, x = vqtriton.VectorQuantize(16, 128), torch.randn(100, 16)
        >>> quantized, indices, loss = vq(x)
        >>> indices = vq(x).indices  # the same by name
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


# so that an exported program that returns it can be saved
_pytree._register_namedtuple(Quantized, serialized_type_name="vqtriton.Quantized")


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared L2 distances of all pairs, in a fixed order of float64 operations.

    This order *defines* the distance: one subtraction, one product and one addition per dimension,
    in the order of the dimensions, each rounded once to float64. Every backend decides close calls
    with exactly this sum, so that not even the last bit is left to chance.

    Args:
        x: [N, D].
        codebook: [K, D].

    Returns:
        [N, K] float64, in squared units of ``x``.

    Example:
        >>> x, codebook = torch.randn(5, 64), torch.randn(512, 64)
        >>> vqtriton.reference.squared_distances(x, codebook).shape
        torch.Size([5, 512])
    """
    x, codebook = x.double(), codebook.double()
    distances = x.new_zeros(x.shape[0], codebook.shape[0])
    for d in range(x.shape[1]):
        difference = x[:, d, None] - codebook[None, :, d]
        distances = distances + difference * difference
    return distances


def dot_products(x: Tensor, codebook: Tensor) -> Tensor:
    """Dot products of all pairs, in a fixed order of float64 operations.

    As `squared_distances`: one product and one addition per dimension, in the order of the
    dimensions, each rounded once to float64.

    Args:
        x: [N, D].
        codebook: [K, D].

    Returns:
        [N, K] float64.

    Example:
        >>> x, codebook = torch.randn(5, 64), torch.randn(512, 64)
        >>> vqtriton.reference.dot_products(x, codebook).shape
        torch.Size([5, 512])
    """
    x, codebook = x.double(), codebook.double()
    products = x.new_zeros(x.shape[0], codebook.shape[0])
    for d in range(x.shape[1]):
        products = products + x[:, d, None] * codebook[None, :, d]
    return products


def normalized(vectors: Tensor) -> Tensor:
    """Vectors divided by their lengths, in a fixed order of float64 operations.

    This order defines what ``metric="cosine"`` compares: ``v / max(sqrt(Σ v_d²), 1e-12)`` in
    float64, with the squares added in the order of the dimensions and each operation rounded once,
    and the result rounded to float32. Vectors of zeros stay zeros. A float64 vector whose squares
    overflow becomes zeros.

    Args:
        vectors: [..., D].

    Returns:
        [..., D] float32 (float64 for float64).

    Example:
        >>> vqtriton.reference.normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    wide = vectors.double()
    sqnorm = torch.zeros_like(wide[..., 0])
    for column in wide.unbind(-1):
        sqnorm = sqnorm + column * column
    result = wide / sqnorm.sqrt().clamp(min=LEAST_NORM)[..., None]
    return result if vectors.dtype == torch.float64 else result.float()


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    precision: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """What `vqtriton.nearest_code` must return, with the same arguments.

    Example:
        >>> x, codebook = torch.randn(100, 64), torch.randn(512, 64)
        >>> indices = vqtriton.nearest_code(x, codebook)
        >>> torch.equal(indices, vqtriton.reference.nearest_code(x, codebook))
        True
    """
    distances = _distances(x, codebook, metric)
    # `min` may return any of equal minima; the lowest index is the rule
    columns = torch.arange(codebook.shape[0], dtype=torch.int64, device=x.device)
    is_nearest = distances == distances.amin(1, keepdim=True)
    indices = torch.where(is_nearest, columns, codebook.shape[0]).amin(1)
    return indices.reshape(x.shape[:-1])


def nearest_codes(
    x: Tensor,
    codebook: Tensor,
    k: int,
    *,
    metric: str = "l2",
    return_distances: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """What `vqtriton.nearest_codes` must return, with the same arguments.

    Example:
        >>> x, codebook = torch.randn(100, 64), torch.randn(512, 64)
        >>> indices = vqtriton.nearest_codes(x, codebook, 4)
        >>> torch.equal(indices, vqtriton.reference.nearest_codes(x, codebook, 4))
        True
    """
    distances, indices = _distances(x, codebook, metric).sort(dim=1, stable=True)
    shape = (*x.shape[:-1], k)
    indices = indices[:, :k].reshape(shape)
    if not return_distances:
        return indices
    dtype = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    return indices, distances[:, :k].to(dtype).reshape(shape)


def _distances(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """[N, K] float64: what codes are ranked by; +inf where that is not finite."""
    rows, codes = x.detach().reshape(-1, x.shape[-1]), codebook.detach()
    if metric == "cosine":
        rows, codes = normalized(rows), normalized(codes)
    distances = -dot_products(rows, codes) if metric == "dot" else squared_distances(rows, codes)
    return distances.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    deterministic: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What `vqtriton.code_sums` must return, with the same arguments.

    Example:
        >>> x, indices = torch.randn(100, 64), torch.randint(512, (100,))
        >>> sums, counts = vqtriton.reference.code_sums(x, indices, 512)
    """
    rows = x.reshape(-1, x.shape[-1]).double()
    flat = indices.reshape(-1)
    keep = (flat >= 0) & (flat < codebook_size) & rows.isfinite().all(1)
    one_hot = torch.nn.functional.one_hot(flat[keep], codebook_size)
    sums = one_hot.double().T @ rows[keep]
    return sums.to(torch.float64 if x.dtype == torch.float64 else torch.float32), one_hot.sum(0)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
) -> Quantized:
    """What `vqtriton.vector_quantize` must return up to rounding, with the same arguments.

    The three stop-gradients are written as in the paper.

    Example:
        >>> x, codebook = torch.randn(100, 64), torch.randn(512, 64)
        >>> quantized, indices, loss = vqtriton.reference.vector_quantize(x, codebook)

    Reference: van den Oord et al. 2017, arXiv:1711.00937, equation 3.
    """
    indices = nearest_code(x, codebook)
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    x64 = x.double().where(valid[..., None], 0)
    finite = x64.isfinite().all(-1)
    codes = codebook.double()[indices]

    # straight through: the value of the code, the gradient of x
    x_finite = x64.where(x64.isfinite(), 0)
    quantized = (codes.detach() + (x_finite - x_finite.detach())).where(valid[..., None], 0)

    # a row that is not finite has no say in where its code goes
    target = x64.detach().where(finite[..., None], codes.detach())
    codebook_term = (target - codes).square().sum(-1)
    commitment_term = (x64 - codes.detach()).square().sum(-1)
    loss = codebook_weight * codebook_term + commitment_weight * commitment_term
    loss = loss.where(finite, torch.nan).where(valid, 0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (valid.sum() * x.shape[-1]).clamp(min=1)
    loss = loss.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return Quantized(quantized.to(x.dtype), indices.where(valid, -1), loss)


def residual_quantize(
    x: Tensor,
    codebooks: Sequence[Tensor],
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
    """What `vqtriton.residual_quantize` must return, with the same arguments.

    Indices exactly, the others up to rounding. The residuals *define* the tokens: they are float32
    (float64 if an argument is), with one subtraction for each level, in the order of the levels.

    Example:
        >>> x, codebooks = torch.randn(100, 16), torch.randn(4, 128, 16)
        >>> quantized, indices, loss = vqtriton.reference.residual_quantize(x, codebooks)
        >>> indices.shape, loss.shape
        (torch.Size([100, 4]), torch.Size([4]))
    """
    is_double = any(t.dtype == torch.float64 for t in (x, *codebooks))
    dtype = torch.float64 if is_double else torch.float32
    is_row = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    levels = [is_row if depths is None else is_row & (depths > q) for q in range(len(codebooks))]
    is_finite = x.isfinite().all(-1)
    x64 = x.double().where(is_row[..., None], 0)
    x_finite = x64.where(is_finite[..., None], 0)
    residual = x.detach().to(dtype).where(is_row[..., None], 0)
    total = torch.zeros_like(residual)
    indices, losses = [], []
    followed = _beams(residual, codebooks, levels, beam_size) if beam_size > 1 else None
    for level, (codebook, is_counted) in enumerate(zip(codebooks, levels, strict=True)):
        found = nearest_code(residual, codebook) if followed is None else followed[..., level]
        # the residual is a value for the codes of later levels, and x is what gets the gradient
        before = residual.double()
        codes = codebook[found].double().where(is_counted[..., None], 0)
        chosen = codes.detach().to(dtype)
        residual, total = residual - chosen, total + chosen
        share = (1 - quant_grad_frac) ** level
        moved = residual.double().where(is_finite[..., None], 0)
        moved = moved + share * (x_finite - x_finite.detach())
        codebook_term = (before.where(is_finite[..., None], codes.detach()) - codes).square()
        loss = commitment_weight * moved.square().sum(-1) + codebook_weight * codebook_term.sum(-1)
        losses.append(loss.where(is_finite, torch.nan).where(is_counted, 0))
        indices.append(found.where(is_counted, -1))
    loss = torch.stack(losses, -1)
    if reduction != "none":
        loss = loss.reshape(-1, len(codebooks)).sum(0)
    if reduction == "mean":
        counts = torch.stack([is_counted.sum() for is_counted in levels])
        loss = loss / (counts * x.shape[-1]).clamp(min=1)
    quantized = total.double() + (x_finite - x_finite.detach())
    quantized = quantized.where(levels[0][..., None], 0)
    return Quantized(quantized.to(x.dtype), torch.stack(indices, -1), loss.to(dtype))


def _beams(
    x: Tensor, codebooks: Sequence[Tensor], levels: Sequence[Tensor], beam_size: int
) -> Tensor:
    """The tokens of a beam search, [..., Q]; 0 where a row has no level."""
    found = []
    counted = torch.stack(list(levels), -1).reshape(-1, len(levels))
    for row, depth in zip(x.reshape(-1, x.shape[-1]), counted.sum(-1).tolist(), strict=True):
        beams: list[tuple[list[int], Tensor]] = [([], row)]
        for codebook in codebooks[:depth]:
            follow = []
            for path, residual in beams:
                squares = squared_distances(residual[None], codebook.detach())[0]
                # by float32, and by the order in which they are found where these are equal
                squares = squares.nan_to_num(nan=torch.inf, posinf=torch.inf)
                near = squares.sort(stable=True).indices[:beam_size]
                rounded = squares.to(x.dtype).tolist()
                follow += [(rounded[k], [*path, k], residual - codebook[k]) for k in near.tolist()]
            follow.sort(key=lambda each: each[0])
            beams = [(path, residual.detach()) for _, path, residual in follow[:beam_size]]
        path = beams[0][0]
        found.append(path + [0] * (len(codebooks) - len(path)))
    return torch.tensor(found, dtype=torch.int64, device=x.device).view(*x.shape[:-1], -1)
