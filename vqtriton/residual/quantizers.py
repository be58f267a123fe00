"""Residual quantizers as modules: a codebook a level, and what they learn together."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqtriton import distributed
from vqtriton.checks import INTEGERS, MOST_CODES, check_number
from vqtriton.codebooks import is_plain
from vqtriton.dispatch import resolve_backend
from vqtriton.functional import (
    rotate,
    snapshot,
    straight_through,
)
from vqtriton.layouts import Layout, projections
from vqtriton.ops import refuse_backward
from vqtriton.quantizers import VectorQuantize
from vqtriton.reference import Quantized
from vqtriton.residual.functional import (
    PreparedCodebooks,
    prepare_codebooks,
    quantize_levels,
)
from vqtriton.residual.learning import LearnedLevels, of_level

# arguments of a `VectorQuantize` that each level is given
LEVEL_OPTIONS = (
    *("codebook_update", "decay", "commitment_weight", "codebook_weight", "reduction"),
    *("kmeans_init", "kmeans_iters", "threshold_ema_dead_code", "use_cosine_sim"),
    *("sync_codebook", "precision", "backend"),
)
FLAGS = (
    *("shared_codebook", "quantize_dropout_per_sample", "rotation_trick", "channel_last"),
    *("accept_image_fmap", "accept_3d_fmap"),
)


class QuantizedLevels(NamedTuple):
    """What a residual quantizer returns with ``return_all_codes``.

    Attributes:
        quantized: the sum of the codes, in the shape and dtype of ``x``.
        indices: [..., Q] int64.
        loss: [Q].
        all_codes: [Q, ..., D] float32, the codes of each level, vectors last.

    Example:
        >>> rvq = vqtriton.ResidualVectorQuantize(16, 128, 4)
        >>> quantized, indices, loss, all_codes = rvq(torch.randn(9, 16), return_all_codes=True)
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    all_codes: Tensor


class Levels(NamedTuple):
    """Which levels a call has: the first ones, and how many are told as dropped."""

    num: int
    depths: Tensor | None = None  # [...] how many each vector has; None: all
    dropped: int = 0


class ResidualVectorQuantize(Layout, LearnedLevels):
    """Quantizes in Q levels, each of which quantizes what the levels before it have left.

    ``ResidualVQ`` is another name for it. Tokens depend neither on the device nor on the batch, and
    the first levels alone give the first tokens of the whole: see `vqtriton.residual_quantize`. The
    gradient of ``x`` is that of one straight-through estimator over the sum of the codes.

    Args:
        dim: D, the size of a vector.
        codebook_size: K, the number of codes of each level, or a sequence of Q numbers.
        num_quantizers: Q, the number of levels; not needed with a sequence of sizes.
        codebook_dim: the size of a code, if it is not D. One linear layer ``project_in`` then comes
            before all levels, and another, ``project_out``, after them.
        shared_codebook: one codebook for all levels, which learns from all of them.
        quantize_dropout: share of the training batches that use only the first levels, a random
            number of them. True is 1.0. Dropped levels have index -1 and loss 0.
        quantize_dropout_cutoff_index: least index of the last level that is used.
        quantize_dropout_multiple_of: the number of levels is rounded up to a multiple of this.
        quantize_dropout_per_sample: draw for each element of the batch (dim 0 of ``x``) by itself.
        quant_grad_frac: see `vqtriton.residual_quantize`.
        beam_size: see `vqtriton.residual_quantize`; 1 is the nearest code at each level.
        eval_beam_size: the same in eval mode; that of training by default.
        rotation_trick: see `VectorQuantize`; from ``x`` to the sum of its codes.
        channel_last, accept_image_fmap, accept_3d_fmap: see `VectorQuantize`.
        options: of each level, as `VectorQuantize` has them: codebook_update, decay,
            commitment_weight, codebook_weight, reduction, kmeans_init (level by level),
            kmeans_iters, threshold_ema_dead_code, use_cosine_sim, sync_codebook, precision,
            backend. With several ranks, all levels meet in one collective a step.

    Attributes:
        layers: `VectorQuantize` of each level: its codes, its sizes, and what can be set at any
            time (``decay``, ``threshold_ema_dead_code``, ``frozen``).
        codebooks: tuple of the [K, D] of each level.
        frozen: True keeps all levels as they are, in training mode as well.
        is_initialized: whether all levels have codes.
        config: dict, the keyword arguments that build this module.

    Raises:
        TypeError: an argument is not of its type, or is unknown.
        ValueError: an argument is out of its range.

    Example:
        >>> rvq = vqtriton.ResidualVectorQuantize(64, 128, 8, kmeans_init=True)
        >>> x = torch.randn(4, 300, 64, requires_grad=True)
        >>> quantized, indices, loss = rvq(x)  # [4, 300, 64], [4, 300, 8], [8]
        >>> (quantized.square().mean() + loss.sum()).backward()

    References: Zeghidour et al. 2021, arXiv:2107.03312; Lee et al. 2022, arXiv:2203.01941.
    """

    # what a level is; for subclasses as well
    level_class: type[VectorQuantize] = VectorQuantize
    project_in: nn.Module | None
    project_out: nn.Module | None

    def __init__(
        self,
        dim: int,
        codebook_size: int | Sequence[int],
        num_quantizers: int | None = None,
        *,
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool | float = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quantize_dropout_per_sample: bool = False,
        quant_grad_frac: float = 0.0,
        beam_size: int = 1,
        eval_beam_size: int | None = None,
        rotation_trick: bool = False,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        **options: Any,
    ) -> None:
        arguments = locals()
        super().__init__()
        for name in FLAGS:
            if not isinstance(arguments[name], bool):
                raise TypeError(f"{name} is {arguments[name]!r:.80}; it must be True or False")
        for name in options:
            if name not in LEVEL_OPTIONS:
                raise TypeError(f"{name} is not an argument of a {type(self).__name__}")
        check_number("dim", dim, int, 1)
        if codebook_dim is not None:
            check_number("codebook_dim", codebook_dim, int, 1)
        sizes = _sizes(codebook_size, num_quantizers, shared_codebook)
        check_number("quantize_dropout", float(quantize_dropout), float, 0, 1)
        last = len(sizes) - 1
        check_number("quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, int, 0, last)
        check_number("quantize_dropout_multiple_of", quantize_dropout_multiple_of, int, 1)
        check_number("quant_grad_frac", quant_grad_frac, float, 0, 1)
        for name in ("beam_size", "eval_beam_size"):
            if arguments[name] is not None or name == "beam_size":
                check_number(name, arguments[name], int, 1, MOST_CODES)
        if options.get("use_cosine_sim") and max(beam_size, eval_beam_size or 1) > 1:
            raise ValueError(f"beam_size is {beam_size}; with use_cosine_sim it must be 1")
        self.dim = dim
        self.codebook_sizes = sizes
        self.num_quantizers = len(sizes)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quantize_dropout_per_sample = quantize_dropout_per_sample
        self.quant_grad_frac = quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = eval_beam_size
        self.rotation_trick = rotation_trick
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.options = options
        self.project_in, self.project_out = projections(dim, self.codebook_dim)
        own = sizes[:1] if shared_codebook else sizes
        levels = [self.level_class(self.codebook_dim, size, **options) for size in own]
        # one module in all places: a level is still ``layers[q]``, also in a state dict
        self.layers = nn.ModuleList(levels * len(sizes) if shared_codebook else levels)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ResidualVectorQuantize:
        """Builds the module that a `config` describes, with codes of its own.

        Args:
            config: the attribute ``config`` of a module.

        Raises:
            TypeError, ValueError: it does not describe a module.

        Example:
            >>> rvq = vqtriton.ResidualVectorQuantize(16, 128, 4)
            >>> same = vqtriton.ResidualVectorQuantize.from_config(rvq.config)
        """
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        config = {name: getattr(self, name) for name in PARAMETERS if name != "codebook_size"}
        if self.project_in is None:
            config["codebook_dim"] = None
        sizes = list(self.codebook_sizes)
        of_levels = {name: getattr(self.layers[0], name) for name in LEVEL_OPTIONS}
        return {**config, "codebook_size": sizes, **of_levels}

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """The [K, D] of each level."""
        return tuple(layer.codebook for layer in self.layers)

    @property
    def is_initialized(self) -> bool:
        """Whether all levels have codes."""
        return all(bool(layer.is_initialized) for layer in self.layers)

    @property
    def frozen(self) -> bool:
        """Whether all levels stay as they are, in training mode as well."""
        return all(layer.frozen for layer in self.layers)

    @frozen.setter
    def frozen(self, value: bool) -> None:
        for layer in self.layers:
            layer.frozen = value

    def reset_parameters(self) -> None:
        """Gives all codes and cluster sizes the values of a new module."""
        for layer in self.layers:
            layer.reset_parameters()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """`VectorQuantize.accumulate`, for all levels."""
        with contextlib.ExitStack() as stack:
            for layer in dict.fromkeys(self.layers):
                stack.enter_context(layer.accumulate())
            yield

    def extra_repr(self) -> str:
        told = [str(self.dim), str(self.codebook_sizes), *(f"{n}={v!r}" for n, v in self._changed)]
        return ", ".join(told)

    @property
    def _changed(self) -> list[tuple[str, Any]]:
        config = self.config
        names = [n for n, p in PARAMETERS.items() if n in config and p.default is not p.empty]
        skipped = ("num_quantizers", "codebook_size")
        return [
            (n, config[n]) for n in names if n not in skipped and config[n] != PARAMETERS[n].default
        ]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        lens: Tensor | None = None,
        num_quantizers: int | None = None,
        return_all_codes: bool = False,
    ) -> Quantized | QuantizedLevels:
        """Quantizes; in training mode the codebooks learn as well. Called as ``rvq(x)``.

        Args:
            x: [..., D], or as the layout says, see `VectorQuantize`.
            mask: bool, [...] as the indices without their last dim, True for the vectors that
                count.
            freeze_codebook: leave codebooks and cluster sizes as they are in this call.
            lens: [B] int, see `VectorQuantize`.
            num_quantizers: use the first levels alone, this many (a lower bitrate). Their tokens
                are those of the whole.
            return_all_codes: also return the codes of each level.

        Returns:
            `Quantized`, or `QuantizedLevels` with ``return_all_codes``.

            quantized: the shape and dtype of ``x``.
            indices: int64, [..., Q], [B, ..., Q] or [B, H, W, Q]; -1 where masked or dropped.
            loss: [Q] float32, of each level as `VectorQuantize` has it; 0 where dropped.

        Raises:
            ValueError, TypeError: see `vqtriton.residual_quantize`.
            RuntimeError: activation checkpointing runs it again while the codebooks learn.

        Example:
            >>> rvq = vqtriton.ResidualVectorQuantize(16, 128, 4).eval()
            >>> quantized, indices, loss = rvq(torch.randn(2, 50, 16), num_quantizers=2)
            >>> torch.equal(rvq.get_output_from_indices(indices), quantized)
            True
        """
        vectors, mask = self._vectors_of(x, mask, lens)
        levels = self._levels(vectors, num_quantizers)
        quantized, indices, loss = self._quantize(vectors, mask, levels, freeze_codebook)
        quantized = self._channels_back(quantized)
        if return_all_codes:
            codes = self.get_codes_from_indices(indices)
            return QuantizedLevels(quantized, indices, loss, codes)
        return Quantized(quantized, indices, loss)

    def _quantize(
        self,
        vectors: Tensor,
        mask: Tensor | None,
        levels: Levels,
        is_held: bool,
    ) -> Quantized:
        """`forward` for vectors [..., D], with the levels that `_levels` gives."""
        cosine = self.layers[0].use_cosine_sim
        if mask is not None and (self.rotation_trick or cosine or self.project_in is not None):
            # whatever a masked vector holds, no gradient is to come from it
            vectors = vectors.where(mask[..., None], 0)
        rows = vectors if self.project_in is None else self.project_in(vectors)
        quantize = self._by_layers if cosine else self._at_once
        found = quantize(rows, mask, levels, is_held)
        quantized = found.quantized
        if self.project_out is not None:
            quantized = self.project_out(quantized)
            if mask is not None:
                quantized = quantized.where(mask[..., None], 0)
        indices, loss = found.indices, found.loss
        if levels.dropped:
            indices = nn.functional.pad(indices, (0, levels.dropped), value=-1)
            loss = nn.functional.pad(loss, (0, levels.dropped))
        return Quantized(quantized, indices, loss)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each level, vectors last.

        Args:
            indices: [..., q], of any integer dtype: the tokens of the first q levels, q <= Q. -1
                means that a vector has no code at this level.

        Returns:
            [q, ..., D] float32, before ``project_out``; zeros where the index is -1.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            ValueError: ``indices`` has more levels than the module.
            IndexError: an index is not of its level.

        Example:
            >>> rvq = vqtriton.ResidualVectorQuantize(16, 128, 4)
            >>> rvq.get_codes_from_indices(torch.zeros(3, 2, dtype=torch.int64)).shape
            torch.Size([2, 3, 16])
        """
        if not isinstance(indices, Tensor) or indices.dtype not in INTEGERS:
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices is {kind}; it must be a tensor of integers")
        if indices.ndim == 0 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; it must be [..., q] with q from 1 to "
                f"{self.num_quantizers}"
            )
        levels = zip(self.layers, indices.unbind(-1), strict=False)
        return torch.stack([layer.get_codes_from_indices(found) for layer, found in levels])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the codes in the layout of the module's output, for a decoder.

        Args:
            indices: what `forward` returned as indices, or those of its first levels alone.

        Returns:
            float32, the layout of ``quantized``. In eval mode it equals it for float32 ``x``.

        Raises:
            TypeError, ValueError, IndexError: see `get_codes_from_indices`.

        Example:
            >>> rvq = vqtriton.ResidualVectorQuantize(16, 128, 4, channel_last=False)
            >>> rvq.get_output_from_indices(torch.zeros(2, 50, 4, dtype=torch.int64)).shape
            torch.Size([2, 16, 50])
        """
        codes = self.get_codes_from_indices(indices)
        # in the order of the levels, as forward adds them
        total = torch.zeros_like(codes[0])
        for chosen in codes:
            total = total + chosen
        if self.project_out is not None:
            total = self.project_out(total).masked_fill((indices < 0).all(-1, keepdim=True), 0)
        return self._channels_back(total)

    # --- what forward calls ---

    def _levels(self, vectors: Tensor, num_quantizers: int | None) -> Levels:
        """What the caller asked for, or what dropout leaves."""
        whole, share = self.num_quantizers, float(self.quantize_dropout)
        if num_quantizers is not None:
            check_number("num_quantizers", num_quantizers, int, 1, whole)
            return Levels(num_quantizers)
        if not (self.training and share > 0 and whole > 1):
            return Levels(whole)
        # a single vector is a batch of one
        is_single = vectors.ndim == 1
        size = vectors.shape[:1] if self.quantize_dropout_per_sample and not is_single else (1,)
        # of a batch on the CPU, as its number of levels is one of Python's; but ranks, which draw
        # other numbers, have to meet in all levels
        is_tensor = (
            self.quantize_dropout_per_sample
            or torch.compiler.is_compiling()
            or distributed.world_size() > 1
        )
        device = vectors.device if is_tensor else torch.device("cpu")
        first, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
        drawn = torch.randint(first, whole, size, dtype=torch.int64, device=device)
        drawn = ((drawn // multiple + 1) * multiple).clamp(max=whole)
        if share < 1:
            is_dropped = torch.rand(size, dtype=torch.float32, device=device) < share
            drawn = drawn.where(is_dropped, whole)
        if not is_tensor:
            return Levels(int(drawn), dropped=whole - int(drawn))
        shape = vectors.shape[:-1]
        drawn = drawn[0] if is_single else drawn.view(-1, *[1] * (len(shape) - 1))
        return Levels(whole, drawn.expand(shape))

    def _routed(self, rows: Tensor, codebooks: Sequence[Tensor], found: Quantized) -> Quantized:
        """With the gradient that ``rows`` get through the sum of codes; for subclasses as well."""
        if not self.rotation_trick:
            return found
        return Quantized(rotate(rows, found.quantized), found.indices, found.loss)

    def _at_once(
        self,
        rows: Tensor,
        mask: Tensor | None,
        levels: Levels,
        is_held: bool,
    ) -> Quantized:
        """All levels in one op, and one step of all of them."""
        layers, (num_levels, depths, _) = [*self.layers], levels
        first = layers[0]
        is_held = is_held or self.frozen
        is_gradient = first.codebook_update == "gradient"
        learning = [self._learns(layer, is_held) for layer in layers]
        changing = [
            learns and (layer._revives or not is_gradient)
            for layer, learns in zip(layers, learning, strict=True)
        ]
        for layer, changes in zip(layers, changing, strict=True):
            if changes:
                layer._check_writable()
        if any(learning):
            self._start(rows, mask, learning)
        for layer, learns in zip(layers, learning, strict=True):
            if not (learns or any(learning)):
                layer._look()
        codebooks: Sequence[Tensor] = [
            layer.codebook.detach() if is_held or layer.frozen else layer.codebook
            for layer in layers
        ]
        joined: Tensor | None = None
        searched: Sequence[Tensor] | PreparedCodebooks = codebooks
        needs_grad = is_gradient and not is_held and torch.is_grad_enabled()
        if any(changing) or (needs_grad and num_levels < len(layers)):
            joined = torch.cat([*codebooks])
            if any(changing):
                # backward needs the codes that were chosen from, not what the update makes of them:
                # this copy, unless a compiler makes it later
                if torch.compiler.is_compiling():
                    joined = snapshot(joined)
                else:
                    refuse_backward()
            searched = codebooks = joined.split(list(self.codebook_sizes))
        elif not (any(learning) or needs_grad):
            searched = self._kept(codebooks)
        found = quantize_levels(
            rows,
            searched.first(num_levels)
            if isinstance(searched, PreparedCodebooks)
            else searched[:num_levels],
            joined,
            commitment_weight=first.commitment_weight,
            codebook_weight=first.codebook_weight if is_gradient and not is_held else 0.0,
            reduction=first.reduction,
            mask=mask,
            depths=depths,
            quant_grad_frac=self.quant_grad_frac,
            beam_size=self.beam_size if self.training else self.eval_beam_size or self.beam_size,
            precision=first.precision,
            backend=first.backend,
        )
        found = self._routed(rows, codebooks[:num_levels], found)
        if joined is not None and any(changing):
            flat = rows.detach().reshape(-1, self.codebook_dim)
            indices = found.indices.reshape(-1, num_levels)
            if num_levels == len(layers) and all(changing) and self._step_together():
                self._update_together(flat, joined, indices)
            else:
                self._update(flat, joined, indices, layers[:num_levels], changing[:num_levels])
        return found

    def _by_layers(
        self,
        rows: Tensor,
        mask: Tensor | None,
        levels: Levels,
        is_held: bool,
    ) -> Quantized:
        """Level by level, for options that the op does not have."""
        num_levels, depths, _ = levels
        residual = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = torch.zeros_like(residual)
        indices, losses = [], []
        for level, layer in enumerate([*self.layers][:num_levels]):
            is_counted = of_level(mask, depths, level)
            share = (1 - self.quant_grad_frac) ** level
            seen = residual if share == 1 else share * residual + (1 - share) * residual.detach()
            # of length 1 with cosine similarity
            seen = layer._project_in(seen)
            found = layer._quantize(seen, is_counted, is_held or layer.frozen)
            codes = found.quantized.detach()
            residual, total = residual - codes, total + codes
            indices.append(found.indices)
            losses.append(found.loss)
        quantized = straight_through(rows, total.to(rows.dtype))
        if mask is not None:
            quantized = quantized.where(mask[..., None], 0)
        found = Quantized(quantized, torch.stack(indices, -1), torch.stack(losses, -1))
        return self._routed(rows, (), found)

    def _kept(self, codebooks: Sequence[Tensor]) -> Sequence[Tensor] | PreparedCodebooks:
        """Frozen codebooks as they were prepared for an earlier inference with the kernels.

        Others are not kept: a write through ``.data`` or by a graph leaves no trace.
        """
        if not self.frozen or not all(is_plain(codes) for codes in codebooks):
            return codebooks
        backend = self.layers[0].backend
        if resolve_backend(backend, codebooks[0].device) == "torch":
            return codebooks
        marks = [(c.device, c.data_ptr(), c._version) for c in codebooks]
        if self._prepared is not None and self._prepared[0] == (backend, marks):
            return self._prepared[2]
        # a later inference may want gradients, for which this one's tensors could not be saved
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare_codebooks(codebooks, backend=backend)
        # with the tensors, so that no others can come to have their addresses
        self._prepared = (backend, marks), [*codebooks], prepared
        return prepared


PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(ResidualVectorQuantize).parameters.items()
    if name != "options"
}
ResidualVQ = ResidualVectorQuantize


def _sizes(
    codebook_size: int | Sequence[int], num_quantizers: int | None, is_shared: bool
) -> tuple[int, ...]:
    """K of each level."""
    if isinstance(codebook_size, Sequence) and not isinstance(codebook_size, str):
        sizes = tuple(codebook_size)
        if num_quantizers not in (None, len(sizes)) or not sizes:
            raise ValueError(
                f"codebook_size has {len(sizes)} sizes; num_quantizers ({num_quantizers}) must be "
                "as many, and at least 1"
            )
    else:
        if num_quantizers is None:
            raise TypeError("num_quantizers is missing; with one codebook_size it must be an int")
        check_number("num_quantizers", num_quantizers, int, 1)
        sizes = (codebook_size,) * num_quantizers
    for size in sizes:
        check_number("codebook_size", size, int, 1)
    if is_shared and len(set(sizes)) > 1:
        raise ValueError(f"codebook_size is {sizes}; a shared codebook has one size")
    return sizes
