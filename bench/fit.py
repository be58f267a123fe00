"""What the terms of a screen's time cost, from measured times: `python -m bench.fit`.

`bench/results/h200/tiles.jsonl` has the times of the screen alone: its defaults at 16 shapes, and
other tiles at nine of them. `--count` compiles them with the Triton that is installed, and notes
the terms of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch

from bench import provenance
from bench.report import RESULTS, Row, read_rows, write_rows
from vqtriton.tiles.tables import Problem
from vqtriton.tuning.machines import SCREEN_COSTS, predict_screen

FILE = RESULTS / "h200" / "tiles.jsonl"
TARGET = "sm_90"


def rows() -> list[Row]:
    return read_rows(FILE)


def count(row: Row) -> Row | None:
    """The row with the terms of its time, in milliseconds; None where the tiles spill."""
    # they need Triton, and the tables of the docs do not
    from vqtriton.kernels.screen_tiles import ScreenCodesConfig
    from vqtriton.tuning import predict, tunables

    problem = Problem("nearest_code", row["dtype"], row["D"], row["K"], row["N"])
    tunable = tunables.TUNABLES["nearest_code"]
    # tiles that were measured then may have had fields that are no more
    known = {field.name for field in fields(ScreenCodesConfig)}
    config = ScreenCodesConfig(**{n: value for n, value in row["tiles"].items() if n in known})
    # what was measured did not finish
    launches = tunables.screen_launches(problem, TARGET, config, splits=2)
    usage = predict.usage(launches, tunable.work, TARGET, print)
    if usage is None:
        return None
    terms = predict.usage_terms(problem, TARGET, config, usage)
    return row | {"counted_with": provenance.version("triton"), "terms": terms}


def fit(measured: Sequence[Row]) -> dict[str, float]:
    """The costs with the least squares of predicted / measured - 1."""
    terms = [[row["terms"][name] / row["screen_ms"] for name in SCREEN_COSTS] for row in measured]
    matrix = torch.tensor(terms, dtype=torch.float64)
    costs = torch.linalg.lstsq(matrix, torch.ones(len(terms), 1, dtype=torch.float64)).solution
    return dict(zip(SCREEN_COSTS, costs[:, 0].tolist(), strict=True))


def ratio(row: Row, costs: dict[str, float] | None = None) -> float:
    """Predicted over measured."""
    return predict_screen(row["terms"], costs or SCREEN_COSTS) / row["screen_ms"]


def left_out(measured: Sequence[Row]) -> list[float]:
    """The ratio of each row, where the costs are those of all shapes but its own."""
    found = []
    for row in measured:
        others = [other for other in measured if shape_of(other) != shape_of(row)]
        found.append(ratio(row, fit(others)))
    return found


def shape_of(row: Row) -> tuple[int, int, int]:
    return row["N"], row["K"], row["D"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="compile the tiles: some minutes")
    measured = rows()
    if parser.parse_args().count:
        measured = [counted for row in measured if (counted := count(row))]
        write_rows(FILE, measured)
    costs = fit(measured)
    print("SCREEN_COSTS =", {name: float(f"{value:.3g}") for name, value in costs.items()})
    for name, ratios in (
        ("predicted / measured", [ratio(row, costs) for row in measured]),
        ("each shape by the others", left_out(measured)),
    ):
        print(f"{name}: {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
