"""bench/training_runs.py: the tables of the docs are those of the result file, and it holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench import training_runs

ROWS = json.loads(training_runs.RESULTS.read_text())


def rows_of(case: str) -> list[dict]:
    rows = [row for row in ROWS if row["case"] == case]
    assert [row["seed"] for row in rows] == list(training_runs.SEEDS)
    return rows


@pytest.mark.parametrize("path", training_runs.DOCS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_result_file(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- training_runs: results -->" in text
    assert training_runs.with_tables(text, ROWS) == text


@pytest.mark.parametrize(
    ("case", "mse", "bce"), [("mnist", 0.004, 57), ("fashion-mnist", 0.008, 210)]
)
def test_every_seed_trains_well(case, mse, bce):
    for row in rows_of(case):
        assert row["test_mse"] <= mse
        assert row["test_bce_nats"] <= bce
        assert row["perplexity"] >= 200
        assert row["codes_used"] >= 500


def test_without_remedies_every_seed_collapses():
    for collapsed, healthy in zip(rows_of("gradient"), rows_of("all"), strict=True):
        assert collapsed["codes_used"] < 100
        assert collapsed["test_mse"] >= 1.5 * healthy["test_mse"]


def test_the_prior_knows_more_than_frequencies():
    prior = json.loads(training_runs.PRIOR_RESULTS.read_text())
    without = min(prior[f"{name}_bits_per_code"] for name in ("uniform", "marginal", "entropy"))
    assert prior["test_bits_per_code"] < 0.7 * without


def test_a_table_is_made_anew_and_the_rest_is_left():
    rows = [
        {"case": "mnist", "test_mse": mse, "perplexity": 9.6, "codes_used": 7}
        for mse in (0.003, 0.001, 0.002)
    ]
    text = "before\n<!-- training_runs: results -->\nold\n<!-- end -->\nafter\n"
    made = training_runs.with_tables(text, rows)
    assert "| MNIST | .00200 (.00100 to .00300) | – | 10 | 7 |" in made
    assert made.startswith("before\n<!-- training_runs: results -->\n| |")
    assert made.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in made
    assert training_runs.with_tables(made, rows) == made


def test_rows_are_replaced_and_resumed(monkeypatch, tmp_path):
    commands = []

    def train(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    def metrics(case, seed):
        folder = tmp_path / f"{case}-{seed}"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text(
            json.dumps(
                {
                    **dict.fromkeys(training_runs.METRICS, seed),
                    "arguments": {"codebook_size": 512},
                    "environment": {"threads": 1, "torch": "x"},
                }
            )
        )

    monkeypatch.setattr(training_runs.subprocess, "run", train)
    monkeypatch.setattr(training_runs, "commit", lambda: "abc")
    monkeypatch.setattr(training_runs, "RUNS", tmp_path)
    monkeypatch.setattr(training_runs, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(training_runs, "DOCS", ())
    monkeypatch.setattr(training_runs, "draw", lambda: None)
    monkeypatch.setattr(training_runs, "run_prior", lambda: commands.append("prior"))
    for case in ("mnist", "ema"):
        metrics(case, 4)
    training_runs.main(["--case", "ema", "mnist", "--seeds", "4"])
    training_runs.main(["--case", "ema", "--seeds", "4"])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["case"] for row in rows] == ["mnist", "ema"]
    assert rows[1]["command"] == (
        "python examples/train_mnist.py --batch-size 256 --no-kmeans-init "
        "--threshold-ema-dead-code 0 --seed 4"
    )
    assert commands.pop(2) == "prior"
    assert len(commands) == 3
    assert all(command[0] == sys.executable and "--resume" in command for command in commands)
