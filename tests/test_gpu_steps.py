"""Steps again, replayed and compiled: bit for bit what they were."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, REAL_DEVICE
from gpu_check import IS_FULL, UPDATES, Tensors, Training, differing, hard_data, note
from torch import Tensor

from vqtriton import ops, torch_backend, triton_backend

# bench is not installed, and plain `pytest` does not look for modules in the root
sys.path.insert(0, str(Path(__file__).parents[1]))
checks = importlib.import_module("bench.check")
captured = pytest.importorskip("vqtriton.tuning.measure").captured

# N, K, D
SHAPES = ((16384, 1024, 8), (16384, 4001, 64)) if IS_FULL else ((40, 24, 8),)
REPEATS, TURNS = (50, 4) if IS_FULL else (2, 2)
CASES = ("gaussian", "near_ties", "duplicates", "not_finite")
# two batch sizes make the size dynamic
COMPILED_ROWS = (4096, 6000, 10_000) if IS_FULL else (24, 40)


# --- the same step again, beside other work ---


def make_step(what: str, rows: int, codes: int, dim: int) -> Callable[[], Tensors]:
    """Takes the same step from the same start."""
    if what in UPDATES:
        training = Training(what, dim, codes, DEVICE)
        x, grad = (torch.randn(rows, dim).to(DEVICE) for _ in range(2))

        def train() -> Tensors:
            training.reset()
            return training.step(x, grad) | training.state()

        return train
    if what in ("spread", "collapsed"):
        # directly: in the moving averages a difference in the last bit is rounded away
        x, indices = torch.randn(rows, dim).to(DEVICE), torch.randint(codes, (rows,))
        indices = (indices if what == "spread" else torch.zeros_like(indices)).to(DEVICE)
        return lambda: dict(
            zip(("sums", "counts"), ops.code_sums(x, indices, codes, "triton"), strict=True)
        )
    x, codebook = hard_data(what, rows, codes, dim, DEVICE)

    def search() -> Tensors:
        out = triton_backend.run_kernels(x, codebook, exact=True, gather=True, reduction="mean")
        names = ("indices", "quantized", "losses", "loss", "num_doubtful")
        return {name: getattr(out, name) for name in names}

    return search


def differences(step: Callable[[], Tensors], repeats: int) -> list[str]:
    """Outputs of which a repeat had other bits."""
    first = {name: value.clone() for name, value in step().items()}
    found: set[str] = set()
    for turn in range(repeats):
        with load(turn):
            found.update(differing(first, step()))
    return sorted(found)


@contextlib.contextmanager
def load(turn: int) -> Iterator[None]:
    """Other addresses for what is allocated and, on a GPU, more or less other work beside it."""
    _held = torch.empty(1 + 40_961 * turn, dtype=torch.uint8, device=DEVICE)
    if not IS_FULL:
        yield
        return
    stream = torch.cuda.Stream()
    side = torch.zeros(512 * (1 + turn % 4), 512, device=DEVICE)
    square = torch.zeros(512, 512, device=DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(8 * (turn % 5)):
            side = side @ square
    yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", [*CASES, "spread", "collapsed", *UPDATES])
def test_the_same_step_again_is_the_same(what: str, shape: tuple[int, int, int]) -> None:
    found = differences(make_step(what, *shape), REPEATS)
    note("repeats", step=what, shape=shape, repeats=REPEATS, differing=found)
    assert not found


def test_a_result_that_does_not_repeat_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    turns = iter(range(100))

    def step(odd: int) -> Tensors:
        value = torch.ones(9)
        # the last bit of one element, in one repeat of five
        value.view(torch.int32)[4] ^= next(turns) == odd
        return {"steady": torch.tensor([torch.nan]), "loss": value}

    assert differences(lambda: step(3), 5) == ["loss"]
    assert differences(lambda: step(-1), 5) == []


def test_sums_whose_last_bit_does_not_repeat_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    turn = 0

    def restless(x: Tensor, indices: Tensor, codebook_size: int, backend: str):
        nonlocal turn
        turn += 1
        sums, counts = torch_backend.code_sums(x, indices, codebook_size)
        if turn % 2:
            fullest = counts.argmax()
            sums[fullest, 0] = sums[fullest, 0].nextafter(torch.tensor(torch.inf))
        return sums, counts

    monkeypatch.setattr(ops, "code_sums", restless)
    for what in ("spread", "collapsed"):
        assert differences(make_step(what, 40, 24, 8), 2) == ["sums"]


# --- CUDA graphs: what is captured once gives, replayed on new inputs, the bits of eager ---


def capture(step: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """What replays the step, which is run and then captured; on a CPU the step itself."""
    if not IS_FULL:
        return step
    outputs: Tensors = {}
    replay = captured(lambda: outputs.update(step()))

    def replayed() -> Tensors:
        replay()
        return outputs

    return replayed


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("update", UPDATES)
def test_a_replayed_training_is_an_eager_one(update: str, shape: tuple[int, int, int]) -> None:
    """Steps that follow one another, so that the codebook of one is what the last has learned."""
    rows, codes, dim = shape
    eager, captured = (Training(update, dim, codes, DEVICE) for _ in range(2))
    x, grad = (torch.zeros(rows, dim, device=DEVICE) for _ in range(2))
    replay = capture(lambda: captured.step(x, grad))
    captured.reset()
    for turn in range(TURNS):
        for buffer in (x, grad):
            buffer.copy_(torch.randn(rows, dim))
        # not the buffers themselves, which a replay could be right about by chance
        want = eager.step(x.clone(), grad.clone()) | eager.state()
        found = differing(want, replay() | captured.state())
        note("graphs", step=update, shape=shape, turn=turn, differing=found)
        assert not found


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_a_replayed_search_is_an_eager_one(shape: tuple[int, int, int]) -> None:
    """With more, fewer and all rows in doubt than when it was captured."""
    rows, codes, dim = shape
    x, codebook = (torch.zeros(n, dim, device=DEVICE) for n in (rows, codes))

    def search() -> Tensors:
        out = triton_backend.run_kernels(x, codebook, exact=True)
        return {"indices": out.indices[0], "num_doubtful": out.num_doubtful}

    replay = capture(search)
    doubtful = []
    for case in ("gaussian", "near_ties", "collapsed", "gaussian"):
        for buffer, values in zip((x, codebook), hard_data(case, *shape, DEVICE, 1), strict=True):
            buffer.copy_(values)
        found = {name: value.clone() for name, value in replay().items()}
        doubtful.append(int(found["num_doubtful"]))
        wrong = int((found["indices"] != checks.nearest_codes(x, codebook)).sum())
        note("graphs", step=case, shape=shape, mismatches=wrong, in_doubt=doubtful[-1])
        assert wrong == 0
        assert not differing(search(), found)
    assert max(doubtful) > min(doubtful)


@pytest.mark.kernel
@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
def test_a_replay_of_old_inputs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(step: Callable[[], Tensors]) -> Callable[[], Tensors]:
        outputs = step()
        return lambda: outputs

    monkeypatch.setattr(sys.modules[__name__], "capture", capture)
    with pytest.raises(AssertionError):
        test_a_replayed_search_is_an_eager_one(SHAPES[0])
    with pytest.raises(AssertionError):
        test_a_replayed_training_is_an_eager_one("ema", SHAPES[0])


# --- torch.compile ---


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.real_device
@pytest.mark.parametrize("update", UPDATES)
def test_a_compiled_training_is_an_eager_one(update: str) -> None:
    dim, codes = (64, 1024) if IS_FULL else (8, 24)
    eager, compiled = (Training(update, dim, codes, REAL_DEVICE) for _ in range(2))
    compiled.forward = torch.compile(compiled.module, fullgraph=True)
    for rows in COMPILED_ROWS:
        x, grad = (torch.randn(rows, dim, device=REAL_DEVICE) for _ in range(2))
        want = eager.step(x, grad) | eager.state()
        found = compiled.step(x, grad) | compiled.state()
        bits = differing(want, found)
        note("compiled", update=update, rows=rows, differing_in_bits=bits)
        assert "indices" not in bits
        assert "quantized" not in bits
        # the compiler may sum in another order, so the rest is held to rounding
        torch.testing.assert_close(found, want)
        # and rounding is not to grow
        compiled.set(eager.state())


@pytest.mark.kernel
@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
@pytest.mark.real_device
def test_a_compiled_step_with_another_index_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(module: torch.nn.Module, fullgraph: bool) -> Callable:
        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            quantized, indices, loss = module(x)
            return quantized, torch.cat([indices[:1] + 1, indices[1:]]), loss

        return forward

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(AssertionError):
        test_a_compiled_training_is_an_eager_one("ema")
