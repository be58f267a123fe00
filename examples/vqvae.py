"""A small VQ-VAE for 28×28 images: 165,000 parameters beside the codebook."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoints import load_checkpoint, with_prefix
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


class Encoder(nn.Sequential):
    """[B, 1, 28, 28] -> [B, D, 7, 7]."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(1, channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            ResidualBlock(2 * channels),
            nn.ReLU(),
            nn.Conv2d(2 * channels, dim, 1),
        )


class Decoder(nn.Sequential):
    """[B, D, 7, 7] -> [B, 1, 28, 28]."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(dim, 2 * channels, 1),
            ResidualBlock(2 * channels),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1),
        )


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder.

    Args:
        vq: quantizes image maps, [B, D, 7, 7].
        channels: width of the encoder's and the decoder's outermost layer; the others have twice.
        reconstruction: what the decoder's output is: "bce": logits of pixels as Bernoulli
            variables; "mse": the pixels themselves.
    """

    def __init__(
        self, vq: vqtriton.VectorQuantize, channels: int = 32, reconstruction: str = "bce"
    ) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.encoder = Encoder(vq.dim, channels)
        self.vq = vq
        self.decoder = Decoder(vq.dim, channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, vqtriton.reference.Quantized]:
        """Images [B, 28, 28] in [0, 1] -> the decoder's output [B, 28, 28], x, what it became."""
        x = self.encoder(images[:, None])
        result = self.vq(x)
        return self.decoder(result.quantized)[:, 0], x, result

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
        """Images uint8 [B, 28, 28] -> indices int64 [B, 7, 7]."""
        return self.vq(self.encoder(images[:, None].float() / 255)).indices

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Indices [B, 7, 7] -> images uint8 [B, 28, 28]."""
        output = self.decoder(self.vq.get_output_from_indices(indices))[:, 0]
        return (self.pixels(output) * 255).round().byte()

    @classmethod
    def from_checkpoint(cls, path: Path) -> VQVAE:
        """The model that train_mnist.py left in a checkpoint, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole checkpoint of train_mnist.py.
        """
        tensors, info = load_checkpoint(path)
        try:
            # whatever it was trained on
            vq = vqtriton.VectorQuantize.from_config(info["quantizer"] | {"backend": "auto"})
            arguments = info["arguments"]
            model = cls(vq, arguments["channels"], arguments["reconstruction"])
            model.load_state_dict(with_prefix(tensors, "model."))
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is not a checkpoint of train_mnist.py: {reason}") from error
        return model.eval()
