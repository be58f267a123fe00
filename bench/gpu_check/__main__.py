"""Runs the parts one after the other, each in a process of its own, and sums up.

A part that fails, crashes or takes too long does not stop the others. The summary comes last,
failures first.

    python -m bench.gpu_check [--dry] [--out FOLDER] [--only PART ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# of the whole run, on a GPU: below nine minutes
DEADLINE = 520.0
# exit status of a part that cannot run here
SKIPPED = 3
RESULT = "result: "


@dataclass(frozen=True)
class Part:
    """A function of `bench.gpu_check.parts`, and seconds after which it is stopped."""

    name: str
    seconds: float


# the most valuable first: what no CPU can show, then how fast it is
PARTS = (
    Part("environment", 30),
    Part("exact", 110),
    Part("determinism", 30),
    Part("graph", 40),
    Part("recompilation", 40),
    Part("large", 40),
    Part("compile", 60),
    Part("predictions", 50),
    Part("peers", 100),
    Part("tests", 120),
    Part("sanitizer", 60),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: str
    status: str  # "run", "skipped" or "failed"
    detail: str
    seconds: float


def run_part(part: Part, command: Sequence[str], seconds: float, log: Path) -> Outcome:
    """In a process of its own, its output appended to the log."""
    start = time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n===== {part.name}\n".encode())
        out.flush()
        offset = out.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            # with what it started, as a compiler or a sanitizer
            os.killpg(process.pid, 9)
            process.wait()
            status = None
    text = log.read_bytes()[offset:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    last = said[-1] if said else lines[-1] if lines else "it said nothing"
    if status is None:
        name, detail = "failed", f"stopped after {seconds:.0f} s; last it said: {last}"
    elif status == SKIPPED:
        name, detail = "skipped", last
    elif status == 0 and said:
        name, detail = "run", last
    else:
        name, detail = "failed", f"exit status {status}: {last}"
    return Outcome(part.name, name, detail, time.monotonic() - start)


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for each part, failures first."""
    order = ("failed", "skipped", "run")
    ranked = sorted(outcomes, key=lambda outcome: order.index(outcome.status))
    counts = ", ".join(f"{sum(o.status == name for o in outcomes)} {name}" for name in order)
    lines = [f"{o.status:8} {o.part:14} {o.seconds:5.0f} s  {o.detail}" for o in ranked]
    return "\n".join([counts, *lines])


def run_all(
    parts: Sequence[Part], out: Path, *, is_dry: bool, deadline: float = DEADLINE
) -> list[Outcome]:
    """Every part gets its seconds, or what is left until the deadline."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_bytes(b"")
    if is_dry:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTHONUNBUFFERED"] = "1"
    start, outcomes = time.monotonic(), []
    for part in parts:
        left = deadline - (time.monotonic() - start)
        if left <= 1:
            outcomes.append(Outcome(part.name, "skipped", "no time was left", 0.0))
            continue
        command = [sys.executable, "-m", "bench.gpu_check.parts", part.name, str(out)]
        outcome = run_part(part, command + ["--dry"] * is_dry, min(part.seconds, left), log)
        print(f"{outcome.status:8} {part.name} ({outcome.seconds:.0f} s)", flush=True)
        outcomes.append(outcome)
    (out / "summary.txt").write_text(summary(outcomes) + "\n")
    rows = [json.dumps(asdict(outcome)) for outcome in outcomes]
    (out / "parts.jsonl").write_text("\n".join(rows) + "\n")
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the interpreter")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    options = parser.parse_args(arguments)
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print("gpu-check needs an NVIDIA GPU; DRY=1 walks its parts without", file=sys.stderr)
            return 2
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    outcomes = run_all(parts, options.out.resolve(), is_dry=options.dry)
    print("\n" + summary(outcomes))
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
