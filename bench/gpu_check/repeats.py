"""Bitwise repeats of searches and training steps while other work keeps the device busy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from bench.gpu_check.check import Check
from bench.gpu_check.exactness import Trial, make_data
from bench.gpu_check.training import UPDATES, Tensors, Training, differing
from vqtriton import ops

REPEATS, DRY_REPEATS = 50, 2
CASES = ("gaussian", "near_ties", "duplicates", "not_finite")


def run(check: Check) -> str:
    repeats = DRY_REPEATS if check.is_dry else REPEATS
    steps = make_steps(check)
    for name, step in steps.items():
        with check.step(name):
            if check.time_left() < 0:
                check.expect(False, f"{name}: the time was up")
                continue
            found = differences(step, repeats, check.device)
            check.note(step=name, repeats=repeats, differing=found)
            check.expect(not found, f"{name}: {', '.join(found)} differ in {repeats} repeats")
    return f"{repeats} repeats of {', '.join(steps)}"


def make_steps(check: Check) -> dict[str, Callable[[], Tensors]]:
    """Each takes the same step from the same start."""
    shapes = [(40, 24, 8)] if check.is_dry else [(200_000, 1000, 8), (50_000, 4001, 64)]
    cases = CASES[:2] if check.is_dry else CASES
    steps: dict[str, Callable[[], Tensors]] = {}
    for rows, codes, dim in shapes:
        for case in cases:
            x, codebook = make_data(Trial(case, rows, codes, dim, "float32", 0), check.device)

            def search(x=x, codebook=codebook) -> Tensors:
                out = ops.run_kernels(x, codebook, exact=True, gather=True)
                return {name: value for name, value in out._asdict().items() if value is not None}

            steps[f"search of {case}, D={dim}"] = search
        # directly: in the moving averages a difference in the last bit is rounded away
        x = torch.randn(rows, dim, device=check.device)
        spread = torch.randint(codes, (rows,), device=check.device)
        collapsed = torch.zeros_like(spread)
        for name, indices in (("spread", spread), ("collapsed", collapsed)):

            def sums(x=x, indices=indices, codes=codes) -> Tensors:
                return dict(
                    zip(("sums", "counts"), ops.code_sums(x, indices, codes, "triton"), strict=True)
                )

            steps[f"sums of {name} rows, D={dim}"] = sums
        for update in UPDATES:
            x, grad = (torch.randn(rows, dim, device=check.device) for _ in range(2))
            training = Training(update, dim, codes, check.device)

            def train(of=training, x=x, grad=grad) -> Tensors:
                of.reset()
                return of.step(x, grad) | of.state()

            steps[f"{update} step, D={dim}"] = train
    return steps


def differences(step: Callable[[], Tensors], repeats: int, device: torch.device) -> list[str]:
    """Outputs of which a repeat had other bits."""
    first = {name: value.clone() for name, value in step().items()}
    found: set[str] = set()
    for turn in range(repeats):
        with load(turn, device):
            found.update(differing(first, step()))
    return sorted(found)


@contextlib.contextmanager
def load(turn: int, device: torch.device) -> Iterator[None]:
    """Other addresses for what is allocated and, on a GPU, more or less other work beside it."""
    _held = torch.empty(1 + 40_961 * turn, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    side = torch.zeros(512 * (1 + turn % 4), 512, device=device)
    square = torch.zeros(512, 512, device=device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(8 * (turn % 5)):
            side = side @ square
    yield
    torch.cuda.current_stream().wait_stream(stream)
