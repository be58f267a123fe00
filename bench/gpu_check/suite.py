"""The tests that run kernels, a process a file: most of their time is that of the compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu_check.check import Check
from bench.provenance import ROOT

MARKED = re.compile(r"mark\.(kernel|gpu)\b")
# in Triton's interpreter the others take minutes
DRY_FILES = ("test_code_sums.py",)


def run(check: Check) -> str:
    files = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if MARKED.search(path.read_text())
    ]
    all_files = len(files)
    if check.is_dry:
        files = [path for path in files if path.name in DRY_FILES]
    # of the processes that compile
    workers = max(1, (os.cpu_count() or 1) - 2)
    seconds = check.time_left()
    total: Counter[str] = Counter()
    with ThreadPoolExecutor(workers) as pool:
        for path, future in [(p, pool.submit(run_file, p, seconds, check.is_dry)) for p in files]:
            with check.step(path.name):
                counts, output = future.result()
                print(f"--- {path.name}\n{output}", flush=True)
                check.note(file=path.name, **counts)
                total += counts
                for line in re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE):
                    check.expect(False, line[:200])
                unfinished = counts["unfinished"] or not counts["passed"]
                check.expect(not unfinished, f"{path.name}: not finished, or no test passed")
    found = ", ".join(f"{count} {name}" for name, count in sorted(total.items()))
    return f"{found}; {len(files)} of {all_files} files"


def run_file(path: Path, seconds: float, is_dry: bool) -> tuple[Counter[str], str]:
    """Counts of what pytest says, and the end of its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    env = os.environ | {
        # each D, dtype and layout is a program of its own: fewer examples than on a CPU
        "HYPOTHESIS_PROFILE": "few",
        **({"TRITON_INTERPRET": "1"} if is_dry else {}),
    }
    try:
        done = subprocess.run(
            [*command, "-m", "(gpu or kernel) and not slow", str(path)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        return Counter(unfinished=1), (error.stdout or b"").decode(errors="replace")[-4000:]
    output = done.stdout.decode(errors="replace")
    last = (output.strip().splitlines() or [""])[-1]
    words = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", last)
    counts: Counter[str] = Counter({word: int(number) for number, word in words})
    # 5: no test of the file is for here
    if done.returncode not in (0, 1):
        counts["unfinished"] = 1
    return counts, output[-4000:]
