"""How the levels of a residual quantizer learn together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from vqtriton import distributed
from vqtriton import ops as base
from vqtriton.checks import check_arguments
from vqtriton.functional import nearest_code
from vqtriton.kernels.arguments import Update
from vqtriton.quantizers import VectorQuantize
from vqtriton.residual import ops
from vqtriton.residual.functional import PreparedCodebooks
from vqtriton.tensors import finite_rows, is_traced, parts_of


class LearnedLevels(nn.Module):
    """Levels that learn in forward; arguments and attributes are those of `ResidualVectorQuantize`.

    Each level is a `VectorQuantize`, whose state and whose steps are its own. All of them take part
    in one collective.
    """

    # of `VectorQuantize`
    layers: Any
    num_quantizers: int
    codebook_sizes: tuple[int, ...]
    codebook_dim: int
    shared_codebook: bool

    def __init__(self) -> None:
        super().__init__()
        # marks of frozen codebooks, the codebooks, and what was prepared of them
        self._prepared: tuple[Any, list[Tensor], PreparedCodebooks] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # what can be made again is not copied or pickled
        return {**self.__dict__, "_prepared": None}

    def _learns(self, layer: VectorQuantize, is_held: bool) -> bool:
        return self.training and not (is_held or layer.frozen) and layer._is_trainable()

    def _start(self, rows: Tensor, mask: Tensor | None, learning: Sequence[bool]) -> None:
        """Before a step: the same codebooks on every rank, from data if asked for."""
        if self.shared_codebook and self.layers[0]._revives:
            num_rows = self.num_quantizers * rows.numel() // self.codebook_dim
            self.layers[0]._check_threshold(num_rows)
        if all(layer._has_codes() for layer in self.layers):
            for layer, learns in zip(self.layers, learning, strict=True):
                if learns:
                    layer._start(rows, mask)
        else:
            start_levels(self, rows, mask, learning)

    @torch.no_grad()
    def _start_levels(self, rows: Tensor, mask: Tensor | None, learning: Sequence[bool]) -> None:
        """Each level from what those before it leave of this batch."""
        first = self.layers[0]
        options = {"precision": first.precision, "backend": first.backend}
        check_arguments(rows, first.codebook, mask, **options)
        residual = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        for layer, learns in zip(self.layers, learning, strict=True):
            if learns:
                layer._start(residual, mask)
                if not layer._has_codes():
                    # no row counts
                    return
            found = nearest_code(residual, layer.codebook, **options)
            residual = residual - layer.codebook[found]

    def _step_together(self) -> bool:
        """Whether one op can make the step of all levels: their settings are one.

        Ranks take the other way, so that all of them sum up the same numbers in the same order.
        """
        first, *others = layers = [*self.layers]
        settings = {
            (layer.codebook_size, layer.decay, layer.threshold_ema_dead_code) for layer in layers
        }
        return (
            not self.shared_codebook
            and first.codebook_update == "ema"
            and len(settings) == 1
            and not is_traced()
            and distributed.place_among(first.sync_codebook)[1] == 1
            and not any(layer._accumulates or layer._pending is not None for layer in layers)
            and all(layer._owns_codebook() for layer in layers)
            and all(layer.codebook.device == first.codebook.device for layer in others)
            # two levels that are one tensor learn one after the other
            and len({layer.codebook.data_ptr() for layer in layers}) == len(layers)
            and len({layer.cluster_size.data_ptr() for layer in layers}) == len(layers)
        )

    @torch.no_grad()
    def _update_together(self, rows: Tensor, codes: Tensor, indices: Tensor) -> None:
        """`_update`, with one op for all levels, on copies that are then copied back."""
        first, sizes = self.layers[0], self.codebook_sizes
        shape = len(sizes), sizes[0], codes.shape[1]
        drawn = self._draw_places(rows, indices, sizes) if first._revives else []
        places = [place for place, _ in drawn]
        sums, counts, samples = ops.residual_sums(
            rows, codes, sizes, indices, places, first.backend
        )
        of_dead: list[Tensor | None] = [None, None]
        if drawn:
            kept = [is_kept for _, is_kept in drawn]
            shared = [
                distributed.share_samples(*each, shape[1], sync=False)
                for each in zip(samples, kept, strict=True)
            ]
            of_dead = [torch.stack(tensors) for tensors in zip(*shared, strict=True)]
        cluster_size = torch.stack([layer.cluster_size for layer in self.layers])
        codebooks = codes.view(shape).clone()
        statistics = counts.view(shape[:2]), sums.view(shape).float()
        update = Update(cluster_size, codebooks, *statistics, *of_dead, first._rates_here())
        base.ema_update_(*update, first.backend)
        state = [t for layer in self.layers for t in (layer.codebook, layer.cluster_size)]
        pairs = zip(codebooks.unbind(0), cluster_size.unbind(0), strict=True)
        torch._foreach_copy_(state, [tensor for pair in pairs for tensor in pair])

    def _draw_places(
        self, rows: Tensor, indices: Tensor, sizes: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Rows for the dead codes of each level."""
        is_finite, sync = finite_rows(rows), self.layers[0].sync_codebook
        return [
            distributed.draw_places(size, keep=(found >= 0) & is_finite, sync=sync)
            for size, found in zip(sizes, indices.unbind(1), strict=True)
        ]

    @torch.no_grad()
    def _update(
        self,
        rows: Tensor,
        codes: Tensor,
        indices: Tensor,
        layers: Sequence[VectorQuantize],
        changing: Sequence[bool],
    ) -> None:
        """One step of the statistics of all levels, which meet in one collective."""
        first = layers[0]
        sync, sizes = first.sync_codebook, [layer.codebook_size for layer in layers]
        revives = any(layer._revives for layer in layers)
        drawn = self._draw_places(rows, indices, sizes) if revives else []
        places = [place for place, _ in drawn]
        arguments = rows, codes, sizes, indices, places, first.backend
        *found, samples = ops.residual_sums(*arguments)
        sums, counts = (parts_of(tensor, sizes) for tensor in found)
        kept = [is_kept for _, is_kept in drawn]
        if self.shared_codebook:
            # all levels are one; a dead code becomes what a random level quantized
            sums, counts = [torch.stack([*sums]).sum(0)], [torch.stack([*counts]).sum(0)]
            if drawn:
                size = samples[0].shape[:1]
                level = torch.randint(len(kept), size, dtype=torch.int64, device=rows.device)
                slot = torch.arange(size[0], dtype=torch.int64, device=rows.device)
                samples = [torch.stack(samples)[level, slot]]
                kept = [torch.stack(kept)[level, slot]]
            layers, changing = layers[:1], changing[:1]

        def draw(level: int) -> tuple[Tensor, Tensor]:
            size = layers[level].codebook_size
            return distributed.share_samples(samples[level], kept[level], size, sync=sync)

        collected = [
            layer._collect(sums[q], counts[q], functools.partial(draw, q)) if changes else []
            for q, (layer, changes) in enumerate(zip(layers, changing, strict=True))
        ]
        totals = distributed.all_reduce([t for local in collected for t in local], sync=sync)
        for layer, local in zip(layers, collected, strict=True):
            if local:
                layer._step(totals[: len(local)])
                totals = totals[len(local) :]


# a start depends on data and happens once, so it is no part of a graph
start_levels = _disable_dynamo(LearnedLevels._start_levels)


def of_level(mask: Tensor | None, depths: Tensor | None, level: int) -> Tensor | None:
    """The vectors that a level quantizes; None: all."""
    if depths is None:
        return mask
    return depths > level if mask is None else mask & (depths > level)
