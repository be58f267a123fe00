"""``python -m bench``: see `bench.training_step` for what is measured and how."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vqtriton
from bench.cases import CASES, Case
from bench.training_step import OURS, PEER, ROOT, Result, available, can_measure_memory, measure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--case",
        nargs="+",
        default=["default"],
        choices=[*CASES, "all"],
        metavar="CASE",
        help=f"any of {', '.join(CASES)}, all",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each subject")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")

    names = available()
    print(
        f"vqtriton {vqtriton.__version__} ({commit()}), torch {torch.__version__}, "
        f"{device()}, {torch.get_num_threads()} threads"
    )
    if PEER not in names:
        print(f"{PEER} is not installed, so there is nothing to compare with: make bench installs")
        print("it, or: python -m pip install -c constraints.txt -e '.[bench]'")
    if not can_measure_memory():
        print("peak memory is not measured: that needs Linux and /proc/self/clear_refs")

    rows: list[dict[str, Any]] = []
    for name in CASES if "all" in options.case else dict.fromkeys(options.case):
        try:
            results = measure(CASES[name], names, options.repeats)
        except ValueError as error:
            print(f"refused, {CASES[name]}: {error}", file=sys.stderr)
            return 1
        print(table(CASES[name], results), flush=True)
        rows += [row(CASES[name], result) for result in results]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def table(case: Case, results: list[Result]) -> str:
    lines = [
        "",
        f"{case} float32, training step on CPU, {len(results[0].seconds)} repeats",
        f"{'':<24}{'wrong indices':>13}{'median':>13}{'p20 to p80':>22}{'peak memory':>14}",
    ]
    for result in results:
        p20, p50, p80 = (1e3 * result.quantile(q) for q in (0.2, 0.5, 0.8))
        spread = f"{p20:.1f} to {p80:.1f} ms"
        memory = "not measured"
        if result.peak_memory is not None:
            memory = f"{result.peak_memory / 2**20:.1f} MiB"
        lines.append(
            f"{result.subject:<24}{result.mismatches:>13}{p50:>10.1f} ms{spread:>22}{memory:>14}"
        )
    by_name = {result.subject: result for result in results}
    if OURS in by_name and PEER in by_name:
        ours, peer = by_name[OURS], by_name[PEER]
        # turn by turn, since the two steps of a turn met the same machine
        ratios = torch.tensor(peer.seconds) / torch.tensor(ours.seconds)
        p20, p80 = ratios.quantile(torch.tensor([0.2, 0.8])).tolist()
        spread, time = f"{p20:.2f} to {p80:.2f} x", peer.quantile(0.5) / ours.quantile(0.5)
        memory = "not measured"
        if ours.peak_memory is not None and peer.peak_memory is not None:
            memory = f"{peer.peak_memory / ours.peak_memory:.1f} x less"
        lines.append(f"{'ratio':<24}{'':>13}{time:>6.2f} x less{spread:>22}{memory:>14}")
    return "\n".join(lines)


def row(case: Case, result: Result) -> dict[str, Any]:
    return {
        "case": case.name,
        "subject": result.subject,
        "version": result.version,
        "shape": {"N": case.num_rows, "K": case.codebook_size, "D": case.dim},
        "dtype": "float32",
        "repeats": len(result.seconds),
        "p20_s": result.quantile(0.2),
        "p50_s": result.quantile(0.5),
        "p80_s": result.quantile(0.8),
        "mismatches": result.mismatches,
        "peak_memory_bytes": result.peak_memory,
        "device": device(),
        "driver": None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "vqtriton": vqtriton.__version__,
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device() -> str:
    """Name of the processor."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    return models[0] if models else platform.machine()


def commit() -> str:
    """Short hash of the checkout, "-dirty" where files have changed since."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "no commit"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
