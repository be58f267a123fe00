"""A small neural audio codec: strided convolutions on both sides of a residual quantizer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from run_files import load_checkpoint, with_prefix
from torch import Tensor, nn

import vqtriton

# how much each of the convolutions shortens the sound
STRIDES = (4, 4, 4)
# samples per frame: a frame becomes one vector
FRAME = math.prod(STRIDES)
# lengths in samples of the windows of the spectrograms that are compared
WINDOWS = (64, 256, 1024)
# what is added to each magnitude: a logarithm of silence would be infinite
FLOOR = 0.1


class ResidualUnit(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ELU(),
            nn.Conv1d(channels, channels // 2, 3, padding=dilation, dilation=dilation),
            nn.ELU(),
            nn.Conv1d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def stages(channels: int) -> list[tuple[int, int, int]]:
    """Channels before and after each of the convolutions that shorten the sound, and its stride."""
    widths = [1, *(channels * 2**i for i in range(len(STRIDES)))]
    pairs = itertools.pairwise(widths)
    return [(*pair, stride) for pair, stride in zip(pairs, STRIDES, strict=True)]


def units(channels: int) -> list[nn.Module]:
    return [ResidualUnit(channels, dilation) for dilation in (1, 3)]


class Encoder(nn.Sequential):
    """[B, 1, T] -> [B, D, T / FRAME]."""

    def __init__(self, dim: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for wide, narrow, stride in stages(channels):
            layers.append(nn.Conv1d(wide, narrow, 2 * stride, stride, stride // 2))
            layers += [*units(narrow), nn.ELU()]
        super().__init__(*layers, nn.Conv1d(narrow, dim, 1))


class Decoder(nn.Sequential):
    """[B, D, T / FRAME] -> [B, 1, T]: the layers of the encoder, turned around."""

    def __init__(self, dim: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for wide, narrow, stride in stages(channels)[::-1]:
            layers += [*units(narrow), nn.ELU()]
            layers.append(nn.ConvTranspose1d(narrow, wide, 2 * stride, stride, stride // 2))
        super().__init__(nn.Conv1d(dim, stages(channels)[-1][1], 1), *layers)


class Codec(nn.Module):
    """Encoder, residual quantizer, decoder.

    Args:
        vq: quantizes sequences [B, D, frames].
        channels: width of the outermost layers; the innermost have four times as many.

    Attributes:
        scale: [] float32, the root mean square of the sounds that it is for.
    """

    def __init__(self, vq: vqtriton.ResidualVectorQuantize, channels: int = 32) -> None:
        super().__init__()
        self.config = {"channels": channels}
        self.encoder = Encoder(vq.dim, channels)
        self.vq = vq
        self.decoder = Decoder(vq.dim, channels)
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def forward(self, sounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sounds [B, T] of unit scale -> the same decoded; indices; loss of each level, [Q]."""
        quantized, indices, loss = self.vq(self.encoder(sounds[:, None]))
        return self.decoder(quantized)[:, 0], indices, loss

    @torch.no_grad()
    def latents(self, sounds: Tensor) -> Tensor:
        """Sounds [B, T], T a multiple of FRAME -> what is quantized, [B, D, T / FRAME]."""
        return self.encoder(sounds[:, None] / self.scale)

    @torch.no_grad()
    def encode(self, sounds: Tensor, levels: int | None = None) -> Tensor:
        """Sounds [B, T], T a multiple of FRAME -> int64 indices [B, T / FRAME, levels]."""
        return self.vq(self.latents(sounds), num_quantizers=levels).indices

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Indices [B, frames, levels], of all levels or of the first ones -> sounds [B, T]."""
        return self.decoder(self.vq.get_output_from_indices(indices))[:, 0] * self.scale

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Codec:
        """The codec that train_codec.py left in a checkpoint, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole checkpoint of a codec.
        """
        tensors, info = load_checkpoint(Path(path))
        try:
            # whatever it was trained on
            config = info["quantizer"] | {"backend": "auto"}
            model = cls(vqtriton.ResidualVectorQuantize.from_config(config), **info["model"])
            model.load_state_dict(with_prefix(tensors, "model."))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is not a checkpoint of a codec: {reason}") from error
        return model.eval()


def spectral_distance(decoded: Tensor, sounds: Tensor) -> Tensor:
    """Mean difference of log magnitudes, over spectrograms with windows of several lengths."""
    terms = []
    for length in WINDOWS:
        window = torch.hann_window(length, dtype=sounds.dtype, device=sounds.device)
        logs = [
            torch.stft(x, length, length // 4, window=window, center=False, return_complex=True)
            .abs()
            .div(length**0.5)
            .add(FLOOR)
            .log()
            for x in (decoded, sounds)
        ]
        terms.append(F.l1_loss(*logs))
    return torch.stack(terms).mean()


def snr(sounds: Tensor, decoded: Tensor) -> float:
    """Signal-to-noise ratio in dB: of the energy of all sounds to that of all errors."""
    error = (sounds - decoded).double().square().sum()
    return 10 * math.log10(sounds.double().square().sum() / error)
