"""Trains a VQ-VAE on a folder of your own images, in colour and of any size.

    .venv/bin/python examples/train_images.py FOLDER
    .venv/bin/python examples/train_images.py FOLDER --resume
    .venv/bin/python examples/train_images.py FOLDER --size 128 --downsample 8 --codebook-size 1024

An image becomes a grid of indices: with 64×64 pixels and 4×4 pixels per index, 16×16 of them. One
image in ten is kept out of training, and the figures are measured on those.

The folder ``--out`` gets what train_mnist.py writes; docs/your-data.md says how to use it.
"""

from __future__ import annotations

import startup  # isort: skip

import os
from argparse import Namespace
from pathlib import Path

from image_folder import ImageFolder
from train_args import Parser, add_training_flags
from train_args import parse_args as parse
from vqvae_trainer import train

DEFAULTS = {"reconstruction": "mse", "batch_size": 32, "epochs": 20, "lr": 1e-3}


def build_parser() -> Parser:
    parser = Parser("Train a VQ-VAE on a folder of images.", "FOLDER ")
    text = "folder with images; folders in it are searched as well"
    parser.group.add_argument("folder", metavar="FOLDER", help=text, type=Path)
    parser.add("size", "pixels of a side; images are cut to squares and scaled to it", 64)
    parser.add("limit", "use the first so many images only, to try things out", type=int)
    workers = min(os.cpu_count() or 1, 8)
    parser.add("workers", "processes that read images; 0 reads them in the main one", workers)
    add_training_flags(parser, **DEFAULTS)
    parser.add("downsample", "pixels per index in each direction: 2, 4, 8, ...", 4)
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """See `train_args.parse_args`."""
    parser = build_parser()

    def indices(args: Namespace) -> int:
        parser.check(args, "size", 1, 2**13)
        parser.check(args, "workers", 0, 2**10)
        parser.check(args, "downsample", 2, 2**13)
        if args.downsample & (args.downsample - 1):
            parser.fail("downsample", f"{args.downsample}; it must be a power of 2")
        if args.size % args.downsample:
            parser.fail("size", f"{args.size}; not a multiple of --downsample {args.downsample}")
        if not args.folder.is_dir():
            parser.error(f"argument FOLDER: {args.folder} is not a folder")
        return (args.size // args.downsample) ** 2

    return parse(parser, argv, lambda args: Path("runs", args.folder.resolve().name), indices)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    def load() -> ImageFolder:
        print(f"Training a VQ-VAE on the images in {args.folder}.", flush=True)
        images = ImageFolder(args.folder, args.size, args.limit, args.workers, args.seed)
        print(
            f"{len(images.train_files)} images to train on, {len(images.test_files)} to test on, "
            f"each cut to squares of {args.size}×{args.size} pixels.",
            flush=True,
        )
        return images

    train(args, load, image_channels=3, downsample=args.downsample)


if __name__ == "__main__":
    startup.run(main)
