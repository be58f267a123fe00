"""Full training runs of the examples: the figures of README.md and docs/training.md.

    .venv/bin/python -m bench.training_runs         # all cases and seeds: an hour or two
    .venv/bin/python -m bench.training_runs --case gradient ema --seeds 0
    .venv/bin/python -m bench.training_runs --docs  # only writes the docs from the result file

Each case is `examples/train_mnist.py` with some flags, run with --resume in a folder of its own
below runs/training_runs: what was interrupted goes on, what is complete stays as it is. The
prior is `examples/train_prior.py` on the first of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.provenance import ROOT, commit, processor
from bench.report import fill

RESULTS = ROOT / "bench" / "results" / "training_runs.json"
PRIOR_RESULTS = ROOT / "bench" / "results" / "train_prior.json"
RUNS = ROOT / "runs" / "training_runs"
SEEDS = (0, 1, 2)
METRICS = ("test_mse", "test_bce_nats", "perplexity", "codes_used", "seconds")


# the setting in which a codebook collapses most visibly
LARGE = "--batch-size 256"
GRADIENT = f"{LARGE} --codebook-update gradient"
NO_REVIVAL = "--threshold-ema-dead-code 0"
# the flags of each case
CASES = {
    "mnist": "",
    "fashion-mnist": "--dataset fashion-mnist",
    "gradient": f"{GRADIENT} --no-kmeans-init {NO_REVIVAL}",
    "kmeans": f"{GRADIENT} {NO_REVIVAL}",
    "revival": f"{GRADIENT} --no-kmeans-init",
    "ema": f"{LARGE} --no-kmeans-init {NO_REVIVAL}",
    "all": LARGE,
    "best": "--batch-size 32 --lr 1e-3 --epochs 7",
}
# the tables of the docs: cases, and what the table calls them
TABLES = {
    "results": {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"},
    "lesson": {
        "gradient": "gradient, uniform start",
        "kmeans": "gradient, k-means start",
        "revival": "gradient, uniform start, revival",
        "ema": "EMA, uniform start",
        "all": "EMA, k-means start, revival",
    },
    "best": {
        "all": "batches of 256",
        "mnist": "batches of 64, the default",
        "best": "batches of 32, `--lr 1e-3`, 7 epochs, one seed",
    },
}
DOCS = (ROOT / "README.md", ROOT / "docs" / "training.md")


def run(case: str, seed: int) -> dict[str, Any]:
    """A row of the result file.

    Raises:
        subprocess.CalledProcessError: the trainer failed; its message is on stderr.
    """
    folder = RUNS / f"{case}-{seed}"
    flags = [*CASES[case].split(), "--seed", str(seed)]
    command = ["examples/train_mnist.py", *flags, "--out", str(folder), "--resume"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "case": case,
        "seed": seed,
        "command": " ".join(["python", "examples/train_mnist.py", *flags]),
        **{name: metrics[name] for name in METRICS if name in metrics},
        "codebook_size": metrics["arguments"]["codebook_size"],
        "device": processor(),
        "threads": metrics["environment"]["threads"],
        "torch": metrics["environment"]["torch"],
        "commit": commit(),
    }


def run_prior() -> None:
    """Writes the prior's result file, and its samples for the docs."""
    folder = RUNS / f"mnist-{SEEDS[0]}"
    command = ["examples/train_prior.py", "--vqvae", str(folder), "--resume"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    metrics = json.loads((folder / "prior" / "metrics.json").read_text())
    metrics["command"] = "python examples/train_prior.py --vqvae runs/mnist"
    metrics["device"] = processor()
    PRIOR_RESULTS.write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.copy(folder / "prior" / "samples.png", ROOT / "docs" / "samples.png")


def prior_table() -> str:
    """Markdown: bits for an index, by what is known of it."""
    metrics = json.loads(PRIOR_RESULTS.read_text())
    lines = ["| prior | bits/code | bits/dim |", "|---|---|---|"]
    for title, key in (
        ("uniform, log2 K", "uniform_bits_per_code"),
        ("how often each code occurs in the training set", "marginal_bits_per_code"),
        ("how often it occurs in the test set itself", "entropy_bits_per_code"),
        ("transformer", "test_bits_per_code"),
    ):
        # 49 codes for 784 pixels
        lines.append(f"| {title} | {metrics[key]:.3f} | {metrics[key] * 49 / 784:.4f} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """Markdown: a line for each case, medians over its seeds with the least and the most."""
    lines = ["| | test MSE | BCE, nats/image | perplexity | codes used |", "|---|---|---|---|---|"]
    for name, title in titles.items():
        of_case = [row for row in rows if row["case"] == name]
        cells = [
            spread([row[metric] for row in of_case if metric in row], digits)
            for metric, digits in (
                ("test_mse", 5),
                ("test_bce_nats", 1),
                ("perplexity", 0),
                ("codes_used", 0),
            )
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    low, middle, high = (
        f"{value:.{digits}f}".removeprefix("0") or "0"
        for value in (min(values), median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def with_tables(text: str, rows: list[dict[str, Any]]) -> str:
    """The text with each of its tables, between two comments that name it, made anew."""

    def make(name: str) -> str:
        return prior_table() if name == "prior" else table(rows, TABLES[name])

    return fill(text, "training_runs", make)


def draw() -> None:
    """The pictures of the docs, of the runs of the first seed that are complete."""
    # examples are scripts, not a package
    sys.path.insert(0, str(ROOT / "examples"))
    import plots
    import run_files

    def folder(case: str) -> Path:
        return RUNS / f"{case}-{SEEDS[0]}"

    if (folder("mnist") / "metrics.json").exists():
        shutil.copy(folder("mnist") / "reconstructions.png", ROOT / "docs" / "reconstructions.png")
    if all((folder(case) / "metrics.json").exists() for case in TABLES["lesson"]):
        curves = {
            title: run_files.load_checkpoint(folder(case) / "checkpoint.safetensors")[1]["curve"]
            for case, title in TABLES["lesson"].items()
        }
        (ROOT / "docs" / "collapse.png").write_bytes(plots.training_curves(curves, 512))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training_runs", description=__doc__)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES, metavar="CASE",
                        help=f"any of {', '.join(CASES)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    parser.add_argument("--docs", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in () if options.docs else options.seeds:
        for name in options.case:
            row = run(name, seed)
            print(json.dumps(row), flush=True)
            rows = [old for old in rows if (old["case"], old["seed"]) != (name, seed)] + [row]
            rows.sort(key=lambda row: (list(CASES).index(row["case"]), row["seed"]))
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    if not options.docs and "mnist" in options.case:
        run_prior()
    for path in DOCS:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
