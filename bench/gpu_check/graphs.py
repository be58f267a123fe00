"""CUDA graphs: what is captured once gives, replayed on new inputs, the bits of eager."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.check import nearest_codes
from bench.gpu_check.check import Check, Skipped
from bench.gpu_check.exactness import Trial, make_data
from bench.gpu_check.training import UPDATES, Tensors, Training, differing
from vqtriton import ops

TURNS = 4


def run(check: Check) -> str:
    shapes = [(40, 24, 8)] if check.is_dry else [(16384, 1024, 8), (16384, 4001, 64)]
    turns = 2 if check.is_dry else TURNS
    for rows, codes, dim in shapes:
        for update in UPDATES:
            with check.step(f"{update} step, D={dim}"):
                check_training(check, update, turns, rows, codes, dim)
        with check.step(f"search, D={dim}"):
            check_search(check, rows, codes, dim)
    if check.is_dry and not check.failures:
        raise Skipped("a CPU has no CUDA graphs; the steps ran, each beside itself")
    return f"{TURNS} replays of a search and of steps with {', '.join(UPDATES)}"


def capture(step: Callable[[], Tensors], device: torch.device) -> Callable[[], Tensors]:
    """Runs the step some times, then captures it; what comes back replays it."""
    if device.type != "cuda":
        return step
    # as torch asks for: warm up on another stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Tensors:
        graph.replay()
        return outputs

    return replay


def check_training(check: Check, update: str, turns: int, rows: int, codes: int, dim: int) -> None:
    """Steps that follow one another, so that the codebook of one is what the last has learned."""
    eager, captured = (Training(update, dim, codes, check.device) for _ in range(2))
    x, grad = (torch.zeros(rows, dim, device=check.device) for _ in range(2))
    replay = capture(lambda: captured.step(x, grad), check.device)
    captured.reset()
    for turn in range(turns):
        for buffer in (x, grad):
            buffer.copy_(torch.randn(rows, dim, device=check.device))
        # not the buffers themselves, which a replay could be right about by chance
        want = eager.step(x.clone(), grad.clone()) | eager.state()
        found = differing(want, replay() | captured.state())
        check.note(step=f"{update}, D={dim}", turn=turn, differing=found)
        check.expect(not found, f"{update} step, D={dim}: {', '.join(found)} differ when replayed")


def check_search(check: Check, rows: int, codes: int, dim: int) -> None:
    """With more, fewer and all rows in doubt than when it was captured."""
    x = torch.zeros(rows, dim, device=check.device)
    codebook = torch.zeros(codes, dim, device=check.device)

    def search() -> dict[str, Tensor]:
        out = ops.run_kernels(x, codebook, exact=True)
        return {"indices": out.indices[0], "num_doubtful": out.num_doubtful}

    replay = capture(search, check.device)
    doubtful = []
    for case in ("gaussian", "near_ties", "collapsed", "gaussian"):
        for buffer, values in zip(
            (x, codebook),
            make_data(Trial(case, rows, codes, dim, "float32", 1), check.device),
            strict=True,
        ):
            buffer.copy_(values)
        found = {name: value.clone() for name, value in replay().items()}
        doubtful.append(int(found["num_doubtful"]))
        wrong = int((found["indices"] != nearest_codes(x, codebook)).sum())
        check.note(step=f"search of {case}, D={dim}", mismatches=wrong, in_doubt=doubtful[-1])
        check.expect(not wrong, f"replayed search of {case}, D={dim}: {wrong} of {rows} wrong")
        check.expect(
            not differing(search(), found), f"search of {case}, D={dim}: replay is not eager"
        )
    check.expect(max(doubtful) > min(doubtful), "the replays had the same rows in doubt")
