"""The quantizer as a module: state, and how it learns."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from vqtriton import dispatch
from vqtriton.checks import INTEGERS, REDUCTIONS, check_number
from vqtriton.functional import (
    PreparedCodebook,
    normalize,
    rotate,
    snapshot,
    vector_quantize,
    vector_quantize_update_,
)
from vqtriton.layouts import Layout, projections
from vqtriton.learning import LearnedCodebook
from vqtriton.reference import Quantized
from vqtriton.tensors import gather

CODEBOOK_UPDATES = ("ema", "gradient")
AT_LEAST_1 = ("dim", "codebook_size", "codebook_dim", "heads")
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
        if kind == int | None:
            if value is None:
                continue
            kind = int
        if kind in (int, float):
            least = 1 if name in AT_LEAST_1 else 0
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


class VectorQuantize(LearnedCodebook, Layout):
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
        accept_3d_fmap: ``x`` is [B, D, T, H, W], the indices [B, T, H, W].
        codebook_dim: the size of a code, if it is not D. A linear layer ``project_in`` then comes
            before the codebook, and another, ``project_out``, after it.
        heads: quantize each vector in so many parts, each of ``codebook_dim`` (D divided by the
            heads, without projections). The indices are then [..., heads].
        separate_codebook_per_head: a codebook for each head, [heads, K, D], instead of one for all.
        use_cosine_sim: look for the code of the same direction: vectors are divided by their
            lengths, and so is each code when it is used. ``quantized`` then has length 1. What is
            stored in ``codebook`` may have any length: with "ema" it is the mean of unit vectors.
        layernorm_after_project_in: a LayerNorm after ``project_in``.
        rotation_trick: give ``x`` the gradient that is rotated and scaled as the code is from
            ``x`` (True), and not the one at the code as it is. docs/residual.md compares them.
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
        accept_3d_fmap: bool = False,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        rotation_trick: bool = False,
        sync_codebook: bool = True,
        precision: str = "exact",
        backend: str = "auto",
    ) -> None:
        arguments = locals()
        check_config({name: arguments[name] for name in PARAMETERS})
        if codebook_dim is None:
            if dim % heads:
                raise ValueError(f"dim is {dim}; without codebook_dim, heads ({heads}) divide it")
            codebook_dim = dim // heads
        super().__init__(
            codebook_dim,
            codebook_size,
            num_codebooks=heads if separate_codebook_per_head and heads > 1 else 0,
            codebook_update=codebook_update,
            decay=decay,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync_codebook=sync_codebook,
            backend=backend,
        )
        self.dim = dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.reduction = reduction
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.use_cosine_sim = use_cosine_sim
        self.layernorm_after_project_in = layernorm_after_project_in
        self.rotation_trick = rotation_trick
        self.precision = precision
        self.project_in, self.project_out = projections(
            dim, heads * codebook_dim, layernorm_after_project_in
        )

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
        if "codebook_dim" not in state:
            state = _of_an_earlier_version(state)
        super().__setstate__(state)

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this module."""
        config = {name: getattr(self, name) for name in PARAMETERS}
        if self.project_in is None:
            # as it follows from the others
            config["codebook_dim"] = None
        return config

    def extra_repr(self) -> str:
        told = [self.dim, self.codebook_size]
        changed = [
            f"{name}={value!r}"
            for name, value in self.config.items()
            if name in DEFAULTS and value != DEFAULTS[name]
        ]
        return ", ".join([*map(str, told), *changed])

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
        vectors, mask = self._vectors_of(x, mask, lens)
        options = self.rotation_trick, self.use_cosine_sim, self.project_in is not None
        if mask is not None and any(options):
            # whatever a masked vector holds, no gradient is to come from it
            vectors = vectors.where(mask[..., None], 0)
        rows = self._project_in(vectors)
        of_rows = mask
        if mask is not None and self.heads > 1:
            of_rows = mask[..., None].expand(rows.shape[:-1])
        is_held = freeze_codebook or self.frozen
        found = self._quantize(rows, of_rows, is_held)
        quantized, indices, loss = self._routed(rows, found, is_held)
        quantized = self._project_out(quantized)
        if mask is not None and self.project_out is not None:
            quantized = quantized.where(mask[..., None], 0)
        return Quantized(self._channels_back(quantized), indices, loss)

    def _project_in(self, vectors: Tensor) -> Tensor:
        """[..., D] -> what the codebook quantizes, [..., D] or [..., H, D]."""
        rows = vectors if self.project_in is None else self.project_in(vectors)
        if self.heads > 1:
            rows = rows.unflatten(-1, (self.heads, self.codebook_dim))
        return normalize(rows, self.backend) if self.use_cosine_sim else rows

    def _project_out(self, codes: Tensor) -> Tensor:
        if self.heads > 1:
            codes = codes.flatten(-2)
        return codes if self.project_out is None else self.project_out(codes)

    def _routed(self, rows: Tensor, found: Quantized, is_held: bool) -> Quantized:
        """What `_quantize` found, with the gradients that ``rows`` get; for subclasses as well."""
        if not self.rotation_trick:
            return found
        return Quantized(rotate(rows, found.quantized), found.indices, found.loss)

    def _quantize(self, vectors: Tensor, mask: Tensor | None, is_held: bool) -> Quantized:
        """`forward`, from what ``project_in`` gives to what ``project_out`` takes."""
        is_gradient = self.codebook_update == "gradient"
        learns = self.training and not is_held and self._is_trainable()
        changes = learns and (self._revives or not is_gradient)
        if changes:
            self._check_writable()
        if learns:
            self._start(vectors, mask)
        else:
            self._look()
        options: dict[str, Any] = {
            "commitment_weight": self.commitment_weight,
            "codebook_weight": self.codebook_weight if is_gradient and not is_held else 0.0,
            "reduction": self.reduction,
            "precision": self.precision,
            "backend": self.backend,
        }
        # the op searches the codes as they are stored
        if changes and self._steps_at_once() and not self.use_cosine_sim:
            return vector_quantize_update_(
                vectors,
                self.codebook,
                mask,
                self.cluster_size,
                self._rates_here(),
                averages=not is_gradient,
                revives=self._revives,
                **options,
            )
        codebook = self.codebook.detach() if is_held else self.codebook
        if changes:
            # backward needs the codes that were chosen from, not what the update makes of them
            codebook = snapshot(codebook)
        if self.use_cosine_sim:
            codebook = normalize(codebook, self.backend)
        is_kept = not (learns or (codebook.requires_grad and torch.is_grad_enabled()))
        found = self._by_head(vectors, codebook, mask, is_kept, options)
        if changes:
            self._update(self._flat(vectors.detach()), self._flat(found.indices, 0))
        return found

    def _by_head(
        self,
        vectors: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        is_kept: bool,
        options: dict[str, Any],
    ) -> Quantized:
        """`vector_quantize` with the codebook of each head."""
        heads = self._by_codebook(codebook)
        codebooks: Sequence[Tensor | PreparedCodebook] = heads
        if is_kept and not self.use_cosine_sim:
            codebooks = [self._kept(codes, head) for head, codes in enumerate(heads)]
        if not self.num_codebooks:
            return vector_quantize(vectors, codebooks[0], mask=mask, **options)
        masks = [None] * self.heads if mask is None else mask.unbind(-1)
        found = [
            vector_quantize(rows, codes, mask=counts, **options)
            for rows, codes, counts in zip(vectors.unbind(-2), codebooks, masks, strict=True)
        ]
        loss = torch.stack([head.loss for head in found], -1)
        if self.reduction == "mean":
            # the heads have as many elements each
            loss = loss.mean(-1)
        elif self.reduction == "sum":
            loss = loss.sum(-1)
        quantized = torch.stack([head.quantized for head in found], -2)
        return Quantized(quantized, torch.stack([head.indices for head in found], -1), loss)

    def _codes_of_embed(
        self, embed: Tensor, embed_avg: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        """With cosine similarity their codes have length 1; ours are as long as the averages."""
        if not self.use_cosine_sim or embed_avg is None or sizes is None:
            return embed
        length = torch.linalg.vector_norm(embed_avg, dim=-1) / sizes
        return embed * length.where(sizes > 0, 1)[..., None]

    def reset_codes(self, which: Tensor, x: Tensor | None = None) -> None:
        """Gives some codes new values, such as those that nobody chooses.

        Args:
            which: [K] bool, or the indices of the codes, int. [heads, K] bool with a codebook for
                each head.
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
        with torch.no_grad():
            rows = None if x is None else self._project_in(self._channels_last(x))
        self._restart(which, rows)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of some indices, vectors last.

        Args:
            indices: [...], of any integer dtype, in [-1, K); [..., heads] with several heads.

        Returns:
            [..., D] float32, D being ``codebook_dim`` times the heads; zeros where the index is -1.
            They come before ``project_out``. With ``use_cosine_sim`` they have length 1.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            IndexError: an index outside [-1, K) (on a GPU a device-side assertion).

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128)
            >>> vq.get_codes_from_indices(torch.tensor([[3, 5, -1]])).shape
            torch.Size([1, 3, 16])
        """
        return self._codes(indices)

    def _codes(self, indices: Tensor) -> Tensor:
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
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; it must be [..., {self.heads}]"
            )
        codebook = self.codebook
        if self.use_cosine_sim:
            codebook = normalize(codebook, self.backend)
        if not self.num_codebooks:
            codes = gather(codebook, indices)
            return codes.flatten(-2) if self.heads > 1 else codes
        chosen = zip(codebook.unbind(0), indices.unbind(-1), strict=True)
        return torch.cat([gather(*head) for head in chosen], -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of some indices in the layout of the module's output, for a decoder.

        Args:
            indices: what `forward` returned as indices, or other indices of that shape.

        Returns:
            [..., D], or [B, D, ...], or [B, D, H, W], float32; zeros where the index is -1 (of all
            heads). In eval mode it equals ``quantized`` of `forward` for float32 ``x``.

        Raises:
            TypeError, IndexError: see `get_codes_from_indices`.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128, accept_image_fmap=True).eval()
            >>> quantized, indices, _ = vq(torch.randn(2, 16, 7, 7))
            >>> torch.equal(vq.get_output_from_indices(indices), quantized)
            True
        """
        codes = self._codes(indices)
        if self.project_out is not None:
            is_masked = indices < 0
            is_masked = is_masked.all(-1) if self.heads > 1 else is_masked
            codes = self.project_out(codes).masked_fill(is_masked[..., None], 0)
        return self._channels_back(codes)


PARAMETERS = inspect.signature(VectorQuantize).parameters
DEFAULTS = {n: p.default for n, p in PARAMETERS.items() if p.default is not p.empty}


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
