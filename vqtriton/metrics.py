"""How well a codebook is used, and how much quantization loses.

`counts` takes indices. `perplexity` and `usage` take counts, not indices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton import distributed
from vqtriton.tensors import has_float64


def counts(indices: Tensor, codebook_size: int, mask: Tensor | None = None) -> Tensor:
    """How often each code was chosen: what `perplexity` and `usage` take.

    Equivalent to ``bincount(indices[(indices >= 0) & mask], minlength=K).double()``.

    Args:
        indices: any shape, any integer dtype. -1 stands for a masked vector, which is left out.
        codebook_size: K >= 1.
        mask: the shape of ``indices``, bool, True for the indices that count.

    Returns:
        [K] float64, on the device of ``indices``; on the CPU if that device has no float64 (MPS).

    Raises:
        TypeError: ``indices`` is not an integer tensor, ``codebook_size`` not an int, or ``mask``
            not a bool tensor.
        ValueError: ``mask`` does not fit ``indices``, or K == 0.
        IndexError: an index that counts is outside [-1, K). Under `torch.compile` such an index is
            left out instead.

    Example:
        >>> found = vqtriton.metrics.counts(torch.tensor([0, 2, 2, -1]), 4)
        >>> found.tolist()
        [1.0, 0.0, 2.0, 0.0]
    """
    _check_size(codebook_size)
    found = _tally(indices, codebook_size, mask)
    if not torch.compiler.is_compiling():
        _check_tally(found)
    return found[:codebook_size].double()


def perplexity(counts: Tensor) -> Tensor:
    """The number of codes in effective use: exp of the entropy (nats) of the code frequencies.

    Args:
        counts: [..., K] floating point, finite and not negative: how often each code was chosen,
            from `counts`, or moving averages of that, such as ``vq.cluster_size``. Not indices.

    Returns:
        [...] float64 in [1, K]; 0 where no code was chosen.

    Raises:
        TypeError: ``counts`` is not a floating-point tensor. Integers are refused, as they may be
            indices.
        ValueError: it has a value that is negative or not finite. `torch.compile` leaves this check
            out.

    Example:
        >>> found = vqtriton.metrics.counts(torch.tensor([0, 1, 2, 3, 3]), 8)
        >>> round(vqtriton.metrics.perplexity(found).item(), 2)
        3.79
    """
    counts = _checked(counts)
    total = counts.sum(-1, keepdim=True)
    entropy = torch.special.entr(counts / total).sum(-1)
    return entropy.exp().where(total.squeeze(-1) > 0, 0)


def usage(counts: Tensor) -> Tensor:
    """Fraction of the codes that were chosen at least once.

    Args:
        counts: [..., K] floating point, from `counts`, as for `perplexity`. Not indices.

    Returns:
        [...] float64 in [0, 1].

    Raises:
        TypeError, ValueError: see `perplexity`.

    Example:
        >>> found = vqtriton.metrics.counts(torch.tensor([0, 2, 2]), 4)
        >>> vqtriton.metrics.usage(found).item()
        0.5
    """
    return (_checked(counts) > 0).double().mean(-1)


class Usage(NamedTuple):
    """What `Meter.compute` returns.

    Attributes:
        counts: [K] float64, how often each code was chosen.
        perplexity: [] float64, see `metrics.perplexity`.
        usage: [] float64, see `metrics.usage`.

    Example:
        >>> vqtriton.metrics.Meter(128).compute().usage.item()
        0.0
    """

    counts: Tensor  # [K] float64, how often each code was chosen
    perplexity: Tensor  # [] float64
    usage: Tensor  # [] float64


class Meter:
    """Counts the codes of many batches, each rank its own, and adds them up when asked.

    Args:
        codebook_size: K >= 1.

    Raises:
        TypeError, ValueError: ``codebook_size`` is not an int, or is less than 1.

    Example:
        >>> vq = vqtriton.VectorQuantize(16, 128).eval()
        >>> meter = vqtriton.metrics.Meter(128)
        >>> for batch in torch.randn(3, 100, 16):
        ...     meter.update(vq(batch).indices)
        >>> counts, perplexity, usage = meter.compute()
    """

    def __init__(self, codebook_size: int) -> None:
        _check_size(codebook_size)
        self.codebook_size = codebook_size
        self.reset()

    def reset(self) -> None:
        """Forgets all batches.

        Example:
            >>> meter = vqtriton.metrics.Meter(128)
            >>> meter.reset()
        """
        self._found: Tensor | None = None

    def update(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Adds a batch, without waiting for a GPU.

        Args:
            indices: see `metrics.counts`.
            mask: see `metrics.counts`.

        Raises:
            TypeError, ValueError: see `metrics.counts`.
            IndexError: an index that counts is outside [-1, K). On a GPU, `compute` raises this
                instead.

        Example:
            >>> meter = vqtriton.metrics.Meter(128)
            >>> meter.update(torch.randint(128, (2, 7, 7)))
        """
        found = _tally(indices, self.codebook_size, mask)
        if found.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_tally(found)
        # not in place, which fails after a batch in inference mode
        self._found = found if self._found is None else self._found.to(found.device) + found

    def compute(self, sync: bool = True) -> Usage:
        """Counts, perplexity and usage over all batches since `reset`.

        The batches are kept, so it may be called again.

        Args:
            sync: over all ranks of `torch.distributed`; then every rank must call this, and every
                rank gets the same.

        Returns:
            `Usage`, a named tuple of three float64 tensors on the device of the indices; zeros
            without a batch.

            counts: [K].
            perplexity: [].
            usage: [].

        Raises:
            IndexError: an index outside [-1, K) was counted, on any rank with ``sync``.

        Example:
            >>> meter = vqtriton.metrics.Meter(4)
            >>> meter.update(torch.tensor([0, 2, 2]))
            >>> meter.compute().usage.item()
            0.5
        """
        found = self._found
        if found is None:
            found = torch.zeros(self.codebook_size + 2, dtype=torch.int64)
        if sync:
            found = found.to(distributed.meeting_device(found.device))
        (found,) = distributed.all_reduce([found], sync=sync, dtype=torch.float64)
        _check_tally(found)
        found = found[: self.codebook_size]
        return Usage(found, perplexity(found), usage(found))


def quantization_error(x: Tensor, quantized: Tensor) -> Tensor:
    """Mean over the vectors of the squared L2 distance to what replaced them.

    This is D times the mean squared error per element.

    Args:
        x: [..., D].
        quantized: [..., D].

    Returns:
        [] float64, in squared units of ``x``; NaN if there are no vectors.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> x = torch.randn(100, 16)
        >>> quantized = vqtriton.VectorQuantize(16, 128)(x).quantized
        >>> error = vqtriton.metrics.quantization_error(x, quantized)
    """
    if x.shape != quantized.shape:
        raise ValueError(f"quantized has shape {tuple(quantized.shape)}, x has {tuple(x.shape)}")
    return (_double(x) - _double(quantized)).square().sum(-1).mean()


def _double(tensor: Tensor) -> Tensor:
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def _check_size(codebook_size: int) -> None:
    if isinstance(codebook_size, bool) or not isinstance(codebook_size, int):
        raise TypeError(f"codebook_size is {codebook_size!r:.80}; it must be an int")
    if codebook_size < 1:
        raise ValueError(f"codebook_size is {codebook_size}; it must be at least 1")


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _checked(counts: Tensor) -> Tensor:
    """In float64."""
    if not isinstance(counts, Tensor) or not counts.is_floating_point():
        what = f"counts is {_kind(counts)}; it must be a floating-point tensor, [..., K]."
        if isinstance(counts, Tensor):
            what += (
                " These may be indices: metrics.counts(indices, codebook_size) makes counts of them"
            )
        raise TypeError(what)
    counts = _double(counts)
    if not torch.compiler.is_compiling() and counts.numel() > 0:
        low, high = (value.item() for value in counts.aminmax())
        # NaN is neither
        if not (low >= 0 and high < float("inf")):
            raise ValueError(
                f"counts has values from {low} to {high}; they must be finite and not negative"
            )
    return counts


def _tally(indices: Tensor, codebook_size: int, mask: Tensor | None) -> Tensor:
    """[K + 2] int64: counts, how many were masked, how many were no index. No shape depends on
    the data, so nothing waits for the device."""
    is_integer = isinstance(indices, Tensor) and not (
        indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
    )
    if not is_integer:
        raise TypeError(f"indices is {_kind(indices)}; it must be an integer tensor")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask is {_kind(mask)}; it must be a bool tensor")
        if mask.shape != indices.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; it must be that of indices, "
                f"{tuple(indices.shape)}"
            )
        if mask.device != indices.device:
            raise ValueError(f"mask is on {mask.device} but indices is on {indices.device}")
    if not has_float64(indices.device):
        indices, mask = indices.cpu(), None if mask is None else mask.cpu()
    place = indices.reshape(-1).long()
    is_masked = place == -1
    if indices.dtype == torch.uint64:
        # above int64 they have become negative
        is_masked = torch.zeros_like(is_masked)
    is_index = (place >= 0) & (place < codebook_size)
    place = place.where(is_index, codebook_size + 1).masked_fill(is_masked, codebook_size)
    if mask is not None:
        place = place.where(mask.reshape(-1), codebook_size)
    found = torch.zeros(codebook_size + 2, dtype=torch.int64, device=place.device)
    return found.index_put_((place,), torch.ones_like(place), accumulate=True)


def _check_tally(found: Tensor) -> None:
    size = len(found) - 2
    if (wrong := int(found[-1])) > 0:
        raise IndexError(
            f"indices has {wrong} values outside [0, {size}) that are not -1, which stands for a "
            "masked vector"
        )
