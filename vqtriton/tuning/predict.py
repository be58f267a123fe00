"""What can be known of tiles without running them: whether they can be used, and a floor."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from vqtriton.tiles.candidates import candidates_of
from vqtriton.tiles.problems import Problem
from vqtriton.tuning.compiling import Launch, compile_launch
from vqtriton.tuning.disassembly import Disassembly
from vqtriton.tuning.machines import (
    ARCHITECTURES,
    MACHINES,
    Shape,
    Work,
    floors,
    predict_screen,
    screen_terms,
)
from vqtriton.tuning.outcomes import Found, Outcome, decide
from vqtriton.tuning.tunables import TUNABLES

Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


class Usage(NamedTuple):
    """Of tiles: that of the kernel which takes the most of a multiprocessor."""

    registers: int
    # bytes of a program
    shared: int
    # programs that a multiprocessor holds at a time
    ctas: int
    # where it is modelled: what is done for a (row, code) pair, and the instructions of one, of the
    # ALU pipe and all
    work: Work | None
    alu: float
    total: float


def predict(problem: Problem, target: str, say: Say = to_stderr) -> Outcome:
    """The tiles with the least predicted time, of those that can be used on a target.

    Where the time of the default is not predicted, it stays as long as it can be used.
    """
    candidates = candidates_of(problem, target)
    found = usable(problem, target, candidates, say)
    left_out = len(candidates) - len(found)
    default = [one for one in found if one.config == candidates[0]]
    if default and math.isnan(default[0].ms):
        found = default
    return decide(problem, candidates, found)._replace(left_out=left_out)


def usable(
    problem: Problem, target: str, configs: Sequence[Any], say: Say = to_stderr
) -> list[Found]:
    """Those that compile, do not spill and fit, the best predicted first.

    Where nothing is predicted the time is NaN, and the order that given: of kernels other than the
    screen, of targets on which nothing was measured, and where the loop cannot be counted.
    """
    found = []
    for place, usage in enumerate(usages(problem, target, configs, say)):
        if usage is None:
            continue
        terms = usage_terms(problem, target, configs[place], usage)
        ms = predict_screen(terms) if terms else math.nan
        about = {"shared": usage.shared, "registers": usage.registers}
        order = (0, ms) if terms else (1, place)
        found.append((order, Found(configs[place], ms, about)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def usage_terms(problem: Problem, target: str, config: Any, usage: Usage) -> dict[str, float]:
    """`machines.screen_terms`; empty where nothing is predicted."""
    machine, unevenness = MACHINES.get(target), TUNABLES[problem.op].unevenness
    if not (usage.work and machine and unevenness):
        return {}
    shape = Shape(problem.num_rows, problem.codebook_size, problem.dim)
    return screen_terms(
        floors(shape, usage.work, usage.alu, usage.total, machine),
        usage.work.inner,
        usage.ctas,
        unevenness(problem, config, machine.multiprocessors),
    )


# N and K are not compiled for
_usages: dict[tuple[Any, ...], Usage | None] = {}


def usages(
    problem: Problem, target: str, configs: Sequence[Any], say: Say = to_stderr
) -> list[Usage | None]:
    """Of each; None if it cannot be used. What is compiled once is known for the process."""
    tunable = TUNABLES[problem.op]
    keys = [(problem.op, problem.dtype, problem.dim, target, config) for config in configs]
    new = {key: tunable.launches(problem, target, key[-1]) for key in keys if key not in _usages}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        # Triton prints thousands of lines of what ptxas does not take
        with contextlib.redirect_stdout(io.StringIO()):
            of_each = pool.map(lambda one: usage(one, tunable.work, target, say), new.values())
            _usages.update(zip(new, of_each, strict=True))
    finally:
        # an interrupt does not wait for all of them
        pool.shutdown(wait=False, cancel_futures=True)
    return [_usages[key] for key in keys]


def usage(
    launches: Sequence[Launch], work: Callable[[Launch], Work] | None, target: str, say: Say
) -> Usage | None:
    """None where one of them does not compile, spills or does not fit."""
    architecture = ARCHITECTURES[target]
    most: Usage | None = None
    for launch in launches:
        try:
            compiled = compile_launch(launch, target)
        except Exception as error:
            # whatever a compiler does not take is no candidate
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"left out, it does not compile: {launch.name}, {first_line:.200}")
            return None
        ctas = architecture.resident_ctas(
            compiled.registers, compiled.shared, compiled.num_warps, compiled.tensor_memory
        )
        if compiled.spilled_bytes or not ctas:
            return None
        if most is None or ctas < most.ctas:
            most = Usage(compiled.registers, compiled.shared, ctas, None, 0.0, 0.0)
        if work is None:
            continue
        values, modelled = launch.values, work(launch)
        threads = compiled.num_warps * architecture.warp_size
        pairs = values["BLOCK_N"] * values["BLOCK_K"] / threads
        with contextlib.suppress(ValueError):
            loop = Disassembly(compiled.assembly).hot_loop(pairs, modelled.inner)
            if loop is not None:
                alu, total = loop.counts.get("alu", 0) / loop.pairs, loop.total / loop.pairs
                most = most._replace(work=modelled, alu=alu, total=total)
    return most
