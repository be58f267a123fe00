"""A process and a time limit for each part: one that fails, crashes or hangs stops no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu_check import summary
from bench.gpu_check.check import ROWS
from bench.gpu_check.parts import Part
from bench.provenance import ROOT

# of the output of a part, from either end: the log stays small
KEPT = 40_000
# for a process to end that was killed
KILL_SECONDS = 10.0


class Outcome(NamedTuple):
    part: str
    # "run", "skipped" or "failed"
    status: str
    text: str
    seconds: float


Command = Callable[[Part, Path, bool, float], list[str]]


def command(part: Part, out: Path, is_dry: bool, seconds: float) -> list[str]:
    words = [sys.executable, "-m", "bench.gpu_check", part.name]
    return [*words, "--out", str(out), "--here", f"{seconds:.1f}", *(["--dry"] if is_dry else [])]


def run_all(
    parts: Sequence[Part], out: Path, is_dry: bool, seconds: float, make: Command = command
) -> list[Outcome]:
    """Every part, whatever becomes of the others; the summary is written after each.

    Args:
        seconds: of all parts; those for which nothing is left fail.
        make: the command of a part.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, "log.txt", "summary.txt", "peers.jsonl"):
        (out / name).unlink(missing_ok=True)
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        left = end - time.monotonic()
        if left < part.least:
            status = "skipped" if part.can_wait else "failed"
            outcome = Outcome(part.name, status, "not begun: no time was left for it", 0.0)
        else:
            try:
                outcome = run_part(part, out, is_dry, min(part.limit, left), make)
            except BaseException:
                # Ctrl-C: whoever reads the summary later is to see what did not run
                missing = parts[len(outcomes) :]
                outcomes += [Outcome(p.name, "failed", "interrupted", 0.0) for p in missing]
                _write_summary(outcomes, out, is_dry)
                raise
        outcomes.append(outcome)
        print(summary.line(outcome), flush=True)
        _write_summary(outcomes, out, is_dry)
    return outcomes


def _write_summary(outcomes: Sequence[Outcome], out: Path, is_dry: bool) -> None:
    (out / "summary.txt").write_text(summary.text(outcomes, is_dry) + "\n")


def run_part(part: Part, out: Path, is_dry: bool, limit: float, make: Command = command) -> Outcome:
    start = time.monotonic()
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    env.pop("TRITON_INTERPRET", None)
    if is_dry and part.is_interpreted:
        env["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            make(part, out, is_dry, limit),
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # so that what it has started ends with it
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # also where Ctrl-C ends this process: what the part printed is kept
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # a process that hangs in its driver may outlive even that
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
            seconds = time.monotonic() - start
            output.seek(0)
            printed = _shorten(output.read().decode(errors="replace"))
            with (out / "log.txt").open("a") as log:
                log.write(f"=== {part.name}, {seconds:.1f} s, exit status {code}\n{printed}\n")
    return Outcome(part.name, *_ended(part, out, code, limit, printed), seconds)


def _shorten(printed: str) -> str:
    if len(printed) <= 2 * KEPT:
        return printed
    cut = len(printed) - 2 * KEPT
    return f"{printed[:KEPT]}\n[{cut} characters left out]\n{printed[-KEPT:]}"


def _ended(part: Part, out: Path, code: int | None, limit: float, printed: str) -> tuple[str, str]:
    """Status and text: what the part itself noted, unless its process says otherwise."""
    last = (printed.strip().splitlines() or ["nothing"])[-1][:200]
    noted = _noted(part, out)
    if code is None:
        return "failed", f"killed after {limit:.0f} s; the last that it printed: {last}"
    if noted is None or (code != 0 and noted[0] != "failed"):
        return "failed", f"ended with status {code}; the last that it printed: {last}"
    return noted


def _noted(part: Part, out: Path) -> tuple[str, str] | None:
    if not (out / ROWS).exists():
        return None
    text = (out / ROWS).read_text(errors="replace")
    if not text.endswith("\n"):
        # killed in the middle of a row: the next part's rows are to start on a line of their own
        (out / ROWS).write_text(text + "\n")
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    ends = [row for row in rows if row["part"] == part.name and "outcome" in row]
    return (ends[-1]["outcome"], ends[-1]["text"]) if ends else None
