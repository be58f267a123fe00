"""Every kernel on a small case under compute-sanitizer: memcheck, and racecheck for shared memory.

What reads memory that nobody wrote, the other tests find: they fill what is allocated with NaN.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from conftest import DEVICE, INTERPRETED
from gpu_check import KERNELS, ROOT, note
from small_cases import CASES

TOOLS = ("memcheck", "racecheck")
PROGRAM = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SECONDS = 60
# exit status of the tool where it has found something
FOUND = 99
# most of a run is the start of torch, on the host
AT_A_TIME = max(1, (os.cpu_count() or 1) // 2)


def command(tool: str, kernel: str) -> list[str]:
    case = [sys.executable, str(ROOT / "tests" / "small_cases.py"), kernel]
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=20"]
    return [PROGRAM, *options, f"--kernel-name=kne={kernel}_kernel", *case]


def run(command: list[str], seconds: float = SECONDS) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and what it printed until then."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        # each tensor an allocation of its own, so that it is seen where one ends
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    try:
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def verdict(status: int | None, printed: str) -> str:
    """What is wrong, in words; nothing if the tool has looked and found nothing."""
    if status is None:
        return "it did not end in time"
    summaries = [line for line in printed.splitlines() if "SUMMARY" in line]
    if not summaries:
        return "the tool gave no summary, so it has looked at nothing"
    return "" if status == 0 else summaries[-1]


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.once
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_finds_nothing(tool: str) -> None:
    if not Path(PROGRAM).exists():
        pytest.skip("compute-sanitizer is not installed")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = {kernel: pool.submit(run, command(tool, kernel)) for kernel in CASES}
    wrong = {}
    for kernel, future in runs.items():
        status, printed = future.result()
        if "Device not supported" in printed:
            pytest.skip("compute-sanitizer does not support this device")
        found = verdict(status, printed)
        note("sanitizer", tool=tool, kernel=kernel, status=status, found=found)
        if found:
            print(printed[-4000:])
            wrong[kernel] = found
    assert not wrong


def test_each_kernel_has_a_case() -> None:
    assert {f"{name}_kernel" for name in CASES} == KERNELS


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("kernel", CASES)
def test_a_case_launches_its_kernel_and_is_right(kernel: str) -> None:
    if not INTERPRETED:
        CASES[kernel](DEVICE)
        return
    from triton.runtime.interpreter import GridExecutor

    launched, launch = set(), GridExecutor.__call__

    def noted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        launched.add(self.fn.__name__)
        launch(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", noted):
        CASES[kernel](DEVICE)
    assert f"{kernel}_kernel" in launched


def test_a_tool_that_hangs_is_ended_and_its_output_kept() -> None:
    words = "import time; print('so far', flush=True); time.sleep(60)"
    status, printed = run([sys.executable, "-c", words], 2)
    assert (status, printed) == (None, "so far\n")
    assert verdict(status, printed) == "it did not end in time"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("print('ERROR SUMMARY: 0 errors')", ""),
        ("print('ERROR SUMMARY: 3 errors'); raise SystemExit(99)", "ERROR SUMMARY: 3 errors"),
        ("pass", "the tool gave no summary, so it has looked at nothing"),
    ],
)
def test_what_a_tool_says_is_understood(words: str, found: str) -> None:
    assert verdict(*run([sys.executable, "-c", words])) == found
