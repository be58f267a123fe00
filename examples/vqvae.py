"""A small convolutional VQ-VAE: for MNIST it has 165,000 parameters beside the codebook."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from run_files import load_checkpoint, with_prefix
from torch import Tensor, nn

import vqtriton


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def widths(image_channels: int, channels: int, downsample: int) -> list[int]:
    """Channels at each resolution, from the image to the grid; each has half the one before."""
    halvings = downsample.bit_length() - 1
    if downsample < 2 or downsample != 2**halvings:
        raise ValueError(f"downsample is {downsample}; it must be 2, 4, 8 or a higher power of 2")
    return [image_channels, channels, *[2 * channels] * (halvings - 1)]


class Encoder(nn.Sequential):
    """[B, C, H, W] -> [B, D, H / downsample, W / downsample]."""

    def __init__(self, dim: int, widths: list[int]) -> None:
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Conv2d(wide, narrow, 4, stride=2, padding=1), nn.ReLU()]
        last = widths[-1]
        super().__init__(
            *layers,
            nn.Conv2d(last, last, 3, padding=1),
            ResidualBlock(last),
            nn.ReLU(),
            nn.Conv2d(last, dim, 1),
        )


class Decoder(nn.Sequential):
    """[B, D, H / downsample, W / downsample] -> [B, C, H, W]."""

    def __init__(self, dim: int, widths: list[int]) -> None:
        last = widths[-1]
        first = [nn.Conv2d(dim, last, 1), ResidualBlock(last), nn.ReLU()]
        layers: list[nn.Module] = [*first, nn.Conv2d(last, last, 3, padding=1)]
        for narrow, wide in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers += [nn.ReLU(), nn.ConvTranspose2d(narrow, wide, 4, stride=2, padding=1)]
        super().__init__(*layers)


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder.

    Args:
        vq: quantizes image maps, [B, D, H / downsample, W / downsample].
        channels: width of the encoder's and the decoder's outermost layer; the others have twice.
        reconstruction: what the decoder's output is: "bce": logits of pixels as Bernoulli
            variables; "mse": the pixels themselves.
        image_channels: 1 for grey images, 3 for colours.
        downsample: pixels per index in each direction, a power of 2.
    """

    def __init__(
        self,
        vq: vqtriton.VectorQuantize,
        channels: int = 32,
        reconstruction: str = "bce",
        image_channels: int = 1,
        downsample: int = 4,
    ) -> None:
        super().__init__()
        self.config = {"channels": channels, "reconstruction": reconstruction}
        self.config |= {"image_channels": image_channels, "downsample": downsample}
        self.reconstruction = reconstruction
        sizes = widths(image_channels, channels, downsample)
        self.encoder = Encoder(vq.dim, sizes)
        self.vq = vq
        self.decoder = Decoder(vq.dim, sizes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, vqtriton.reference.Quantized]:
        """Images [B, C, H, W] in [0, 1] -> the decoder's output, the same; x; what it became."""
        x = self.encoder(images)
        result = self.vq(x)
        return self.decoder(result.quantized), x, result

    def reconstruction_loss(self, output: Tensor, images: Tensor) -> Tensor:
        """-log p(image | quantized) or the squared error, mean over the pixels."""
        if self.reconstruction == "bce":
            return F.binary_cross_entropy_with_logits(output, images)
        return F.mse_loss(output, images)

    def pixels(self, output: Tensor) -> Tensor:
        """The decoder's output as pixels in [0, 1]."""
        return output.sigmoid() if self.reconstruction == "bce" else output.clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] -> indices int64 [B, H / downsample, W / downsample]."""
        return self.vq(self.encoder(images.float() / 255)).indices

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Indices [B, H / downsample, W / downsample] -> images uint8 [B, C, H, W]."""
        output = self.decoder(self.vq.get_output_from_indices(indices))
        return (self.pixels(output) * 255).round().byte()

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> VQVAE:
        """The model that a trainer left in a checkpoint, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole checkpoint of a VQ-VAE.
        """
        tensors, info = load_checkpoint(Path(path))
        try:
            # whatever it was trained on
            vq = vqtriton.VectorQuantize.from_config(info["quantizer"] | {"backend": "auto"})
            arguments = info["arguments"]
            # files of earlier versions have no "model"
            config: dict[str, Any] = info.get("model") or {
                name: arguments[name] for name in ("channels", "reconstruction")
            }
            model = cls(vq, **config)
            model.load_state_dict(with_prefix(tensors, "model."))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is not a checkpoint of a VQ-VAE: {reason}") from error
        return model.eval()
