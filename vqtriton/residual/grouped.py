"""Residual quantizers for parts of a vector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqtriton.checks import check_number
from vqtriton.layouts import Layout
from vqtriton.reference import Quantized
from vqtriton.residual.quantizers import QuantizedLevels, ResidualVectorQuantize


class GroupedResidualVectorQuantize(Layout, nn.Module):
    """Divides each vector into groups of elements, each with a `ResidualVectorQuantize` of its own.

    ``GroupedResidualVQ`` is another name for it.

    Args:
        dim: D, the size of a vector, divided by ``groups``.
        codebook_size, num_quantizers, options: of each group, see `ResidualVectorQuantize`. With
            ``quantize_dropout`` all groups use as many levels.
        groups: G.

    Attributes:
        rvqs: the G `ResidualVectorQuantize`.
        codebooks: G tuples of the [K, D / G] of each level.
        frozen, config: see `ResidualVectorQuantize`.

    Raises:
        TypeError, ValueError: see `ResidualVectorQuantize`.

    Example:
        >>> rvq = vqtriton.GroupedResidualVectorQuantize(64, 1024, 8, groups=2)
        >>> quantized, indices, loss = rvq(torch.randn(4, 300, 64))
        >>> indices.shape, loss.shape
        (torch.Size([2, 4, 300, 8]), torch.Size([2, 8]))

    Reference: Yang et al. 2023, HiFi-Codec, arXiv:2305.02765.
    """

    # of `ResidualVectorQuantize`
    rvqs: Any
    # what a group is; for subclasses as well
    group_class: type[ResidualVectorQuantize] = ResidualVectorQuantize

    def __init__(
        self,
        dim: int,
        codebook_size: int | Sequence[int],
        num_quantizers: int | None = None,
        *,
        groups: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        check_number("dim", dim, int, 1)
        check_number("groups", groups, int, 1)
        if dim % groups:
            raise ValueError(f"groups is {groups}; it must divide dim, which is {dim}")
        self.dim = dim
        self.groups = groups
        options |= {"codebook_size": codebook_size, "num_quantizers": num_quantizers}
        self.rvqs = nn.ModuleList(
            self.group_class(dim=dim // groups, **options) for _ in range(groups)
        )
        first = self.rvqs[0]
        self.num_quantizers = first.num_quantizers
        self.channel_last = first.channel_last
        self.accept_image_fmap = first.accept_image_fmap
        self.accept_3d_fmap = first.accept_3d_fmap

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GroupedResidualVectorQuantize:
        """See `ResidualVectorQuantize.from_config`."""
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        return {**self.rvqs[0].config, "dim": self.dim, "groups": self.groups}

    @property
    def codebooks(self) -> tuple[tuple[Tensor, ...], ...]:
        """The [K, D / G] of each group and level."""
        return tuple(rvq.codebooks for rvq in self.rvqs)

    @property
    def is_initialized(self) -> bool:
        """Whether all levels of all groups have codes."""
        return all(rvq.is_initialized for rvq in self.rvqs)

    @property
    def frozen(self) -> bool:
        """Whether all groups stay as they are, in training mode as well."""
        return all(rvq.frozen for rvq in self.rvqs)

    @frozen.setter
    def frozen(self, value: bool) -> None:
        for rvq in self.rvqs:
            rvq.frozen = value

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """`VectorQuantize.accumulate`, for all groups."""
        with contextlib.ExitStack() as stack:
            for rvq in self.rvqs:
                stack.enter_context(rvq.accumulate())
            yield

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        lens: Tensor | None = None,
        num_quantizers: int | None = None,
        return_all_codes: bool = False,
    ) -> Quantized | QuantizedLevels:
        """See `ResidualVectorQuantize.forward`.

        Returns:
            As there, with the groups first: indices [G, ..., Q], loss [G, Q], all_codes
            [G, Q, ..., D / G].

        Example:
            >>> rvq = vqtriton.GroupedResidualVectorQuantize(64, 128, 4, groups=2)
            >>> quantized, indices, loss = rvq(torch.randn(100, 64), num_quantizers=3)
        """
        vectors, mask = self._vectors_of(x, mask, lens)
        levels = self.rvqs[0]._levels(vectors, num_quantizers)
        parts = vectors.chunk(self.groups, -1)
        found = [
            rvq._quantize(part, mask, levels, freeze_codebook)
            for rvq, part in zip(self.rvqs, parts, strict=True)
        ]
        quantized = self._channels_back(torch.cat([each.quantized for each in found], -1))
        indices = torch.stack([each.indices for each in found])
        loss = torch.stack([each.loss for each in found])
        if return_all_codes:
            codes = self.get_codes_from_indices(indices)
            return QuantizedLevels(quantized, indices, loss, codes)
        return Quantized(quantized, indices, loss)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """[G, ..., q] -> [G, q, ..., D / G]; see `ResidualVectorQuantize.get_codes_from_indices`.

        Example:
            >>> rvq = vqtriton.GroupedResidualVectorQuantize(64, 128, 4, groups=2)
            >>> rvq.get_codes_from_indices(torch.zeros(2, 5, 3, dtype=torch.int64)).shape
            torch.Size([2, 3, 5, 32])
        """
        groups = zip(self.rvqs, self._by_group(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(found) for rvq, found in groups])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """[G, ..., q] -> the layout of ``quantized``; see `ResidualVectorQuantize`.

        Example:
            >>> rvq = vqtriton.GroupedResidualVectorQuantize(64, 128, 4, groups=2)
            >>> rvq.get_output_from_indices(torch.zeros(2, 5, 3, dtype=torch.int64)).shape
            torch.Size([5, 64])
        """
        groups = zip(self.rvqs, self._by_group(indices), strict=True)
        outputs = [rvq.get_output_from_indices(found) for rvq, found in groups]
        return torch.cat(outputs, 1 if self._is_second else -1)

    def _by_group(self, indices: Tensor) -> Sequence[Tensor]:
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices is a {type(indices).__name__}; it must be a tensor")
        if indices.ndim == 0 or len(indices) != self.groups:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; it must be [{self.groups}, ..., q]"
            )
        return indices.unbind(0)


GroupedResidualVQ = GroupedResidualVectorQuantize
