"""``python -m bench``: time and memory beside others, checked first. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

import vqtriton
from bench import compare, gpu_report, provenance, report
from bench.cases import CASES, DEFAULT, DEFAULT_SCOPES, SCOPES
from bench.check import Refused
from bench.devices import make_device
from bench.measure import GIB, Options, Row, measure
from bench.subjects import OURS, SUBJECTS, default_subjects

# of a command that Ctrl-C ended, as shells have it
INTERRUPTED = 130
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    # fmt: off
    for flag, settings in {
        "--scope": {"nargs": "+", "default": DEFAULT_SCOPES, "choices": SCOPES},
        "--case": {"nargs": "+", "choices": [*CASES, "all"], "metavar": "CASE",
                   "help": f"any of {', '.join(CASES)}, all; by default minutes on two cores"},
        "--subject": {"nargs": "+", "choices": SUBJECTS, "metavar": "SUBJECT",
                      "help": f"any of {', '.join(map(repr, SUBJECTS))}"},
        "--device": {"default": "cpu", "choices": ("cpu", "cuda")},
        "--dtype": {"default": "float32", "choices": DTYPES},
        "--repeats": {"type": int, "default": 5, "help": "timed steps of each subject"},
        "--memory": {"type": positive, "default": 2, "metavar": "GIB",
                     "help": "leave out who would hold larger matrices; 2 by default"},
        "--check-all": {"action": "store_true", "help": "all rows, however long it takes"},
        "--budget": {"type": positive, "default": float("inf"), "metavar": "SECONDS",
                     "help": "begin no case after that"},
        "--json": {"type": Path, "metavar": "FILE", "help": "write the rows there, a line each"},
        "--docs": {"action": "store_true",
                   "help": "measure nothing; make the docs' tables from bench/results anew"},
        "--compare": {"nargs": 2, "metavar": ("A", "B"),
                      "help": "two result files, or two commits ('.': what is checked out)"},
    }.items():
        parser.add_argument(flag, **settings)
    # fmt: on
    return parser


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    asked = parser.parse_args(arguments)
    if asked.repeats < 1:
        parser.error(f"--repeats is {asked.repeats}; it must be at least 1")
    if asked.json and not asked.json.parent.is_dir():
        parser.error(f"--json is {asked.json}; there is no folder {asked.json.parent}")
    if asked.json and asked.compare:
        parser.error("--json is for rows that are measured; --compare makes none")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; torch sees no GPU")
    if asked.docs:
        report.write_docs()
        gpu_report.write(provenance.ROOT / "docs" / "gpu.md")
        return 0
    are_files = [Path(name).is_file() for name in asked.compare or ()]
    if all(are_files) and asked.compare:
        try:
            print("\n".join(compare.compare_files(*map(Path, asked.compare))))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if any(are_files):
        file, other = (asked.compare[are_files.index(is_file)] for is_file in (True, False))
        parser.error(f"--compare: {file} is a file and {other} is none")

    device, dtype = make_device(asked.device), DTYPES[asked.dtype]
    options = Options(
        dtype=dtype,
        repeats=asked.repeats,
        memory_limit=asked.memory * GIB,
        check_products=float("inf") if asked.check_all else None,
        budget=asked.budget,
        command=shlex.join(["python", "-m", "bench", *arguments]),
    )
    cases = {scope: asked.case or DEFAULT[scope] for scope in asked.scope}
    if asked.case and "all" in asked.case:
        cases = dict.fromkeys(asked.scope, tuple(CASES))
    print(
        f"vqtriton {vqtriton.__version__} ({provenance.commit()}), torch {torch.__version__}, "
        f"{device.name}, {torch.get_num_threads()} threads"
    )
    if asked.compare:
        subjects = asked.subject or [OURS]
        lines = compare.compare_revisions(
            *asked.compare, asked.scope, cases, subjects, device, options
        )
        try:
            for line in lines:
                print(line, flush=True)
        except (Refused, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    if not device.can_weigh():
        print("peak memory is not measured: that needs Linux and /proc/self/clear_refs")
    measured: list[Row] = []

    def keep(rows: list[Row]) -> None:
        """At once: an interrupt later on loses nothing of it."""
        measured.extend(rows)
        if rows:
            print(report.table(rows), flush=True)
        if measured and asked.json:
            report.write_rows(asked.json, measured)

    try:
        found = measure(
            asked.scope,
            cases.__getitem__,
            lambda scope: asked.subject or default_subjects(scope, asked.device, dtype),
            device,
            options,
            keep,
        )
    except KeyboardInterrupt:
        kept = f"; they are in {asked.json}" if measured and asked.json else ""
        print(f"interrupted after {len(measured)} rows{kept}", file=sys.stderr)
        return INTERRUPTED
    if found.left_out:
        print("\nleft out:", *found.left_out, sep="\n  ")
    for refusal in found.refused:
        print(f"refused, {refusal}", file=sys.stderr)
    if not found.rows:
        print("nothing was measured", file=sys.stderr)
    return int(bool(found.refused) or not found.rows)


if __name__ == "__main__":
    sys.exit(main())
