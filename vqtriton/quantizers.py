"""The quantizer as a module: state, and how it learns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from einops import rearrange
from torch import Tensor, nn

from vqtriton import clustering, distributed, ops
from vqtriton.functional import check_arguments, code_sums, gather, snapshot, vector_quantize
from vqtriton.reference import Quantized
from vqtriton.screening import finite_rows

CODEBOOK_UPDATES = ("ema", "gradient")


def check_config(config: dict[str, Any]) -> None:
    """Whether the keyword arguments can build a `VectorQuantize`.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range.
    """
    for name, kind in get_type_hints(VectorQuantize.__init__).items():
        if name == "return":
            continue
        value = config[name]
        # True is an int to Python, 1 a float to everybody
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or isinstance(value, bool) != (kind is bool):
            raise TypeError(f"{name} is {value!r:.80}; it must be of type {kind.__name__}")
        least = 1 if name in ("dim", "codebook_size") else 0
        # float32, as the statistics and the loss that it is for
        if kind in (int, float) and not least <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name} is {value!r:.80}; it must be finite and at least {least}")
    if config["decay"] > 1:
        raise ValueError(f"decay is {config['decay']}; it must be in [0, 1]")
    for name, known in (
        ("codebook_update", CODEBOOK_UPDATES),
        ("precision", ops.PRECISIONS),
        ("backend", ops.BACKENDS),
    ):
        if config[name] not in known:
            raise ValueError(
                f"{name} is {config[name]!r:.80}; it must be one of {', '.join(known)}"
            )


class VectorQuantize(nn.Module):
    """Replaces vectors by the nearest of K learned codes.

    Defaults are those of the VQ-VAE paper. Where vector-quantize-pytorch's differ it is said below.

    Args:
        dim: D, size of a vector.
        codebook_size: K, number of codes.
        codebook_update: "ema": codes are moving averages of the vectors that chose them (appendix
            A.1 of the paper). "gradient": codes are parameters, pulled by the codebook term of the
            loss (vector-quantize-pytorch: ``learnable_codebook=True, ema_update=False``).
        decay: of the moving averages, in [0, 1] (vector-quantize-pytorch: 0.8).
        eps: Laplace smoothing of the cluster sizes, in rows.
        commitment_weight: β (vector-quantize-pytorch: 1.0).
        codebook_weight: weight of the codebook term; of no effect with "ema".
        kmeans_init: start from k-means of the first batch that is trained on, over all ranks.
            Otherwise codes start uniform in ±1/K. With ``torch.compile(fullgraph=True)``, take
            the first step uncompiled.
        kmeans_iters: iterations of that.
        threshold_ema_dead_code: replace a code by a random vector of the batch when the moving
            average of the rows that choose it, per step over all ranks, falls below this; 0 is
            never. It starts anew with the mean cluster size. Keep it well below that mean (rows a
            step / K): above it every code is dead at every step, and none learns.
        channel_last: vectors along the last dim, [..., D]; else along the second, [B, D, ...].
        accept_image_fmap: x is [B, D, H, W], the indices [B, H, W].
        sync_codebook: add up the statistics of all ranks when `torch.distributed` is in use.
        precision: see `vqtriton.nearest_code`.
        backend: see `vqtriton.nearest_code`.

    In training mode a forward changes the codebook. So under activation checkpointing, which runs
    it again in backward, choose codes outside the checkpointed part, or the second run chooses
    from other codes than the first and the gradients are wrong.

    Attributes:
        codebook: [K, D] float32. It and the statistics stay float32 whatever the module is cast
            to, since a moving average stalls in half precision.
        cluster_size: [K] float32, moving average of the rows per code.
        embed_sum: [K, D] float32, moving average of their sums ("ema" only).

    Reference: van den Oord et al. 2017, arXiv:1711.00937.
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_sum: Tensor
    is_initialized: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_update: str = "ema",
        decay: float = 0.99,
        eps: float = 1e-5,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        sync_codebook: bool = True,
        precision: str = "exact",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_update = codebook_update
        self.decay = decay
        self.eps = eps
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.sync_codebook = sync_codebook
        self.precision = precision
        self.backend = backend

        check_config(self.config)

        codebook = torch.empty(codebook_size, dim, dtype=torch.float32)
        codebook.uniform_(-1 / codebook_size, 1 / codebook_size)
        if codebook_update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("embed_sum", codebook.clone())
        # one row each: the averages and the codebook agree from the first step
        self.register_buffer("cluster_size", torch.ones(codebook_size, dtype=torch.float32))
        self.register_buffer("is_initialized", torch.tensor(not kmeans_init))
        # what `is_initialized` was found to be, so that steps need not wait for the device
        self._known_initialized = not kmeans_init
        self._is_broadcast = False

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        return {name: getattr(self, name) for name in inspect.signature(VectorQuantize).parameters}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def forward(
        self, x: Tensor, mask: Tensor | None = None, freeze_codebook: bool = False
    ) -> Quantized:
        """Quantizes; in training mode the codebook learns as well.

        Args:
            x: [..., D], or [B, D, ...], or [B, D, H, W]: see ``channel_last`` and
                ``accept_image_fmap``.
            mask: shape of the indices, bool, True for the vectors that count.
            freeze_codebook: leave codebook and statistics as they are.

        Returns:
            ``(quantized, indices, loss)`` as of `vqtriton.vector_quantize`; ``quantized`` in the
            layout of ``x``. With "ema", loss is the weighted commitment term alone.

        Raises:
            ValueError, TypeError: see `vqtriton.vector_quantize`.
        """
        vectors = self._channels_last(x)
        learns = self.training and not freeze_codebook
        is_gradient = self.codebook_update == "gradient"
        if learns:
            self._prepare(vectors, mask)
        codebook = self.codebook
        if freeze_codebook:
            codebook = codebook.detach()
        elif learns and (not is_gradient or self.threshold_ema_dead_code > 0):
            # backward needs the codes that were chosen from, not what the update makes of them
            codebook = snapshot(codebook)
        quantized, indices, loss = vector_quantize(
            vectors,
            codebook,
            commitment_weight=self.commitment_weight,
            codebook_weight=self.codebook_weight if is_gradient and not freeze_codebook else 0.0,
            mask=mask,
            precision=self.precision,
            backend=self.backend,
        )
        if learns and (not is_gradient or self.threshold_ema_dead_code > 0):
            self._update(vectors.detach().reshape(-1, self.dim), indices.reshape(-1))
        return Quantized(self._channels_back(quantized), indices, loss)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """[...] int64 -> [..., D] float32; zeros where the index is -1.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            IndexError: an index outside [-1, K) (on a GPU a device-side assertion).
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices is {kind}; it must be an int64 tensor")
        if indices.device.type == "cpu" and indices.numel() > 0:
            low, high = indices.aminmax()
            if low < -1 or high >= self.codebook_size:
                raise IndexError(
                    f"indices has values from {low} to {high}; they must be in "
                    f"[0, {self.codebook_size}), or -1 for a masked vector"
                )
        return gather(self.codebook, indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The codes in the layout of the module's output: what ``forward`` gave as quantized."""
        return self._channels_back(self.get_codes_from_indices(indices))

    def _channels_last(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
        layout = "[..., D]"
        if self.accept_image_fmap:
            layout = "[B, D, H, W]"
            if x.ndim == 4 and x.shape[1] == self.dim:
                return rearrange(x, "b d h w -> b h w d")
        elif not self.channel_last:
            layout = "[B, D, ...]"
            if x.ndim >= 2 and x.shape[1] == self.dim:
                return rearrange(x, "b d ... -> b ... d")
        elif x.ndim >= 1 and x.shape[-1] == self.dim:
            return x
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be {layout} with D = {self.dim}")

    def _channels_back(self, x: Tensor) -> Tensor:
        if self.accept_image_fmap or not self.channel_last:
            return rearrange(x, "b ... d -> b d ...")
        return x

    def _prepare(self, vectors: Tensor, mask: Tensor | None) -> None:
        """Before the first step: the same codebook on every rank, from data if asked for."""
        must_broadcast = (
            self.sync_codebook and not self._is_broadcast and distributed.world_size() > 1
        )
        if self._known_initialized and not must_broadcast:
            return
        # before anything changes or other ranks are waited for
        check_arguments(
            vectors, self.codebook, mask, precision=self.precision, backend=self.backend
        )
        if must_broadcast:
            with torch.no_grad():
                # not state_dict(): FSDP2 has hooks on it that put the shards back
                distributed.broadcast_([*self.parameters(), *self.buffers()])
            self._is_broadcast = True
            self._known_initialized = bool(self.is_initialized)
        if not self._known_initialized:
            self._init_from_data(vectors.detach(), mask)

    @torch.no_grad()
    def _init_from_data(self, vectors: Tensor, mask: Tensor | None) -> None:
        rows = vectors.reshape(-1, self.dim) if mask is None else vectors[mask]
        codebook, counts, has_rows = clustering.lloyd(
            clustering.Rows(rows),
            self.codebook_size,
            self.kmeans_iters,
            sync=self.sync_codebook,
            backend=self.backend,
        )
        if not has_rows:
            # no row on any rank: the next batch may have some
            return
        self.codebook.copy_(codebook)
        if self.codebook_update == "ema":
            self.cluster_size.copy_(counts.clamp(min=1))
            self.embed_sum.copy_((codebook * self.cluster_size[:, None]).nan_to_num_(0))
        self.is_initialized.fill_(True)
        self._known_initialized = True

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor) -> None:
        """One step of the statistics, and of what follows from them."""
        is_ema = self.codebook_update == "ema"
        revives = self.threshold_ema_dead_code > 0
        local = list(code_sums(rows, indices, self.codebook_size, backend=self.backend))
        if revives:
            keep = (indices >= 0) & finite_rows(rows)
            local += distributed.sample_rows(
                rows, self.codebook_size, keep=keep, sync=self.sync_codebook
            )
        sums, counts, *drawn = distributed.all_reduce(local, sync=self.sync_codebook)

        ops.ema_update_(
            self.cluster_size,
            self.codebook,
            self.embed_sum if is_ema else None,
            counts,
            sums,
            *(drawn or (None, None)),
            self.decay,
            self.eps,
            self.threshold_ema_dead_code,
            self.backend,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets a shard in place of the parameter. Forward then sees a copy, gathered from the
        # shards, and what it changes there is lost; the optimizer's steps are not.
        if name == "codebook" and hasattr(value, "device_mesh"):
            for option, used in (
                ("threshold_ema_dead_code", self.threshold_ema_dead_code > 0),
                ("kmeans_init", not self._known_initialized),
            ):
                if used:
                    raise ValueError(
                        f"{option} changes the codebook in forward, so that one which is a "
                        "parameter cannot be sharded; pass ignored_params={vq.codebook} to "
                        'fully_shard, or use codebook_update="ema"'
                    )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantize:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = bool(self.is_initialized)
