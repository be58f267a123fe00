"""The flags of train_mnist.py."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from checkpoints import load_checkpoint
from mnist_data import DATASETS

import vqtriton

# a code that fewer vectors choose than this part of an even share is revived by default; with a
# decay of .99, one that none chooses gets there in 90 steps
REVIVE_BELOW = 0.4
# the weight that makes of each kind of reconstruction term about as much
RECONSTRUCTION_WEIGHT = {"bce": 10.0, "mse": 30.0}
# the arguments of the quantizer that are not settled by what it quantizes, maps of 7×7 vectors, or
# by what the trainer does with its loss
QUANTIZER = {
    "dim": "D, size of a code",
    "codebook_size": "K, number of codes",
    "codebook_update": "how codes learn, ema or gradient",
    "decay": "of the moving averages of ema",
    "commitment_weight": "β of the paper",
    "codebook_weight": "of the codebook term; of no effect with ema",
    "kmeans_init": "start the codes from k-means of the first batch, not uniform in ±1/K",
    "kmeans_iters": "iterations of that",
    "threshold_ema_dead_code": "revive codes that fewer vectors a step choose, until 80 %% of "
    f"training; 0 is never (default: {REVIVE_BELOW} of an even share, batch · 49 / K)",
    "sync_codebook": "learn from the vectors of all ranks",
    "precision": "exact, or fast, which has no certificate",
    "backend": "auto, triton or torch",
}
# not part of what makes a run what it is: a resumed one may have others
PASSING = ("data_dir", "device", "compile", "out", "resume", "log_to")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked, and three things more.

    ``quantizer``: the arguments of the quantizer. ``recorded``: what makes a run what it is, all
    of it JSON. ``checkpoint``: what --resume found, or None.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    out = args.out or Path("runs", args.dataset)
    checkpoint = None
    if args.resume and (out / "checkpoint.safetensors").exists():
        try:
            checkpoint = load_checkpoint(out / "checkpoint.safetensors")
        except (OSError, ValueError) as error:
            parser.error(f"argument --resume: {error}")
        # a flag of an earlier version
        recorded = checkpoint[1]["arguments"]
        recorded.pop("eps", None)
        # what is not said again is as it was
        parser.set_defaults(**recorded)
        args = parser.parse_args(argv)
        for name in (name for name in recorded if getattr(args, name) != recorded[name]):
            parser.error(
                f"argument {flag(name)}: it is {recorded[name]} in {out}, which cannot be changed"
            )
    if args.reconstruction_weight is None:
        args.reconstruction_weight = RECONSTRUCTION_WEIGHT[args.reconstruction]
    if args.threshold_ema_dead_code is None:
        even_share = args.batch_size * 49 / max(args.codebook_size, 1)
        args.threshold_ema_dead_code = REVIVE_BELOW * even_share
    args.recorded = {name: value for name, value in vars(args).items() if name not in PASSING}
    args.quantizer = {name: getattr(args, name) for name in QUANTIZER} | {"accept_image_fmap": True}
    args.out, args.checkpoint = out, checkpoint
    check(parser, args)
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a VQ-VAE on MNIST and measure it on the whole test set.",
        # short, so that an error is not lost below a list of options
        usage="%(prog)s [--help] [options]",
        allow_abbrev=False,
    )

    def add(name: str, help: str, default: Any = None, **options: Any) -> None:
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in options:
            options = {"type": type(default), "metavar": "VALUE"} | options
        if default is not None:
            help += " (default: %(default)s)"
        group.add_argument(flag(name), help=help, default=default, **options)

    group = parser.add_argument_group("data")
    add("dataset", "images to train on", "mnist", choices=sorted(DATASETS))
    add("data_dir", "folder with the four IDX files; else they are fetched", type=Path)
    add("limit", "train on the first so many images only, to try things out", type=int)
    group = parser.add_argument_group("model")
    add("channels", "of the outermost layers; the others have twice as many", 32)
    kinds = sorted(RECONSTRUCTION_WEIGHT)
    add("reconstruction", "pixels as Bernoulli variables, or squared error", "bce", choices=kinds)
    weight = "of the reconstruction, mean over the pixels (default: "
    add("reconstruction_weight", f"{weight}{RECONSTRUCTION_WEIGHT})", type=float)
    group = parser.add_argument_group("quantizer, see vqtriton.VectorQuantize")
    parameters = inspect.signature(vqtriton.VectorQuantize).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    defaults |= {"dim": 32, "codebook_size": 512, "kmeans_init": True}
    for name, text in QUANTIZER.items():
        if name == "threshold_ema_dead_code":
            add(name, text, type=float)
        else:
            add(name, text, defaults[name])
    group = parser.add_argument_group("training")
    add("epochs", "passes over the training set", 5)
    add("batch_size", "images a step, over all ranks", 64)
    add("lr", "peak of the OneCycle rate", 2e-3)
    add("seed", "of everything random", 0)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("device", "where to train, as torch calls it", best)
    add("amp", "encoder and decoder in bfloat16", False)
    add("compile", "with torch.compile", False)
    group = parser.add_argument_group("results")
    add("out", "folder for the results (default: runs/ and the data set)", type=Path)
    add("resume", "go on from the checkpoint in --out; start if there is none", False)
    add("log_to", "send the values there as well", choices=("tensorboard", "wandb"))
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a line that names the flag that is out of its range."""
    for name, low in {"limit": 1, "channels": 1, "epochs": 1, "batch_size": 1, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**63:
            parser.error(f"argument {flag(name)}: {value}; it must be in [{low}, 2**63)")
    for name in ("lr", "reconstruction_weight"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"argument {flag(name)}: {getattr(args, name)}; it must be positive")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        parser.error(f"argument --batch-size: {args.batch_size}; not a multiple of {ranks} ranks")
    if args.limit is not None and args.limit < ranks:
        parser.error(f"argument --limit: {args.limit}; it must be at least the {ranks} ranks")
    check_places(parser, args)
    try:
        # whether its backend works on this device, and there is nothing to start from yet
        arguments = args.quantizer | {"kmeans_init": False}
        vq = vqtriton.VectorQuantize(**arguments).to(args.device).eval()
        vq(torch.zeros(1, args.dim, 1, 1, device=args.device))
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(f"quantizer: {str(error).splitlines()[0]}")


def check_places(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The same for where data come from, and where work and results go."""
    if args.data_dir is not None and not args.data_dir.is_dir():
        parser.error(f"argument --data-dir: {args.data_dir} is not a folder")
    try:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        tensor = torch.zeros(1, device=args.device)
        # the device "meta" makes tensors but no values
        tensor.item()
        args.device = tensor.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # whether it can be written to
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: {error}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
