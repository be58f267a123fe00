"""Two result files, or two commits in one run, and whether they differ beyond the spread."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path

from bench.cases import CASES, Case
from bench.devices import Cpu, Cuda
from bench.measure import Options, interleave, quantile
from bench.provenance import ROOT
from bench.report import MIB, read_rows
from bench.worker import Worker

# what the rows of two files have to share to be compared
KEY = ("scope", "case", "subject", "dtype", "device", "threads")


# steps of each, fewer than which have no spread
LEAST_REPEATS = 3


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    """What became of the time; a difference is one where p20 to p80 of both do not overlap."""
    if min(len(before), len(after)) < LEAST_REPEATS:
        return f"no verdict from fewer than {LEAST_REPEATS} repeats"
    times = quantile(before, 0.5) / quantile(after, 0.5)
    if quantile(after, 0.8) < quantile(before, 0.2):
        return f"faster by {times:.2f}x"
    if quantile(after, 0.2) > quantile(before, 0.8):
        return f"slower by {1 / times:.2f}x"
    return "no difference beyond the spread"


def compare_files(before: Path, after: Path) -> list[str]:
    """A line for each row that both have.

    Raises:
        ValueError: they have none in common, or one is no file of rows.
    """
    old, new = (
        {tuple(row[k] for k in KEY): row for row in read_rows(path) if row.keys() >= {*KEY}}
        for path in (before, after)
    )
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError(f"{before} and {after} share no row of the same {', '.join(KEY)}")
    return [
        line(
            ", ".join(key[:3]),
            *((rows[key]["seconds"], rows[key]["peak_memory_bytes"]) for rows in (old, new)),
        )
        for key in shared
    ]


def compare_revisions(
    before: str,
    after: str,
    scopes: Iterable[str],
    cases: dict[str, Iterable[str]],
    subjects: Iterable[str],
    device: Cpu | Cuda,
    options: Options,
) -> Iterator[str]:
    """Each commit in a process of its own, turn by turn; a line for each case and subject.

    "." is what is checked out. This bench measures both, so that only the library differs.

    Raises:
        ValueError: a revision that git does not know.
        Refused: one of them is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        roots = [checkout(name, Path(folder) / str(i)) for i, name in enumerate((before, after))]
        for scope in scopes:
            for case, subject in product(cases[scope], subjects):
                results = race(roots, subject, CASES[case], scope, device, options)
                yield line(f"{scope}, {case}, {subject}", *results)


def race(
    roots: Iterable[Path],
    subject: str,
    case: Case,
    scope: str,
    device: Cpu | Cuda,
    options: Options,
) -> list[tuple[list[float], int | None]]:
    """Seconds and peak memory of the subject with the library of each folder."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(subject, case, scope, device.device.type, options.dtype, root)
            )
            for root in roots
        ]
        # first, since what is weighed must be what a process does first
        peaks = [w.ask("peak_memory") if device.can_weigh() else None for w in workers]
        for worker in workers:
            worker.ask("check")
        asked = [partial(worker.ask, "seconds") for worker in workers]
        return list(zip(interleave(asked, options.repeats), peaks, strict=True))


def checkout(revision: str, folder: Path) -> Path:
    """A folder with the library of a commit and the bench of this one."""
    if revision == ".":
        return ROOT
    command = ["git", "archive", revision, "--", "vqtriton", "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ValueError(f"{revision} is neither a file nor a commit: {done.stderr.decode()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    (folder / "vqtriton" / "kernels").symlink_to("../kernels")
    (folder / "bench").symlink_to(ROOT / "bench")
    if not (folder / "vqtriton" / "tuning").exists():
        # of a commit without it: this bench takes its arithmetic from there
        (folder / "vqtriton" / "tuning").symlink_to(ROOT / "vqtriton" / "tuning")
    return folder


def line(
    name: str, before: tuple[Sequence[float], int | None], after: tuple[Sequence[float], int | None]
) -> str:
    times, memory = [], ""
    for seconds, _ in (before, after):
        p20, p50, p80 = (f"{1e3 * quantile(seconds, q):.4g}" for q in (0.2, 0.5, 0.8))
        times.append(f"{p50} ({p20} to {p80})")
    if before[1] is not None and after[1] is not None:
        memory = f", {before[1] / MIB:.1f} -> {after[1] / MIB:.1f} MiB"
    return f"{name}: {verdict(before[0], after[0])}: {' -> '.join(times)} ms{memory}"
