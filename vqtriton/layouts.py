"""Where the vectors of an input lie, and back: layouts, masks, projections."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from vqtriton.checks import INTEGERS, check_mask


class Layout:
    """A module that takes vectors last, second, or as maps of images or videos.

    Arguments and attributes are those of `vqtriton.VectorQuantize`.
    """

    dim: int
    channel_last: bool
    accept_image_fmap: bool
    accept_3d_fmap: bool

    def _channels_last(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
        layout, num_dims = "[..., D]", 0
        if self.accept_image_fmap:
            layout, num_dims = "[B, D, H, W]", 4
        elif self.accept_3d_fmap:
            layout, num_dims = "[B, D, T, H, W]", 5
        elif not self.channel_last:
            layout = "[B, D, ...]"
        elif x.ndim >= 1 and x.shape[-1] == self.dim:
            return x
        fits = x.ndim >= 2 and x.shape[1] == self.dim and num_dims in (0, x.ndim)
        if self._is_second and fits:
            return rearrange(x, "b d ... -> b ... d")
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be {layout} with D = {self.dim}")

    def _vectors_of(
        self, x: Tensor, mask: Tensor | None, lens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x with vectors last, and the mask [...] of those that count; None: all."""
        vectors = self._channels_last(x)
        if lens is not None:
            mask = mask_of_lengths(lens, vectors, mask)
        check_mask(mask, vectors)
        return vectors, mask

    def _channels_back(self, x: Tensor) -> Tensor:
        return rearrange(x, "b ... d -> b d ...") if self._is_second else x

    @property
    def _is_second(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last


def mask_of_lengths(lens: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N] bool, True for the first lens[b] of the vectors [B, N, D] of each sequence."""
    if mask is not None:
        raise ValueError("mask and lens are both given; give one of them")
    if not isinstance(lens, Tensor) or lens.dtype not in INTEGERS:
        kind = lens.dtype if isinstance(lens, Tensor) else type(lens).__name__
        raise TypeError(f"lens is {kind}; it must be a tensor of integers")
    if vectors.ndim != 3 or lens.shape != vectors.shape[:1]:
        raise ValueError(
            f"lens has shape {tuple(lens.shape)} and the vectors {tuple(vectors.shape)}; they "
            "must be [B] and [B, N, D]"
        )
    lens = lens.to(vectors.device, torch.int64)
    if lens.device.type == "cpu" and not torch.compiler.is_compiling() and lens.numel() > 0:
        low, high = lens.aminmax()
        if low < 0 or high > vectors.shape[1]:
            raise ValueError(
                f"lens has values from {low} to {high}; they must be in [0, {vectors.shape[1]}]"
            )
    places = torch.arange(vectors.shape[1], dtype=torch.int64, device=vectors.device)
    return places < lens[:, None]


def projections(
    dim: int, width: int, layernorm_after: bool = False
) -> tuple[nn.Module | None, nn.Module | None]:
    """Into the space of the codes and out of it; None where that is the space of x.

    Named and built as those of vector-quantize-pytorch, so that either loads the other's.
    """
    if width == dim:
        return None, None
    project_in: nn.Module = nn.Linear(dim, width)
    if layernorm_after:
        project_in = nn.Sequential(project_in, nn.LayerNorm(width))
    return project_in, nn.Linear(width, dim)
