"""A subject in a process of its own, which is asked on stdin and answers on stdout.

So it can be weighed by itself, on a CPU, and be of another commit than its rival (`bench.compare`).
Asked for "check", "seconds" or "peak_memory", it answers with a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.check import Refused, check, find_truth
from bench.devices import make_device
from bench.provenance import ROOT
from bench.subjects import SUBJECTS, Run, make_inputs


class Worker:
    """The process, from outside."""

    def __init__(
        self,
        subject: str,
        case: Case,
        scope: str,
        device: str,
        dtype: torch.dtype,
        root: Path = ROOT,
    ) -> None:
        spec = {
            "subject": subject,
            "case": vars(case),
            "scope": scope,
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(spec)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> Any:
        """
        Raises:
            Refused: the subject is wrong.
            RuntimeError: the process ended; its message is on stderr.
        """
        try:
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self._process.args[-1]} ended")
        found = json.loads(answer)
        if isinstance(found, dict) and "refused" in found:
            raise Refused(found["refused"])
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def warm_up(run: Run, case: Case) -> None:
    """Code, thread pools and buffers of the BLAS are paid for once a process.

    By a tiny step, so that nothing large is left to be used again; but compiling is not the step.
    """
    if not run.subject.is_compiled:
        tiny = make_inputs(replace(case, num_rows=64, codebook_size=32), run.inputs.x.dtype)
        run = Run(run.subject, run.scope, tiny)
    run.reset()
    run.step()
    square = torch.ones(1024, 1024)
    square @ square


def serve(spec: dict[str, Any]) -> None:
    torch.set_num_threads(spec["threads"])
    device = make_device(spec["device"])
    case = Case(**spec["case"])
    inputs = make_inputs(case, getattr(torch, spec["dtype"]), device.device)
    run = Run(SUBJECTS[spec["subject"]], spec["scope"], inputs)
    # what libraries print must not be taken for an answer
    answers, sys.stdout = sys.stdout, sys.stderr
    for question in map(str.strip, sys.stdin):
        if question == "peak_memory" and not device.shares_memory:
            warm_up(run, case)
        run.reset()
        try:
            if question == "check":
                answer = check(run, find_truth(inputs, device.check_products))._asdict()
            else:
                answer = getattr(device, question)(run.step)
        except Refused as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
