"""Checks, weighs and times subjects side by side, and makes a row of each.

Time: all subjects in one process, turn by turn, in an order that turns around each time, so that
what else the machine does falls on all of them. Before each step the subject's state is put back
and a buffer of twice the last-level cache is written: no step finds its inputs or its codebook in
a cache. (Rotating over copies of the inputs would leave the state of modules where it is.)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import vqtriton
from bench import provenance
from bench.cases import CASES, Case
from bench.check import Refused, check, check_memory, find_truth, memory_limit
from bench.devices import Cpu, Cuda
from bench.subjects import SUBJECTS, Run, Subject, make_inputs
from bench.worker import Worker
from vqtriton.tuning.machines import Rates

GIB = 1 << 30
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype = torch.float32
    # timed steps of each subject
    repeats: int = 5
    # of matrices that a subject may hold; one that would hold more is left out
    memory_limit: float = 2 * GIB
    # products that the float64 check may take; the device's own number if None
    check_products: float | None = None
    # seconds after which no further case is begun
    budget: float = float("inf")
    # how it was called
    command: str = ""


@dataclass
class Report:
    """What was measured, and what was not and why."""

    rows: list[Row]
    refused: list[str]
    left_out: list[str]


def interleave(steps: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Seconds of each step, turn by turn."""
    seconds: list[list[float]] = [[] for _ in steps]
    turns = list(enumerate(steps))
    for _ in range(repeats):
        for place, step in turns:
            seconds[place].append(step())
        turns.reverse()
    return seconds


def quantile(values: Sequence[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def measure(
    scopes: Iterable[str],
    cases: Callable[[str], Iterable[str]],
    subjects: Callable[[str], Iterable[str]],
    device: Cpu | Cuda,
    options: Options = Options(),
    show: Callable[[list[Row]], None] = lambda rows: None,
) -> Report:
    """Everything that is asked for, within the budget.

    Args:
        cases: names, by scope.
        subjects: names, by scope.
        show: gets the rows of a case as soon as they are there.
    """
    report, start, rates = Report([], [], []), time.monotonic(), Rates(0.0, 0.0)
    for scope in scopes:
        for name in cases(scope):
            if time.monotonic() - start > options.budget:
                report.left_out.append(f"{name}, {scope}: the time is up")
                continue
            # before and after each case: on a busy machine a rate may be less than there is
            rates = rates.best(device.rates())
            rows = measure_case(CASES[name], scope, subjects(scope), device, rates, options, report)
            show(rows)
            report.rows += rows
    return report


def measure_case(
    case: Case,
    scope: str,
    names: Iterable[str],
    device: Cpu | Cuda,
    rates: Rates,
    options: Options,
    report: Report,
) -> list[Row]:
    inputs = make_inputs(case, options.dtype, device.device)
    products = device.check_products if options.check_products is None else options.check_products
    truth = find_truth(inputs, products)
    runs, found = [], []
    for name in names:
        subject = SUBJECTS[name]
        reason = _why_not(subject, case, scope, device, options)
        if reason:
            report.left_out.append(f"{name}, {case.name}, {scope}: {reason}")
            continue
        try:
            run = Run(subject, scope, inputs)
            checked = check(run, truth)
            peak = weigh(run, case, device, options)
            if peak is not None:
                check_memory(subject, case, peak)
        except Refused as error:
            report.refused.append(f"{case}, {scope}: {error}")
        except torch.OutOfMemoryError:
            report.left_out.append(f"{name}, {case.name}, {scope}: out of memory")
        except Exception as error:
            # a peer may fail in any way, and what is measured of the others is not lost with it
            first_line = (str(error).splitlines() or [""])[0]
            report.refused.append(
                f"{name}, {case.name}, {scope}: {type(error).__name__}: {first_line:.200}"
            )
        else:
            runs.append(run)
            found.append((checked, peak))

    def step(run: Run) -> float:
        run.reset()
        return device.seconds(run.step)

    seconds = interleave([lambda run=run: step(run) for run in runs], options.repeats)
    rates = rates.best(device.rates())
    return [
        {
            **describe(run.subject, case, scope, device, options),
            **checked._asdict(),
            "peak_memory_bytes": peak,
            **timing(case, scope, of_run, rates, options.dtype.itemsize),
        }
        for run, (checked, peak), of_run in zip(runs, found, seconds, strict=True)
    ]


def _why_not(
    subject: Subject, case: Case, scope: str, device: Cpu | Cuda, options: Options
) -> str | None:
    if not subject.is_installed():
        return f"{subject.package} is not installed"
    if not subject.can_run(scope, device.device.type, options.dtype):
        return f"it has no {scope} on {device.device.type} in {options.dtype}"
    if subject.memory(case) > options.memory_limit:
        return f"it would take about {subject.memory(case) / GIB:.1f} GiB"
    return None


def weigh(run: Run, case: Case, device: Cpu | Cuda, options: Options) -> int | None:
    """Bytes of one step, results included; None where it cannot be told."""
    if not device.can_weigh():
        return None
    run.reset()
    if device.shares_memory:
        return device.peak_memory(run.step)
    with Worker(run.subject.name, case, run.scope, device.device.type, options.dtype) as worker:
        return worker.ask("peak_memory")


def timing(case: Case, scope: str, seconds: list[float], rates: Rates, itemsize: int) -> Row:
    num_bytes = case.least_bytes(scope, itemsize)
    floors = rates.floors(num_bytes, case.products)
    p50 = quantile(seconds, 0.5)
    return {
        "p20_s": quantile(seconds, 0.2),
        "p50_s": p50,
        "p80_s": quantile(seconds, 0.8),
        "seconds": seconds,
        "tflop_per_s": 2 * case.products / p50 / 1e12,
        "gb_per_s": num_bytes / p50 / 1e9,
        "floor_memory_s": floors["memory"],
        "floor_dot_s": floors["dot"],
        "floor_fraction": max(floors.values()) / p50,
        "matmul_flop_per_s": rates.dot,
        "copy_bytes_per_s": rates.memory,
    }


def describe(subject: Subject, case: Case, scope: str, device: Cpu | Cuda, options: Options) -> Row:
    return {
        "case": case.name,
        "scope": scope,
        "subject": subject.name,
        "version": provenance.version(subject.package),
        "shape": {"N": case.num_rows, "K": case.codebook_size, "D": case.dim},
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": device.name,
        "driver": device.driver,
        "threads": torch.get_num_threads(),
        "command": options.command,
        "commit": provenance.commit(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "triton": provenance.version("triton"),
        "vqtriton": vqtriton.__version__,
        "memory_limit_bytes": memory_limit(case) if subject.holds_no_matrix else None,
    }
