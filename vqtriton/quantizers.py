"""The quantizer as a module: state, and how it learns."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import torch
from einops import rearrange
from torch import Tensor

from vqtriton import dispatch
from vqtriton.checks import INTEGERS, REDUCTIONS, check_number
from vqtriton.functional import snapshot, vector_quantize, vector_quantize_update_
from vqtriton.learning import LearnedCodebook
from vqtriton.reference import Quantized
from vqtriton.tensors import gather

CODEBOOK_UPDATES = ("ema", "gradient")
# arguments of earlier versions that are no more
RETIRED = ("eps",)
# where torch keeps the tensors of a module
TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")


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
        if kind in (int, float):
            least = 1 if name in ("dim", "codebook_size") else 0
            check_number(name, value, kind, least, 1 if name == "decay" else None)
        elif not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.80}; it must be of type {kind.__name__}")
    for name, known in (
        ("codebook_update", CODEBOOK_UPDATES),
        ("reduction", REDUCTIONS),
        ("precision", dispatch.PRECISIONS),
        ("backend", dispatch.BACKENDS),
    ):
        if config[name] not in known:
            raise ValueError(
                f"{name} is {config[name]!r:.80}; it must be one of {', '.join(known)}"
            )


class VectorQuantize(LearnedCodebook):
    """Replaces vectors by the nearest of K learned codes.

    In training mode, each call also moves the codes ("ema"); in eval mode nothing changes. The
    defaults are those of the VQ-VAE paper. Where vector-quantize-pytorch has another default, it is
    in brackets.

    Args:
        dim: D, the size of a vector.
        codebook_size: K, the number of codes.
        codebook_update: "ema": codes are moving averages of the vectors that chose them (appendix
            A.1 of the paper). "gradient": codes are parameters, moved by an optimizer along the
            codebook term of the loss (``learnable_codebook=True, ema_update=False``).
        decay: of the moving averages, in [0, 1] (0.8). It can be set at any time, by a schedule;
            so can ``threshold_ema_dead_code``.
        commitment_weight: β (1.0).
        codebook_weight: weight of the codebook term; no effect with "ema".
        reduction: of the loss, see `vqtriton.vector_quantize`.
        kmeans_init: start from k-means of the first batch that is trained on, over all ranks; until
            then the codes are zeros. Otherwise codes start uniform in ±1/K. With
            ``torch.compile(fullgraph=True)``, take the first step uncompiled.
        kmeans_iters: iterations of that k-means.
        threshold_ema_dead_code: replace a code by a random vector of the batch when the moving
            average of the rows that choose it falls below this number of rows per step (of all
            ranks); 0 is never. **Choose 0.1 to 0.4 of the rows per code**, which are the rows of a
            step divided by K: with 4096 rows and K = 512, 0.8 to 3.2. At the rows per code or
            above, most codes are replaced again and again, and the first training step warns
            (unless it is compiled). docs/codebook.md has the measurements.
        channel_last: vectors along the last dim, [..., D]; else along the second, [B, D, ...].
        accept_image_fmap: ``x`` is [B, D, H, W], the indices [B, H, W].
        sync_codebook: add up the statistics of all ranks when `torch.distributed` is in use.
        precision: see `vqtriton.nearest_code`.
        backend: see `vqtriton.nearest_code`.

    Attributes:
        codebook: [K, D] float32, whatever the module is cast to. The next step goes on from the
            codes that it finds here, whoever wrote them.
        cluster_size: [K] float32, moving average of the rows per code and step.
        frozen: True keeps codebook and cluster sizes as they are, in training mode as well. After
            ``requires_grad_(False)`` on a "gradient" codebook, neither k-means start nor revival
            writes to it.
        is_initialized: [] bool, whether there are codes. ``is_initialized.fill_(False)`` starts
            anew.
        config: dict, the keyword arguments that build this module.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range.

    Activation checkpointing runs a forward again in backward, after the codes have moved, so it is
    refused where forward changes the codes: leave the quantizer out of the checkpointed part.

    Example:
        >>> vq = vqtriton.VectorQuantize(64, 512, kmeans_init=True)
        >>> x = torch.randn(16, 49, 64, requires_grad=True)
        >>> quantized, indices, loss = vq(x)  # [16, 49, 64], [16, 49], []
        >>> (quantized.square().mean() + loss).backward()

    References: van den Oord et al. 2017, arXiv:1711.00937; k-means start and revival: Dhariwal et
    al. 2020, arXiv:2005.00341, and Zeghidour et al. 2021, arXiv:2107.03312.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_update: str = "ema",
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        reduction: str = "mean",
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        sync_codebook: bool = True,
        precision: str = "exact",
        backend: str = "auto",
    ) -> None:
        arguments = locals()
        check_config({name: arguments[name] for name in PARAMETERS})
        super().__init__(
            dim,
            codebook_size,
            codebook_update=codebook_update,
            decay=decay,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync_codebook=sync_codebook,
            backend=backend,
        )
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.reduction = reduction
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.precision = precision

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VectorQuantize:
        """Builds the module that a `config` describes, also one of an earlier version.

        Args:
            config: the attribute ``config`` of a module.

        Returns:
            A new module with codes of its own.

        Raises:
            TypeError, ValueError: it does not describe a module.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128, decay=0.9)
            >>> same = vqtriton.VectorQuantize.from_config(vq.config)
            >>> found = same.load_state_dict(vq.state_dict())
        """
        return cls(**{name: value for name, value in config.items() if name not in RETIRED})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_rates" not in state:
            state = _of_an_earlier_version(state)
        super().__setstate__(state)

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        lens: Tensor | None = None,
    ) -> Quantized:
        """Quantizes; in training mode the codebook learns as well. Called as ``vq(x)``.

        Args:
            x: [..., D] by default; [B, D, ...] with ``channel_last=False``; [B, D, H, W] with
                ``accept_image_fmap``.
            mask: bool, in the shape of the indices, True for the vectors that count.
            freeze_codebook: leave codebook and cluster sizes as they are in this call. The
                attribute ``frozen`` does so in all calls.
            lens: [B] int, in place of a mask: the first ``lens[b]`` vectors of sequence b count.
                ``x`` is [B, N, D], or [B, D, N] with ``channel_last=False``.

        Returns:
            `Quantized`, a named tuple of three.

            quantized: the shape and dtype of ``x``.
            indices: int64, [...], or [B, ...], or [B, H, W]; -1 where masked.
            loss: [] float32, ready to be added to the loss of the model. With "ema" it is
                commitment_weight times the mean of the squared differences between ``x`` and its
                codes, over all elements of the vectors that count. With "gradient" the codebook
                term is added: codebook_weight times the same mean. ``reduction`` can change the
                mean, see `vqtriton.vector_quantize`.

        Raises:
            ValueError, TypeError: see `vqtriton.vector_quantize`.
            RuntimeError: activation checkpointing runs it again while the codebook learns.

        Warns:
            UserWarning: ``threshold_ema_dead_code`` is not below the rows per code, or there are no
                codes yet in eval mode, as it waits for its k-means start.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128, accept_image_fmap=True)
            >>> fmap, mask = torch.randn(2, 16, 7, 7), torch.rand(2, 7, 7) < 0.9
            >>> quantized, indices, loss = vq(fmap, mask=mask)  # [2, 16, 7, 7], [2, 7, 7], []
        """
        vectors = self._channels_last(x)
        if lens is not None:
            mask = mask_of_lengths(lens, vectors, mask)
        is_gradient = self.codebook_update == "gradient"
        is_held = freeze_codebook or self.frozen
        learns = self.training and not is_held and self._is_trainable()
        changes = learns and (self._revives or not is_gradient)
        if changes:
            self._check_writable()
        if learns:
            self._start(vectors, mask)
        else:
            self._look()
        if changes and self._steps_at_once():
            quantized, indices, loss = vector_quantize_update_(
                vectors,
                self.codebook,
                mask,
                self.cluster_size,
                self._rates_here(),
                commitment_weight=self.commitment_weight,
                codebook_weight=self.codebook_weight if is_gradient else 0.0,
                reduction=self.reduction,
                averages=not is_gradient,
                revives=self._revives,
                precision=self.precision,
                backend=self.backend,
            )
            return Quantized(self._channels_back(quantized), indices, loss)
        codebook = self.codebook.detach() if is_held else self.codebook
        if changes:
            # backward needs the codes that were chosen from, not what the update makes of them
            codebook = snapshot(codebook)
        needs_grad = codebook.requires_grad and torch.is_grad_enabled()
        quantized, indices, loss = vector_quantize(
            vectors,
            codebook if learns or needs_grad else self._kept(codebook),
            commitment_weight=self.commitment_weight,
            codebook_weight=self.codebook_weight if is_gradient and not is_held else 0.0,
            reduction=self.reduction,
            mask=mask,
            precision=self.precision,
            backend=self.backend,
        )
        if changes:
            self._update(vectors.detach().reshape(-1, self.dim), indices.reshape(-1))
        return Quantized(self._channels_back(quantized), indices, loss)

    def reset_codes(self, which: Tensor, x: Tensor | None = None) -> None:
        """Gives some codes new values, such as those that nobody chooses.

        Args:
            which: [K] bool, or the indices of the codes, int.
            x: as `forward` takes it: the codes become random rows of it. Without ``x`` each is put
                beside one of the codes that stay, drawn in proportion to the cluster sizes.

        Raises:
            TypeError, ValueError: ``which`` or ``x`` does not fit, no code would stay, or there are
                no codes yet.

        Example:
            >>> vq, x = vqtriton.VectorQuantize(16, 128), torch.randn(1000, 16)
            >>> counts = vqtriton.metrics.counts(vq(x).indices, 128)
            >>> vq.reset_codes(counts == 0, x)
        """
        self._restart(which, None if x is None else self._channels_last(x))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of some indices, vectors last.

        Args:
            indices: [...], of any integer dtype, in [-1, K).

        Returns:
            [..., D] float32; zeros where the index is -1.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            IndexError: an index outside [-1, K) (on a GPU a device-side assertion).

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128)
            >>> vq.get_codes_from_indices(torch.tensor([[3, 5, -1]])).shape
            torch.Size([1, 3, 16])
        """
        is_tensor = isinstance(indices, Tensor)
        if not is_tensor or indices.dtype not in INTEGERS:
            kind = indices.dtype if is_tensor else type(indices).__name__
            raise TypeError(f"indices is {kind}; it must be a tensor of integers")
        indices = indices.long()
        is_readable = indices.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_readable and indices.numel() > 0:
            low, high = indices.aminmax()
            if low < -1 or high >= self.codebook_size:
                raise IndexError(
                    f"indices has values from {low} to {high}; they must be in "
                    f"[0, {self.codebook_size}), or -1 for a masked vector"
                )
        return gather(self.codebook, indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of some indices in the layout of the module's output, for a decoder.

        Args:
            indices: what `forward` returned as indices, or other indices of that shape.

        Returns:
            [..., D], or [B, D, ...], or [B, D, H, W], float32; zeros where the index is -1. In eval
            mode it equals ``quantized`` of `forward` for float32 ``x``.

        Raises:
            TypeError, IndexError: see `get_codes_from_indices`.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128, accept_image_fmap=True).eval()
            >>> quantized, indices, _ = vq(torch.randn(2, 16, 7, 7))
            >>> torch.equal(vq.get_output_from_indices(indices), quantized)
            True
        """
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


PARAMETERS = tuple(inspect.signature(VectorQuantize).parameters)


def _of_an_earlier_version(state: dict[str, Any]) -> dict[str, Any]:
    """What a module that an earlier version pickled is today."""
    vq = VectorQuantize(**{name: state[name] for name in PARAMETERS if name in state})
    tensors = {**state["_parameters"], **state["_buffers"]}
    own = ("codebook", "cluster_size", "embed_sum", "is_initialized")
    vq.load_state_dict({name: tensors[name] for name in own if name in tensors})
    vq.to(tensors["codebook"].device)
    vq.codebook.requires_grad_(tensors["codebook"].requires_grad)
    for place in ("_parameters", "_buffers"):
        # the user's own
        vars(vq)[place].update({n: t for n, t in state[place].items() if n not in own})
    retired = {"decay", "threshold_ema_dead_code", "eps", "_known_initialized"}
    kept = {name: value for name, value in state.items() if name not in retired}
    return kept | {n: v for n, v in vars(vq).items() if n not in kept or n in TENSORS}


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
