"""Trains a VQ-VAE on MNIST: two or three minutes on two CPU cores.

    python examples/train_mnist.py
    python examples/train_mnist.py --codebook-update gradient --no-kmeans-init

An image of 28×28 pixels becomes a grid of 7×7 indices. The loss is that of the paper (van den Oord
et al. 2017, arXiv:1711.00937, equation 3); its KL term is the constant 49·log K, which is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from mnist_data import load_mnist, write_atomically
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from vqvae import VQVAE

import vqtriton

# the loss is this times the mean over the pixels, plus the quantizer's mean over the elements
RECONSTRUCTION_WEIGHT = 10.0
# a code that fewer vectors choose than this part of an even share is revived by default; with a
# decay of .99, one that none chooses gets there in 90 steps
REVIVE_BELOW = 0.4
# revived codes need some steps to settle before the codebook is used
REVIVE_UNTIL = 0.8


def bce_nats(logits: Tensor, images: Tensor) -> Tensor:
    """-log p(image | quantized), pixels as Bernoulli variables: sum over pixels, mean over images.

    Grey pixels have an entropy of their own, so it cannot reach 0: 45.5 nats on MNIST's test set.
    """
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def train(model: VQVAE, images: Tensor, args: argparse.Namespace) -> list[dict[str, float]]:
    """Trains in place; the means of the loss terms over each epoch."""
    vq = model.vq
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    steps_per_epoch = math.ceil(len(images) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total_steps)
    history = []
    step = 0
    start = time.perf_counter()
    model.train()
    for epoch in range(1, args.epochs + 1):
        counts = torch.zeros(vq.codebook_size, device=images.device, dtype=torch.int64)
        sums = torch.zeros(4, device=images.device)
        # on the CPU, so that a seed means the same order on every device
        batches = torch.randperm(len(images)).to(images.device).split(args.batch_size)
        bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", leave=False, disable=None)
        for batch in bar:
            if step >= REVIVE_UNTIL * total_steps:
                vq.threshold_ema_dead_code = 0
            target = images[batch].float() / 255
            logits, x, (quantized, indices, vq_loss) = model(target)
            reconstruction = bce_nats(logits, target)
            loss = RECONSTRUCTION_WEIGHT * reconstruction / target[0].numel() + vq_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1

            batch_counts = indices.flatten().bincount(minlength=vq.codebook_size)
            counts += batch_counts
            # both terms have the value of the squared error; they differ in whom they move
            sq_error = F.mse_loss(quantized, x)
            codebook_term = sq_error if vq.codebook_update == "gradient" else 0 * sq_error
            terms = (loss, reconstruction, codebook_term, vq.commitment_weight * sq_error)
            sums += torch.stack(terms).detach() * len(batch)
            # now and then, since reading a value waits for a GPU
            if step % 20 == 0 or step == total_steps:
                if not loss.isfinite():
                    raise SystemExit(f"step {step}: the loss is {loss.item()}; try a lower --lr")
                perplexity = vqtriton.metrics.perplexity(batch_counts)
                bar.set_postfix(loss=f"{loss:.4f}", perplexity=f"{perplexity:.0f}")
        names = ("loss", "bce_nats", "codebook_term", "commitment_term")
        means = dict(zip(names, (sums / len(images)).tolist(), strict=True))
        means["perplexity"] = vqtriton.metrics.perplexity(counts).item()
        means["codes_used"] = (counts > 0).sum().item()
        history.append(means)
        # with moving averages there is no such term
        is_gradient = vq.codebook_update == "gradient"
        codebook_term = f"codebook {means['codebook_term']:.5f}  " if is_gradient else ""
        tqdm.write(
            f"epoch {epoch}/{args.epochs}  loss {means['loss']:.4f}  "
            f"bce {means['bce_nats']:.2f} nats  {codebook_term}"
            f"commitment {means['commitment_term']:.5f}  perplexity {means['perplexity']:.0f}  "
            f"used {means['codes_used']}/{vq.codebook_size}  {time.perf_counter() - start:.0f} s"
        )
    vq.threshold_ema_dead_code = args.threshold_ema_dead_code
    return history


@torch.no_grad()
def evaluate(model: VQVAE, images: Tensor, batch_size: int = 500) -> dict[str, float]:
    """What the model does with all the images."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=images.device)
    outputs = []
    for batch in images.split(batch_size):
        target = batch.float() / 255
        logits, x, (quantized, indices, _) = model(target)
        sq_error = (logits.sigmoid() - target).double().square().sum() / target[0].numel()
        # of a grey pixel, which is what no model can be below
        entropy = (torch.special.entr(target) + torch.special.entr(1 - target)).double().sum()
        sums += torch.stack([sq_error, bce_nats(logits, target) * len(batch), entropy])
        rows = [t.movedim(1, -1).flatten(0, -2) for t in (x, quantized)]
        outputs.append((*rows, indices.flatten()))
    x, quantized, indices = map(torch.cat, zip(*outputs, strict=True))
    counts = indices.bincount(minlength=model.vq.codebook_size)
    mse, bce, floor = (sums / len(images)).tolist()
    error = vqtriton.metrics.quantization_error(x, quantized)
    return {
        "test_mse": mse,
        "test_bce_nats": bce,
        "test_bce_floor_nats": floor,
        "perplexity": vqtriton.metrics.perplexity(counts).item(),
        "usage": vqtriton.metrics.usage(counts).item(),
        "codes_used": (counts > 0).sum().item(),
        "quantization_error": error.item(),
        # 1 would be a codebook with nothing but the mean
        "quantization_error_relative": (error / x.double().var(0, correction=0).sum()).item(),
    }


@torch.no_grad()
def draw_reconstructions(
    model: VQVAE, images: Tensor, labels: Tensor, rows: int = 3, scale: int = 3
) -> Image.Image:
    """A column for each digit; in each row an original above its reconstruction."""
    model.eval()
    chosen = torch.stack([(labels == digit).nonzero()[:rows, 0] for digit in range(10)], 1)
    originals = images[chosen.flatten()]
    logits, _, _ = model(originals.float() / 255)
    reconstructions = (logits.sigmoid() * 255).round().byte()
    # 28 pixels and a gap of 2 between columns, 2·28 and a gap of 6 between pairs
    sheet = np.full((rows * 62 - 6, 10 * 30 - 2), 128, dtype=np.uint8)
    for i, pair in enumerate(torch.cat([originals, reconstructions], 1).cpu().numpy()):
        top, left = i // 10 * 62, i % 10 * 30
        sheet[top : top + 56, left : left + 28] = pair
    return Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))


def save_results(
    out: Path, model: VQVAE, results: dict[str, object], reconstructions: Image.Image
) -> None:
    """Each file is replaced in one step, the metrics last: where they are, the rest is."""
    vqtriton.save(model.vq, out / "codebook.safetensors")
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    write_atomically(out / "model.safetensors", safetensors.torch.save(weights))
    png = io.BytesIO()
    reconstructions.save(png, "PNG")
    write_atomically(out / "reconstructions.png", png.getvalue())
    write_atomically(
        out / "metrics.json", (json.dumps(results, indent=2, default=str) + "\n").encode()
    )


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number in [low, high]."""
    wanted = "an integer" if kind is int else "a number"
    wanted += f" of at least {low}" + (f" and at most {high}" if high < math.inf else "")

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: it must be {wanted}")

    return parse


def device(text: str) -> torch.device:
    """An argparse type: a device that tensors can be put on."""
    try:
        tensor = torch.zeros(1, device=text)
        # the device "meta" makes tensors but no values
        tensor.item()
        return tensor.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(
        description="Train a VQ-VAE on MNIST and measure it on the whole test set.",
        # short, so that an error is not lost below a list of options
        usage="%(prog)s [--help] [options]",
        allow_abbrev=False,
    )

    def add(flag: str, *, help: str, **options: object) -> None:
        if "type" in options:
            options["metavar"] = "VALUE"
        if "default" in options:
            help += " (default: %(default)s)"
        parser.add_argument(flag, help=help, **options)

    add("--epochs", type=count, default=5, help="passes over the training set")
    add("--batch-size", type=count, default=256, help="images a step")
    add("--codebook-size", type=count, default=512, help="K, number of codes")
    add("--dim", type=count, default=32, help="D, size of a code")
    add("--codebook-update", choices=("ema", "gradient"), default="ema", help="how codes learn")
    add("--decay", type=number(float, 0, 1), default=0.99, help="of the EMA statistics")
    add("--commitment-weight", type=number(float, 0), default=0.25, help="β of the paper")
    add(
        "--kmeans-init",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start the codes from k-means of the first batch, not uniform in ±1/K",
    )
    add(
        "--threshold-ema-dead-code",
        type=number(float, 0),
        help="revive codes that fewer vectors a step choose, until 80 %% of training; 0 is never "
        f"(default: {REVIVE_BELOW} of an even share, batch · 49 / K)",
    )
    add("--lr", type=number(float, 1e-9), default=2e-3, help="peak of the OneCycle rate")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything random")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=best, help="where to train, as torch calls it")
    add("--data-dir", type=Path, help="folder with MNIST's four IDX files; else they are fetched")
    add("--limit", type=count, help="train on the first so many images only, to try things out")
    add("--out", type=Path, default=Path("runs/mnist"), help="folder for the results")
    args = parser.parse_args(argv)
    if args.threshold_ema_dead_code is None:
        args.threshold_ema_dead_code = REVIVE_BELOW * args.batch_size * 49 / args.codebook_size
    if args.data_dir is not None and not args.data_dir.is_dir():
        parser.error(f"argument --data-dir: {args.data_dir} is not a folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def main() -> None:
    # cuBLAS reads this when it starts; without it deterministic algorithms are refused
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = parse_args()
    # off the CPU an operation without a deterministic form warns, rather than end the run
    torch.use_deterministic_algorithms(True, warn_only=args.device.type != "cpu")
    # a help in finding bugs that costs some percent of the time
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    try:
        data = load_mnist(args.data_dir)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train_mnist.py: {error}") from error
    train_images = data.train_images[: args.limit].to(args.device)
    test_images, test_labels = data.test_images.to(args.device), data.test_labels.to(args.device)

    vq = vqtriton.VectorQuantize(
        args.dim,
        args.codebook_size,
        codebook_update=args.codebook_update,
        decay=args.decay,
        commitment_weight=args.commitment_weight,
        kmeans_init=args.kmeans_init,
        threshold_ema_dead_code=args.threshold_ema_dead_code,
        accept_image_fmap=True,
    )
    model = VQVAE(vq).to(args.device)
    start = time.perf_counter()
    history = train(model, train_images, args)
    results = evaluate(model, test_images)
    results |= {"epochs": args.epochs, "seed": args.seed, "seconds": time.perf_counter() - start}
    # what the same seed needs to give the same bits
    environment = {"vqtriton": vqtriton.__version__, "torch": torch.__version__}
    environment["threads"] = torch.get_num_threads()
    results |= {"history": history, "arguments": vars(args), "environment": environment}
    save_results(args.out, model, results, draw_reconstructions(model, test_images, test_labels))
    print(
        f"test  mse {results['test_mse']:.5f}  bce {results['test_bce_nats']:.2f} nats  "
        f"perplexity {results['perplexity']:.0f}  "
        f"used {results['codes_used']}/{args.codebook_size}  {results['seconds']:.0f} s\n"
        f"wrote {args.out}"
    )


if __name__ == "__main__":
    main()
