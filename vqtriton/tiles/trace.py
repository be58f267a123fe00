"""The shapes that a program really uses: VQTRITON_TRACE=FILE, a line of JSON for each."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from vqtriton.planes import MAX_DIM
from vqtriton.tiles.problems import DTYPES, Problem, problem_fault, problem_of

VARIABLE = "VQTRITON_TRACE"
_seen: set[tuple[Any, ...]] = set()


def is_on() -> bool:
    return VARIABLE in os.environ


def record(op: str, x: torch.Tensor, codebook_size: int) -> None:
    """Notes a shape when it is first seen, at once: what is killed later keeps it.

    Args:
        op: one of `vqtriton.tiles.problems.OPS`.
        x: [N, D].
    """
    path = os.environ.get(VARIABLE)
    if not path or x.dtype not in DTYPES.values() or 0 in x.shape or x.shape[1] > MAX_DIM:
        return
    key = (path, op, x.dtype, x.shape, codebook_size)
    if key in _seen:
        return
    _seen.add(key)
    dtype = str(x.dtype).removeprefix("torch.")
    problem = Problem(op, dtype, x.shape[1], codebook_size, x.shape[0])
    try:
        # a pipe that nobody reads would hold the program up
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is no regular file")
        # one write to the end of the file, which those of other processes do not cut in two
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(problem._asdict()) + "\n")
    except OSError as error:
        warnings.warn(f"{VARIABLE} is {path}, where nothing can be noted: {error}", stacklevel=2)


def read(path: Path) -> list[Problem]:
    """The shapes of a file, each once.

    Raises:
        ValueError: a line is no shape, or there is none.
        OSError: it cannot be read.
    """
    problems: dict[Problem, None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reason = problem_fault(row) if isinstance(row, dict) else "it is no object"
            if reason is None and row["heads"] != 1:
                reason = f"heads is {row['heads']}; what is tuned has one"
            if reason is not None:
                raise ValueError(reason)
            problems[problem_of(row)] = None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is no shape: {error}") from None
    if not problems:
        raise ValueError(f"{path} has no shapes")
    return list(problems)
