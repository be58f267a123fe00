"""What is launched without Triton's JIT is what the JIT would launch."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
launch = importlib.import_module("vqtriton.kernels.launch")


def test_one_thread_at_a_time_compiles() -> None:
    """Triton parses what is launched first, and Python 3.11 cannot in two threads at once."""
    inside: list[int] = []
    most: list[int] = []

    class Kernel:
        def __getitem__(self, grid):
            return self.run

        def run(self, *args, **given) -> None:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=launch.launch, args=(Kernel(), (1,), 7)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.fixture(scope="module")
def found() -> dict:
    """What tests/launch_cases.py says. In a process of its own: the stub of a driver stays."""
    command = [sys.executable, str(ROOT / "tests" / "launch_cases.py")]
    env = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.once
def test_each_call_gets_the_program_that_the_jit_would_choose(found) -> None:
    assert len(found["cases"]) > 20
    wrong = [name for name, is_same in found["cases"].items() if not is_same]
    assert wrong == []
    # as many as the JIT makes: some programs serve several cases
    assert found["programs"] == found["programs_of_jit"] > 8


@pytest.mark.once
def test_a_later_launch_gets_the_arguments_of_the_first(found) -> None:
    assert found["arguments_are_the_same"]
    assert found["grids"] == [[3, 1, 1], [3, 1, 1]]


@pytest.mark.once
def test_a_later_launch_does_not_ask_the_jit(found) -> None:
    assert found["asked_jit"] == 1
