"""``vqtriton tune``: which tiles are fastest for which shapes. See docs/tuning.md."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vqtriton.tuning import tables, trace
from vqtriton.tuning.tables import DTYPES, Problem, Row

# what models have trained with: N of a step, K, D; docs/benchmarks.md says which
REAL_MODELS = (
    (3072, 1024, 256),
    (16384, 16384, 4),
    (65536, 8192, 3),
    (32768, 8192, 32),
    (32768, 16384, 8),
    (2048, 262144, 256),
    (16384, 262144, 128),
    (4096, 4096, 12),
    (4096, 8192, 64),
    (10880, 4096, 32),
    (4800, 1024, 128),
    (2376, 1024, 8),
    (2400, 2048, 256),
    (9000, 4096, 512),
    (640, 256, 32),
)
PRESETS = {"real-models": REAL_MODELS}
# a candidate has to be faster than the default by this much
LEAST_GAIN = 0.02
# of a candidate: steps before the clock, and timed ones
WARM_UP, REPEATS = 2, 9
INTERRUPTED = 130
DEFAULT_OUT = Path("vqtriton-tables")


class Outcome(NamedTuple):
    """Of a problem."""

    problem: Problem
    # predicted or measured, in milliseconds
    default_ms: float
    best_ms: float
    # None: the default is best, or nothing was found that is right
    row: Row | None
    # candidates, and those that were left out
    tried: int
    left_out: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    flags: dict[str, dict[str, Any]] = {
        "--shape": {"type": shape, "action": "append", "default": [], "metavar": "N,K,D[,DTYPE]",
                    "help": "tune for that; may be given again"},
        "--from-trace": {"type": Path, "metavar": "FILE",
                         "help": f"shapes that a program noted under {trace.VARIABLE}=FILE"},
        "--preset": {"choices": PRESETS, "help": "shapes of published models"},
        "--out": {"type": Path, "metavar": "DIR",
                  "help": f"folder of the tables; ${tables.VARIABLE} or {DEFAULT_OUT} by default"},
        "--budget": {"type": seconds, "default": float("inf"), "metavar": "SECONDS",
                     "help": "begin no shape after that"},
        "--resume": {"action": "store_true", "help": "leave out what the table has already"},
        "--static": {"action": "store_true",
                     "help": "without a GPU: compile, leave out what spills, predict the rest"},
        "--target": {"choices": ("sm_90",), "default": "sm_90",
                     "help": "of --static; nothing is predicted for others"},
        "--check": {"action": "store_true",
                    "help": "tune nothing; compile each row of the table for the target"},
        "--device": {"help": "cuda by default; cpu in Triton's interpreter, to try the command"},
    }
    # fmt: on
    for flag, settings in flags.items():
        parser.add_argument(flag, **settings)


def shape(text: str) -> tuple[int, int, int, str]:
    *numbers, dtype = text.split(",") if text.count(",") == 3 else (*text.split(","), "float32")
    try:
        n, k, d = map(int, numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,K,D or N,K,D,DTYPE") from None
    if min(n, k, d) < 1 or dtype not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: N, K and D must be at least 1, DTYPE one of {', '.join(DTYPES)}"
        )
    return n, k, d, dtype


def seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def problems_of(asked: argparse.Namespace, ops: Iterable[str]) -> list[Problem]:
    """
    Raises:
        ValueError, OSError: the file of a trace is none.
    """
    shapes: list[tuple[int, int, int, str]] = list(asked.shape)
    if asked.preset:
        shapes += [(n, k, d, "float32") for n, k, d in PRESETS[asked.preset]]
    found = [tables.problem_for(op, *of_step) for of_step in shapes for op in ops]
    if asked.from_trace:
        found += [problem for problem in trace.read(asked.from_trace) if problem.op in ops]
    return list(dict.fromkeys(found))


def run(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The command; its exit status."""
    try:
        from vqtriton.tuning.tunables import TUNABLES
    except ModuleNotFoundError as error:
        parser.error(f"tuning needs Triton: {error}")
    # where no GPU is, tiles that move the same bytes cannot be told apart
    ops = [op for op, tunable in TUNABLES.items() if tunable.launches or not asked.static]
    if asked.check:
        return check_table(folder_of(asked) / tables.file_name(asked.target), asked.target, parser)
    try:
        problems = problems_of(asked, ops)
    except (OSError, ValueError) as error:
        parser.error(f"--from-trace: {error}")
    if not problems:
        parser.error("nothing to tune for: give --shape, --from-trace or --preset")
    if asked.static and asked.device:
        parser.error("--device is where tiles are timed; --static times none")
    device = torch.device(asked.device or "cuda")
    tune_one: Callable[[Problem], Outcome]
    if asked.static:
        name, source = asked.target, "static"
        tune_one = lambda problem: predict(problem, asked.target)  # noqa: E731
    else:
        name, source = device_name(device, parser), "measured"
        tune_one = lambda problem: measure(problem, device)  # noqa: E731

    out = folder_of(asked)
    path = out / tables.file_name(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tables.merge(path, name, [])
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}; nothing was tuned")
    if asked.resume:
        done = {tables.problem_of(row) for row in tables.read(path) if is_of(row, source)}
        problems = [problem for problem in problems if problem not in done]
    command = shlex.join(["vqtriton", *sys.argv[1:]])
    return tune_all(problems, tune_one, path, name, source, command, asked.budget)


def folder_of(asked: argparse.Namespace) -> Path:
    return asked.out or Path(os.environ.get(tables.VARIABLE) or DEFAULT_OUT)


def check_table(path: Path, target: str, parser: argparse.ArgumentParser) -> int:
    """Compiles what the rows of a table give, with the Triton that is installed."""
    import triton

    from vqtriton.tuning.tunables import TUNABLES

    try:
        rows = tables.read(path)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    wrong = 0
    for row in rows:
        tunable = TUNABLES[row["op"]]
        if tunable.launches and tunable.work:
            problem, config = tables.problem_of(row), tunable.config(**row["config"])
            (launch,) = tunable.launches(problem, target, config)
            if compile_one(launch, tunable.work(launch), target) is None:
                print(f"spills, does not fit or does not compile: {problem}, {config}")
                wrong += 1
    print(f"{path}: {len(rows)} rows, {wrong} of no use with Triton {triton.__version__}")
    return int(wrong > 0 or not rows)


def is_of(row: Row, source: str) -> bool:
    """Whether it was found in the same way as this run would find it."""
    import triton

    return row["source"] == source and row.get("triton") == triton.__version__


def device_name(device: torch.device, parser: argparse.ArgumentParser) -> str:
    from vqtriton import ops

    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and torch sees no GPU; --static needs none")
    if device.type == "cpu" and not ops.interpreter_is_on():
        parser.error("--device is cpu, where kernels run only under TRITON_INTERPRET=1")
    return tables.device_names(device)[0]


def tune_all(
    problems: Sequence[Problem],
    tune_one: Callable[[Problem], Outcome],
    path: Path,
    device: str,
    source: str,
    command: str,
    budget: float,
) -> int:
    """One after the other; each is in the table before the next begins."""
    import triton

    start = time.monotonic()
    outcomes: list[Outcome] = []
    status = 0
    try:
        for place, problem in enumerate(problems):
            spent = time.monotonic() - start
            if spent > budget:
                print(f"the time is up: {len(problems) - place} shapes are left", file=sys.stderr)
                break
            left = f", {spent / place * (len(problems) - place):.0f} s left" if place else ""
            print(f"[{place + 1}/{len(problems)}{left}] {problem}", file=sys.stderr, flush=True)
            outcome = tune_one(problem)
            outcomes.append(outcome)
            if outcome.row is not None:
                origin = {
                    "source": source,
                    "triton": triton.__version__,
                    "date": datetime.date.today().isoformat(),
                    "command": command,
                }
                tables.merge(path, device, [{**problem._asdict(), **outcome.row, **origin}])
    except KeyboardInterrupt:
        print("interrupted; --resume goes on where this ended", file=sys.stderr)
        status = INTERRUPTED
    print(summary(outcomes, source))
    print(f"{path}: {len(tables.read(path))} rows; used where {tables.VARIABLE}={path.parent}")
    return status


def summary(outcomes: Iterable[Outcome], source: str) -> str:
    """A line for each problem."""
    word = "predicted" if source == "static" else "measured"
    lines = [f"{word + ' ms':<56}{'default':>10}{'best':>10}{'gain':>8}  tried, left out"]
    for problem, default, best, row, tried, left_out in outcomes:
        gain = f"{default / best - 1:.1%}" if row else "nothing"
        lines.append(f"{problem!s:<56}{default:>10.4g}{best:>10.4g}{gain:>8}  {tried}, {left_out}")
    return "\n".join(lines)


def candidates_of(problem: Problem, target: str) -> list[Any]:
    """The default first."""
    from vqtriton.tuning.tunables import TUNABLES

    tunable = TUNABLES[problem.op]
    default = tunable.default(target, problem.dim)
    return list(dict.fromkeys([default, *tunable.candidates(problem.dim)]))


# --- without a GPU ---

_compiled: dict[tuple[Any, ...], tuple[dict[str, int], float, float] | None] = {}


def predict(problem: Problem, target: str) -> Outcome:
    """The tiles with the least predicted time, of those that neither spill nor overflow.

    The time is `machines.in_turns` of an H100: dot products and instructions take turns, unless
    memory or L2 take longer. Of equal ones those are best of which more programs fit into a
    multiprocessor. The default stays if nothing is clearly better.
    """
    from vqtriton.tuning.machines import Shape, floors, in_turns
    from vqtriton.tuning.tunables import TUNABLES

    tunable = TUNABLES[problem.op]
    assert tunable.launches is not None
    assert tunable.work is not None
    n, k, d = problem.num_rows, problem.codebook_size, problem.dim
    found = []
    candidates = candidates_of(problem, target)
    for place, config in enumerate(candidates):
        (launch,) = tunable.launches(problem, target, config)
        key = (problem.op, problem.dtype, d, target, config)
        if key not in _compiled:
            _compiled[key] = compile_one(launch, tunable.work(launch), target)
        compiled = _compiled[key]
        if compiled is not None:
            usage, alu, total = compiled
            predicted = in_turns(floors(Shape(n, k, d), tunable.work(launch), alu, total))
            found.append((predicted, -usage["ctas"], place, config, usage))
    default = next((row for row in found if row[2] == 0), None)
    best = min(found, key=lambda row: row[:3], default=None)
    if best is None:
        return Outcome(problem, float("nan"), float("nan"), None, len(candidates), len(candidates))
    default_ms = default[0] if default else float("nan")
    if default and best[0] > (1 - LEAST_GAIN) * default_ms:
        best = default
    row = {
        "config": asdict(best[3]),
        "shared": best[4]["shared"],
        "registers": best[4]["registers"],
        "ms": best[0],
        "default_ms": default_ms,
    }
    left_out = len(candidates) - len(found)
    return Outcome(problem, default_ms, best[0], row, len(candidates), left_out)


def compile_one(launch: Any, work: Any, target: str) -> tuple[dict[str, int], float, float] | None:
    """Registers, shared bytes and resident programs; ALU and all instructions of a pair.

    None where it cannot be used: it does not compile, spills, or does not fit.
    """
    from vqtriton.tuning.compiling import compile_launch
    from vqtriton.tuning.disassembly import Disassembly
    from vqtriton.tuning.machines import ARCHITECTURES

    try:
        compiled = compile_launch(launch, target)
    except Exception as error:
        # whatever a compiler does not take is no candidate
        print(f"  left out, it does not compile: {str(error)[:200]}", file=sys.stderr)
        return None
    architecture = ARCHITECTURES[target]
    ctas = architecture.resident_ctas(
        compiled.registers, compiled.shared, compiled.num_warps, compiled.tensor_memory
    )
    if compiled.spilled_bytes or not ctas:
        return None
    values = launch.values
    threads = compiled.num_warps * architecture.warp_size
    pairs = values["BLOCK_N"] * values["BLOCK_K"] / threads
    try:
        loop = Disassembly(compiled.assembly).hot_loop(pairs, work.inner)
    except ValueError:
        # a loop that cannot be counted cannot be ranked
        return None
    if loop is None:
        return None
    usage = {"registers": compiled.registers, "shared": compiled.shared, "ctas": ctas}
    return usage, loop.counts.get("alu", 0) / loop.pairs, loop.total / loop.pairs


# --- with one ---


def measure(problem: Problem, device: torch.device) -> Outcome:
    """The fastest tiles of those whose results are right, on memory that was filled with NaN."""
    from vqtriton.kernels.screen_codes import architecture
    from vqtriton.tuning.tunables import TUNABLES, make_inputs

    tunable = TUNABLES[problem.op]
    candidates = candidates_of(problem, architecture(device))
    copies = [make_inputs(problem, device, seed) for seed in range(copies_needed(problem, device))]
    times: list[tuple[float, int, Any]] = []
    for place, config in enumerate(candidates):
        try:
            with poisoned():
                results = tunable.run(copies[0], config)
                is_right = tunable.is_right(copies[0], results)
        except Exception as error:
            # too much shared memory, or what a compiler does not take
            print(f"  left out, {config}: {str(error)[:200]}", file=sys.stderr)
            continue
        if not is_right:
            print(f"  left out, it is wrong: {config}", file=sys.stderr)
            continue
        steps = [lambda i=i, c=config: tunable.run(i, c) for i in copies]
        times.append((1e3 * median_seconds(steps, device), place, config))
    default_ms = next((ms for ms, place, _ in times if place == 0), float("nan"))
    if not times:
        return Outcome(problem, default_ms, float("nan"), None, len(candidates), len(candidates))
    best_ms, place, config = min(times, key=lambda row: row[:2])
    if best_ms > (1 - LEAST_GAIN) * default_ms:
        best_ms, config = default_ms, candidates[0]
    row = {
        "config": asdict(config),
        # it ran here, and the file is of devices of the same name
        "shared": 0,
        "ms": best_ms,
        "default_ms": default_ms,
    }
    return Outcome(problem, default_ms, best_ms, row, len(candidates), len(candidates) - len(times))


class poisoned:
    """`torch.empty` is filled with NaN: whatever is left unwritten shows."""

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self._before)


def copies_needed(problem: Problem, device: torch.device) -> int:
    """So many inputs that the next one is in no cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    of_one = 2 * problem.num_rows * problem.dim * DTYPES[problem.dtype].itemsize
    return max(2, min(32, 2 * cache // of_one + 1))


def median_seconds(steps: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of a step; the inputs take turns."""
    for turn in range(WARM_UP if device.type == "cuda" else 0):
        steps[turn % len(steps)]()
    found = []
    for turn in range(REPEATS if device.type == "cuda" else 1):
        step = steps[turn % len(steps)]
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize(device)
            found.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            step()
            found.append(time.perf_counter() - begun)
    return statistics.median(found)
