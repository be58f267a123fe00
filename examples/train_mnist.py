"""Trains a VQ-VAE on MNIST or Fashion-MNIST: two or three minutes on two CPU cores.

    python examples/train_mnist.py
    python examples/train_mnist.py --resume
    python examples/train_mnist.py --dataset fashion-mnist --out runs/fashion-mnist
    torchrun --nproc-per-node 2 examples/train_mnist.py --device cpu

An image of 28×28 pixels becomes a grid of 7×7 indices. The loss is that of the paper (van den Oord
et al. 2017, arXiv:1711.00937, equation 3); its KL term is the constant 49·log K, which is left out.

The folder ``--out`` gets log.jsonl, a line an epoch; checkpoint.safetensors, from which --resume
goes on as if nothing had happened; pictures; and at the end metrics.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import plots
import torch
import torch.distributed as dist
from checkpoints import save_checkpoint, with_prefix, write_atomically
from mnist_data import Data, load
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from train_args import parse_args
from vqvae import VQVAE

import vqtriton

# steps between two looks at the values: each look waits for the device
LOOK_EVERY = 20
# the part of the training in which codes are revived; they need some time to settle
REVIVE_UNTIL = 0.8

Report = Callable[[dict[str, float], int], object]


class Trainer:
    """A model, its optimizer, and where the run stands: what a checkpoint holds."""

    def __init__(self, args: Namespace, num_images: int, rank: int, world: int) -> None:
        self.args, self.rank, self.world = args, rank, world
        vq = vqtriton.VectorQuantize(**args.quantizer)
        self.model = VQVAE(vq, args.channels, args.reconstruction).to(args.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr)
        # as many for every rank
        self.num_images = num_images - num_images % world
        self.steps_per_epoch = math.ceil(self.num_images / args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, args.lr, total_steps=self.total_steps
        )
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        self.curve: list[dict[str, float]] = []
        # of the epoch so far: loss terms, and how often each code was chosen
        self.sums = torch.zeros(3, dtype=torch.float64, device=args.device)
        self.counts = torch.zeros(args.codebook_size, dtype=torch.float64, device=args.device)

    def save(self) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for i, state in optimizer["state"].items():
            tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
        tensors |= {"sums": self.sums, "counts": self.counts, "rng.cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.args.device)
        info = {name: getattr(self, name) for name in ("step", "seconds", "log", "curve")}
        info |= {"groups": optimizer["param_groups"], "schedule": self.schedule.state_dict()}
        info |= {"arguments": self.args.recorded, "quantizer": self.model.vq.config}
        save_checkpoint(self.args.out / "checkpoint.safetensors", tensors, info)

    def restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """The inverse of `save`."""
        self.model.load_state_dict(with_prefix(tensors, "model."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in with_prefix(tensors, "optimizer.").items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": info["groups"]})
        self.schedule.load_state_dict(info["schedule"])
        self.sums.copy_(tensors["sums"])
        self.counts.copy_(tensors["counts"])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.args.device)
        for name in ("step", "seconds", "log", "curve"):
            setattr(self, name, info[name])

    def train(self, data: Data, report: Report) -> int:
        """Trains to the end; 0, or the number of the signal that stopped it before."""
        args = self.args
        eager = DistributedDataParallel(self.model) if self.world > 1 else self.model
        forward = eager
        start = time.perf_counter() - self.seconds
        options = {"unit": "image", "leave": False, "disable": self.rank > 0 or None}
        options |= {"total": args.epochs * self.num_images, "initial": self.step * args.batch_size}
        with noticed_signals() as received, tqdm(**options) as bar:
            while self.step < self.total_steps:
                epoch, i = divmod(self.step, self.steps_per_epoch)
                if self._is_stopped(received):
                    self._check_loss(self.sums[0])
                    return received[0] if received else signal.SIGTERM
                order = shuffled(args.seed, epoch, len(data.train_images))[: self.num_images]
                batch = order[i * args.batch_size : (i + 1) * args.batch_size]
                mine = batch[self.rank :: self.world].to(args.device)
                values = self._step(forward, data.train_images[mine].float() / 255)
                if args.compile and forward is eager:
                    # the first step may start the codebook from data, which no graph can hold
                    forward = torch.compile(eager)
                self.seconds = time.perf_counter() - start
                bar.update(len(batch))
                if values:
                    bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
                    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
                    report(values, self.step)
                if self.step % self.steps_per_epoch == 0:
                    record = self._end_epoch()
                    if self.rank == 0:
                        self._publish(record, data)
                        report(record, self.step)
        return 0

    def _step(self, forward: torch.nn.Module, target: Tensor) -> dict[str, float]:
        """Trains on images [B, 28, 28] in [0, 1]; now and then tells how it goes."""
        args, vq = self.args, self.model.vq
        is_young = self.step < REVIVE_UNTIL * self.total_steps
        vq.threshold_ema_dead_code = args.threshold_ema_dead_code if is_young else 0
        self.model.train()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output, _, (_, indices, vq_loss) = forward(target)
        reconstruction = self.model.reconstruction_loss(output.float(), target)
        loss = args.reconstruction_weight * reconstruction + vq_loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

        counts = vqtriton.metrics.counts(indices, vq.codebook_size)
        self.counts += counts
        self.sums += torch.stack([loss, reconstruction, vq_loss]).detach() * len(target)
        if self.step % LOOK_EVERY > 0 and self.step < self.total_steps:
            return {}
        self._check_loss(loss)
        values = {"loss": loss.item(), "reconstruction": reconstruction.item()}
        values["perplexity"] = vqtriton.metrics.perplexity(counts).item()
        values["usage"] = vqtriton.metrics.usage(counts).item()
        self.curve.append({"step": self.step, **values})
        return values

    def _check_loss(self, loss: Tensor) -> None:
        """Before it reaches a checkpoint, which would be of no use."""
        if not loss.isfinite():
            raise SystemExit(f"step {self.step}: the loss is {loss.item()}; try a lower --lr")

    def _end_epoch(self) -> dict[str, float]:
        """What the epoch came to, over all ranks."""
        vq = self.model.vq
        self._check_loss(self._sum(self.sums)[0])
        loss, reconstruction, vq_loss = (self.sums / self.num_images).tolist()
        # the two terms have the value of the same squared error; they differ in whom they move
        codebook_weight = vq.codebook_weight if vq.codebook_update == "gradient" else 0.0
        error = vq_loss / ((codebook_weight + vq.commitment_weight) or 1.0)
        perplexity = vqtriton.metrics.perplexity(self._sum(self.counts)).item()
        self.sums.zero_()
        self.counts.zero_()
        return {
            "epoch": self.step // self.steps_per_epoch,
            "loss": loss,
            "reconstruction": reconstruction,
            "codebook_term": codebook_weight * error,
            "commitment_term": vq.commitment_weight * error,
            "train_perplexity": perplexity,
            "seconds": self.seconds,
        }

    def _publish(self, record: dict[str, float], data: Data) -> None:
        """Measures the model on the test set, and writes all that a run leaves."""
        metrics, counts = evaluate(self.model, data.test_images)
        record |= metrics
        self.log.append(record)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
        # three originals of each class above their reconstructions
        chosen = [(data.test_labels == label).nonzero()[:3, 0] for label in range(10)]
        originals = data.test_images[torch.stack(chosen, 1)]
        reconstructions = self.model.decode(self.model.encode(originals.flatten(0, 1)))
        pairs = torch.cat([originals, reconstructions.view_as(originals)], 1).flatten(0, 1)
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        for name, content in {
            "log.jsonl": lines.encode(),
            "reconstructions.png": plots.tile(pairs, columns=10),
            "usage.png": plots.usage_histogram(counts),
            "curves.png": plots.training_curves({"": self.curve}, len(counts)),
        }.items():
            write_atomically(self.args.out / name, content)
        self.save()

    def finish(self) -> None:
        """Writes metrics.json: what the model came to, and all it takes to get there again."""
        codebook = self.model.vq.codebook.detach().cpu().numpy().tobytes()
        digests = [hashlib.sha256(codebook).hexdigest()] * self.world
        if self.world > 1:
            dist.all_gather_object(digests, digests[0])
        if self.rank > 0:
            return
        environment = {"vqtriton": vqtriton.__version__, "torch": torch.__version__}
        # with others, floats add up in another order
        environment |= {"threads": torch.get_num_threads(), "ranks": self.world}
        environment |= {"device": str(self.args.device), "compile": self.args.compile}
        results = self.log[-1] | {"codebook_sha256": digests}
        results |= {"arguments": self.args.recorded, "environment": environment}
        content = json.dumps(results, indent=2) + "\n"
        write_atomically(self.args.out / "metrics.json", content.encode())

    def _is_stopped(self, received: list[int]) -> bool:
        """Whether any rank received a signal; asked at the same steps by all."""
        if self.world == 1 or self.step % LOOK_EVERY > 0:
            return self.world == 1 and bool(received)
        return self._sum(torch.tensor(len(received), device=self.args.device)).item() > 0

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def noticed_signals() -> Iterator[list[int]]:
    """The numbers of SIGINT and SIGTERM as they come; a second one ends the program at once."""
    received: list[int] = []

    def notice(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {n: signal.signal(n, notice) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@lru_cache(1)
def shuffled(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch: of nothing else, so that a resumed one goes on in the same."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))


@torch.no_grad()
def evaluate(
    model: VQVAE, images: Tensor, batch_size: int = 500
) -> tuple[dict[str, float], Tensor]:
    """What the model does with all the images, and how often it chooses each code."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=images.device)
    parts = []
    for batch in images.split(batch_size):
        target = batch.float() / 255
        output, x, (quantized, indices, _) = model(target)
        sq_error = (model.pixels(output) - target).double().square().sum() / target[0].numel()
        nats = model.reconstruction_loss(output, target).double() * target.numel()
        # of grey pixels as Bernoulli variables: no model can be below
        floor = (torch.special.entr(target) + torch.special.entr(1 - target)).double().sum()
        sums += torch.stack([sq_error, nats, floor])
        rows = [t.movedim(1, -1).flatten(0, -2) for t in (x, quantized)]
        parts.append((*rows, indices.flatten()))
    x, quantized, indices = map(torch.cat, zip(*parts, strict=True))
    counts = vqtriton.metrics.counts(indices, model.vq.codebook_size)
    mse, nats, floor = (sums / len(images)).tolist()
    metrics = {"test_mse": mse}
    if model.reconstruction == "bce":
        metrics |= {"test_bce_nats": nats, "test_bce_floor_nats": floor}
    error = vqtriton.metrics.quantization_error(x, quantized)
    metrics |= {
        "perplexity": vqtriton.metrics.perplexity(counts).item(),
        "usage": vqtriton.metrics.usage(counts).item(),
        "codes_used": (counts > 0).sum().item(),
        "quantization_error": error.item(),
        # 1 would be a codebook with nothing but the mean
        "quantization_error_relative": (error / x.double().var(0, correction=0).sum()).item(),
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
            f"train_mnist.py: --log-to {args.log_to}: {error}; pip install 'vqtriton[logging]'"
        ) from error
    return lambda values, step: None


def main(argv: list[str] | None = None) -> None:
    # cuBLAS reads this when it starts; without it deterministic algorithms are refused
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if world > 1:
        # about the weights of a single channel, whose strides can be written in two ways
        warnings.filterwarnings("ignore", "Grad strides do not match")
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    # off the CPU an operation without a deterministic form warns, rather than end the run
    torch.use_deterministic_algorithms(True, warn_only=args.device.type != "cpu")
    # a help in finding bugs that costs some percent of the time
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    try:
        data = load(args.dataset, args.data_dir)
    except ValueError as error:
        raise SystemExit(f"train_mnist.py: {error}") from error
    report = open_report(args) if rank == 0 else lambda values, step: None
    data = Data(*(tensor.to(args.device) for tensor in data))
    data = data._replace(train_images=data.train_images[: args.limit])

    trainer = Trainer(args, len(data.train_images), rank, world)
    if args.checkpoint:
        try:
            trainer.restore(*args.checkpoint)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(f"train_mnist.py: this checkpoint is of no use: {reason}") from error
    elif args.resume:
        print(f"no checkpoint in {args.out}: starting from the beginning", file=sys.stderr)
    if rank == 0:
        (args.out / "metrics.json").unlink(missing_ok=True)
        if not args.resume and (old := args.out / "checkpoint.safetensors").exists():
            # somebody may have forgotten --resume
            old.replace(args.out / "previous.safetensors")
        trainer.save()
    received = trainer.train(data, report)
    if received == 0:
        trainer.finish()
    elif rank == 0:
        trainer.save()
        print(f"stopped at step {trainer.step}; --resume goes on from there", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()
    if received:
        raise SystemExit(128 + received)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        raise SystemExit(f"train_mnist.py: {error}") from error
