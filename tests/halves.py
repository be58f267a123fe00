"""Both halves of the suite at once: ``python tests/halves.py [compiled] [interpreted]``.

Triton decides at import whether kernels are interpreted, so each half is a pytest of its own. Every
few seconds a line says how far each is, and what takes long; failures are shown in full when their
half ends. The last line is ``N passed, N failed, N skipped`` of both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
HALVES = {"compiled": [], "interpreted": ["-m", "kernel"]}
SECONDS_BETWEEN_SIGNS = 8
OUTCOMES = {
    **{"PASSED": "passed", "XFAIL": "passed", "FAILED": "failed", "XPASS": "failed"},
    **{"ERROR": "failed", "SKIPPED": "skipped"},
}
COLLECTED = re.compile(r"collected (\d+) items?(?:.* / (\d+) selected)?")
SKIPPED = re.compile(r"SKIPPED \[(\d+)\] [^ ]*: (.*)")
DONE = re.compile(rf"(.*?::.*?) ({'|'.join(OUTCOMES)})\b.*\[ *\d+%\]$")


class Half:
    """A pytest, and what its lines have said so far."""

    def __init__(self, name: str, flags: list[str]) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.total = 0
        self.current = "starting"
        self.current_since = self.start = time.monotonic()
        self.other_lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pytest", "-v", *HALVES[name], *flags],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": str(int(name == "interpreted"))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        line = b""
        with self.process as process:
            # the name of a test arrives when it starts, and the rest of its line when it ends
            while part := process.stdout.read1():
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
        return self.reader.is_alive()

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
    names = [name for name in arguments if name in HALVES] or list(HALVES)
    flags = [argument for argument in arguments if argument not in HALVES]
    running = [Half(name, flags) for name in names]
    total: Counter[str] = Counter()
    are_well = True
    try:
        while running:
            say(*(half.sign() for half in running))
            until = time.monotonic() + SECONDS_BETWEEN_SIGNS
            while time.monotonic() < until and all(half.is_running for half in running):
                time.sleep(0.2)
            for half in [half for half in running if not half.is_running]:
                running.remove(half)
                are_well &= half.end()
                total += half.counts
    finally:
        for half in running:
            half.process.kill()
    say(closing(total))
    return int(not are_well)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
