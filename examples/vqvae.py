"""A small VQ-VAE for 28×28 images: 165,000 parameters beside the codebook."""

from __future__ import annotations

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

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            ResidualBlock(64),
            nn.ReLU(),
            nn.Conv2d(64, dim, 1),
        )


class Decoder(nn.Sequential):
    """[B, D, 7, 7] -> logits of the pixels, [B, 1, 28, 28]."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Conv2d(dim, 64, 1),
            ResidualBlock(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )


class VQVAE(nn.Module):
    def __init__(self, vq: vqtriton.VectorQuantize) -> None:
        super().__init__()
        self.encoder = Encoder(vq.dim)
        self.vq = vq
        self.decoder = Decoder(vq.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Images [B, 28, 28] in [0, 1] -> logits [B, 28, 28], x and what became of it."""
        x = self.encoder(images[:, None])
        quantized, indices, loss = self.vq(x)
        return self.decoder(quantized)[:, 0], x, (quantized, indices, loss)
