"""Trains a VQ-VAE on MNIST or Fashion-MNIST: about four minutes on two CPU cores.

    .venv/bin/python examples/train_mnist.py
    .venv/bin/python examples/train_mnist.py --resume
    .venv/bin/python examples/train_mnist.py --dataset fashion-mnist
    .venv/bin/torchrun --nproc-per-node 2 examples/train_mnist.py --device cpu

An image of 28×28 pixels becomes a grid of 7×7 indices. The loss is that of the paper (van den Oord
et al. 2017, arXiv:1711.00937, equation 3); its KL term is the constant 49·log K, which is left out.

The folder ``--out`` gets after each epoch: log.jsonl, a line an epoch; metrics.json, the last of
them and what made it; pictures; and checkpoint.safetensors, from which --resume goes on as if
nothing had happened.
"""

from __future__ import annotations

import startup  # isort: skip

from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from mnist_data import DATASETS, load
from torch import Tensor
from train_args import Parser, add_training_flags
from train_args import parse_args as parse
from vqvae_trainer import train


class Mnist:
    """The data set in the memory of the device."""

    unit, fingerprint = "images", ""

    def __init__(self, args: Namespace) -> None:
        print(f"Training a VQ-VAE on {args.dataset}.", flush=True)
        data = load(args.dataset, args.data_dir)
        self.train_images = data.train_images[: args.limit, None].to(args.device)
        self.test_images = data.test_images[:, None].to(args.device)
        self.count = len(self.train_images)
        # three of each class
        places = [(data.test_labels == label).nonzero()[:3, 0] for label in range(10)]
        self.shown = self.test_images[torch.stack(places, 1).to(args.device)]

    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[Tensor]:
        for batch in places:
            yield self.train_images[batch.to(self.train_images.device)]

    def test_batches(self) -> Iterable[Tensor]:
        return self.test_images.split(500)


def build_parser() -> Parser:
    parser = Parser("Train a VQ-VAE on MNIST and measure it on the whole test set.")
    parser.add("dataset", "images to train on", "mnist", choices=sorted(DATASETS))
    parser.add("data_dir", "folder with the four IDX files; else they are fetched", type=Path)
    parser.add("limit", "train on the first so many images only, to try things out", type=int)
    add_training_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """See `train_args.parse_args`."""
    return parse(build_parser(), argv, lambda args: Path("runs", args.dataset), lambda args: 7 * 7)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    train(args, lambda: Mnist(args))


if __name__ == "__main__":
    startup.run(main)
