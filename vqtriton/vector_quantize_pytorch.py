"""The quantizers of vector-quantize-pytorch with these searches: change the import, keep the rest.

The classes have the names, arguments, defaults and results of release 1.32.0 and are subclasses of
those of vqtriton, so what they can do, these can. docs/vector-quantize-pytorch.md lists what
differs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqtriton import quantizers
from vqtriton.functional import normalize, rotate, straight_through
from vqtriton.reference import Quantized
from vqtriton.residual import grouped
from vqtriton.residual import quantizers as residual
from vqtriton.residual.learning import of_level
from vqtriton.tensors import gather

Weights = Tensor | Callable[[Tensor, Tensor], Tensor]

PATCH = "or stay with theirs, and let vqtriton.patch make its searches exact"
OWN_LOSS = "add such a term to the loss yourself"
NEAREST = "the nearest code is always taken"
AFFINE = "codes are searched as they are; threshold_ema_dead_code brings unused ones back"
BY_OPTIMIZER = "use learnable_codebook=True, ema_update=False, and give your optimizer the codes"
NO_DIVEQ = "use rotation_trick=True"
NO_BEAM = "vqtriton.ResidualVectorQuantize has beam_size; it ranks beams by what they leave"
# arguments that are not here: their defaults, which are accepted, and what to do instead
NOT_HERE: dict[str, tuple[Any, str]] = {
    "commitment_use_cross_entropy_loss": (False, "the commitment loss is the squared error"),
    "orthogonal_reg_weight": (0.0, OWN_LOSS),
    "orthogonal_reg_active_codes_only": (False, OWN_LOSS),
    "orthogonal_reg_max_codes": (None, OWN_LOSS),
    "codebook_diversity_loss_weight": (0.0, AFFINE),
    "codebook_diversity_temperature": (100.0, AFFINE),
    "stochastic_sample_codes": (False, NEAREST),
    "sample_codebook_temp": (1.0, NEAREST),
    "straight_through": (
        False,
        "it is the Gumbel estimator; the usual straight-through one is rotation_trick=False",
    ),
    "directional_reparam": (False, NO_DIVEQ),
    "directional_reparam_variance": (5e-3, NO_DIVEQ),
    "sync_affine_param": (False, AFFINE),
    "affine_param": (False, AFFINE),
    "affine_param_batch_decay": (0.99, AFFINE),
    "affine_param_codebook_decay": (0.9, AFFINE),
    "vq_bridge": (None, "the codes are searched as they are"),
    "manual_ema_update": (False, "use accumulate()"),
    "in_place_codebook_optimizer": (None, BY_OPTIMIZER),
    "manual_in_place_optimizer_update": (False, BY_OPTIMIZER),
    "sync_update_v": (0.0, "use its default, 0"),
    "route_gradients_to_input": (True, "detach the result"),
}
NOT_HERE_IN_RESIDUAL: dict[str, tuple[Any, str]] = {
    "diveq": (False, NO_DIVEQ),
    "heads": (1, "use GroupedResidualVQ"),
    "separate_codebook_per_head": (False, "use GroupedResidualVQ"),
    "layernorm_after_project_in": (False, "a level has no projection"),
    "implicit_neural_codebook": (False, "each level has codes of its own"),
    "mlp_kwargs": ({}, "each level has codes of its own"),
    "beam_size": (None, NO_BEAM),
    "eval_beam_size": (None, NO_BEAM),
    "beam_score_quantizer_weights": (None, NO_BEAM),
}
NOT_HERE_IN_FORWARD: dict[str, tuple[Any, str]] = {
    "indices": (None, "use torch.nn.functional.cross_entropy(-torch.cdist(x, codebook), indices)"),
    "topk": (None, NEAREST),
    "sample_codebook_temp": (None, NEAREST),
    "codebook_transform_fn": (None, "the codes are searched as they are"),
    "beam_size": (None, NO_BEAM),
    "rand_quantize_dropout_fixed_seed": (None, "give num_quantizers"),
}


class LossBreakdown(NamedTuple):
    """What `VectorQuantize` adds to its results with ``return_loss_breakdown``.

    Attributes:
        commitment: [] float32, without its weight.
        codebook_diversity, orthogonal_reg, inplace_optimize: 0, these terms are not here.
    """

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Level(quantizers.VectorQuantize):
    """A `vqtriton.VectorQuantize` whose codes start as theirs do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.use_cosine_sim:
            # the first values were drawn before it was known
            self.reset_parameters()

    def _draw(self, codebook: Tensor) -> None:
        # what nn.init.kaiming_uniform_ makes of a tensor [1, K, D]
        bound = (6 / (self.codebook_size * self.codebook_dim)) ** 0.5
        nn.init.uniform_(codebook, -bound, bound)
        if vars(self).get("use_cosine_sim"):
            codebook.copy_(nn.functional.normalize(codebook, dim=-1))


class VectorQuantize(Level):
    """``VectorQuantize`` of vector-quantize-pytorch, as a `vqtriton.VectorQuantize`.

    Arguments, defaults and results are theirs. Their state dicts load; `to_vector_quantize_pytorch`
    writes them. The loss is 0 in eval mode, where nothing gets a gradient through the codes. With
    ``learnable_codebook`` its value is counted once, and it moves both codes and ``x``.

    Args:
        dim, codebook_size, codebook_dim, heads, separate_codebook_per_head, decay, kmeans_init,
            kmeans_iters, use_cosine_sim, layernorm_after_project_in, threshold_ema_dead_code,
            channel_last, accept_image_fmap, accept_3d_fmap, commitment_weight: see
            `vqtriton.VectorQuantize`.
        eps: has no effect, as cluster sizes are not smoothed. `to_vector_quantize_pytorch` has it.
        freeze_codebook: default of the argument of `forward`.
        sync_kmeans: True; several ranks start from the same codes.
        rotation_trick: True where it is None and ``dim`` is more than 1.
        sync_codebook: True where it is None: as soon as there are several ranks.
        ema_update: True where it is None. False without ``learnable_codebook`` keeps the codes.
        learnable_codebook: codes are parameters; needs ``ema_update=False``.
        return_zeros_for_masked_padding: False: masked vectors come back as they were given.
        precision, backend: see `vqtriton.VectorQuantize`; they have no such arguments.
        not_here: their other arguments, which may only have their defaults.

    Raises:
        TypeError: an argument is unknown or not of its type.
        ValueError: an argument is out of its range, or not here; the message says what to use.

    Example:
        >>> from vqtriton.vector_quantize_pytorch import VectorQuantize
        >>> vq = VectorQuantize(dim=256, codebook_size=512, decay=0.8, commitment_weight=1.0)
        >>> quantized, indices, commit_loss = vq(torch.randn(1, 1024, 256))
    """

    freeze_codebook: bool
    return_zeros_for_masked_padding: bool
    # of the step that this call makes
    _ema_update_weight: Weights | None = None

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        *,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        precision: str = "exact",
        backend: str = "auto",
        **not_here: Any,
    ) -> None:
        arguments = locals()
        refuse(NOT_HERE, **not_here)
        super().__init__(
            dim,
            codebook_size,
            # theirs is not divided by the heads
            codebook_dim=dim if codebook_dim is None else codebook_dim,
            heads=heads,
            separate_codebook_per_head=separate_codebook_per_head,
            layernorm_after_project_in=layernorm_after_project_in,
            channel_last=channel_last,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
            rotation_trick=dim > 1 if rotation_trick is None else rotation_trick,
            **level_options(arguments),
        )
        keep(self, arguments)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VectorQuantize:
        """Builds the module that a `config` describes, with codes of its own."""
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: None = None,
        sample_codebook_temp: None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: None = None,
        ema_update_weight: Weights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes; in training mode the codebook learns as well.

        Args:
            x, mask, lens: see `vqtriton.VectorQuantize.forward`.
            freeze_codebook: leave the codebook as it is; None: as the module was built.
            return_loss_breakdown: add a `LossBreakdown` to the results.
            ema_update_weight: [K] or [H, K] between 0 and 1, or a function of the sums [H, K, D]
                and counts [H, K] of a step that gives them: how much of the step each code makes.
            accum_ema_update: only add up the statistics; the next call without it applies them.
            ema_update: False is ``freeze_codebook=True`` for a codebook of moving averages.
            indices, topk, sample_codebook_temp, codebook_transform_fn: are not here.

        Returns:
            (quantized, indices, loss), and a `LossBreakdown` where it is asked for.
        """
        refuse(
            NOT_HERE_IN_FORWARD,
            indices=indices,
            topk=topk,
            sample_codebook_temp=sample_codebook_temp,
            codebook_transform_fn=codebook_transform_fn,
        )
        if self.codebook_update == "gradient" and (ema_update or ema_update_weight is not None):
            name = "ema_update" if ema_update else "ema_update_weight"
            raise ValueError(f"{name} is given, but a learnable codebook has no averages")
        is_held = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        is_held = is_held or (ema_update is False and self.codebook_update == "ema")
        self._ema_update_weight = ema_update_weight
        try:
            with self.accumulate() if accum_ema_update else contextlib.nullcontext():
                found = super().forward(x, mask, is_held, lens)
        finally:
            self._ema_update_weight = None
        quantized, chosen, loss = found
        if not self.return_zeros_for_masked_padding and (mask is not None or lens is not None):
            is_masked = chosen < 0 if self.heads == 1 else (chosen < 0).all(-1)
            quantized = given_back(self, quantized, x, is_masked)
        if not return_loss_breakdown:
            return Quantized(quantized, chosen, loss)
        zero = torch.zeros_like(loss)
        weight = self.commitment_weight
        commitment = loss / weight if weight > 0 else zero
        breakdown: Any = LossBreakdown(commitment, zero, zero, zero)
        return quantized, chosen, loss, breakdown

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of some indices, in the layout of ``quantized``; before ``project_out``.

        With heads that share one codebook they are [..., H, D], as theirs.
        """
        codes = self._codes(indices)
        if self.heads > 1 and not self.num_codebooks:
            codes = codes.unflatten(-1, (self.heads, self.codebook_dim))
        return self._channels_back(codes)

    def _routed(self, rows: Tensor, found: Quantized, is_held: bool) -> Quantized:
        loss = their_loss(self, found.loss, self.codebook_update == "gradient" and not is_held)
        if not self.training:
            return Quantized(found.quantized.detach(), found.indices, loss)
        return super()._routed(rows, Quantized(found.quantized, found.indices, loss), is_held)

    def _steps_at_once(self) -> bool:
        return self._ema_update_weight is None and super()._steps_at_once()

    def _step(self, totals: list[Tensor]) -> None:
        if self._ema_update_weight is not None:
            self._weighted_step(self._ema_update_weight, totals)
        super()._step(totals)

    def _weighted_step(self, weights: Weights, totals: list[Tensor]) -> None:
        """Of the averages; the usual step is then left with nothing but dead codes."""
        codes, sizes, (counts, sums) = self.codebook, self.cluster_size, totals[:2]
        num = max(self.num_codebooks, 1)
        if callable(weights):
            weights = weights(sums.view(num, *codes.shape[-2:]), counts.view(num, -1))
        weights = weights.to(counts).expand(num, -1).reshape(sizes.shape)
        weights = (1 - self.decay) * weights
        averages = (codes * sizes[..., None]).lerp(sums, weights[..., None])
        sizes = sizes.lerp(counts, weights)
        is_moved = (weights > 0) & (sizes > 0)
        self._write((averages / sizes[..., None]).where(is_moved[..., None], codes))
        self.cluster_size.copy_(sizes)
        totals[:2] = torch.zeros_like(counts), torch.zeros_like(sums)


class ResidualVQ(residual.ResidualVectorQuantize):
    """``ResidualVQ`` of vector-quantize-pytorch, as a `vqtriton.ResidualVectorQuantize`.

    ``x`` gets the sum of the gradients of all levels, each through its own estimator, as there. A
    shared codebook makes one step with the sums of all levels, where theirs averages level after
    level, and masks, maps of images and ``channel_last=False`` work.

    Args:
        dim, num_quantizers, codebook_size, codebook_dim, shared_codebook, quantize_dropout,
            quantize_dropout_cutoff_index, quantize_dropout_multiple_of, accept_image_fmap,
            quant_grad_frac: see `vqtriton.ResidualVectorQuantize`.
        return_zeros_for_masked_padding, others: see `VectorQuantize` of this module.

    Raises:
        TypeError, ValueError: see `VectorQuantize`.

    Example:
        >>> from vqtriton.vector_quantize_pytorch import ResidualVQ
        >>> rvq = ResidualVQ(dim=256, num_quantizers=8, codebook_size=1024)
        >>> quantized, indices, commit_loss = rvq(torch.randn(1, 1024, 256))
    """

    freeze_codebook: bool
    return_zeros_for_masked_padding: bool
    level_class = Level

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | Sequence[int],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **others: Any,
    ) -> None:
        arguments = locals()
        of_levels = {**LEVEL_DEFAULTS, **{k: others.pop(k) for k in LEVEL_DEFAULTS if k in others}}
        refuse(NOT_HERE | NOT_HERE_IN_RESIDUAL, **others)
        rotation_trick = of_levels["rotation_trick"]
        width = dim if codebook_dim is None else codebook_dim
        super().__init__(
            dim,
            codebook_size,
            num_quantizers,
            codebook_dim=codebook_dim,
            shared_codebook=shared_codebook,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
            quant_grad_frac=quant_grad_frac,
            rotation_trick=width > 1 if rotation_trick is None else rotation_trick,
            channel_last=of_levels["channel_last"],
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=of_levels["accept_3d_fmap"],
            **level_options(of_levels),
        )
        keep(self, {**arguments, **of_levels})

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        config = super().config
        own = {name: config[name] for name in RESIDUAL_PARAMETERS if name in config}
        kept = {name: getattr(self, name) for name in KEPT}
        of_levels = {name: config[name] for name in LEVEL_DEFAULTS if name in config}
        return {**own, **of_levels, **kept}

    @property
    def codebooks(self) -> Any:
        """[Q, K, D], or a tuple of [K, D] where K differs."""
        codes = [layer.codebook for layer in self.layers]
        if self.layers[0].use_cosine_sim:
            codes = [normalize(one, self.layers[0].backend) for one in codes]
        return torch.stack(codes) if len(set(self.codebook_sizes)) == 1 else tuple(codes)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: None = None,
        freeze_codebook: bool = False,
        beam_size: None = None,
        rand_quantize_dropout_fixed_seed: None = None,
        num_quantizers: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes; in training mode the codebooks learn as well.

        Args:
            x, mask, freeze_codebook, num_quantizers, return_all_codes: see
                `vqtriton.ResidualVectorQuantize.forward`; theirs has no ``num_quantizers``.
            indices, sample_codebook_temp, beam_size, rand_quantize_dropout_fixed_seed: are not
                here.

        Returns:
            (quantized, indices, loss), and the codes of all levels where they are asked for.
        """
        refuse(
            NOT_HERE_IN_FORWARD,
            indices=indices,
            sample_codebook_temp=sample_codebook_temp,
            beam_size=beam_size,
            rand_quantize_dropout_fixed_seed=rand_quantize_dropout_fixed_seed,
        )
        is_held = freeze_codebook or self.freeze_codebook
        found = super().forward(x, mask, is_held, None, num_quantizers, return_all_codes)
        if mask is None or self.return_zeros_for_masked_padding:
            return found
        return found._replace(quantized=given_back(self, found.quantized, x, ~mask))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of all levels, [Q, ..., D]; zeros for those that ``indices`` lacks."""
        if isinstance(indices, Tensor) and indices.ndim > 0:
            missing = max(self.num_quantizers - indices.shape[-1], 0)
            indices = nn.functional.pad(indices, (0, missing), value=-1)
        return super().get_codes_from_indices(indices)

    def _quantize(
        self, vectors: Tensor, mask: Tensor | None, levels: residual.Levels, is_held: bool
    ) -> Quantized:
        found = super()._quantize(vectors, mask, levels, is_held)
        has_codebook_term = self.layers[0].codebook_update == "gradient" and not is_held
        loss = their_loss(self, found.loss, has_codebook_term)
        return Quantized(found.quantized, found.indices, loss)

    def _at_once(
        self, rows: Tensor, mask: Tensor | None, levels: residual.Levels, is_held: bool
    ) -> Quantized:
        if self.training and self.rotation_trick and self.quant_grad_frac > 0:
            # what a level passes on is then turned by all levels before it
            return self._by_layers(rows, mask, levels, is_held)
        return super()._at_once(rows, mask, levels, is_held)

    def _routed(self, rows: Tensor, codebooks: Sequence[Tensor], found: Quantized) -> Quantized:
        quantized, indices, loss = found
        if not self.training:
            return Quantized(quantized.detach(), indices, loss)
        if self.rotation_trick:
            residual = rows.to(torch.promote_types(rows.dtype, torch.float32))
            total = torch.zeros_like(residual)
            for codebook, chosen in zip(codebooks, indices.unbind(-1), strict=True):
                codes = gather(codebook.detach(), chosen)
                residual, total = residual - codes, total + rotate(residual, codes)
            moving = total.to(rows.dtype)
        else:
            passed = 1 - self.quant_grad_frac
            powers = [passed**level for level in range(indices.shape[-1])]
            shares = torch.tensor(powers, dtype=rows.dtype, device=rows.device)
            moving = rows * (shares * (indices >= 0)).sum(-1, keepdim=True)
        return Quantized(straight_through(moving, quantized), indices, loss)

    def _by_layers(
        self, rows: Tensor, mask: Tensor | None, levels: residual.Levels, is_held: bool
    ) -> Quantized:
        residual = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = torch.zeros_like(residual)
        indices, losses = [], []
        for level, layer in enumerate([*self.layers][: levels.num]):
            is_counted = of_level(mask, levels.depths, level)
            # with cosine similarity of length 1
            vectors = layer._project_in(residual)
            codes, chosen, loss = layer._quantize(vectors, is_counted, is_held or layer.frozen)
            if self.rotation_trick:
                codes = rotate(vectors, codes)
            residual = residual - straight_through(self.quant_grad_frac * codes, codes)
            total = total + codes
            indices.append(chosen)
            losses.append(loss)
        total = total.to(rows.dtype)
        total = total if self.training else total.detach()
        return Quantized(total, torch.stack(indices, -1), torch.stack(losses, -1))


class GroupedResidualVQ(grouped.GroupedResidualVectorQuantize):
    """``GroupedResidualVQ`` of vector-quantize-pytorch.

    Args:
        dim, groups: see `vqtriton.GroupedResidualVectorQuantize`.
        options: of each group, see `ResidualVQ` of this module.

    Raises:
        TypeError, ValueError: see `VectorQuantize`.

    Example:
        >>> from vqtriton.vector_quantize_pytorch import GroupedResidualVQ
        >>> rvq = GroupedResidualVQ(dim=256, groups=2, num_quantizers=8, codebook_size=1024)
        >>> quantized, indices, commit_loss = rvq(torch.randn(1, 1024, 256))
    """

    group_class = ResidualVQ

    def __init__(self, *, dim: int, groups: int = 1, **options: Any) -> None:
        super().__init__(dim, groups=groups, **options)

    @property
    def codebooks(self) -> Any:
        """[G, Q, K, D / G], or a tuple of what each group has where K differs."""
        codes = tuple(rvq.codebooks for rvq in self.rvqs)
        return torch.stack(codes) if isinstance(codes[0], Tensor) else codes

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        indices: None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
        num_quantizers: int | None = None,
    ) -> tuple[Tensor, ...]:
        """See `ResidualVQ.forward`; indices, loss and codes have the groups first."""
        refuse(NOT_HERE_IN_FORWARD, indices=indices, sample_codebook_temp=sample_codebook_temp)
        first = self.rvqs[0]
        is_held = freeze_codebook or first.freeze_codebook
        found = super().forward(x, mask, is_held, None, num_quantizers, return_all_codes)
        if mask is None or first.return_zeros_for_masked_padding:
            return found
        return found._replace(quantized=given_back(self, found.quantized, x, ~mask))


# attributes that hold an argument as it was given, with the value of None put in
KEPT = (
    *("eps", "freeze_codebook", "sync_kmeans", "ema_update", "learnable_codebook"),
    "return_zeros_for_masked_padding",
)
PARAMETERS = [name for name in inspect.signature(VectorQuantize).parameters if name != "not_here"]
RESIDUAL_PARAMETERS = [*inspect.signature(ResidualVQ).parameters]
# what `ResidualVQ` passes on to its levels
LEVEL_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(VectorQuantize).parameters.items()
    if parameter.default is not parameter.empty
    and name not in {*RESIDUAL_PARAMETERS, *NOT_HERE_IN_RESIDUAL}
}


def refuse(not_here: Mapping[str, tuple[Any, str]], **arguments: Any) -> None:
    """
    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument that is not here has another value than their default.
    """
    for name, value in arguments.items():
        if name not in not_here:
            raise TypeError(f"{name} is not an argument of vector-quantize-pytorch 1.32")
        default, advice = not_here[name]
        # not ==, which a tensor answers for each of its elements
        if value is not default and (isinstance(value, Tensor) or value != default):
            said = "a tensor" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise ValueError(f"{name} is {said}, which is not here: {advice}, {PATCH}")


def level_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of theirs are for a level of ours."""
    if not arguments["sync_kmeans"]:
        raise ValueError(
            "sync_kmeans is False; k-means of each rank by itself would give the ranks different "
            "codes: use sync_codebook=False"
        )
    learns = bool(arguments["learnable_codebook"])
    averages = arguments["ema_update"] is None or bool(arguments["ema_update"])
    if learns and averages:
        raise ValueError("learnable_codebook is True; it needs ema_update=False")
    if learns and arguments["use_cosine_sim"]:
        raise ValueError("learnable_codebook is True; it does not go with use_cosine_sim")
    if not (learns or averages) and arguments["threshold_ema_dead_code"]:
        raise ValueError(
            "ema_update is False, so the codes stay as they are, and threshold_ema_dead_code "
            f"({arguments['threshold_ema_dead_code']!r}) must be 0"
        )
    sync = arguments["sync_codebook"]
    names = (
        *("decay", "kmeans_init", "kmeans_iters", "threshold_ema_dead_code", "use_cosine_sim"),
        *("commitment_weight", "precision", "backend"),
    )
    return {
        **{name: arguments[name] for name in names},
        "codebook_update": "gradient" if learns else "ema",
        # their one weight is that of both terms
        "codebook_weight": arguments["commitment_weight"],
        "sync_codebook": True if sync is None else sync,
    }


def keep(module: Any, arguments: Mapping[str, Any]) -> None:
    """The arguments that nothing else holds."""
    for name in KEPT:
        setattr(module, name, arguments[name])
    module.learnable_codebook = bool(arguments["learnable_codebook"])
    module.ema_update = arguments["ema_update"] is None or bool(arguments["ema_update"])
    # nothing is there to move them
    module.frozen = not (module.learnable_codebook or module.ema_update)


def their_loss(module: nn.Module, loss: Tensor, has_codebook_term: bool) -> Tensor:
    """Of ours, which is computed in eval mode as well and has the codebook term beside the other.

    The terms are equal, so half of their sum is the value of one, with the gradients of both.
    """
    if not module.training:
        return torch.zeros_like(loss)
    return loss - loss.detach() / 2 if has_codebook_term else loss


def given_back(module: Any, quantized: Tensor, x: Tensor, is_masked: Tensor) -> Tensor:
    """Masked vectors as they were given."""
    is_masked = is_masked.unsqueeze(1 if module._is_second else -1)
    return x.where(is_masked, quantized)
