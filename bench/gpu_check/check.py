"""What a part is given, and what becomes of it: run, skipped or failed."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.parts import Part
from bench.provenance import ROOT

ROWS = "rows.jsonl"
# of the seconds that a part has: after that it should begin nothing new
SOFT = 0.85


class Skipped(Exception):
    """A part that cannot be run here, and why."""


class Check:
    """Notes what is found. A failure is noted too, and the part goes on."""

    def __init__(self, part: str, out: Path, is_dry: bool, seconds: float) -> None:
        self.part, self.out, self.is_dry = part, out, is_dry
        self.device = torch.device("cpu" if is_dry else "cuda")
        self.failures: list[str] = []
        self._end = time.monotonic() + SOFT * seconds

    def time_left(self) -> float:
        """Seconds until nothing new should be begun."""
        return self._end - time.monotonic()

    def note(self, **row: Any) -> None:
        """A line of the table, written at once: what is killed keeps what it found."""
        line = json.dumps({"part": self.part, **row})
        print(line, flush=True)
        with (self.out / ROWS).open("a") as file:
            file.write(line + "\n")

    def expect(self, is_right: object, text: str) -> None:
        if not is_right:
            print(f"FAILED: {text}", flush=True)
            self.failures.append(text)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """An error in here is a failure of the step, not the end of the part."""
        try:
            yield
        except Skipped:
            raise
        except Exception as error:
            traceback.print_exc()
            self.expect(False, f"{name}: {describe(error)}")

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message':.300}".replace("\n", " ")


def run_here(part: Part, out: Path, is_dry: bool, seconds: float) -> int:
    """Runs a part in this process and notes how it ended."""
    # hard data and the oracle of the tests
    sys.path.insert(0, str(ROOT / "tests"))
    out.mkdir(parents=True, exist_ok=True)
    check = Check(part.name, out, is_dry, seconds)
    status, text = "run", ""
    try:
        text = importlib.import_module(f"bench.gpu_check.{part.name}").run(check)
    except Skipped as reason:
        status, text = "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        check.failures.append(describe(error))
    if check.failures:
        status = "failed"
        first = "; ".join(check.failures[:4])
        more = f"; and {len(check.failures) - 4} more" if len(check.failures) > 4 else ""
        text = f"{first}{more}" + (f" | {text}" if text else "")
    check.note(outcome=status, text=text)
    return int(status == "failed")
