"""torch.compile(fullgraph=True) of a training step beside eager."""

from __future__ import annotations

import torch

from bench.gpu_check.check import Check
from bench.gpu_check.training import UPDATES, Training, differing

# two batch sizes make the size dynamic
ROWS = (4096, 6000, 10_000)
DRY_ROWS = (24, 40)


def run(check: Check) -> str:
    updates = UPDATES[:1] if check.is_dry else UPDATES
    dim, codes = (8, 24) if check.is_dry else (64, 1024)
    same = 0
    for update in updates:
        with check.step(update):
            eager, compiled = (Training(update, dim, codes, check.device) for _ in range(2))
            compiled.forward = torch.compile(compiled.module, fullgraph=True)
            for rows in DRY_ROWS if check.is_dry else ROWS:
                x, grad = (torch.randn(rows, dim, device=check.device) for _ in range(2))
                want = eager.step(x, grad) | eager.state()
                found = compiled.step(x, grad) | compiled.state()
                bits = differing(want, found)
                check.note(update=update, rows=rows, differing_in_bits=bits)
                same += not bits
                check.expect(
                    "indices" not in bits and "quantized" not in bits,
                    f"{update}, {rows} rows: indices or codes differ",
                )
                # the compiler may sum in another order, so the rest is held to rounding
                torch.testing.assert_close(found, want)
                # and rounding is not to grow
                compiled.set(eager.state())
    return f"{', '.join(updates)}: as eager up to rounding, {same} steps bit by bit"
