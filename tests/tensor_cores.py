"""How tensor cores add, played on a CPU, and sums on which they err as much as they can.

docs/exactness.md, "g", says where the models are from. ``.venv/bin/python tests/tensor_cores.py
CHECKOUT`` plays the sums that were recorded on GPUs and compares the bits; CHECKOUT is a clone of
https://github.com/north-numerical-computing/MATLAB-tensor-core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from vqtriton.planes import TENSOR_CORES, TensorCore

# below every exponent of a product of two fp16 and of what the screen sums
NO_EXPONENT = -200
# fraction bits that float64 has more than float32
MORE_BITS = 52 - 23


def exponent(values: Tensor) -> Tensor:
    """Of float64: values are in ±[2^e, 2^(e + 1))."""
    return torch.frexp(values).exponent - 1


def truncated(values: Tensor) -> Tensor:
    """float64 to what float32 holds, toward zero; not for what is subnormal or overflows."""
    return (values.view(torch.int64) >> MORE_BITS << MORE_BITS).view(torch.float64)


def dot(rows: Tensor, codes: Tensor, unit: TensorCore, start: Tensor | None = None) -> Tensor:
    """rows [N, I] · codes [K, I], both of fp16 -> [N, K] float32, from ``start`` [N, K] or 0 on."""
    rows, codes = rows.double()[:, None], codes.double()[None]
    total = rows.new_zeros(rows.shape[0], codes.shape[1]) if start is None else start.double()
    for first in range(0, rows.shape[2], unit.products):
        a, b = (t[..., first : first + unit.products] for t in (rows, codes))
        # exact; what was added before is one more term
        terms = torch.cat([a * b, total[..., None]], 2)
        # products are not normalized: they are in ±[2^e, 2^(e + 2))
        exponents = torch.cat([exponent(a) + exponent(b), exponent(total)[..., None]], 2)
        largest = exponents.where(terms != 0, NO_EXPONENT).amax(2, keepdim=True)
        last_bit = torch.ldexp(torch.ones_like(terms[..., :1]), largest - 23 - unit.extra_bits)
        # whole numbers below 2**32, whose sum is exact
        total = truncated(((terms / last_bit).trunc() * last_bit).sum(2))
    return total.float()


def lossy(inner: int, unit: TensorCore, sign: int) -> tuple[Tensor, Tensor]:
    """A row and a code, [inner] fp16, whose sum, about 1, loses as much as it can.

    One product is 1; all others have the sign and are just below what is cut beside it. Where their
    sign is that of 1, the last of each step is just below a whole bit of float32: a part of it is
    cut when it is aligned, and what is left of it when the sum is.
    """
    most = 2 - 2.0**-10
    row, code = torch.full((2, inner), most).double()
    row *= 2.0**-13
    code *= sign * 2.0 ** (-12 - unit.extra_bits)
    if sign > 0:
        code[unit.products - 1 :: unit.products] = most * 2.0**-12
    row[0] = code[0] = 1
    return row.half(), code.half()


def read(path: Path) -> Tensor:
    """[rows, columns] float32, written as hexadecimal or as binary numbers."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    bits = [[int(word, 2 if len(word) == 32 else 16) for word in line] for line in lines]
    return torch.tensor(bits).to(torch.uint32).view(torch.float32)


def main(checkout: Path) -> None:
    gpus = {"V100": (7, 0), "A100": (8, 0), "A2": (8, 6), "Ada": (8, 9), "L40S": (8, 9)}
    gpus |= {"H100": (9, 0), "H200": (9, 0), "B200": (10, 0)}
    for gpu, capability in gpus.items():
        for dtype in ("fp16", "bf16") if gpu != "V100" else ("fp16",):
            folder, unit = checkout / "model_validation" / gpu / dtype, TENSOR_CORES[capability]
            a, b = (read(folder / f"{name}_{gpu}_{dtype}.txt") for name in "ab")
            start, want = (read(folder / f"{name}_{gpu}_fp32.txt") for name in "cd")
            # units that are nearly the same, to see what the recorded sums can tell apart
            others = [unit._replace(extra_bits=unit.extra_bits + more) for more in (1, -1)]
            others.append(unit._replace(products=unit.products // 2))
            wrong = []
            for one in (unit, *others):
                pairs = zip(a[:, None], b[:, None], start[:, None], strict=True)
                found = torch.cat([dot(x, y, one, c) for x, y, c in pairs])
                wrong.append((found != want).sum().item())
            print(
                f"{gpu} {dtype}: {wrong[0]} of {len(want)} differ; with a bit more, a bit less and "
                f"half the products {wrong[1:]}",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
