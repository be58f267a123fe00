"""The parts of the suite, all at once: ``python tests/parts.py [GROUP | PART...] [FLAG...]``.

Each is a pytest of its own: Triton decides at import whether kernels are interpreted, and three
processes keep two cores busy until the end. Every few seconds a line says how far each is and what
takes long. Failures are shown in full when their part ends. The last line is that of all parts:
``N passed, N failed, N skipped``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    path.stem.removeprefix("test_"): str(path)
    for path in sorted((ROOT / "tests").glob("test_*.py"))
}
# examples, benchmarks, and what compiles for GPUs: as much work as all the others
OF_PROGRAMS = ("train", "mnist", "tokens", "semantic", "bench", "compile", "sass", "search")
OF_PROGRAMS += ("tuning", "fit")
PROGRAMS = [file for name, file in FILES.items() if name.startswith(OF_PROGRAMS)]
# the checks of a GPU; without one they run with tiny inputs
CHECKS = {name: file for name, file in FILES.items() if name.startswith("gpu_")}
TEXTS = {name: Path(file).read_text(encoding="utf-8") for name, file in FILES.items()}
INTERPRETED = {
    name: FILES[name]
    for name, text in TEXTS.items()
    if re.search(r"mark\.(kernel|needs_kernels)\b", text)
}
# what is about the interpreter alone has no test for a GPU
HAVE_KERNELS = {
    name: file
    for name, file in INTERPRETED.items()
    if not re.search(r"^pytestmark = .*\bneeds_interpreter\b", TEXTS[name], re.M)
}
KERNELS = ["-m", "kernel and not slow"]
# seconds that a part has on a GPU; what is not done by then has failed
ON_GPU = [*KERNELS, "--session-timeout=180"]
NO_PROGRAMS = [f"--ignore={file}" for file in PROGRAMS]
QUICK = ["-m", "not slow"]
GROUPS = {
    "all": {
        "package": [*QUICK, *NO_PROGRAMS],
        "programs": [*QUICK, *PROGRAMS],
        "interpreted": [*KERNELS, *INTERPRETED.values()],
    },
    # with those that are slow
    "ci": {
        "package": NO_PROGRAMS,
        "programs": PROGRAMS,
        "interpreted": [*KERNELS, *INTERPRETED.values()],
    },
    # a GPU has room for all of them at once
    "gpu": {name: [*ON_GPU, file] for name, file in (CHECKS | HAVE_KERNELS).items()},
    # a walk through its checks without one
    "dry": {
        "interpreted": [*KERNELS, *CHECKS.values()],
        "others": ["-m", "once and kernel", *CHECKS.values()],
    },
}
SECONDS_BETWEEN_SIGNS = 8
OUTCOMES = {
    **{"PASSED": "passed", "XFAIL": "passed", "FAILED": "failed", "XPASS": "failed"},
    **{"ERROR": "failed", "SKIPPED": "skipped"},
}
COLLECTED = re.compile(r"collected (\d+) items?(?:.* / (\d+) selected)?")
SKIPPED = re.compile(r"SKIPPED \[(\d+)\] [^ ]*: (.*)")
DONE = re.compile(rf"(.*?::.*?) ({'|'.join(OUTCOMES)})\b.*\[ *\d+%\]$")


class Part:
    """A pytest, and what its lines have said so far."""

    def __init__(self, name: str, selection: list[str], flags: list[str]) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.total = 0
        self.current = "starting"
        self.current_since = self.start = time.monotonic()
        self.other_lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pytest", "-v", *selection, *flags],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": str(int(name == "interpreted"))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        line = b""
        with self.process.stdout as output:
            # the name of a test arrives when it starts, and the rest of its line when it ends
            while part := output.read1():
                *lines, line = (line + part).split(b"\n")
                for text in lines:
                    self.take(text.decode(errors="replace").rstrip())
                if b"::" in line:
                    self.begin(line.decode(errors="replace").split("/")[-1].strip())

    def begin(self, name: str) -> None:
        self.current, self.current_since = name, time.monotonic()

    def take(self, line: str) -> None:
        if done := DONE.match(line):
            outcome = OUTCOMES[done[2]]
            self.counts[outcome] += 1
            if outcome == "failed":
                say(f"{self.name}: FAILED {done[1]}")
            return
        if found := COLLECTED.search(line):
            self.total = int(found[2] or found[1])
        self.other_lines.append(line)

    @property
    def is_running(self) -> bool:
        if self.process.poll() is None:
            return True
        # all that it has said; whoever inherited its output may live longer
        self.reader.join(timeout=5)
        return False

    def sign(self) -> str:
        now = time.monotonic()
        done = self.counts.total()
        share = f"{100 * done // max(1, self.total):3} %"
        words = f"{self.counts['passed']} of {self.total} passed, {self.counts['failed']} failed"
        for_long = now - self.current_since
        return (
            f"{self.name + ':':12} {share}, {words}, {minutes(now - self.start)}, now "
            f"{self.current}" + (f" for {for_long:.0f} s" if for_long > 5 else "")
        )

    def end(self) -> bool:
        """Says what there is to say; whether all is well."""
        status = self.process.returncode
        is_well = status == 0 and self.counts["passed"] > 0 and not self.counts["failed"]
        if not is_well:
            if not self.counts["failed"]:
                # there was no test, or it was interrupted or killed
                self.counts["failed"] += 1
                self.other_lines.append(f"pytest ended with status {status}: {self.current}")
            say(f"\n===== {self.name}: what pytest says =====", *self.other_lines)
        skips: Counter[str] = Counter()
        for line in self.other_lines:
            if skip := SKIPPED.match(line):
                skips[skip[2]] += int(skip[1])
        summary = [f"{self.name + ':':12} {n} skipped, {why}" for why, n in skips.most_common()]
        time_taken = minutes(time.monotonic() - self.start)
        say(*summary, f"{self.name + ':':12} {closing(self.counts)} in {time_taken}")
        return is_well


def minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def closing(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def main(arguments: list[str]) -> int:
    group = next((name for name in arguments if name in GROUPS), "all")
    arguments, parts = [name for name in arguments if name != group], GROUPS[group]
    names = [name for name in arguments if name in parts] or list(parts)
    flags = [argument for argument in arguments if argument not in parts]
    running = [Part(name, parts[name], flags) for name in names]
    total: Counter[str] = Counter()
    are_well = True
    try:
        while running:
            say(*(part.sign() for part in running))
            until = time.monotonic() + SECONDS_BETWEEN_SIGNS
            while time.monotonic() < until and all(part.is_running for part in running):
                time.sleep(0.2)
            for part in [part for part in running if not part.is_running]:
                running.remove(part)
                are_well &= part.end()
                total += part.counts
    except KeyboardInterrupt:
        are_well = False
        # make passes on what it was sent itself, so it comes twice
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    finally:
        for part in running:
            part.process.kill()
            # it did not end, so something in it did not pass
            total += part.counts + Counter(failed=1)
    say(closing(total))
    return int(not are_well)


if __name__ == "__main__":
    # as Ctrl-C: the parts end as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
