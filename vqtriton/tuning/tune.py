"""``python -m vqtriton tune``: the fastest tiles for some shapes. See docs/tuning.md."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vqtriton import dispatch
from vqtriton.planes import MAX_DIM
from vqtriton.tiles import tables, trace
from vqtriton.tiles.problems import DTYPES, MOST, Problem, problem_for, problem_of
from vqtriton.tiles.tables import Row
from vqtriton.tuning import writing
from vqtriton.tuning.outcomes import Outcome, nothing_found

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
INTERRUPTED = 130
DEFAULT_OUT = Path("vqtriton-tables")
# targets of --static: those that kernels/screen_codes.py has tiles for
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# width of the progress bar, in characters
WIDTH = 20
# without news for so long, the progress is shown again
HEARTBEAT_SECONDS = 10
# roughly, on one core and on a GPU: to compile a candidate, and to time one
COMPILE_SECONDS, TIMING_SECONDS = 2.0, 0.3
# of the command in a row, in characters
MOST_COMMAND = 400

# tunes for a problem; the other argument takes what there is to say meanwhile
TuneOne = Callable[[Problem, Callable[[str], None]], Outcome]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    static = ("without a GPU: compile, leave out what spills, rank the rest by predicted time; "
              "for the search alone")
    flags: dict[str, dict[str, Any]] = {
        "--shape": {"type": shape, "action": "append", "default": [], "metavar": "N,K,D[,DTYPE]",
                    "help": "tune for this shape; can be given several times"},
        "--from-trace": {"type": Path, "metavar": "FILE",
                         "help": f"tune for the shapes that {trace.VARIABLE}=FILE has recorded"},
        "--preset": {"choices": PRESETS, "help": "tune for the shapes of published models"},
        "--dtype": {"choices": DTYPES, "nargs": "+",
                    "help": "dtypes for --preset (default: float32)"},
        "--out": {"type": Path, "metavar": "DIR",
                  "help": f"folder for the tables (default: ${tables.VARIABLE} or {DEFAULT_OUT})"},
        "--budget": {"type": seconds, "default": float("inf"), "metavar": "SECONDS",
                     "help": "stop starting new shapes after this time"},
        "--resume": {"action": "store_true", "help": "skip the shapes that the table already has"},
        "--static": {"action": "store_true", "help": static},
        "--target": {"choices": TARGETS, "default": "sm_90",
                     "help": "GPU for --static and --check (default: %(default)s); for sm_100 and "
                             "gfx942 no times are predicted: tiles are found only where the "
                             "default cannot be used"},
        "--check": {"action": "store_true",
                    "help": "tune nothing; compile each row of the table for --target"},
        "--device": {"help": "where to measure (default: cuda); cpu works in Triton's interpreter, "
                             "to try the command"},
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
    if not 1 <= min(n, k, d) <= max(n, k, d) < MOST or dtype not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: N, K and D must be from 1 to 2**48 - 1, DTYPE one of {', '.join(DTYPES)}"
        )
    if d > MAX_DIM:
        raise argparse.ArgumentTypeError(f"{text!r}: the kernels take at most D = {MAX_DIM}")
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
        models, dtypes = PRESETS[asked.preset], asked.dtype or ["float32"]
        shapes += [(*of_model, dtype) for dtype in dtypes for of_model in models]
    found = [problem_for(op, *of_step) for of_step in shapes for op in ops]
    if asked.from_trace:
        found += [problem for problem in trace.read(asked.from_trace) if problem.op in ops]
    return list(dict.fromkeys(found))


def run(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The command; its exit status."""
    try:
        from vqtriton.kernels.screen_tiles import architecture
        from vqtriton.tuning.measure import measure
        from vqtriton.tuning.predict import predict
        from vqtriton.tuning.tunables import TUNABLES
    except ModuleNotFoundError as error:
        parser.error(f"tuning needs Triton: {error}")
    if (asked.static or asked.check) and dispatch.interpreter_is_on():
        parser.error("--static and --check compile, and under TRITON_INTERPRET=1 nothing does")
    # where no GPU is, tiles that move the same bytes cannot be told apart
    tuned = [op for op, tunable in TUNABLES.items() if tunable.work or not asked.static]
    if asked.check:
        return check_table(folder_of(asked) / tables.file_name(asked.target), asked.target, parser)
    if asked.dtype and not asked.preset:
        parser.error(
            "--dtype only applies to --preset; with --shape, append the dtype: N,K,D,DTYPE"
        )
    try:
        problems = problems_of(asked, tuned)
    except (OSError, ValueError) as error:
        parser.error(f"--from-trace: {error}")
    if not problems:
        of_trace = ", which --from-trace has none of" if asked.from_trace else ""
        parser.error(
            f"nothing to tune for: give --shape, --from-trace or --preset{of_trace}"
            + f"; --static tunes only {', '.join(tuned)}" * asked.static
        )
    if asked.static and asked.device:
        parser.error("--device says where to measure, and --static does not measure")
    tune_one: TuneOne
    if asked.static:
        name, source, device = asked.target, "static", torch.device("cpu")
        tune_one = lambda problem, say: predict(problem, asked.target, say)  # noqa: E731
    else:
        device = device_of(asked.device or "cuda", parser)
        name, source = tables.device_names(device)[0], "measured"
        tune_one = lambda problem, say: measure(problem, device, say)  # noqa: E731

    out = folder_of(asked)
    path = out / tables.file_name(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        writing.merge(path, name, [])
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}; nothing was tuned")
    if asked.resume:
        done = {problem_of(row) for row in tables.read(path) if is_of(row, source)}
        problems = [problem for problem in problems if problem not in done]
    command = shlex.join(["python", "-m", "vqtriton", *sys.argv[1:]])
    if len(command) > MOST_COMMAND:
        # a row has it, and a table thousands of rows
        command = f"{command[:MOST_COMMAND]}..."
    target = asked.target if asked.static else architecture(device)
    interpreted = not asked.static and device.type == "cpu"
    print(plan(problems, target, source, asked.budget, interpreted), file=sys.stderr, flush=True)
    return tune_all(problems, tune_one, path, name, source, command, asked.budget)


def plan(
    problems: Sequence[Problem], target: str, source: str, budget: float, interpreted: bool
) -> str:
    """What will be done, and roughly how long it takes."""
    from vqtriton.tiles.candidates import candidates_of

    if not problems:
        return "nothing is left to tune: the table has all of these shapes"
    text = f"{len(problems)} to tune, each an op at a shape"
    if interpreted:
        return f"{text}, in Triton's interpreter: seconds for tiny shapes, very long for others"
    candidates = {problem: len(candidates_of(problem, target)) for problem in problems}
    # N and K are not compiled for
    compiled = sum({problem[:3]: count for problem, count in candidates.items()}.values())
    cores = os.cpu_count() or 1
    expected = COMPILE_SECONDS * compiled / cores
    text += f": {compiled} candidates to compile on {cores} cores"
    if source == "measured":
        timed = sum(candidates.values())
        expected += TIMING_SECONDS * timed
        text += f", {timed} to check and time"
    if budget < expected:
        text += f"; roughly {duration(expected)}, but no shape starts after {duration(budget)}"
        return f"{text} (--budget)"
    return f"{text}; roughly {duration(expected)}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def folder_of(asked: argparse.Namespace) -> Path:
    return asked.out or tables.user_folder() or DEFAULT_OUT


def check_table(path: Path, target: str, parser: argparse.ArgumentParser) -> int:
    """Compiles what the rows of a table give, with the Triton that is installed."""
    import triton

    from vqtriton.tiles.candidates import TILES
    from vqtriton.tuning.predict import usages

    try:
        rows = tables.read(path)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    # what cannot be read is of no use either; `read` has named it
    wrong = len(tables.read_all(path)) - len(rows)
    for row in rows:
        if tables.keeps_default(row):
            continue
        problem, config = problem_of(row), TILES[row["op"]].config(**row["config"])
        if usages(problem, target, [config]) == [None]:
            print(f"spills, does not fit or does not compile: {problem}, {config}")
            wrong += 1
    used = f"{wrong} of no use with Triton {triton.__version__}"
    print(f"{path}: {len(tables.read_all(path))} shapes, {used}")
    return int(wrong > 0 or not rows)


def is_of(row: Row, source: str) -> bool:
    """Whether it was found in the same way as this run would find it."""
    import triton

    return row["source"] == source and row.get("triton") == triton.__version__


def device_of(name: str, parser: argparse.ArgumentParser) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device is {name!r}; it must be cuda, cuda:0 and so on, or cpu")
    if device.type not in ("cuda", "cpu"):
        parser.error(f"--device is {name}, for which there are no kernels; it must be cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and torch sees no GPU; --static needs none")
    if device.type == "cpu" and not dispatch.interpreter_is_on():
        parser.error("--device is cpu, where kernels run only under TRITON_INTERPRET=1")
    return device


def tune_all(
    problems: Sequence[Problem],
    tune_one: TuneOne,
    path: Path,
    device: str,
    source: str,
    command: str,
    budget: float,
) -> int:
    """One after the other; each is in the table before the next begins."""
    import triton

    progress = Progress(len(problems))
    outcomes: list[Outcome] = []
    status = 0
    try:
        for problem in problems:
            if progress.seconds() > budget:
                left = len(problems) - len(outcomes)
                progress.say(f"the time is up: {left} of {len(problems)} shapes are left")
                break
            progress.show(len(outcomes), f"{problem}")
            try:
                with progress.beating():
                    outcome = tune_one(problem, progress.say)
            except (RuntimeError, ValueError) as error:
                # memory, for example: the other problems are not to suffer
                progress.say(f"left out, {problem}: {str(error)[:200]}")
                outcome, status = nothing_found(problem), 1
            outcomes.append(outcome)
            if outcome.row is not None:
                origin = {
                    "source": source,
                    "triton": triton.__version__,
                    "date": datetime.date.today().isoformat(),
                    "command": command,
                }
                writing.merge(path, device, [{**problem._asdict(), **outcome.row, **origin}])
        else:
            progress.show(len(outcomes), "done")
    except KeyboardInterrupt:
        progress.say("interrupted; --resume continues from here")
        status = INTERRUPTED
    except (OSError, ValueError) as error:
        # a full disk, or a table that is as large as may be
        progress.say(f"ended, as nothing can be written: {error}")
        status = 1
    progress.say()
    print(summary(outcomes, source))
    rows = tables.read(path)
    tiles = sum(not tables.keeps_default(row) for row in rows)
    print(
        f"{path}: tiles for {tiles} shapes, the default for {len(rows) - tiles}; "
        f"used where {tables.VARIABLE}={path.parent}"
    )
    return status


class Progress:
    """How far a run is, on stderr: a bar that stays in its line on a terminal, lines elsewhere."""

    _shown = 0, ""

    def __init__(self, total: int) -> None:
        self._total, self._start = total, time.monotonic()
        self._ends = "\r\x1b[2K" if sys.stderr.isatty() else "", "" if sys.stderr.isatty() else "\n"

    def seconds(self) -> float:
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Shows the progress again and again, with the seconds since this began."""
        begun, ended = self.seconds(), threading.Event()

        def beat() -> None:
            done, what = self._shown
            while not ended.wait(HEARTBEAT_SECONDS):
                self.show(done, f"{what}, for {self.seconds() - begun:.0f} s")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def show(self, done: int, what: str) -> None:
        self._shown = done, what
        left = self.seconds() / done * (self._total - done) if done else math.nan
        bar = "#" * (WIDTH * done // max(1, self._total))
        eta = f"{left:4.0f} s left" if done else ""
        before, after = self._ends
        line = f"[{bar:.<{WIDTH}}] {done}/{self._total} {eta}  {what}"
        print(f"{before}{line}", end=after, file=sys.stderr, flush=True)

    def say(self, text: str = "") -> None:
        """Above the bar."""
        before, after = self._ends
        print(f"{before}{text}", end="\n" if text else after, file=sys.stderr, flush=True)


def summary(outcomes: Iterable[Outcome], source: str) -> str:
    """A line for each problem."""
    word = "predicted" if source == "static" else "measured"
    lines = [f"{word + ' ms':<56}{'default':>10}{'best':>10}{'gain':>9}  tried, left out"]
    for problem, default, best, row, tried, left_out in outcomes:
        times = "".join(f"{'-' if math.isnan(ms) else f'{ms:.4g}':>10}" for ms in (default, best))
        # a default that cannot be used has no time
        gain = "-" if math.isnan(default) else f"{default / best - 1:.1%}"
        if row is None or tables.keeps_default(row):
            gain = "none" if row else "none fit"
        lines.append(f"{problem!s:<56}{times}{gain:>9}  {tried}, {left_out}")
    return "\n".join(lines)
