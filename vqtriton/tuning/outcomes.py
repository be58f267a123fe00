"""What tuning finds for a problem, however it finds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from vqtriton.tiles.problems import Problem
from vqtriton.tiles.tables import Row

# a candidate has to be faster than the default by this much: less could be noise
LEAST_GAIN = 0.03


class Found(NamedTuple):
    """Tiles that can be used."""

    config: Any
    # predicted or measured, in milliseconds
    ms: float
    # what else their row in a table tells; `shared` at least
    about: Row


class Outcome(NamedTuple):
    """Of a problem."""

    problem: Problem
    # in milliseconds; NaN if there is none
    default_ms: float
    best_ms: float
    # None: nothing can be used
    row: Row | None
    # candidates, and those that cannot be used
    tried: int
    left_out: int


def nothing_found(problem: Problem) -> Outcome:
    return Outcome(problem, math.nan, math.nan, None, 0, 0)


def decide(problem: Problem, candidates: Sequence[Any], found: Sequence[Found]) -> Outcome:
    """The default stays if nothing is clearly better: then the row has no config.

    Args:
        candidates: all that were tried, the default first.
        found: those of them that can be used, the best first.
    """
    counts = len(candidates), len(candidates) - len(found)
    if not found:
        return nothing_found(problem)._replace(tried=counts[0], left_out=counts[1])
    best = found[0]
    default = next((one for one in found if one.config == candidates[0]), None)
    default_ms = default.ms if default else math.nan
    # of what is not predicted the time is NaN
    if default and not best.ms <= (1 - LEAST_GAIN) * default_ms:
        best = default
    row: Row = {"config": None if best is default else asdict(best.config), **best.about}
    for name, ms in (("ms", best.ms), ("default_ms", default_ms)):
        # JSON has no NaN
        row[name] = None if math.isnan(ms) else ms
    return Outcome(problem, default_ms, best.ms, row, *counts)
