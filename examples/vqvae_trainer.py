"""Trains a VQ-VAE: the part that train_mnist.py and train_images.py share."""

from __future__ import annotations

import hashlib
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import plots
import torch
import torch.distributed as dist
from run_files import write_atomically
from startup import SCRIPT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from trainer import Report, Trainer, Values, end_if_complete, make_repeatable, no_report
from vqvae import VQVAE

import vqtriton


class Images(Protocol):
    """What to train on and to test with: images uint8 [B, C, H, W]."""

    # number of images to train on, and what they are called
    count: int
    unit: str
    # differs where the images do
    fingerprint: str
    # to be shown above their reconstructions, [rows, columns, C, H, W]
    shown: Tensor

    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[Tensor]:
        """The training images at the places of each batch."""

    def test_batches(self) -> Iterable[Tensor]:
        """The whole test set."""


def describe(record: dict[str, Any]) -> str:
    """What a model does on the test set, in words."""
    nats = record.get("test_bce_nats")
    codebook_size = round(record["codes_used"] / record["usage"])
    return (
        f"on the test set MSE {record['test_mse']:.4g}"
        + (f", BCE {nats:.4g} nats an image" if nats is not None else "")
        + f", perplexity {record['perplexity']:.3g}, "
        f"{record['codes_used']} of {codebook_size} codes used"
    )


class VQVAETrainer(Trainer):
    describe = staticmethod(describe)

    def __init__(self, args: Namespace, model: VQVAE, images: Images) -> None:
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
        super().__init__(args, model, optimizer, images.count)
        self.images, self.vq, self.unit = images, model.vq, images.unit
        double = {"dtype": torch.float64, "device": args.device}
        # loss terms; how often each code was chosen
        self.sums = {"sums": torch.zeros(3, **double)}
        self.sums["counts"] = torch.zeros(args.codebook_size, **double)
        # counts the codes of recent steps, which are then added to the sums: no step waits for that
        self.meter = vqtriton.metrics.Meter(args.codebook_size)
        self.digests: list[str] = []
        eager = DistributedDataParallel(model) if self.world > 1 else model
        self.eager = self.forward = eager

    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[Tensor]:
        return self.images.batches(places, epoch)

    def train_on(self, batch: Tensor, is_looked_at: bool) -> Values:
        args, vq, model = self.args, self.vq, self.model
        vq.threshold_ema_dead_code = args.threshold_ema_dead_code if self.revives else 0
        model.train()
        target = batch.to(args.device).float() / 255
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output, _, (_, indices, vq_loss) = self.forward(target)
        reconstruction = model.reconstruction_loss(output.float(), target)
        loss = args.reconstruction_weight * reconstruction + vq_loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if args.compile and self.forward is self.eager:
            # the first step may start the codebook from data, which no graph can hold
            self.forward = torch.compile(self.eager)

        self.meter.update(indices)
        terms = torch.stack([loss, reconstruction, vq_loss]).detach()
        self.sums["sums"] += terms * len(target)
        if not is_looked_at:
            return {}
        self.check(loss)
        counts = vqtriton.metrics.counts(indices, vq.codebook_size)
        measures = vqtriton.metrics.perplexity(counts), vqtriton.metrics.usage(counts)
        # one wait for all
        values = torch.stack([loss.double(), reconstruction.double(), *measures]).tolist()
        return dict(zip(("loss", "reconstruction", "perplexity", "usage"), values, strict=True))

    def check_sums(self) -> None:
        self.sums["counts"] += self.meter.compute(sync=False).counts.to(self.args.device)
        self.meter.reset()
        super().check_sums()

    def end_epoch(self) -> dict[str, Any]:
        vq = self.vq
        self.sum(self.sums["sums"])
        loss, reconstruction, vq_loss = (self.sums["sums"] / self.count).tolist()
        # the two terms have the value of the same squared error; they differ in whom they move
        codebook_weight = vq.codebook_weight if vq.codebook_update == "gradient" else 0.0
        error = vq_loss / ((codebook_weight + vq.commitment_weight) or 1.0)
        codebook = vq.codebook.detach().cpu().numpy().tobytes()
        self.digests = [hashlib.sha256(codebook).hexdigest()] * self.world
        if self.world > 1:
            dist.all_gather_object(self.digests, self.digests[0])
        return {
            "loss": loss,
            "reconstruction": reconstruction,
            "codebook_term": codebook_weight * error,
            "commitment_term": vq.commitment_weight * error,
            "train_perplexity": vqtriton.metrics.perplexity(self.sum(self.sums["counts"])).item(),
        }

    def publish(self, record: dict[str, Any]) -> None:
        model = self.model
        metrics, counts = evaluate(model, self.images.test_batches(), self.args.device)
        record |= metrics
        shown = self.images.shown
        originals = shown.flatten(0, 1).to(self.args.device)
        reconstructions = model.decode(model.encode(originals)).view_as(shown)
        for name, content in {
            "reconstructions.png": plots.pairs(shown, reconstructions),
            "usage.png": plots.usage_histogram(counts),
            "curves.png": plots.training_curves({"": self.curve}, len(counts)),
        }.items():
            write_atomically(self.args.out / name, content)

    def configs(self) -> dict[str, Any]:
        images = self.images.fingerprint
        return super().configs() | {"quantizer": self.vq.config, "images": images}

    def restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        if info.get("images", "") != self.images.fingerprint:
            raise ValueError("it was trained on other images: one was added, renamed or taken away")
        super().restore(tensors, info)

    def facts(self) -> dict[str, Any]:
        return {"codebook_sha256": self.digests} | super().facts()


@torch.no_grad()
def evaluate(
    model: VQVAE, batches: Iterable[Tensor], device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """What the model does with all the images, and how often it chooses each code."""
    model.eval()
    meter = vqtriton.metrics.Meter(model.vq.codebook_size)
    double = {"dtype": torch.float64, "device": device}
    # sums over the images: squared error, nats, entropy; over the encoder's vectors: error of
    # quantization, squared norm, the vector itself
    sums, vectors = torch.zeros(3, **double), torch.zeros(2 + model.vq.dim, **double)
    number = 0
    for batch in batches:
        target = batch.to(device).float() / 255
        number += len(target)
        output, x, (quantized, indices, _) = model(target)
        sq_error = (model.pixels(output) - target).double().square().sum() / target[0].numel()
        nats = model.reconstruction_loss(output, target).double() * target.numel()
        # the entropy of the pixels as Bernoulli variables: no model has fewer nats
        floor = (torch.special.entr(target) + torch.special.entr(1 - target)).double().sum()
        sums += torch.stack([sq_error, nats, floor])
        rows, codes = (t.movedim(1, -1).flatten(0, -2) for t in (x.double(), quantized))
        error = vqtriton.metrics.quantization_error(rows, codes) * len(rows)
        vectors += torch.cat([torch.stack([error, rows.square().sum()]), rows.sum(0)])
        meter.update(indices)
    # this rank alone evaluates, so there is nothing to add up
    counts, perplexity, usage = meter.compute(sync=False)
    mse, nats, floor = (sums / number).tolist()
    error, square, *mean = (vectors / counts.sum()).tolist()
    metrics = {"test_mse": mse}
    if model.reconstruction == "bce":
        metrics |= {"test_bce_nats": nats, "test_bce_floor_nats": floor}
    metrics |= {
        "perplexity": perplexity.item(),
        "usage": usage.item(),
        "codes_used": (counts > 0).sum().item(),
        "quantization_error": error,
        # 1 would be a codebook with nothing but the mean
        "quantization_error_relative": error / (square - sum(value**2 for value in mean)),
    }
    return metrics, counts


def open_report(args: Namespace) -> Report:
    """Where the values go beside the folder: TensorBoard, Weights & Biases, or nowhere."""
    try:
        if args.log_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(args.out / "tensorboard")
            return lambda values, step: [writer.add_scalar(*item, step) for item in values.items()]
        if args.log_to == "wandb":
            import wandb

            run = wandb.init(project="vqtriton", dir=args.out, config=args.recorded)
            return lambda values, step: run.log(values, step=step)
    except ImportError as error:
        raise SystemExit(
            f"{SCRIPT}: --log-to {args.log_to}: {error}; pip install '.[logging]'"
        ) from error
    return no_report


def train(args: Namespace, load: Callable[[], Images], **config: int) -> None:
    """The whole program, once its flags are read.

    Args:
        args: see `train_args.parse_args`.
        load: makes the images ready. An error ends the program with one line.
        config: arguments of the model that no flag sets.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    end_if_complete(args, describe)
    if world > 1:
        # about the weights of a single channel, whose strides can be written in two ways
        warnings.filterwarnings("ignore", "Grad strides do not match")
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    make_repeatable(args)
    try:
        images = load()
    except ValueError as error:
        raise SystemExit(f"{SCRIPT}: {error}") from error
    vq = vqtriton.VectorQuantize(**args.quantizer)
    model = VQVAE(vq, args.channels, args.reconstruction, **config).to(args.device)
    VQVAETrainer(args, model, images).run(lambda: open_report(args))
