"""Images to codes and back, with what train_mnist.py trained.

    .venv/bin/python examples/mnist_codec.py encode runs/mnist --out codes.vq
    .venv/bin/python examples/mnist_codec.py decode runs/mnist --codes codes.vq --out images.idx
    .venv/bin/python examples/mnist_codec.py reconstruct runs/mnist --out same.idx

The last two give the same bytes, on the same machine with the same number of threads.
"""

from __future__ import annotations

import startup  # isort: skip

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import plots
import safetensors.numpy
import torch
from mnist_data import DATASETS, load, read_images, to_idx
from PIL import Image
from run_files import load_checkpoint, write_atomically
from safetensors import SafetensorError, safe_open
from torch import Tensor
from vqvae import VQVAE

# the last bits of a convolution depend on the batch: encoder and decoder cut at the same places
BATCH = 500
FORMAT = "vqtriton.examples.codes"


def pack(indices: np.ndarray, codebook_size: int) -> np.ndarray:
    """Indices, ceil(log2 K) bits each, highest first -> uint8 [ceil(number · bits / 8)]."""
    if indices.size > 0 and not 0 <= indices.min() <= indices.max() < codebook_size:
        raise ValueError(f"indices has values outside [0, {codebook_size})")
    bits = np.unpackbits(indices.astype(">u4").reshape(-1, 1).view(np.uint8), axis=1)
    return np.packbits(bits[:, 32 - (codebook_size - 1).bit_length() :])


def unpack(packed: np.ndarray, count: int, codebook_size: int) -> np.ndarray:
    """What `pack` was given, int64 [count]; a ValueError if it cannot have been that."""
    width = (codebook_size - 1).bit_length()
    if len(packed) != -(-count * width // 8):
        raise ValueError(f"{len(packed)} bytes are not {count} indices of {width} bits")
    bits = np.zeros((count, 32), np.uint8)
    bits[:, 32 - width :] = np.unpackbits(packed, count=count * width).reshape(count, width)
    indices = np.packbits(bits).view(">u4").astype(np.int64)
    if count > 0 and indices.max() >= codebook_size:
        raise ValueError(f"index {indices.max()}; it must be below codebook_size, {codebook_size}")
    return indices


def encode(model: VQVAE, images: Tensor) -> bytes:
    """The codes file of images uint8 [N, 28, 28]; prints what it costs and what is lost."""
    indices = torch.cat([model.encode(batch) for batch in images[:, None].split(BATCH)])
    packed = pack(indices.numpy(), model.vq.codebook_size)
    header = json.dumps(describe(model, len(images)))
    content = safetensors.numpy.save({"packed": packed}, {FORMAT: header})
    raw, file, alone = images.numel(), len(content), len(packed)
    print(f"images    {len(images)}, {raw} bytes")
    print(f"codes     {file} bytes, {file - alone} of them header; ratio {raw / file:.2f}")
    if raw > 0:
        print(f"bits/dim  {8 * file / raw:.5f}, of the indices alone {8 * alone / raw:.5f}")
        share = indices.flatten().bincount().double() / indices.numel()
        entropy = torch.special.entr(share).sum() / np.log(2)
        # for an ideal coder that was told how often each code occurs; a code is of 16 pixels
        print(f"entropy   {entropy:.4f} bits/code, so at best {entropy / 16:.5f} bits/dim")
        decoded = images_of(model, indices)
        mse = ((images.int() - decoded.int()) / 255).square().mean()
        print(f"mse       {mse:.6f}, of pixels in [0, 1]")
    return content


def decode(model: VQVAE, path: Path) -> Tensor:
    """The images of a codes file, uint8 [N, 28, 28]."""
    try:
        # what safe_open says of a folder is of no help
        with path.open("rb"), safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[FORMAT])
            packed = file.get_tensor("packed")
        count = header["shape"][0]
        if type(count) is not int or count < 0:
            raise ValueError(f"shape is {header['shape']}")
        expected = describe(model, count)
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole file of codes, as encode writes it") from error
    if header != expected:
        what = "the same number of codes, but other weights"
        if header.get("codebook_size") != model.vq.codebook_size:
            what = f"{header.get('codebook_size')} codes, not {model.vq.codebook_size}"
        raise ValueError(f"{path} was made by another model, with {what}: decode with that one")
    try:
        indices = unpack(packed, 49 * count, model.vq.codebook_size).reshape(count, 7, 7)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return images_of(model, torch.from_numpy(indices))


def images_of(model: VQVAE, indices: Tensor) -> Tensor:
    """Indices [N, 7, 7] -> images uint8 [N, 28, 28]."""
    return torch.cat([model.decode(batch)[:, 0] for batch in indices.split(BATCH)])


@torch.no_grad()
def reconstruct(model: VQVAE, images: Tensor) -> Tensor:
    """What the model makes of images in one go, both uint8 [N, 28, 28]."""
    outputs = (model(batch.float() / 255)[0] for batch in images[:, None].split(BATCH))
    return torch.cat([(model.pixels(output) * 255).round().byte()[:, 0] for output in outputs])


def describe(model: VQVAE, count: int) -> dict[str, object]:
    """The header of a codes file; "model" is a sha256 of all that decoding depends on."""
    sha256 = hashlib.sha256(model.reconstruction.encode())
    for name, t in {"codebook": model.vq.codebook, **model.decoder.state_dict()}.items():
        sha256.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.detach().numpy().tobytes())
    size, digest = model.vq.codebook_size, sha256.hexdigest()
    bits = (size - 1).bit_length()
    return {"shape": [count, 7, 7], "codebook_size": size, "bits": bits, "model": digest}


def read(path: Path | None, dataset: str) -> Tensor:
    """Images uint8 [N, 28, 28]. Colours are refused: there are many ways to make them grey."""
    if path is None or path.suffix.lower() != ".png":
        return read_images(path) if path else load(dataset).test_images
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.size, image.mode) != ((28, 28), "L"):
                raise ValueError(f"{image.size}, mode {image.mode}; it must be 28×28, 8 bits grey")
            return torch.from_numpy(np.array(image))[None]
    # a damaged PNG makes Pillow raise SyntaxError, IndexError and more
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A VQ-VAE as a codec of images of 28×28 pixels.")
    commands = parser.add_subparsers(required=True, metavar="encode|decode|reconstruct")
    for command in (encode, decode, reconstruct):
        sub = commands.add_parser(command.__name__, description=command.__doc__, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("run", type=Path, help="folder that train_mnist.py wrote")
        if command is decode:
            sub.add_argument("--codes", type=Path, required=True, help="file that encode wrote")
        else:
            sub.add_argument("--images", type=Path, help="IDX or grey PNG (default: the test set)")
        sub.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    try:
        if not args.out.parent.is_dir() or (args.out.exists() and not args.out.is_file()):
            raise ValueError(f"--out: {args.out} is not a file in a folder that exists")
        suffix = args.out.suffix.lower()
        is_picture = args.command is not encode and suffix in Image.registered_extensions()
        if is_picture and suffix != ".png":
            raise ValueError(f"--out: {args.out} must end in .png for a picture, or else in .idx")
        path = args.run / "checkpoint.safetensors"
        source = args.codes if args.command is decode else args.images
        if args.out.resolve() in (path.resolve(), source and source.resolve()):
            raise ValueError(f"--out: {args.out} is read; it cannot be written as well")
        model = VQVAE.from_checkpoint(path)
        dataset = load_checkpoint(path)[1]["arguments"].get("dataset")
        if dataset not in DATASETS:
            raise ValueError(f"{path} is not of train_mnist.py (for others: docs/your-data.md)")
        result = args.command(model, source if args.command is decode else read(source, dataset))
        if args.command is not encode:
            print(f"images    {len(result)} of 28×28 pixels")
            result = plots.sheet(result) if is_picture else to_idx(result.numpy())
        write_atomically(args.out, result)
        print(f"written   {args.out}, {len(result)} bytes")
    except (OSError, ValueError) as error:
        raise SystemExit(f"mnist_codec.py: {error}") from error


if __name__ == "__main__":
    startup.run(main)
