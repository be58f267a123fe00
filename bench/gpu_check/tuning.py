"""Tiles for the shapes of real models: what they gain, and the table to ship."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from bench.gpu_check.check import Check
from bench.provenance import ROOT
from vqtriton.tuning import tables
from vqtriton.tuning.tune import REAL_MODELS

DRY_SHAPES = ((48, 40, 8),)
DTYPES, DRY_DTYPES = ("float32", "bfloat16"), ("float32",)
# of what is left, for the shape that was begun last
SHARE = 0.8


def run(check: Check) -> str:
    folder = check.out / "tables"
    shapes = [
        f"{n},{k},{d},{dtype}"
        for dtype in (DRY_DTYPES if check.is_dry else DTYPES)
        for n, k, d in (DRY_SHAPES if check.is_dry else REAL_MODELS)
    ]
    flags = [flag for shape in shapes for flag in ("--shape", shape)]
    command = ["tune", *flags, "--out", str(folder), "--budget", f"{SHARE * check.time_left():.0f}"]
    with check.step("tune"):
        done = tune([*command, "--device", check.device.type])
        check.expect(done == 0, f"python -m vqtriton tune ended with status {done}")
    name = tables.device_names(check.device)[0]
    rows = tables.read(folder / tables.file_name(name))
    gains = []
    for row in rows:
        problem = tables.problem_of(row)
        # a default that cannot be used has no time
        gains.append((row["default_ms"] or row["ms"]) / row["ms"])
        check.note(problem=str(problem), ms=row["ms"], default_ms=row["default_ms"])
    check.expect(rows, "nothing was tuned")
    wanted = len(shapes) * 4
    better = sum(gain > 1 for gain in gains)
    text = f"{len(rows)} of {wanted} problems, {better} of them faster than the default"
    return f"{text}, at best {max(gains, default=1.0):.2f}×; tables/{tables.file_name(name)}"


def tune(arguments: Sequence[str]) -> int:
    """As a command of its own; it prints its summary."""
    command = [sys.executable, "-m", "vqtriton", *arguments]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.STDOUT, check=False)
    return done.returncode
