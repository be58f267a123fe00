"""What a call costs the host, without a GPU: ``python -m bench.host [--before COMMIT]``.

*Operations* are what a device is asked for: launches of kernels, copies, memsets and torch's own
operations, counted on a stub of a GPU. On a GPU some of torch's take several launches (a sort takes
about ten), so a profiler counts more.

*Host µs* is the time until a call returns, where the kernels are compiled and their launches do
nothing: Python, checks, allocations, and how Triton packs arguments. It leaves out the driver's
part of a launch. Torch's operations are done on a CPU, on a few rows; what their launches on a GPU
would take is not known here. With ``--before`` another commit is timed as well, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vqtriton
from bench.provenance import ROOT

# the stubs are the tests'
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

ROWS, CODES, DIM = 96, 64, 64
REPEATS = 200
Step = Callable[[], object]
Put = Callable[[Tensor], Tensor]


def steps(put: Put) -> dict[str, Step]:
    """What is counted and timed, on tensors where ``put`` puts them."""
    torch.manual_seed(0)
    x, codebook, grad = (put(torch.randn(n, DIM)) for n in (ROWS, CODES, ROWS))
    mask, of_loss = put(torch.arange(ROWS) % 5 > 0), put(torch.ones(()))
    prepared = vqtriton.prepare_codebook(codebook, backend="triton")

    def module(is_training: bool = True, mask: Tensor | None = None, **options: Any) -> Step:
        vq = vqtriton.VectorQuantize(DIM, CODES, backend="triton", **options)
        with torch.no_grad():
            vq.codebook.copy_(codebook.cpu())
        for name, tensor in vq.named_buffers():
            vq._buffers[name] = put(tensor.detach().clone())
        for name, tensor in vq.named_parameters():
            vq._parameters[name] = torch.nn.Parameter(put(tensor.detach().clone()))
        vq.train(is_training)

        def infer() -> None:
            with torch.no_grad():
                vq(x, mask=mask)

        def train() -> None:
            leaf = x.detach().requires_grad_()
            quantized, _, loss = vq(leaf, mask=mask)
            grads = [grad, of_loss]
            torch.autograd.grad([quantized, loss], [leaf, *vq.parameters()], grads)

        return train if is_training else infer

    return {
        "nearest_code": lambda: vqtriton.nearest_code(x, codebook, backend="triton"),
        "nearest_code, prepared": lambda: vqtriton.nearest_code(x, prepared, backend="triton"),
        "module in eval": module(is_training=False),
        "EMA step": module(),
        "EMA step, mask": module(mask=mask),
        "EMA step, revival": module(threshold_ema_dead_code=0.5),
        "gradient step": module(codebook_update="gradient"),
        "gradient step, mask": module(mask=mask, codebook_update="gradient"),
        "gradient step, revival": module(codebook_update="gradient", threshold_ema_dead_code=0.5),
    }


def count() -> dict[str, Counter[str]]:
    """The operations of each step, by name."""
    from stub_device import CountingDevice
    from triton.runtime.jit import JITFunction

    device = CountingDevice()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: Any, **options: Any) -> None:
        device.counts[kernel.__name__] += 1

    found = {}
    with mock.patch.object(JITFunction, "run", launch), only_kernels(), device:
        for name, step in steps(device.put).items():
            # what is done once is not of a step
            step()
            device.counts.clear()
            step()
            found[name] = device.counts.copy()
    return found


def turns() -> Iterator[dict[str, float]]:
    """Microseconds of each step, turn by turn, for ever."""
    import stub_driver

    stub_driver.install()
    with only_kernels():
        taken = steps(lambda tensor: tensor)
        while True:
            # a process that has waited is slow at first
            for step in taken.values():
                step()
            found = {}
            for name, step in taken.items():
                start = time.perf_counter()
                step()
                found[name] = 1e6 * (time.perf_counter() - start)
            yield found


def host_us(roots: Sequence[Path] = (ROOT,)) -> list[dict[str, list[float]]]:
    """`turns` with the library of each folder, all in turn, each in a process of its own."""
    found: list[dict[str, list[float]]] = [{} for _ in roots]
    with ExitStack() as stack:
        workers = []
        for root in roots:
            command = [sys.executable, "-m", "bench.host", "--worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            worker = stack.enter_context(subprocess.Popen(command, cwd=root, **pipes))
            stack.callback(worker.stdin.close)
            workers.append(worker)
        for turn in range(-3, REPEATS):
            for worker, times in zip(workers, found, strict=True):
                worker.stdin.write("\n")
                worker.stdin.flush()
                for name, microseconds in json.loads(worker.stdout.readline()).items():
                    # the first ones compile
                    if turn >= 0:
                        times.setdefault(name, []).append(microseconds)
    return found


def only_kernels() -> Any:
    """Kernels are launched wherever the tensors are."""
    # in earlier commits this function was in `ops`
    name = "dispatch" if hasattr(vqtriton, "dispatch") else "ops"
    return mock.patch(f"vqtriton.{name}.resolve_backend", _triton)


def _triton(backend: str, device: torch.device) -> str:
    # not a mock's own, which takes as long as a launch
    return "triton"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON, with each operation")
    parser.add_argument("--before", metavar="COMMIT", help="time the library of this commit too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.worker:
        for _, found in zip(sys.stdin, turns(), strict=False):
            print(json.dumps(found), flush=True)
        return 0
    from bench.compare import checkout
    from bench.measure import quantile

    counts = count()
    with tempfile.TemporaryDirectory() as folder:
        before = [checkout(args.before, Path(folder) / "before")] if args.before else []
        *others, times = host_us([*before, ROOT])
    if args.json:
        rows = {n: {"operations": counts[n], "host_us": quantile(times[n], 0.5)} for n in counts}
        print(json.dumps(rows, indent=2))
        return 0
    columns = "".join(f"{f'µs at {args.before:.7}':>14}{'p20 to p80':>16}" for _ in others)
    print(f"{'':<24}{'operations':>12}{columns}{'host µs':>14}{'p20 to p80':>16}")
    for name, of_step in counts.items():
        text = f"{name:<24}{of_step.total():>12}"
        for found in (*others, times):
            low, median, high = (quantile(found[name], q) for q in (0.2, 0.5, 0.8))
            text += f"{median:>14.0f}{f'{low:.0f} to {high:.0f}':>16}"
        ratios = [quantile(found[name], 0.5) / quantile(times[name], 0.5) for found in others]
        print(text + "".join(f"  {ratio:.1f} times faster" for ratio in ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
