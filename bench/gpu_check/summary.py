"""How the parts ended, for a person to read: failures first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu_check.runner import Outcome

ORDER = ("failed", "skipped", "run")
DRY = "DRY: tiny sizes on a CPU. It shows that the parts work, and says nothing about a GPU."


def line(outcome: Outcome) -> str:
    status = outcome.status.upper() if outcome.status == "failed" else outcome.status
    return f"{status:<8}{outcome.part:<12}{outcome.seconds:>5.0f} s  {outcome.text}"


def text(outcomes: Sequence[Outcome], is_dry: bool) -> str:
    counts = {status: sum(o.status == status for o in outcomes) for status in ORDER}
    heading = ", ".join(f"{count} {status}" for status, count in counts.items())
    seconds = sum(outcome.seconds for outcome in outcomes)
    return "\n".join(
        [
            *([DRY] if is_dry else []),
            f"{len(outcomes)} parts: {heading}; {seconds:.0f} s",
            # sorted is stable: the order in which they ran
            *map(line, sorted(outcomes, key=lambda outcome: ORDER.index(outcome.status))),
        ]
    )
