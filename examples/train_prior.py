"""Trains a prior over the indices of a VQ-VAE and samples images from it: minutes on two CPU cores.

    python examples/train_prior.py --vqvae runs/mnist
    python examples/train_prior.py --vqvae runs/mnist --sample-only --temperature 0.9 --top-k 100

As in the paper (van den Oord et al. 2017, arXiv:1711.00937, section 3.3) p(z) is fit once the
VQ-VAE is trained: p of an index given those before it, row by row. A sample of p(z) through the
decoder is an image. Here p is a small transformer, and it also knows the class of the image.

The folder ``--out`` gets log.jsonl, a line an epoch; prior.safetensors; samples.png, a column a
class; and at the end metrics.json, with figures over the whole test set:

    test_bits_per_code     -log2 p of an index, mean over all
    test_bits_per_dim      the same for each of the 784 pixels: the rate of the indices alone; what
                           the decoder does not get right is not in it
    uniform_bits_per_code  log2 K: an index without a prior
    marginal_bits_per_code an index by the frequency of its code in the training set
    entropy_bits_per_code  by that in the test set itself: no fixed frequencies can do better
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import plots
import torch
import torch.nn.functional as F
from checkpoints import load_checkpoint, save_checkpoint, write_atomically
from mnist_data import CLASS_NAMES, load
from torch import Tensor, nn
from tqdm import tqdm
from train_args import check_places, flag
from vqvae import VQVAE

import vqtriton

SIDE = 7
INDICES = SIDE * SIDE
PIXELS = 28 * 28
# what makes a prior what it is, beside --seed
RECORDED = ("limit", "width", "depth", "heads", "dropout", "epochs", "batch_size", "lr")


class Prior(nn.Module):
    """p(index | the indices before it, class): a causal transformer.

    Args:
        codebook: [K, D]; embedding and output start as projections of it, so that codes
            which are close to each other are alike from the first step on.
    """

    def __init__(
        self, codebook: Tensor, classes: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        codebook_size, dim = codebook.shape
        codes = F.layer_norm(codebook - codebook.mean(0), codebook.shape)
        codes = codes @ torch.randn(2, dim, width) / dim**0.5
        self.code = nn.Embedding(codebook_size, width, _weight=codes[0])
        self.label = nn.Embedding(classes, width)
        self.position = nn.Embedding(INDICES, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, F.gelu, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.body = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        # they are copies of one layer
        for weight in self.body.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.head = nn.Linear(width, codebook_size)
        self.head.weight.data = codes[1] / (4 * width) ** 0.5

    def forward(self, before: Tensor, labels: Tensor) -> Tensor:
        """The first T indices [B, T], labels [B] -> logits of the first T + 1, [B, T + 1, K]."""
        x = torch.cat([self.label(labels)[:, None], self.code(before)], 1)
        x = x + self.position.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.body(x, mask, is_causal=True))

    def nats(self, indices: Tensor, labels: Tensor) -> Tensor:
        """-log p of each of the indices [B, 49], for labels [B]."""
        logits = self(indices[:, :-1], labels)
        return F.cross_entropy(logits.movedim(-1, 1), indices, reduction="none")

    @torch.no_grad()
    def sample(self, labels: Tensor, temperature: float, top_k: int, seed: int) -> Tensor:
        """Indices [B, 7, 7] for labels [B]; each is drawn from the ``top_k`` likeliest codes."""
        self.eval()
        generator = torch.Generator(labels.device).manual_seed(seed)
        indices = labels.new_empty(len(labels), 0)
        for _ in range(INDICES):
            logits, codes = self(indices, labels)[:, -1].double().topk(top_k)
            p = (logits / temperature).softmax(-1)
            drawn = codes.gather(1, p.multinomial(1, generator=generator))
            indices = torch.cat([indices, drawn], 1)
        return indices.unflatten(1, (SIDE, SIDE))


def encode(vqvae: VQVAE, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28], labels uint8 [N] -> indices [N, 49], labels int64 [N]."""
    device = vqvae.vq.codebook.device
    indices = [vqvae.encode(batch.to(device)).flatten(1) for batch in images.split(500)]
    return torch.cat(indices), labels.to(device).long()


def fingerprint(vqvae: VQVAE) -> str:
    """sha256 of all that the VQ-VAE has learned."""
    tensors = vqvae.state_dict().values()
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()


@torch.no_grad()
def bits_per_code(prior: Prior, indices: Tensor, labels: Tensor) -> float:
    """-log2 p of the indices [N, 49], mean over all."""
    prior.eval()
    batches = zip(indices.split(500), labels.split(500), strict=True)
    nats = sum(prior.nats(*batch).double().sum().item() for batch in batches)
    return nats / indices.numel() / math.log(2)


def baselines(train: Tensor, test: Tensor, codebook_size: int) -> dict[str, float]:
    """Bits per code without a prior; see the head of this file. train, test: indices."""
    # one more of each: a code that the training set lacks must not cost infinitely many
    guess = train.flatten().bincount(minlength=codebook_size).double() + 1
    share = test.flatten().bincount(minlength=codebook_size).double() / test.numel()
    return {
        "uniform_bits_per_code": math.log2(codebook_size),
        "marginal_bits_per_code": -(share * (guess / guess.sum()).log2()).sum().item(),
        "entropy_bits_per_code": torch.special.entr(share).sum().item() / math.log(2),
    }


def fit(
    prior: Prior, args: argparse.Namespace, indices: Tensor, labels: Tensor, *test: Tensor
) -> None:
    """Trains on indices [N, 49] and labels [N]; ``test``: two such tensors."""
    optimizer = torch.optim.AdamW(prior.parameters(), args.lr)
    steps = args.epochs * math.ceil(len(indices) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1)
    recorded = {name: getattr(args, name) for name in (*RECORDED, "seed")}
    info = {"arguments": recorded, "vqvae_sha256": fingerprint(args.model)}
    log: list[dict[str, Any]] = []
    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        prior.train()
        order = np.random.default_rng((args.seed, epoch)).permutation(len(indices))
        batches = torch.from_numpy(order).to(args.device).split(args.batch_size)
        bits = 0.0
        title = f"epoch {epoch}/{args.epochs}"
        for batch in tqdm(batches, title, unit="step", leave=False, disable=None):
            loss = prior.nats(indices[batch], labels[batch]).mean()
            if not loss.isfinite():
                raise SystemExit(f"{title}: the loss is {loss.item()}; try a lower --lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bits += loss.item() / math.log(2) * len(batch) / len(indices)
        # the first is of the prior as it was at each step, the second as it is now
        record = {"epoch": epoch, "train_bits_per_code": bits}
        record["test_bits_per_code"] = bits_per_code(prior, *test)
        record["test_bits_per_dim"] = record["test_bits_per_code"] * INDICES / PIXELS
        record["seconds"] = time.perf_counter() - start
        log.append(record)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
        lines = "".join(json.dumps(line) + "\n" for line in log)
        write_atomically(args.out / "log.jsonl", lines.encode())
        save_checkpoint(args.out / "prior.safetensors", prior.state_dict(), info)
        draw(prior, args)
    results = record | baselines(indices, test[0], args.model.vq.codebook_size) | info
    environment = {"vqtriton": vqtriton.__version__, "torch": torch.__version__}
    results["environment"] = environment | {"threads": torch.get_num_threads()}
    write_atomically(args.out / "metrics.json", (json.dumps(results, indent=2) + "\n").encode())


def draw(prior: Prior, args: argparse.Namespace) -> None:
    """Writes samples.png."""
    classes = prior.label.num_embeddings
    labels = torch.arange(classes, device=args.device).repeat(args.samples_per_class)
    indices = prior.sample(labels, args.temperature, args.top_k, args.seed)
    png = plots.tile(args.model.decode(indices), columns=classes)
    write_atomically(args.out / "samples.png", png)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked, and three things more.

    ``model``: the VQ-VAE. ``dataset``: what it was trained on. ``tensors``: the prior that
    --sample-only found, or None.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    path = args.vqvae / "checkpoint.safetensors"
    try:
        model = VQVAE.from_checkpoint(path)
        dataset = load_checkpoint(path)[1]["arguments"].get("dataset")
    except (OSError, ValueError) as error:
        parser.error(f"argument --vqvae: {error}")
    out = args.out or args.vqvae / "prior"
    if out.resolve() == args.vqvae.resolve():
        parser.error("argument --out: the folder of --vqvae has results of its own")
    tensors = None
    if args.sample_only:
        path = out / "prior.safetensors"
        try:
            tensors, info = load_checkpoint(path)
        except (OSError, ValueError) as error:
            parser.error(f"argument --sample-only: {error}")
        if info.get("vqvae_sha256") != fingerprint(model):
            parser.error(f"argument --vqvae: {path} is not a prior of the VQ-VAE in {args.vqvae}")
        # samples may have a seed of their own
        recorded = info["arguments"] | {"seed": args.seed}
        # what is not said again is as it was
        args = parser.parse_args(argv, argparse.Namespace(**recorded))
        for name in (name for name in recorded if getattr(args, name) != recorded[name]):
            parser.error(
                f"argument {flag(name)}: it is {recorded[name]} in {out}, which cannot be changed"
            )
    if args.top_k is None:
        args.top_k = model.vq.codebook_size
    args.out, args.model, args.dataset, args.tensors = out, model, dataset, tensors
    check(parser, args)
    args.model.to(args.device)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a line that names the flag that is out of its range."""
    whole = ("limit", "width", "depth", "heads", "epochs", "batch_size", "samples_per_class")
    limits: dict[str, tuple[float, float]] = dict.fromkeys(whole, (1, 2**31))
    limits |= {"top_k": (1, args.model.vq.codebook_size + 1), "seed": (0, 2**63)}
    limits |= {"dropout": (0, 1), "lr": (1e-9, math.inf), "temperature": (1e-9, math.inf)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        # written so that NaN is out of range
        if value is not None and not low <= value < high:
            parser.error(f"argument {flag(name)}: {value}; it must be in [{low}, {high})")
    if args.width % args.heads:
        parser.error(f"argument --width: {args.width}; not a multiple of {args.heads} heads")
    check_places(parser, args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a prior over the indices of a VQ-VAE and sample images from it.",
        # short, so that an error is not lost below a list of options
        usage="%(prog)s [--help] --vqvae FOLDER [options]",
        allow_abbrev=False,
    )

    def add(name: str, help: str, default: Any = None, **options: Any) -> None:
        options = {"type": type(default), "metavar": "VALUE"} | options
        if default is not None:
            help += " (default: %(default)s)"
        parser.add_argument(flag(name), help=help, default=default, **options)

    add("vqvae", "folder of a run of train_mnist.py", type=Path, required=True)
    add("out", "folder for the results (default: prior in that folder)", type=Path)
    add("data_dir", "folder with the four IDX files; else they are fetched", type=Path)
    add("limit", "train on the first so many images only, to try things out", type=int)
    add("width", "of the transformer: numbers per position", 96)
    add("depth", "of the transformer: layers", 3)
    add("heads", "of the transformer: parts of the width that attend by themselves", 4)
    add("dropout", "share of the activations left out in training", 0.0)
    add("epochs", "passes over the training set", 3)
    add("batch_size", "images a step", 16)
    add("lr", "peak of the OneCycle rate", 3e-3)
    add("seed", "of everything random", 0)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("device", "where to train, as torch calls it", best)
    add("temperature", "of the samples: divides the logits", 1.0)
    add("top_k", "of the samples: choose among so many codes (default: all)", type=int)
    add("samples_per_class", "rows of samples.png", 8)
    text = "draw samples.png anew from the prior in --out"
    parser.add_argument("--sample-only", action="store_true", help=text)
    return parser


def main() -> None:
    # cuBLAS reads this when it starts; without it deterministic algorithms are refused
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = parse_args()
    # off the CPU an operation without a deterministic form warns, rather than end the run
    torch.use_deterministic_algorithms(True, warn_only=args.device.type != "cpu")
    # a help in finding bugs that costs some percent of the time
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    codebook = args.model.vq.codebook.detach().cpu()
    shape = (len(CLASS_NAMES[args.dataset]), args.width, args.depth, args.heads, args.dropout)
    prior = Prior(codebook, *shape).to(args.device)
    if args.tensors:
        prior.load_state_dict(args.tensors)
        draw(prior, args)
        return
    try:
        data = load(args.dataset, args.data_dir)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train_prior.py: {error}") from error
    train = encode(args.model, data.train_images[: args.limit], data.train_labels[: args.limit])
    test = encode(args.model, data.test_images, data.test_labels)
    fit(prior, args, *train, *test)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(f"train_prior.py: {error}") from error
