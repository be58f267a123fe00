"""Images to tokens with VQModel of diffusers, by its own search and by that of vqtriton.

    .venv/bin/python examples/tokenize_images.py
    .venv/bin/python examples/tokenize_images.py --images FOLDER --size 64 --dtype bfloat16
    .venv/bin/python examples/tokenize_images.py --model FOLDER --images FOLDER --out tokens.npz

The report is that of encode_audio.py. Without ``--images``, the images are those of MNIST, or
generated patterns if MNIST cannot be had. Without ``--model`` the weights are random: no checkpoint
is downloaded.
"""

from __future__ import annotations

import startup  # isort: skip

from argparse import Namespace
from pathlib import Path
from typing import Any

import mnist_data
import torch
import torch.nn.functional as F
from image_folder import ImageFolder, Squares
from token_args import add_flags, check_flags, load_model
from token_report import report
from torch import Tensor
from train_args import Parser

# The model with random weights has a token for each 4×4 pixels.
CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
    "latent_channels": 32,
    "num_vq_embeddings": 1024,
}


def build_parser() -> Parser:
    parser = Parser("Compare the tokens of an image tokenizer with and without vqtriton.")
    text = "folder with images; folders in it are searched as well (default: MNIST)"
    parser.add("images", text, type=Path)
    parser.add("data_dir", "folder with the IDX files of MNIST; else they are fetched", type=Path)
    parser.add("count", "images to use", 64)
    parser.add("size", "pixels of a side; images are cut to squares and scaled to it", 32)
    add_flags(parser, "a checkpoint of VQModel")
    return parser


def parse_args(parser: Parser, argv: list[str] | None) -> Namespace:
    args = parser.parse_args(argv)
    check_flags(parser, args)
    parser.check(args, "count", 1, 2**20)
    parser.check(args, "size", 8, 2**13)
    for name in ("images", "data_dir"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            parser.fail(name, f"{folder} is not a folder")
    return args


def patterns(count: int, size: int) -> Tensor:
    """Smooth colours, uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(size) / size
    x, y, start = (6 * torch.rand(3, count, 3, 1, 1, generator=generator)).unbind()
    waves = torch.sin(x * place + y * place[:, None] + start)
    return (127.5 + 127 * waves).to(torch.uint8)


def read_images(parser: Parser, args: Namespace) -> tuple[Tensor, str]:
    """Images uint8 [count, 3, size, size], and where they come from."""
    if args.images is not None:
        try:
            folder = ImageFolder(args.images, args.size, args.count)
            squares = Squares(folder.test_files + folder.train_files, args.size)
            return torch.stack([squares[i] for i in range(len(squares))]), str(args.images)
        except ValueError as error:
            parser.fail("images", error)
    try:
        digits = mnist_data.load("mnist", args.data_dir).test_images[: args.count, None].float()
    except (OSError, ValueError) as error:
        if args.data_dir is not None:
            parser.fail("data_dir", error)
        return patterns(args.count, args.size), "generated patterns, as MNIST cannot be had"
    scaled = F.interpolate(digits, (args.size, args.size), mode="bilinear", antialias=True)
    return scaled.round().to(torch.uint8).expand(-1, 3, -1, -1), "the test set of MNIST"


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_args(parser, argv)
    model = load_model(parser, args, "diffusers", "VQModel", CONFIG)
    images, what = read_images(parser, args)
    channels = model.config.in_channels
    if channels not in (1, 3):
        parser.fail("model", f"{args.model} takes {channels} channels; it must be 1 or 3")
    source = "random weights" if args.model is None else f"the weights in {args.model}"
    print(f"VQModel with {source}, {args.dtype}, on {args.device}.")
    print(f"Images: {what}; {len(images)} of {args.size}×{args.size} pixels.", flush=True)
    pixels = images.to(args.device, getattr(torch, args.dtype)) / 127.5 - 1
    pixels = pixels.mean(1, keepdim=True) if channels == 1 else pixels
    # in small batches, as its layers hold large maps
    latents = torch.cat([model.encode(batch).latents for batch in pixels.split(16)])

    def quantize(quantizer: Any, latents: Tensor) -> Tensor:
        indices = quantizer(latents)[2][2]
        return indices.reshape(len(latents), 1, *latents.shape[2:])

    report(args, model, "quantize", quantize, latents)


if __name__ == "__main__":
    startup.run(main)
