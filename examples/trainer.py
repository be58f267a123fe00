"""The loop that the trainers share: stopped at any step, it goes on to the same digits."""

from __future__ import annotations

import abc
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from progress import Progress, minutes
from run_files import claimed, save_checkpoint, with_prefix, write_atomically
from startup import SCRIPT
from torch import Tensor, nn

import vqtriton

# steps between two looks at the values: each look waits for the device
LOOK_EVERY = 20
# the part of the training in which codes are revived; they need some time to settle
REVIVE_UNTIL = 0.8

Values = dict[str, float]
Report = Callable[[Values, int], object]


def no_report(values: Values, step: int) -> None:
    pass


class Trainer(abc.ABC):
    """A model, its optimizer, and where the run stands: what a checkpoint holds.

    A subclass has `batches`, `train_on`, `end_epoch`, `publish` and `describe`.

    Args:
        args: flags; of them this class reads epochs, batch_size, lr, seed, device, out, resume,
            checkpoint and recorded.
        count: number of examples to train on; each rank gets the same number in every epoch.
        warmup: part of the steps in which the learning rate rises.
    """

    # what an example is called
    unit = "images"
    # the values that a line has room for
    shown: tuple[str, ...] = ("loss", "perplexity")

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        count: int,
        warmup: float = 0.3,
    ) -> None:
        self.args, self.model, self.optimizer, self.warmup = args, model, optimizer, warmup
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.available, self.count = count, count - count % self.world
        self.steps_per_epoch = math.ceil(self.count / args.batch_size)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        self.curve: list[Values] = []
        # sums over the epoch so far
        self.sums: dict[str, Tensor] = {}
        # the epochs at which the learning rate has come down; more than one in a run that was
        # given more epochs
        self.cycles: list[int] = [args.epochs]
        self._start_cycle()

    @abc.abstractmethod
    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[Any]:
        """What to train on, for the places of each batch."""

    @abc.abstractmethod
    def train_on(self, batch: Any, is_looked_at: bool) -> Values:
        """A step of the optimizer. The values to show; an empty dict unless it is looked at."""

    @abc.abstractmethod
    def end_epoch(self) -> dict[str, Any]:
        """What the epoch came to in training. All ranks call it."""

    @abc.abstractmethod
    def publish(self, record: dict[str, Any]) -> None:
        """Adds to the record what the model does on the test set, and writes pictures."""

    @abc.abstractmethod
    def describe(self, record: dict[str, Any]) -> str:
        """A record in words."""

    @property
    def total_steps(self) -> int:
        return self.cycles[-1] * self.steps_per_epoch

    @property
    def cycle(self) -> tuple[int, int]:
        """The first step of the cycle that this step is in, and the first after it."""
        ends = [0, *(epoch * self.steps_per_epoch for epoch in self.cycles)]
        return next(
            (begin, end)
            for begin, end in itertools.pairwise(ends)
            if self.step < end or end == ends[-1]
        )

    @property
    def revives(self) -> bool:
        """Whether dead codes are revived in this step."""
        begin, end = self.cycle
        return self.step - begin < REVIVE_UNTIL * (end - begin)

    def _start_cycle(self) -> None:
        begin, end = self.cycle
        steps = end - begin
        # a rise of exactly one step would divide by zero
        warmup = self.warmup if self.warmup * steps != 1 else 2 / steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, self.args.lr, total_steps=steps, pct_start=warmup
        )

    def run(self, open_report: Callable[[], Report] = lambda: no_report) -> None:
        """The whole run. Ends the program with a line and a status where it does not get there.

        Args:
            open_report: makes what is called with values and the step that they are of.
        """
        args = self.args
        if self.rank > 0:
            self._run(no_report)
            return
        if args.resume and not args.checkpoint:
            print(f"no checkpoint in {args.out}: starting from the beginning", file=sys.stderr)
        with claimed(args.out, args.resume):
            self._run(open_report())

    def _run(self, report: Report) -> None:
        args, is_first = self.args, self.rank == 0
        if args.checkpoint:
            try:
                self.restore(*args.checkpoint)
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise SystemExit(f"{SCRIPT}: {args.out} cannot be resumed: {reason}") from error
        elif is_first:
            self.save()
        if is_first:
            past = f", going on at step {self.step}" if self.step else ""
            print(
                f"Epochs: {self.cycles[-1]} of {self.steps_per_epoch} steps, on {self.count} "
                f"{self.unit}, on {args.device} with {torch.get_num_threads()} threads{past}.\n"
                f"Results: {args.out}. Ctrl-C stops, --resume goes on.",
                flush=True,
            )
        received = self._train(report)
        if is_first and received:
            self.save()
            print(f"stopped at step {self.step}; --resume goes on from there", file=sys.stderr)
        elif is_first:
            print_end(args, self.describe(self.log[-1]))
        if self.world > 1:
            dist.destroy_process_group()
        if received:
            raise SystemExit(128 + received)

    def _train(self, report: Report) -> int:
        """Trains to the end; 0, or the number of the signal that stopped it before."""
        args, epochs = self.args, self.cycles[-1]
        start = time.perf_counter() - self.seconds
        done = self.step // self.steps_per_epoch * self.count
        done += self.step % self.steps_per_epoch * args.batch_size
        progress = Progress(epochs * self.count, done, is_shown=self.rank == 0)
        with noticed_signals() as received, contextlib.closing(progress):
            while self.step < self.total_steps:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                title = f"epoch {epoch + 1} of {epochs}"
                places = self.order(epoch)[: self.count].split(args.batch_size)[first:]
                mine = [batch[self.rank :: self.world] for batch in places]
                if self.step == self.cycle[0]:
                    self._start_cycle()
                for batch, whole in zip(self.batches(mine, epoch), places, strict=True):
                    if self._is_stopped(received):
                        self.check_sums()
                        return received[0] if received else signal.SIGTERM
                    is_last = self.step + 1 == self.total_steps
                    values = self.train_on(batch, (self.step + 1) % LOOK_EVERY == 0 or is_last)
                    self.schedule.step()
                    self.step += 1
                    self.seconds = time.perf_counter() - start
                    if values:
                        self.curve.append({"step": self.step, **values})
                        progress.show({name: values[name] for name in self.shown})
                        report(values, self.step)
                    progress.advance(len(whole), title)
                record = self._end_epoch(epoch + 1)
                if self.rank == 0:
                    progress.write(f"{title}: {self.describe(record)}, {minutes(self.seconds)}")
                    report(record, self.step)
        return 0

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        self.check_sums()
        record = {"epoch": epoch} | self.end_epoch() | {"seconds": self.seconds}
        for tensor in self.sums.values():
            tensor.zero_()
        if self.rank == 0:
            self.publish(record)
            self.log.append(record)
            lines = "".join(json.dumps(line) + "\n" for line in self.log)
            write_atomically(self.args.out / "log.jsonl", lines.encode())
            content = json.dumps(record | self.facts(), indent=2) + "\n"
            write_atomically(self.args.out / "metrics.json", content.encode())
            self.save()
        return record

    def configs(self) -> dict[str, Any]:
        """What the model is made from again."""
        return {"model": self.model.config}

    def facts(self) -> dict[str, Any]:
        """All it takes to get the same result again."""
        environment = {"vqtriton": vqtriton.__version__, "torch": torch.__version__}
        # with others, floats add up in another order
        environment |= {"threads": torch.get_num_threads(), "ranks": self.world}
        environment |= {"device": str(self.args.device)}
        environment |= {"compile": getattr(self.args, "compile", False)}
        return {"arguments": self.args.recorded, "environment": environment}

    def order(self, epoch: int) -> Tensor:
        """The places of all examples, in the order of an epoch that is counted from 0."""
        return shuffled(self.args.seed, epoch, self.available)

    def check_sums(self) -> None:
        """Before they reach a checkpoint, which would be of no use."""
        for tensor in self.sums.values():
            self.check(self.sum(tensor.clone()).sum())

    def check(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise SystemExit(f"step {self.step}: the loss is {loss.item()}; try a lower --lr")

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def _is_stopped(self, received: list[int]) -> bool:
        """Whether any rank received a signal; asked at the same steps by all."""
        if self.world == 1 or self.step % LOOK_EVERY > 0:
            return self.world == 1 and bool(received)
        return self.sum(torch.tensor(len(received), device=self.args.device)).item() > 0

    def save(self) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for i, state in optimizer["state"].items():
            tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
        tensors |= self.sums | {"rng.cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.args.device)
        info = {name: getattr(self, name) for name in ("step", "seconds", "log", "curve", "cycles")}
        info |= {"groups": optimizer["param_groups"], "schedule": self.schedule.state_dict()}
        info |= {"arguments": self.args.recorded, "count": self.count} | self.configs()
        save_checkpoint(self.args.out / "checkpoint.safetensors", tensors, info)

    def restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """The inverse of `save`; then, the epochs that were asked for since are added."""
        if info.get("count", self.count) != self.count:
            raise ValueError(f"it was trained on {info['count']} {self.unit}, not {self.count}")
        self.model.load_state_dict(with_prefix(tensors, "model."))
        for name in ("step", "seconds", "log", "curve"):
            setattr(self, name, info[name])
        self.cycles = info.get("cycles", [info["arguments"]["epochs"]])
        if self.args.epochs > self.cycles[-1]:
            self.cycles = [*self.cycles, self.args.epochs]
        # it sets the learning rate, so it comes before the optimizer has its own
        self._start_cycle()
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in with_prefix(tensors, "optimizer.").items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": info["groups"]})
        self.schedule.load_state_dict(info["schedule"])
        for name, tensor in self.sums.items():
            tensor.copy_(tensors[name])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.args.device)


def make_repeatable(args: Namespace) -> None:
    """A run with the same flags will have the same result."""
    # off the CPU an operation without a deterministic form warns, rather than end the run
    torch.use_deterministic_algorithms(True, warn_only=args.device.type != "cpu")
    # a help in finding bugs that costs some percent of the time
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)


def end_if_complete(args: Namespace, describe: Callable[[dict[str, Any]], str]) -> None:
    """Ends the program where the run to resume has all the epochs that are asked for."""
    if args.checkpoint:
        log = args.checkpoint[1].get("log", [])
        if len(log) == args.epochs:
            if int(os.environ.get("RANK", 0)) > 0:
                raise SystemExit(0)
            print(f"already complete ({len(log)} of {args.epochs} epochs)")
            print_end(args, describe(log[-1]))
            print(f"More: --resume --epochs {2 * len(log)}. Anew: without --resume.")
            raise SystemExit(0)


def print_end(args: Namespace, text: str) -> None:
    """What came out, and where it is."""
    names = sorted(path.name for path in args.out.iterdir() if path.is_file())
    print(f"Result: {text}.\n{args.out}: {', '.join(names)}", flush=True)


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
