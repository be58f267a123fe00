"""What tiles are chosen for: an op on tensors of some sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vqtriton.planes import MAX_DIM

# ops whose kernels have tiles to choose
OPS = ("nearest_code", "code_sums", "grad_x", "ema_update")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# N, K, D and heads are less
MOST = 1 << 48


class Problem(NamedTuple):
    """What is tuned for."""

    op: str
    dtype: str
    dim: int
    codebook_size: int
    num_rows: int
    heads: int = 1

    def __str__(self) -> str:
        return (
            f"{self.op} N={self.num_rows} K={self.codebook_size} D={self.dim} {self.dtype}"
            + f" H={self.heads}" * (self.heads > 1)
        )


def problem_for(op: str, n: int, k: int, d: int, dtype: str) -> Problem:
    """Of an op in a step with x [n, d] and k codes."""
    if op == "ema_update":
        # of float32 statistics, whatever the rows are and however many
        return Problem(op, "float32", d, k, k)
    return Problem(op, dtype, d, k, n)


def problem_of(row: dict[str, Any]) -> Problem:
    return Problem(*(row[name] for name in Problem._fields))


_TYPES: dict[str, type] = {
    "op": str,
    "dtype": str,
    "dim": int,
    "codebook_size": int,
    "num_rows": int,
    "heads": int,
}


def problem_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with the fields of a `Problem`; None if nothing is."""
    reason = type_fault(row, _TYPES)
    if reason:
        return reason
    if row["op"] not in OPS:
        return f"op is {row['op']!r:.40}; it must be one of {', '.join(OPS)}"
    if row["dtype"] not in DTYPES:
        return f"dtype is {row['dtype']!r:.40}; it must be one of {', '.join(DTYPES)}"
    for name in ("dim", "codebook_size", "num_rows", "heads"):
        if not 1 <= row[name] < MOST:
            return f"{name} is {row[name]}; it must be from 1 to 2**48 - 1"
    if row["dim"] > MAX_DIM:
        return f"dim is {row['dim']}: the kernels take at most {MAX_DIM}"
    return None


def type_fault(row: dict[str, Any], kinds: dict[str, type]) -> str | None:
    for name, kind in kinds.items():
        # True is an int to Python
        if type(row.get(name)) is not kind:
            return f"{name} is {row.get(name)!r:.40}; it must be of type {kind.__name__}"
    return None
