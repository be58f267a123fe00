"""The methods that replace those of other projects' quantizers.

Each does what theirs does, but for the search: the same operations in the same order, so that
values, dtypes and gradients are the same wherever the indices are. ``self`` is their module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqtriton.clients.search import ATTRIBUTE, ORIGINAL, search, this_thread
from vqtriton.functional import code_sums

# --- codebooks of audio codecs: rows in, indices out ---


def quantize_rows(self: Any, hidden_states: Tensor) -> Tensor:
    """EnCodec and its descendants: x [N, D] -> [N]."""
    return search(self, hidden_states, self.embed)


def quantize_rows_in_float32(self: Any, hidden_states: Tensor) -> Tensor:
    """Mimi in transformers converts both sides to float32."""
    return search(self, _not_wider(hidden_states), _not_wider(self.embed))


def quantize_rows_of_moshi(self: Any, x: Tensor) -> Tensor:
    return search(self, x, self.embedding)


def encode_of_encodec(self: Any, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
    """Encodec in transformers: [B, D, T] -> [levels, B, T]."""
    return _levels(embeddings, self.layers[: self.get_num_quantizers_for_bandwidth(bandwidth)])


def encode_of_xcodec(self: Any, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
    number = self.get_num_quantizers_for_bandwidth(bandwidth)
    return _levels(embeddings, self.quantizers[:number])


def _levels(embeddings: Tensor, layers: Iterable[Any]) -> Tensor:
    """The loop of a residual quantizer, with vectors last from the first level to the last."""
    batch, dim, time = embeddings.shape
    residual = embeddings.transpose(1, 2).reshape(-1, dim)
    chosen = []
    for layer in layers:
        indices = layer.codebook.quantize(residual)
        residual = residual - F.embedding(indices, layer.codebook.embed)
        chosen.append(indices)
    return torch.stack(chosen).view(len(chosen), batch, time)


def _not_wider(tensor: Tensor) -> Tensor:
    # a half has the same value in float32
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def decode_latents(self: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """DAC: latents [B, D, T] -> codes [B, D, T], indices [B, T]; both sides are normalised."""
    if self.codebook.weight.is_meta:
        # its values are elsewhere, and theirs brings them here
        return getattr(self, ORIGINAL).decode_latents(self, latents)
    batch, dim, time = latents.shape
    rows = F.normalize(latents.transpose(1, 2).reshape(-1, dim))
    indices = search(self, rows, F.normalize(self.codebook.weight)).view(batch, time)
    return self.codebook(indices).transpose(1, 2), indices


# --- image tokenizers: feature maps in; codes, a loss and indices out ---


def _channels_last(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).contiguous()


def _channels_first(z: Tensor) -> Tensor:
    return z.permute(0, 3, 1, 2).contiguous()


def _loss(z: Tensor, codes: Tensor, commitment_weight: float, codebook_weight: float) -> Tensor:
    # a weight of 1 changes no bit
    commitment = torch.mean((codes.detach() - z) ** 2)
    return commitment_weight * commitment + codebook_weight * torch.mean((codes - z.detach()) ** 2)


def forward_of_chameleon(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chameleon and Janus: β weighs the codebook term; indices [N]."""
    z = _channels_last(hidden_state)
    weight = self.embedding.weight
    indices = search(self, z.view(-1, weight.shape[1]), weight)
    codes = self.embedding(indices).view(z.shape)
    return _channels_first(z + (codes - z).detach()), _loss(z, codes, 1, self.beta), indices


def forward_of_glm(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GLM-Image: as Chameleon, with both sides normalised."""
    z = F.normalize(_channels_last(hidden_state), p=2, dim=-1)
    embedding = F.normalize(self.embedding.weight, p=2, dim=-1)
    indices = search(self, z.view(-1, z.shape[-1]), embedding)
    codes = embedding[indices].view(z.shape)
    return _channels_first(z + (codes - z).detach()), _loss(z, codes, 1, self.beta), indices


def forward_of_emu3(self: Any, hidden_state: Tensor) -> Tensor:
    """[B, T, C, H, W] -> [B, T, H, W]"""
    z = hidden_state.permute(0, 1, 3, 4, 2)
    indices = search(self, z.reshape(-1, z.shape[-1]), self.embedding.weight)
    return indices.view(z.shape[:-1])


def forward_of_diffusers(self: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """diffusers, and taming-transformers' `VectorQuantizer2`."""
    z = _channels_last(z)
    weight = self.embedding.weight
    indices = search(self, z.view(-1, weight.shape[1]), weight)
    codes = self.embedding(indices).view(z.shape)
    weights = (1, self.beta) if self.legacy else (self.beta, 1)
    loss = _loss(z, codes, *weights)
    if self.remap is not None:
        indices = self.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
    if self.sane_index_shape:
        indices = indices.reshape(z.shape[:-1])
    return _channels_first(z + (codes - z).detach()), loss, (None, None, indices)


def forward_of_taming(
    self: Any,
    z: Tensor,
    temp: float | None = None,
    rescale_logits: bool = False,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, tuple]:
    if (temp is not None and temp != 1.0) or rescale_logits or return_logits:
        raise AssertionError("temp, rescale_logits and return_logits are for the Gumbel quantizer")
    return forward_of_diffusers(self, z)


# --- vector-quantize-pytorch ---


def _theirs() -> ModuleType:
    return sys.modules["vector_quantize_pytorch.vector_quantize_pytorch"]


def forward_of_vector_quantize(
    self: Any, x: Tensor, indices: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Tells the codebook whether its scores are read."""
    forward = getattr(self, ORIGINAL).forward
    is_cross_entropy = self.has_commitment_loss and self.commitment_use_cross_entropy_loss
    is_loss_of_scores = self.has_codebook_diversity_loss or is_cross_entropy
    searches = self._codebook.__dict__.get(ATTRIBUTE)
    if searches is None or indices is not None or (self.training and is_loss_of_scores):
        return forward(self, x, indices, *args, **kwargs)
    thread = this_thread()
    searches.without_scores[thread] = True
    try:
        return forward(self, x, indices, *args, **kwargs)
    finally:
        searches.without_scores.pop(thread, None)


@torch.amp.autocast("cuda", enabled=False)
def forward_of_codebook(
    self: Any,
    x: Tensor,
    sample_codebook_temp: float | None = None,
    mask: Tensor | None = None,
    freeze_codebook: bool = False,
    codebook_transform_fn: Any = None,
    ema_update_weight: Any = None,
    accum_ema_update: bool = False,
    ema_update: bool | None = None,
    topk: int | None = None,
    update_usage: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [H, B, N, D], or [B, N, D], -> codes, indices, and no scores."""
    reads_scores = this_thread() not in self.__dict__[ATTRIBUTE].without_scores
    is_other_choice = _samples(self, sample_codebook_temp) or topk is not None
    if reads_scores or is_other_choice or codebook_transform_fn is not None:
        return getattr(self, ORIGINAL).forward(
            self,
            x,
            sample_codebook_temp,
            mask,
            freeze_codebook,
            codebook_transform_fn,
            ema_update_weight,
            accum_ema_update,
            ema_update,
            topk,
            update_usage,
        )
    x = x.float()
    heads = x if x.ndim >= 4 else x[None]
    flat = heads.flatten(1, -2)
    mask = _mask_of_rows(mask, flat)
    # a compiler takes no branch on a tensor
    if not torch.compiler.is_compiling():
        self.init_embed_(flat, mask=mask)
    elif not _is_true(self.initted):
        raise RuntimeError("the codebook waits for k-means: take the first step uncompiled")
    if self.affine_param:
        self.update_affine(flat, self.embed, mask=mask)
    embed = (self.embed if self.learnable_codebook else self.embed.detach()).float()
    if self.vq_bridge is not None:
        embed = self.vq_bridge(embed)
    if self.affine_param:
        codebook_std, batch_std = _deviations(self)
        embed = (embed - self.codebook_mean) * (batch_std / codebook_std) + self.batch_mean
    metric = "dot" if self.use_cosine_sim else "l2"
    chosen = [search(self, rows, codes, metric) for rows, codes in zip(flat, embed, strict=True)]
    indices = torch.stack(chosen)
    codes = torch.stack([F.embedding(i, e) for i, e in zip(chosen, embed, strict=True)])
    if self.training and update_usage and not freeze_codebook:
        self.update_codebook(
            flat,
            indices,
            mask=mask,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
    return codes.view(x.shape), indices.view(x.shape[:-1]), None


def _deviations(self: Any) -> tuple[Tensor, Tensor]:
    variances = self.codebook_variance, self.batch_variance
    codebook_std, batch_std = (variance.clamp(min=1e-5).sqrt() for variance in variances)
    return codebook_std, batch_std


def _is_true(flag: Tensor) -> bool:
    return bool(flag)


# what torch.compiler.assume_constant_result does, which imports all of the compiler
vars(_is_true)["_dynamo_marked_constant"] = True


def _samples(self: Any, temperature: float | None) -> bool:
    """Whether the choice may be another one than the nearest code."""
    sample = self.gumbel_sample
    theirs = _theirs().gumbel_sample
    if sample is theirs:
        return False
    if not isinstance(sample, partial) or sample.func is not theirs:
        return True
    options = {"stochastic", "straight_through"}
    if sample.args or not sample.keywords.keys() <= options:
        return True
    temperature = self.sample_codebook_temp if temperature is None else temperature
    return self.training and temperature > 0 and any(sample.keywords.values())


def _mask_of_rows(mask: Tensor | None, flat: Tensor) -> Tensor | None:
    """[B, N] -> [H, N'], for rows [H, N', D] of one head or several."""
    if mask is None:
        return None
    repeats = flat.shape[1] // mask.numel()
    return mask[:, None].expand(-1, repeats, -1).reshape(1, -1).expand(len(flat), -1)


def update_indices(
    self: Any, x: Tensor, embed_ind: Tensor, mask: Tensor | None = None, **options: Any
) -> None:
    """A step of the averages for indices that are given; theirs takes -1 for 0."""
    heads = x.float() if x.ndim >= 4 else x.float()[None]
    flat = heads.flatten(1, -2)
    indices = embed_ind.reshape(flat.shape[:2]).clamp(min=0)
    self.update_codebook(flat, indices, mask=_mask_of_rows(mask, flat), **options)


def track_cluster_size_and_embed_avg(
    self: Any,
    flatten: Tensor,
    embed_onehot: Tensor,
    mask: Tensor | None = None,
    ema_update_weight: Any = None,
    accum_ema_update: bool = False,
) -> None:
    """The sums of their update, from indices [H, N] in place of the one-hot matrix."""
    if embed_onehot.is_floating_point():
        getattr(self, ORIGINAL).track_cluster_size_and_embed_avg(
            self, flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
        )
        return
    theirs = _theirs()
    if self.affine_param:
        codebook_std, batch_std = _deviations(self)
        flatten = (flatten - self.batch_mean) * (codebook_std / batch_std) + self.codebook_mean
    indices = embed_onehot if mask is None else embed_onehot.masked_fill(~mask, -1)
    backend = self.__dict__[ATTRIBUTE].backend
    sums = [
        code_sums(rows, i, self.codebook_size, backend=backend)
        for rows, i in zip(flatten.detach(), indices, strict=True)
    ]
    embed_sum = torch.stack([total for total, _ in sums])
    cluster_size = torch.stack([count for _, count in sums]).to(embed_sum.dtype)
    self.all_reduce_fn(cluster_size)
    self.all_reduce_fn(embed_sum)
    if callable(ema_update_weight):
        ema_update_weight = ema_update_weight(embed_sum, cluster_size)
    for old, new in ((self.cluster_size, cluster_size), (self.embed_avg, embed_sum)):
        if accum_ema_update:
            theirs.accum_grad_(old, new)
        else:
            theirs.ema_inplace(old, new, self.decay, ema_update_weight)
