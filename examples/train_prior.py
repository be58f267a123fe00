"""Trains a prior over the indices of a VQ-VAE, and draws new digits: ten minutes on two cores.

    .venv/bin/python examples/train_prior.py --vqvae runs/mnist
    .venv/bin/python examples/train_prior.py --vqvae runs/mnist --resume
    .venv/bin/python examples/train_prior.py --vqvae runs/mnist --sample-only --temperature 0.9

As in the paper (van den Oord et al. 2017, arXiv:1711.00937, section 3.3) p(z) is fitted once the
VQ-VAE is trained: p of an index given those before it, row by row. A sample of p(z) through the
decoder is an image. Here p is a small transformer, and it also knows the class of the image.

The folder ``--out`` gets after each epoch: log.jsonl, a line an epoch; samples.png, a column a
class; checkpoint.safetensors, from which --resume goes on; and metrics.json, with figures over the
whole test set:

    test_bits_per_code     -log2 p of an index, mean over all
    test_bits_per_dim      the same for each of the 784 pixels: the rate of the indices alone; what
                           the decoder does not get right is not in it
    uniform_bits_per_code  log2 K: an index without a prior
    marginal_bits_per_code an index by the frequency of its code in the training set
    entropy_bits_per_code  by that in the test set itself: no fixed frequencies can do better
"""

from __future__ import annotations

import startup  # isort: skip

import argparse
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import plots
import torch
import torch.nn.functional as F
from mnist_data import CLASS_NAMES, load
from run_files import load_checkpoint, with_prefix, write_atomically
from torch import Tensor, nn
from train_args import Parser, add_run_flags, check_places
from trainer import Trainer, Values, end_if_complete, make_repeatable, shuffled
from vqvae import VQVAE

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
        self.config = {"width": width, "depth": depth, "heads": heads, "dropout": dropout}
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
    batches = images[:, None].to(device).split(500)
    indices = [vqvae.encode(batch).flatten(1) for batch in batches]
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


def describe(record: dict[str, Any]) -> str:
    return (
        f"{record['test_bits_per_code']:.4g} bits a code on the test set, "
        f"{record['test_bits_per_dim']:.4g} bits a pixel "
        f"({record['train_bits_per_code']:.4g} bits a code in training)"
    )


class PriorTrainer(Trainer):
    """Trains on indices [N, 49] and labels [N]; ``test``: two such tensors."""

    shown = ("bits a code",)
    describe = staticmethod(describe)

    def __init__(
        self, args: argparse.Namespace, prior: Prior, train: tuple[Tensor, Tensor], test: Any
    ) -> None:
        optimizer = torch.optim.AdamW(prior.parameters(), args.lr)
        super().__init__(args, prior, optimizer, len(train[0]), warmup=0.1)
        self.train, self.test = train, test
        self.sums = {"bits": torch.zeros(1, dtype=torch.float64)}
        self.baselines = baselines(train[0], test[0], args.vqvae_model.vq.codebook_size)

    def order(self, epoch: int) -> Tensor:
        return shuffled(self.args.seed, epoch + 1, self.available)

    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        indices, labels = self.train
        for batch in places:
            batch = batch.to(indices.device)
            yield indices[batch], labels[batch]

    def train_on(self, batch: tuple[Tensor, Tensor], is_looked_at: bool) -> Values:
        self.model.train()
        loss = self.model.nats(*batch).mean()
        self.check(loss)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        bits = loss.item() / math.log(2)
        self.sums["bits"] += bits * len(batch[0]) / self.count
        return {"bits a code": bits} if is_looked_at else {}

    def end_epoch(self) -> dict[str, Any]:
        # each step was measured before the prior learned from it
        return {"train_bits_per_code": self.sums["bits"].item()}

    def publish(self, record: dict[str, Any]) -> None:
        # the prior after this epoch
        bits = bits_per_code(self.model, *self.test)
        record |= {"test_bits_per_code": bits, "test_bits_per_dim": bits * INDICES / PIXELS}
        draw(self.model, self.args)

    def configs(self) -> dict[str, Any]:
        return super().configs() | {"vqvae_sha256": self.args.vqvae_sha256}

    def facts(self) -> dict[str, Any]:
        return self.baselines | {"vqvae_sha256": self.args.vqvae_sha256} | super().facts()


def draw(prior: Prior, args: argparse.Namespace) -> None:
    """Writes samples.png."""
    classes = prior.label.num_embeddings
    labels = torch.arange(classes, device=args.device).repeat(args.samples_per_class)
    indices = prior.sample(labels, args.temperature, args.top_k, args.seed)
    images = args.vqvae_model.decode(indices)
    write_atomically(args.out / "samples.png", plots.columns(images, CLASS_NAMES[args.dataset]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked, and some things more.

    ``vqvae_model``: the VQ-VAE. ``vqvae_sha256``: its fingerprint. ``dataset``: what it was
    trained on. ``recorded``: what makes a prior what it is. ``checkpoint``: what --resume or
    --sample-only found, or None.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    path = args.vqvae / "checkpoint.safetensors"
    try:
        model = VQVAE.from_checkpoint(path)
        dataset = load_checkpoint(path)[1]["arguments"].get("dataset")
        if dataset not in CLASS_NAMES:
            raise ValueError(f"{path} is not of train_mnist.py")
    except (OSError, ValueError) as error:
        parser.fail("vqvae", error)
    args.out = args.out or args.vqvae / "prior"
    if args.out.resolve() == args.vqvae.resolve():
        parser.fail("out", "the folder of --vqvae has results of its own")
    if args.sample_only:
        # samples may have a seed of their own
        args = parser.resume(args, argv, name="sample_only", free=("seed",))
    else:
        args = parser.resume(args, argv)
    sha256 = fingerprint(model)
    if args.checkpoint and args.checkpoint[1].get("vqvae_sha256") != sha256:
        parser.fail("vqvae", f"{args.out} is not a prior of the VQ-VAE in {args.vqvae}")
    if args.top_k is None:
        args.top_k = model.vq.codebook_size
    args.vqvae_model, args.vqvae_sha256, args.dataset = model, sha256, dataset
    args.recorded = {name: getattr(args, name) for name in (*RECORDED, "seed")}
    check(parser, args)
    model.to(args.device)
    return args


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the program with a line that names the flag that is out of its range."""
    whole = ("limit", "width", "depth", "heads", "epochs", "batch_size", "samples_per_class")
    limits: dict[str, tuple[float, float]] = dict.fromkeys(whole, (1, 2**31))
    limits |= {"top_k": (1, args.vqvae_model.vq.codebook_size + 1), "seed": (0, 2**63)}
    limits |= {"dropout": (0, 1), "lr": (1e-9, math.inf), "temperature": (1e-9, math.inf)}
    for name, (low, high) in limits.items():
        parser.check(args, name, low, high)
    if args.width % args.heads:
        parser.fail("width", f"{args.width}; not a multiple of {args.heads} heads")
    check_places(parser, args)


def build_parser() -> Parser:
    description = "Train a prior over the indices of a VQ-VAE and draw images from it."
    parser = Parser(description, "--vqvae FOLDER ")
    add = parser.add
    add("vqvae", "folder of a run of train_mnist.py", type=Path, required=True)
    add("data_dir", "folder with the four IDX files; else they are fetched", type=Path)
    add("limit", "train on the first so many images only, to try things out", type=int)
    parser.begin("model")
    add("width", "of the transformer: numbers per position", 96)
    add("depth", "of the transformer: layers", 3)
    add("heads", "of the transformer: parts of the width that attend by themselves", 4)
    add("dropout", "share of the activations left out in training", 0.0)
    parser.begin("training")
    add("epochs", "passes over the training set; with --resume, more than before", 3)
    add("batch_size", "images a step", 16)
    add("lr", "peak of the OneCycle rate", 3e-3)
    add_run_flags(parser, "prior in that of --vqvae")
    add("temperature", "of the samples: divides the logits", 1.0)
    add("top_k", "of the samples: choose among so many codes (default: all)", type=int)
    add("samples_per_class", "rows of samples.png", 8)
    add("sample_only", "draw samples.png anew from the prior in --out", False)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_repeatable(args)
    codebook = args.vqvae_model.vq.codebook.detach().cpu()
    shape = (len(CLASS_NAMES[args.dataset]), args.width, args.depth, args.heads, args.dropout)
    prior = Prior(codebook, *shape).to(args.device)
    if args.sample_only:
        prior.load_state_dict(with_prefix(args.checkpoint[0], "model."))
        draw(prior, args)
        print(f"{len(prior.label.weight) * args.samples_per_class} images: {args.out}/samples.png")
        return
    end_if_complete(args, describe)
    print(f"Training a prior over the indices of {args.vqvae}.", flush=True)
    try:
        data = load(args.dataset, args.data_dir)
    except ValueError as error:
        raise SystemExit(f"{startup.SCRIPT}: {error}") from error
    model, limit = args.vqvae_model, args.limit
    train = encode(model, data.train_images[:limit], data.train_labels[:limit])
    test = encode(model, data.test_images, data.test_labels)
    PriorTrainer(args, prior, train, test).run()


if __name__ == "__main__":
    startup.run(main)
