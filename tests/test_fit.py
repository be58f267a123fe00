"""The model of the screen's time, held to the times that were measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
fit = importlib.import_module("bench.fit")
machines = importlib.import_module("vqtriton.tuning.machines")
ROWS = fit.rows()


def test_each_time_is_predicted_within_30_percent() -> None:
    ratios = [fit.ratio(row) for row in ROWS]
    assert len({fit.shape_of(row) for row in ROWS}) == 16
    assert 0.7 < min(ratios) < max(ratios) < 1.3


def test_the_costs_are_what_the_times_say() -> None:
    costs = fit.fit(ROWS)
    assert costs == pytest.approx(machines.SCREEN_COSTS, rel=5e-3)
    # a model of as many terms that knows nothing would not do so where it has not looked
    ratios = fit.left_out(ROWS)
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert f"the {len(ROWS)} times of this table" in " ".join(text.split())
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times the measured ones" in text


@pytest.mark.parametrize("dim", [8, 64, 128, 512])
def test_terms_are_those_of_the_tiles(dim: int) -> None:
    """Counted with the Triton that is installed, which differs a little from the one there."""
    row = next(row for row in ROWS if row["D"] == dim and row["N"] > 30_000)
    counted = fit.count(row)
    # more registers than when it was measured, so that fewer CTAs may share a multiprocessor
    fewer = {name: value for name, value in counted["terms"].items() if name != "lone_dot"}
    assert fewer == pytest.approx({name: row["terms"][name] for name in fewer}, rel=0.15)
    assert 0.85 < counted["terms"]["lone_dot"] / row["terms"]["lone_dot"] < 2.1
    # what is predicted follows the numbers of rows and codes
    more = fit.count(row | {"N": 4 * row["N"], "K": 2 * row["K"]})
    grown = machines.predict_screen(more["terms"]) / machines.predict_screen(counted["terms"])
    assert 6 < grown < 8.5


def test_no_screen_read_more_from_l2_than_the_machine_can() -> None:
    """Its rate is that of the screen that read most in its time, of those in the file."""
    rates = []
    for row in ROWS:
        tiles = {name: row["tiles"][name] for name in ("block_n", "block_k", "hold_rows")}
        # 2 bytes an element: each code, and each row again where rows are streamed
        vectors = 1 if tiles["hold_rows"] else 1 + tiles["block_n"] / tiles["block_k"]
        blocks = -(-row["N"] // tiles["block_n"])
        rates.append(blocks * row["K"] * 2 * row["D"] * vectors / (row["screen_ms"] * 1e-3))
    assert max(rates) == pytest.approx(machines.H100.l2, rel=0.02)


def test_tiles_that_spill_are_not_counted() -> None:
    row = next(row for row in ROWS if row["D"] == 64)
    assert fit.count(row | {"tiles": row["tiles"] | {"max_registers": 32}}) is None


def test_the_fit_finds_the_costs_that_times_were_made_of() -> None:
    costs = {"start": 9.0, "inner": 4.0, "memory": 0.5, "issue": 1.5, "lone_dot": 3.0}
    made = [row | {"screen_ms": machines.predict_screen(row["terms"], costs)} for row in ROWS]
    assert fit.fit(made) == pytest.approx(costs, rel=1e-6)
