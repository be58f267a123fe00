"""bench/gpu_times.py, walked through on a CPU: one stage's failure costs no other its results."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
gpu_times = importlib.import_module("bench.gpu_times")
gpu_report = importlib.import_module("bench.gpu_report")
provenance = importlib.import_module("bench.provenance")


def context(out: Path, seconds: float = math.inf):
    return gpu_times.Context(out, "cpu", gpu_times.time.monotonic() + seconds)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_what_the_tables_are_made_of(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_times, "REPEATS", 2)
    # compiled for seconds, and so in `make gpu-check DRY=1` alone
    monkeypatch.setattr(gpu_times, "TINY", gpu_times.Case("tiny case", 48, 40, 8))
    compile_step = gpu_times.torch.compile
    monkeypatch.setattr(gpu_times.torch, "compile", lambda function, mode: function)
    of_tiny = context(tmp_path)
    for stage in (gpu_times.latency, gpu_times.sums, gpu_times.kmeans):
        stage(of_tiny)
    monkeypatch.setattr(gpu_times.torch, "compile", compile_step)
    latency = rows(tmp_path / "latency.jsonl")
    assert {row["subject"] for row in latency if row["what"] == "assign"} >= {
        *("ours exact", "ours exact, prepared", "ours fast", "addmm+argmin"),
        "ours exact, reduce-overhead",
    }
    assert {row["subject"] for row in latency if row["what"] == "train"} >= {
        *("ours", "ours, reduce-overhead")
    }
    assert all(row["wall_us"] > 0 for row in latency)
    # the same columns as those that are published
    published = set(gpu_report.rows_of("latency")[0])
    assert published - set(latency[0]) == {"host_us", "graph_us", "kernels"}
    assert set(rows(tmp_path / "kmeans.jsonl")[0]) == set(gpu_report.rows_of("kmeans")[0])
    assert set(rows(tmp_path / "sums.jsonl")[0]) <= set(gpu_report.rows_of("sums")[0])
    assert len(rows(tmp_path / "sums.jsonl")) == 5


def test_a_stage_that_fails_costs_no_other(tmp_path: Path, monkeypatch, capfd) -> None:
    def fails(context) -> None:
        context.write("latency", {"found": 1})
        raise ValueError("the planted failure")

    def works(context) -> None:
        context.write("sums", {"found": 2})

    monkeypatch.setattr(gpu_times, "STAGES", (fails, works))
    monkeypatch.setattr(sys, "argv", ["gpu_times", "--dry", f"--out={tmp_path}"])
    assert gpu_times.main() == 1
    out, err = capfd.readouterr()
    assert "failed: fails" in out
    assert "the planted failure" in err
    assert rows(tmp_path / "latency.jsonl") == [{"found": 1}]
    assert rows(tmp_path / "sums.jsonl") == [{"found": 2}]


def test_a_subject_that_fails_costs_no_other(tmp_path: Path, monkeypatch) -> None:
    def times(step, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_times, "times", times)
    monkeypatch.setattr(gpu_times.torch, "compile", lambda function, mode: function)
    gpu_times.latency(context(tmp_path))
    found = rows(tmp_path / "latency.jsonl")
    assert len(found) > 4
    assert {row["error"] for row in found} == {"out of memory"}


def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(gpu_times.torch, "compile", lambda function, mode: function)
    for stage in (gpu_times.latency, gpu_times.sums, gpu_times.kmeans, gpu_times.peers):
        stage(context(tmp_path, -1))
    assert not list(tmp_path.iterdir())
    # what is missing is said
    assert capfd.readouterr().out.count("left out, the time is up") > 10


def test_without_a_gpu_it_says_so_at_once(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(gpu_times.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_times", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as caught:
        gpu_times.main()
    assert caught.value.code == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_copy_in_another_repository_has_no_commit_of_it(tmp_path: Path, monkeypatch) -> None:
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "copy")
    monkeypatch.delenv("VQTRITON_COMMIT", raising=False)
    assert provenance.commit.__wrapped__() == "no commit"
    monkeypatch.setenv("VQTRITON_COMMIT", "abc1234")
    assert provenance.commit.__wrapped__() == "abc1234"
    # that of a checkout is not to be told otherwise
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert len(provenance.commit.__wrapped__()) == 7
