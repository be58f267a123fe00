"""bench/host.py: what a call asks of a device, and what it costs the host."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
host = importlib.import_module("bench.host")

# at most; to be lowered whenever it can be
MOST = {
    "nearest_code": 3,
    "nearest_code, prepared": 2,
    "module in eval": 3,
    "EMA step": 6,
    "EMA step, mask": 7,
    "EMA step, revival": 9,
    "gradient step": 5,
    "gradient step, mask": 6,
    "gradient step, revival": 10,
}


@pytest.fixture(scope="module")
def counts():
    return host.count()


def test_operations_of_each_call(counts) -> None:
    assert {name: of_call.total() for name, of_call in counts.items()} == MOST


def test_the_command_times_the_host(monkeypatch, capsys) -> None:
    monkeypatch.setattr(host, "REPEATS", 3)
    assert host.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {name: sum(row["operations"].values()) for name, row in rows.items()} == MOST
    times = {name: row["host_us"] for name, row in rows.items()}
    # four times apart: other tests run beside this one
    assert 0 < times["nearest_code, prepared"] < times["EMA step"]
