"""`bench.measure` beside the peers that are installed; rows as those of ``python -m bench``."""

from __future__ import annotations

import json

import torch

from bench.devices import Cpu, make_device
from bench.gpu_check.check import Check
from bench.measure import GIB, Options, Row, measure
from bench.report import table
from bench.subjects import SUBJECTS, default_subjects

SCOPES = ("assign", "training")
CASES = {
    "assign": (
        "roofline-1M-1024-64",
        "vit-vqgan",
        "roofline-64K-1024-128",
        "llamagen",
        "titok",
        "roofline-1M-16384-128",
    ),
    "training": ("vit-vqgan", "titok", "encodec", "taming", "square"),
}
DRY_CASES = ("rq-vae",)
# of the matrices that a peer may hold
MATRIX_BYTES = 16 * GIB


class Unweighed(Cpu):
    """Weighing on a CPU takes a process for each subject; a GPU weighs in this one."""

    def can_weigh(self) -> bool:
        return False


def run(check: Check) -> str:
    device = Unweighed() if check.is_dry else make_device("cuda")
    repeats = 3 if check.is_dry else 15
    rows: list[Row] = []
    left_out: list[str] = []

    def show(of_case: list[Row]) -> None:
        if of_case:
            print(table(of_case), flush=True)
            with (check.out / "peers.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in of_case)

    # case by case: a peer that breaks down takes no other case with it
    for dtype in (torch.float16, torch.float32):
        for scope in SCOPES:
            # compiled for seconds, for each shape anew
            subjects = set(default_subjects(scope, check.device.type, dtype)) - {
                "torch.compile of it"
            }
            for case in DRY_CASES if check.is_dry else CASES[scope]:
                if check.time_left() < 0:
                    left_out.append(f"{case}, {scope}, {dtype}: the time was up")
                    continue
                with check.step(f"{case}, {scope}, {dtype}"):
                    options = Options(dtype, repeats, MATRIX_BYTES, command="make gpu-check")
                    found = measure(
                        [scope],
                        lambda _, case=case: [case],
                        lambda _, names=subjects: [name for name in SUBJECTS if name in names],
                        device,
                        options,
                        show,
                    )
                    rows += found.rows
                    left_out += [f"{line}, {dtype}" for line in found.left_out]
                    for refusal in found.refused:
                        check.expect(False, f"refused, {refusal}")
    print("left out:", *left_out, sep="\n  ")
    check.note(left_out=left_out)
    check.expect(rows, "nothing was measured")
    subjects = sorted({row["subject"] for row in rows})
    return f"{len(rows)} rows of {', '.join(subjects)}; {len(left_out)} left out, see the log"
