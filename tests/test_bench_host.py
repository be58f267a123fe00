"""bench/host.py: what a call asks of a device, and what it costs the host."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
host = importlib.import_module("bench.host")
gpu_report = importlib.import_module("bench.gpu_report")

# at most; to be lowered whenever it can be
MOST = {
    "nearest_code": 8,
    "nearest_code, prepared": 5,
    "module in eval": 12,
    "EMA step": 28,
    "EMA step, mask": 32,
    "EMA step, revival": 54,
    "gradient step": 25,
}


@pytest.fixture(scope="module")
def counts():
    return host.count()


def test_operations_of_each_call(counts) -> None:
    assert {name: of_call.total() for name, of_call in counts.items()} == MOST


def test_kernels_are_those_that_a_gpu_was_seen_to_run(counts) -> None:
    seen = {
        row["subject"]: {name for name, *_ in row["kernels"] if name.endswith("_kernel")}
        for row in gpu_report.rows_of("latency")
        if row["case"] == "rq-vae" and row["dtype"] == "float32" and "kernels" in row
    }
    for name, subject in {"nearest_code": "ours exact", "EMA step": "ours"}.items():
        launched = {kernel for kernel in counts[name] if kernel.endswith("_kernel")}
        # with few rows, a GPU of many processors divides the codes into parts
        assert launched == seen[subject] - {"merge_splits_kernel"}


def test_the_command_times_the_host() -> None:
    """In a process of its own: the stub of a driver stays."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = "import bench.host as host; host.REPEATS = 3; raise SystemExit(host.main())"
    done = subprocess.run(
        [sys.executable, "-c", words, "--json"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {name: sum(row["operations"].values()) for name, row in rows.items()} == MOST
    times = {name: row["host_us"] for name, row in rows.items()}
    assert 0 < times["nearest_code, prepared"] < times["nearest_code"] < times["EMA step"]
