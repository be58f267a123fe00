"""That `make gpu-check` stops for nothing, hides nothing, and sees what is planted."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

sys.path.insert(0, str(Path(__file__).parents[1]))
runner = importlib.import_module("bench.gpu_check.__main__")

once = pytest.mark.skipif(INTERPRETED, reason="once is enough")


def run(script: str, tmp_path: Path, seconds: float = 60) -> runner.Outcome:
    part = runner.Part("name", seconds)
    return runner.run_part(part, [sys.executable, "-c", script], seconds, tmp_path / "log.txt")


@once
@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("print('result: all well')", "run", "all well"),
        ("print('result: no such program'); raise SystemExit(3)", "skipped", "no such program"),
        ("print('result: 7 wrong'); raise SystemExit(1)", "failed", "exit status 1: 7 wrong"),
        ("raise ValueError('odd')", "failed", "exit status 1: ValueError: odd"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "exit status -11: it said nothing"),
        # a part that ends without a result was not run
        ("print('on my way')", "failed", "exit status 0: on my way"),
    ],
)
def test_what_becomes_of_a_part(script: str, status: str, detail: str, tmp_path: Path) -> None:
    outcome = run(script, tmp_path)
    assert (outcome.status, outcome.detail) == (status, detail)


@once
def test_a_slow_part_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; print('result: half', flush=True);"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    outcome = run(script, tmp_path, seconds=2)
    assert outcome.status == "failed"
    assert outcome.detail == "stopped after 2 s; last it said: half"
    assert outcome.seconds < 10


@once
def test_the_summary_has_every_part_failures_first() -> None:
    outcomes = [
        runner.Outcome("a", "run", "well", 1.0),
        runner.Outcome("b", "skipped", "no GPU", 1.0),
        runner.Outcome("c", "failed", "7 wrong", 1.0),
    ]
    counts, *lines = runner.summary(outcomes).splitlines()
    assert counts == "1 failed, 1 skipped, 1 run"
    assert [line.split()[:2] for line in lines] == [["failed", "c"], ["skipped", "b"], ["run", "a"]]


@once
def test_no_time_left_is_told(tmp_path: Path) -> None:
    outcomes = runner.run_all(runner.PARTS, tmp_path, is_dry=True, deadline=0)
    assert {outcome.status for outcome in outcomes} == {"skipped"}
    assert [outcome.part for outcome in outcomes] == [part.name for part in runner.PARTS]


@once
def test_a_failure_stops_nothing_and_shows(tmp_path: Path, monkeypatch, capsys) -> None:
    parts = (
        runner.Part("graph", 60),
        runner.Part("no such part", 60),
        runner.Part("sanitizer", 60),
    )
    monkeypatch.setattr(runner, "PARTS", parts)
    # run_all sets it for the processes of the parts
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    assert runner.main(["--dry", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "1 failed, 2 skipped, 0 run" in said
    assert "CUDA graphs need a GPU" in said
    assert {p.name for p in tmp_path.iterdir()} == {"log.txt", "summary.txt", "parts.jsonl"}


@once
def test_every_part_has_a_function_and_seconds() -> None:
    parts = importlib.import_module("bench.gpu_check.parts")
    assert list(parts.FUNCTIONS) == [part.name for part in runner.PARTS]
    assert sum(part.seconds for part in runner.PARTS[:-2]) <= runner.DEADLINE <= 540


@once
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert runner.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRETED, reason="a dry run interprets the kernels")
def test_planted_faults_are_seen(tmp_path: Path, monkeypatch) -> None:
    parts = importlib.import_module("bench.gpu_check.parts")
    at, right = parts.Setting(tmp_path, is_dry=True), parts.ops.run_kernels

    def one_off(x, codebook, **options):
        out = right(x, codebook, **options)
        out.indices[0, -1] = (out.indices[0, -1] + 1) % codebook.shape[0]
        return out

    monkeypatch.setattr(parts.ops, "run_kernels", one_off)
    with pytest.raises(parts.Wrong, match="wrong"):
        parts.exact(at)
    monkeypatch.setattr(parts.ops, "run_kernels", right)

    step = parts._step
    monkeypatch.setattr(parts, "_step", lambda *args: [t + torch.rand(()) for t in step(*args)])
    with pytest.raises(parts.Wrong, match="differs in its bits"):
        parts.determinism(at)
