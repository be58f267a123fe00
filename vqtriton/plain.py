"""A trained quantizer in plain torch, for runtimes that know neither our ops nor Triton."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqtriton.quantizers import VectorQuantize
from vqtriton.screening import centred_codebook
from vqtriton.tensors import gather

# Largest element of a scaled row: a sum of D < 2¹² products with it cannot overflow.
FAR = 2.0**100
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PlainQuantizer(nn.Module):
    """Inference with the codes of a `VectorQuantize`, for ONNX and AOTInductor.

    It uses only torch ops that every exporter knows: one matmul, an argmax and a gather. It does
    not learn, gives ``x`` no gradient and computes no loss; training or eval mode makes no
    difference. A forward holds the whole [N, K] matrix of float32 scores. This is meant for
    inference on other runtimes. Inside torch, `VectorQuantize` is exact and needs less memory.

    With y = scale·(x − mean) and e_k = scale·(c_k − mean), the index is the argmax of the scores
    y·e_k − ‖e_k‖²/2 in float32. Unlike `vqtriton.nearest_code` this can be wrong in close calls,
    and only there. Let B bound the error of a score, as `vqtriton.screening.error_bound` gives it::

        B = products·(‖y‖·E + E²/2) + distances·‖y‖² + tiny,    E = max ‖e_k‖

    The float64 squared distance of the chosen code is above the least by at most 4·B/scale². This
    needs products that are made and summed in float32, in any order. Settings that let a matmul
    round its inputs, such as TF32 on GPUs, are outside the bound. One code that is far from all
    others makes E large, and then many calls are close. Equal codes may have scores that differ in
    the last bit, so any of them may be chosen.

    A row with NaN or infinity gets index 0, as in `vqtriton.nearest_code`, and NaN in
    ``quantized``: a `VectorQuantize` shows the fault in the loss,
    which is not computed here.

    Args:
        vq: a `VectorQuantize`. Its codebook is copied, so later changes do not reach this module.
            The layout (``channel_last``, ``accept_image_fmap``) is the same.

    Attributes:
        codebook: [K, D] float32, the codes as given.
        codes: [K, D] float32, the codes centred and scaled.
        half_sqnorm: [K] float32, half of their squared norms; +inf where a code is not finite.
        mean: [D] float32.
        scale: [] float32, a power of two.

    All tensors stay float32 whatever the module is cast to.

    Raises:
        TypeError: ``vq`` is not a `VectorQuantize`.
        ValueError: ``vq`` has several heads, projections or cosine similarity.

    Warns:
        UserWarning: ``vq`` has no codes yet, as it waits for its k-means start.

    Example:
        >>> plain = vqtriton.PlainQuantizer(vqtriton.VectorQuantize(16, 128))
        >>> quantized, indices = plain(torch.randn(8, 49, 16))  # [8, 49, 16], [8, 49]
        >>> codes = plain.decode(indices)  # [8, 49, 16]
    """

    codebook: Tensor
    codes: Tensor
    half_sqnorm: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, vq: VectorQuantize) -> None:
        super().__init__()
        if not isinstance(vq, VectorQuantize):
            raise TypeError(f"vq is a {type(vq).__name__}; it must be a VectorQuantize")
        changed = ("use_cosine_sim", "project_in")
        refused = [name for name in changed if getattr(vq, name)]
        if vq.heads > 1 or refused:
            what = "heads" if vq.heads > 1 else refused[0]
            raise ValueError(f"vq has {what}, which a PlainQuantizer does not know")
        if not vq.is_initialized:
            warnings.warn("vq has no codes yet: it waits for its k-means start", stacklevel=2)
        self.dim = vq.dim
        self.codebook_size = vq.codebook_size
        self.channel_last = vq.channel_last
        self.accept_image_fmap = vq.accept_image_fmap
        self.accept_3d_fmap = vq.accept_3d_fmap
        codebook = vq.codebook.detach().clone(memory_format=torch.contiguous_format)
        prepared = centred_codebook(codebook, torch.float32)
        self.register_buffer("codebook", codebook)
        for name in ("codes", "half_sqnorm", "mean"):
            self.register_buffer(name, getattr(prepared, name))
        self.register_buffer("scale", prepared.codes.new_tensor(prepared.scale))
        # exporters warn of modules in training mode
        self.eval()

    def extra_repr(self) -> str:
        names = ("dim", "codebook_size", "channel_last", "accept_image_fmap")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces each vector by its nearest code.

        Args:
            x: [..., D], or [B, D, ...], or [B, D, H, W], as for the `VectorQuantize` it was made
                from; float32, float16 or bfloat16.

        Returns:
            A tuple of two.

            quantized: the codes in the shape and dtype of ``x``.
            indices: int64, [...], or [B, ...], or [B, H, W].

        Raises:
            ValueError: a shape that does not fit.
            TypeError: not a tensor, or another dtype.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128, accept_image_fmap=True)
            >>> plain = vqtriton.PlainQuantizer(vq)
            >>> quantized, indices = plain(torch.randn(2, 16, 7, 7))  # [2, 16, 7, 7], [2, 7, 7]
        """
        vectors = self._channels_last(x.detach() if isinstance(x, Tensor) else x)
        rows = vectors.reshape(-1, self.dim).float()
        # not by the largest element: exported maxima may pass over NaN
        is_finite = (rows.abs() < torch.inf).all(1)
        scores = self._scores(self._scaled(rows.where(is_finite[:, None], 0)))
        found = scores.argmax(1).where(is_finite, 0)
        codes = self.codebook[found].where(is_finite[:, None], torch.nan)
        quantized = codes.to(x.dtype).reshape(vectors.shape)
        # a plain tuple: to load a program that returns a class of ours takes vqtriton
        return self._channels_back(quantized), found.reshape(vectors.shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of some indices in the layout of the module's output.

        Args:
            indices: [...], or [B, ...], or [B, H, W], int64 or int32 in [-1, K). For other values
                the result depends on the runtime.

        Returns:
            float32, the layout of ``quantized`` of `forward`; zeros where the index is -1.

        Raises:
            TypeError: ``indices`` is not an int64 or int32 tensor.

        Example:
            >>> plain = vqtriton.PlainQuantizer(vqtriton.VectorQuantize(16, 128))
            >>> codes = plain.decode(torch.randint(128, (8, 49)))  # [8, 49, 16]
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices is {kind}; it must be an int64 tensor")
        return self._channels_back(gather(self.codebook, indices))

    def _scaled(self, rows: Tensor) -> Tensor:
        """scale·(x − mean) of finite rows [N, D]; rows that are very far out are pulled in."""
        # a factor below 1 comes before the difference, which could overflow without it, and a
        # factor above 1 after it; both are powers of two
        before, after = self.scale.clamp(max=1), self.scale.clamp(min=1)
        limit = torch.finfo(torch.float32).max
        difference = (rows * before - self.mean * before).clamp(-limit, limit)
        # out there only the direction decides; elsewhere the factor is 1
        pull = (FAR / after / difference.abs().amax(1, keepdim=True)).clamp(max=1)
        return difference * pull * after

    def _scores(self, y: Tensor) -> Tensor:
        """[N, D] -> [N, K] float32."""
        device = y.device.type
        # the only op here that autocast would round; without autocast, exporters see no context
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return torch.addmm(-self.half_sqnorm, y, self.codes.T)
        return torch.addmm(-self.half_sqnorm, y, self.codes.T)

    def _channels_last(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
        if x.dtype not in DTYPES:
            raise TypeError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
        layout = "[..., D]"
        if self.accept_image_fmap:
            layout = "[B, D, H, W]"
            if x.ndim == 4 and x.shape[1] == self.dim:
                return x.movedim(1, -1)
        elif self.accept_3d_fmap:
            layout = "[B, D, T, H, W]"
            if x.ndim == 5 and x.shape[1] == self.dim:
                return x.movedim(1, -1)
        elif not self.channel_last:
            layout = "[B, D, ...]"
            if x.ndim >= 2 and x.shape[1] == self.dim:
                return x.movedim(1, -1)
        elif x.ndim >= 1 and x.shape[-1] == self.dim:
            return x
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be {layout} with D = {self.dim}")

    def _channels_back(self, x: Tensor) -> Tensor:
        if self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last:
            return x.movedim(-1, 1)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlainQuantizer:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(keep_dtype, recurse)
        return self
