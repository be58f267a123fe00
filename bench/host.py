"""What a call costs the host, without a GPU: ``python -m bench.host``.

*Operations* are what a device is asked for: launches of kernels, copies, memsets and torch's own
operations, counted on a stub of a GPU. On a GPU some of torch's take several launches (a sort takes
about ten), so a profiler counts more.

*Host µs* is the time until a call returns, where the kernels are compiled and their launches do
nothing: Python, checks, allocations, and how Triton packs arguments. It leaves out the driver's
part of a launch. Torch's operations are done on a CPU, on a few rows; what their launches on a GPU
would take is not known here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vqtriton
from bench.measure import quantile
from bench.provenance import ROOT
from vqtriton import dispatch

# the stubs are the tests'
sys.path.insert(0, str(ROOT / "tests"))

ROWS, CODES, DIM = 96, 64, 64
REPEATS = 200
Step = Callable[[], object]
Put = Callable[[Tensor], Tensor]


def steps(put: Put) -> dict[str, Step]:
    """What is counted and timed, on tensors where ``put`` puts them."""
    torch.manual_seed(0)
    x, codebook, grad = (put(torch.randn(n, DIM)) for n in (ROWS, CODES, ROWS))
    mask = put(torch.arange(ROWS) % 5 > 0)
    prepared = vqtriton.prepare_codebook(codebook, backend="triton")

    def module(is_training: bool = True, mask: Tensor | None = None, **options: Any) -> Step:
        vq = vqtriton.VectorQuantize(DIM, CODES, backend="triton", **options)
        vq.set_codebook(codebook.cpu())
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
            grads = [grad, torch.ones_like(loss)]
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


def host_us() -> dict[str, list[float]]:
    """Microseconds of each step, turn by turn."""
    import stub_driver

    stub_driver.install()
    found: dict[str, list[float]] = {}
    with only_kernels():
        taken = steps(lambda tensor: tensor)
        for turn in range(-3, REPEATS):
            for name, step in taken.items():
                start = time.perf_counter()
                step()
                if turn >= 0:
                    found.setdefault(name, []).append(1e6 * (time.perf_counter() - start))
    return found


def only_kernels() -> Any:
    """Kernels are launched wherever the tensors are."""
    return mock.patch.object(dispatch, "resolve_backend", _triton)


def _triton(backend: str, device: torch.device) -> str:
    # not a mock's own, which takes as long as a launch
    return "triton"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON, with each operation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, times = count(), host_us()
    if args.json:
        rows = {n: {"operations": counts[n], "host_us": quantile(times[n], 0.5)} for n in counts}
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'':<24}{'operations':>12}{'host µs':>9}{'p20 to p80':>16}")
    for name, of_step in counts.items():
        low, median, high = (quantile(times[name], q) for q in (0.2, 0.5, 0.8))
        spread = f"{low:.0f} to {high:.0f}"
        print(f"{name:<24}{of_step.total():>12}{median:>9.0f}{spread:>16}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
