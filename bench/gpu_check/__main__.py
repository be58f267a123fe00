"""Checks everything on this machine's GPU, in parts: see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.__main__ import positive
from bench.gpu_check import check, runner, summary
from bench.gpu_check.parts import PARTS
from bench.provenance import ROOT

# seconds of all parts together
SECONDS, DRY_SECONDS = 520.0, 240.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        epilog="parts: " + "; ".join(f"{part.name}, {part.about}" for part in PARTS.values()),
    )
    parser.add_argument("part", nargs="*", help="all of them by default")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", metavar="DIR")
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter"
    )
    parser.add_argument("--seconds", type=positive, help="for all parts; what is left then fails")
    # what the process of a part does, and how long it has
    parser.add_argument("--here", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in options.part:
        if name not in PARTS:
            parser.error(f"part is {name!r}; it must be one of {', '.join(PARTS)}")
    if not options.dry and not torch.cuda.is_available():
        print(
            "torch sees no GPU, so nothing was checked; DRY=1 (--dry) walks the parts on a CPU",
            file=sys.stderr,
        )
        return 2
    if not importlib.util.find_spec("triton"):
        print("Triton is not installed, so nothing was checked", file=sys.stderr)
        return 2
    out = options.out.absolute()
    if out.exists() and not out.is_dir():
        parser.error(f"--out is {out}, which is no folder")
    if options.here is not None:
        (name,) = options.part
        return check.run_here(PARTS[name], out, options.dry, options.here)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # as Ctrl-C does it: the part that runs is ended too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    seconds = options.seconds or (DRY_SECONDS if options.dry else SECONDS)
    with kernels_in_reach():
        outcomes = runner.run_all(
            [PARTS[name] for name in options.part or PARTS], out, options.dry, seconds
        )
    print(f"\n{summary.text(outcomes, options.dry)}\n\nin {out}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


@contextlib.contextmanager
def kernels_in_reach() -> Iterator[None]:
    """A checkout that is not installed has no `vqtriton.kernels`: a link stands in meanwhile."""
    if importlib.util.find_spec("vqtriton.kernels"):
        yield
        return
    link = ROOT / "vqtriton" / "kernels"
    link.symlink_to("../kernels")
    try:
        yield
    finally:
        link.unlink()


if __name__ == "__main__":
    sys.exit(main())
