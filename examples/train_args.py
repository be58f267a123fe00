"""The flags of the trainers: how they are read, checked, and taken from a run that is resumed."""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from run_files import load_checkpoint

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
    f"training; 0 is never (default: {REVIVE_BELOW} · indices of a batch / K)",
    "use_cosine_sim": "search by direction, with vectors and codes of length 1",
    "rotation_trick": "rotate the gradient of a vector as its code is from it",
    "sync_codebook": "learn from the vectors of all ranks",
    "precision": "exact, or fast, which has no certificate",
    "backend": "auto, triton or torch",
}
# not part of what makes a run what it is: a resumed one may have others
PASSING = (
    *("data_dir", "folder", "workers", "device", "compile"),
    *("out", "resume", "log_to", "checkpoint"),
)


class Parser(argparse.ArgumentParser):
    """Flags with defaults that --help shows; an error is one line, with the flag's name."""

    def __init__(self, description: str, positional: str = "") -> None:
        super().__init__(
            description=description,
            # short, so that an error is not lost below a list of options
            usage=f"%(prog)s [--help] {positional}[options]",
            allow_abbrev=False,
        )
        self.group = self.add_argument_group("data")

    def add(self, name: str, help: str, default: Any = None, **options: Any) -> None:
        """A flag of the group that was begun last. Its type is that of the default."""
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in options:
            options = {"type": type(default), "metavar": "VALUE"} | options
        if default is not None:
            help += " (default: %(default)s)"
        self.group.add_argument(flag(name), help=help, default=default, **options)

    def begin(self, title: str) -> None:
        self.group = self.add_argument_group(title)

    def fail(self, name: str, message: object) -> NoReturn:
        self.error(f"argument {flag(name)}: {message}")

    def check(self, args: argparse.Namespace, name: str, low: float, high: float) -> None:
        """The value must be None or in [low, high)."""
        value = getattr(args, name)
        # written so that NaN is out of range
        if value is not None and not low <= value < high:
            bounds = f"[{low}, {'2**63' if high == 2**63 else high})"
            self.fail(name, f"{value}; it must be in {bounds}")

    def resume(
        self,
        args: argparse.Namespace,
        argv: list[str] | None,
        name: str = "resume",
        free: tuple[str, ...] = (),
    ) -> argparse.Namespace:
        """Adds ``checkpoint``, what is in --out or None; flags that are not given are as it says.

        A flag may not differ from the run's; only --epochs may be more.

        Args:
            name: the flag that asks for it. Any other than --resume needs a checkpoint.
            free: flags that may differ.
        """
        path = args.out / "checkpoint.safetensors"
        args.checkpoint = None
        if not getattr(args, name) or (name == "resume" and not path.exists()):
            return args
        try:
            checkpoint = load_checkpoint(path)
        except (OSError, ValueError) as error:
            self.fail(name, error)
        # a flag of an earlier version
        recorded = {k: v for k, v in checkpoint[1]["arguments"].items() if k != "eps"}
        kept = {key: value for key, value in recorded.items() if key not in free}
        self.set_defaults(out=args.out, **kept)
        args = self.parse_args(argv)
        for key, was in recorded.items():
            value = getattr(args, key, was)
            may_grow = key == "epochs" and isinstance(was, int) and value > was
            if value != was and key not in free and not may_grow:
                can = "more, but not fewer" if key == "epochs" else "no other"
                self.fail(key, f"{value}; it was {was} in {args.out}, and can be {can}")
        args.checkpoint = checkpoint
        return args


def parse_args(
    parser: Parser,
    argv: list[str] | None,
    out: Callable[[argparse.Namespace], Path],
    indices: Callable[[argparse.Namespace], int],
) -> argparse.Namespace:
    """The flags, checked, and three things more.

    ``quantizer``: the arguments of the quantizer. ``recorded``: what makes a run what it is, all
    of it JSON. ``checkpoint``: what --resume found, or None.

    Args:
        out: the default of --out.
        indices: how many an image becomes; it may also check flags of its own.
    """
    args = parser.parse_args(argv)
    args.out = args.out or out(args)
    args = parser.resume(args, argv)
    check(parser, args)
    rows = args.batch_size * indices(args)
    if args.reconstruction_weight is None:
        args.reconstruction_weight = RECONSTRUCTION_WEIGHT[args.reconstruction]
    if args.threshold_ema_dead_code is None:
        args.threshold_ema_dead_code = REVIVE_BELOW * rows / max(args.codebook_size, 1)
    args.recorded = {name: value for name, value in vars(args).items() if name not in PASSING}
    args.quantizer = {name: getattr(args, name) for name in QUANTIZER} | {"accept_image_fmap": True}
    try:
        # whether its backend works on this device, and there is nothing to start from yet
        vq = vqtriton.VectorQuantize(**args.quantizer | {"kmeans_init": False})
        vq.to(args.device).eval()(torch.zeros(1, args.dim, 1, 1, device=args.device))
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(f"quantizer: {str(error).splitlines()[0]}")
    return args


def add_training_flags(parser: Parser, **other_defaults: Any) -> None:
    """The flags that every trainer of a VQ-VAE has."""
    parameters = inspect.signature(vqtriton.VectorQuantize).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    defaults |= {"dim": 32, "codebook_size": 512, "kmeans_init": True, "channels": 32}
    defaults |= {"reconstruction": "bce", "epochs": 5, "batch_size": 64, "lr": 2e-3}
    defaults |= other_defaults

    def add(name: str, help: str) -> None:
        parser.add(name, help, defaults[name])

    parser.begin("model")
    add("channels", "of the outermost layers; the others have twice as many")
    kinds = sorted(RECONSTRUCTION_WEIGHT)
    text = "pixels as Bernoulli variables, or squared error"
    parser.add("reconstruction", text, defaults["reconstruction"], choices=kinds)
    text = "of the reconstruction, mean over the pixels (default: "
    parser.add("reconstruction_weight", f"{text}{RECONSTRUCTION_WEIGHT})", type=float)
    parser.begin("quantizer, see vqtriton.VectorQuantize")
    for name, text in QUANTIZER.items():
        if name == "threshold_ema_dead_code":
            parser.add(name, text, type=float)
        else:
            add(name, text)
    parser.begin("training")
    add("epochs", "passes over the training set; with --resume, more than before")
    add("batch_size", "images a step, over all ranks")
    add("lr", "peak of the OneCycle rate")
    parser.add("amp", "encoder and decoder in bfloat16", False)
    parser.add("compile", "with torch.compile", False)
    add_run_flags(parser, "runs/ and the name of the data")
    parser.add("log_to", "send the values there as well", choices=("tensorboard", "wandb"))


def add_run_flags(parser: Parser, folder: str) -> None:
    """The flags of every trainer; ``folder`` says where results go by default."""
    parser.add("seed", "of everything random", 0)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add("device", "where to train, as torch calls it", best)
    parser.begin("results")
    text = f"folder for the results (default: {folder}); a run that is there is kept by another"
    parser.add("out", f"{text} name", type=Path)
    parser.add("resume", "continue from the checkpoint in --out; without one, start", False)


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the program with a line that names the flag that is out of its range."""
    for name, low in {"limit": 1, "channels": 1, "epochs": 1, "batch_size": 1, "seed": 0}.items():
        parser.check(args, name, low, 2**63)
    for name in ("lr", "reconstruction_weight"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.fail(name, f"{value}; it must be positive")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        parser.fail("batch_size", f"{args.batch_size}; not a multiple of {ranks} ranks")
    if args.limit is not None and args.limit < ranks:
        parser.fail("limit", f"{args.limit}; it must be at least the {ranks} ranks")
    check_places(parser, args)


def check_places(parser: Parser, args: argparse.Namespace) -> None:
    """The same for where data come from, and where work and results go."""
    data_dir = getattr(args, "data_dir", None)
    if data_dir is not None and not data_dir.is_dir():
        parser.fail("data_dir", f"{data_dir} is not a folder")
    try:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        tensor = torch.zeros(1, device=args.device)
        # the device "meta" makes tensors but no values
        tensor.item()
        args.device = tensor.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.fail("device", str(error).splitlines()[0])
    # it is made when the run begins, so that a mistake in another flag leaves no empty folder
    there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not there.is_dir():
        parser.fail("out", f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        parser.fail("out", f"{there} cannot be written to")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
