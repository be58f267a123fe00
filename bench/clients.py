"""Other projects' quantizers as they are and patched: tokens, time and memory, from one run.

``python -m bench.clients [NAME...] [--store]``. Time: turn by turn, in an order that turns around
each time. Memory: what torch's allocator hands out at most during a call. Tokens: each method that
is replaced is asked again on what it was given in the patched model, before it was replaced; where
the two tokens differ, float64 says which is nearer.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import vqtriton
from bench import provenance, report
from bench.client_models import MODELS, ClientModel
from bench.devices import allocator_peak
from bench.measure import Row, interleave, quantile
from vqtriton.clients import methods
from vqtriton.clients.table import CLIENTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RESULTS = report.RESULTS / "clients_cpu.jsonl"
# seconds for the turns of one size, and their least and largest number
BUDGET, LEAST, MOST = 4.0, 7, 301
PACKAGES = {"dac": "descript-audio-codec", "vector_quantize_pytorch": "vector-quantize-pytorch"}


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare_speed(model: ClientModel, theirs: nn.Module, ours: nn.Module) -> list[Row]:
    rows = []
    for name, number in (("vector", 1), ("frame", model.frame), ("batch", model.batch)):
        x = model.x(number)
        steps = [lambda one=one, x=x: model.run(one, x) for one in (theirs, ours)]
        once = [seconds(step) + seconds(step) for step in steps]
        turns = min(MOST, max(LEAST, int(2 * BUDGET / sum(once))))
        taken = interleave([lambda step=step: seconds(step) for step in steps], turns)
        peaks = [allocator_peak(step) for step in steps]
        quantiles = [[quantile(times, q) for q in (0.2, 0.5, 0.8)] for times in taken]
        row = {"size": name, "vectors": number, "turns": turns}
        rows.append({**row, "seconds": quantiles, "peak_bytes": peaks})
    return rows


def compare_tokens(
    model: ClientModel, theirs: nn.Module, ours: nn.Module, names: list[str], dtype: torch.dtype
) -> Row:
    """How many tokens of one batch differ, and how many of either are farther by float64."""
    found = {"tokens": 0, "differ": 0, "theirs_farther": 0, "ours_farther": 0, "refused": ""}
    theirs, ours = (copy.deepcopy(one).to(dtype) for one in (theirs, ours))
    given: list[tuple[Tensor, Tensor, str, Tensor]] = []
    search = methods.search

    def recorded(module: nn.Module, x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
        indices = search(module, x, codebook, metric)
        given.append((x, codebook, metric, indices))
        return indices

    for name in names:
        module = ours.get_submodule(name)
        method = next(m for client in CLIENTS for m in client.methods if m in vars(type(module)))
        original = getattr(theirs.get_submodule(name), method)
        replaced = getattr(module, method)

        def both(*args: Any, original=original, replaced=replaced, **kwargs: Any) -> Any:
            given.clear()
            results = replaced(*args, **kwargs)
            (x, codebook, metric, indices), *_ = given
            try:
                other = original(*args, **kwargs)
            except RuntimeError as error:
                found["refused"] = str(error).splitlines()[0]
                return results
            (their_indices,) = [t for t in _pytree.tree_leaves(other) if is_integer(t)]
            count(found, x, codebook, metric, indices, their_indices.reshape(-1))
            return results

        module.__dict__[method] = both
    methods.search = recorded
    try:
        model.run(ours, model.x(model.batch).to(dtype))
    finally:
        methods.search = search
    return found


def is_integer(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.int64


def count(
    found: Row, x: Tensor, codebook: Tensor, metric: str, ours: Tensor, theirs: Tensor
) -> None:
    (rows,) = (ours != theirs).nonzero(as_tuple=True)
    found["tokens"] += len(ours)
    found["differ"] += len(rows)
    x64, codes = x[rows].double(), codebook.double()
    chosen = [codes[indices[rows]] for indices in (ours, theirs)]
    if metric == "dot":
        mine, other = (-(x64 * code).sum(1) for code in chosen)
    else:
        mine, other = ((x64 - code).square().sum(1) for code in chosen)
    found["theirs_farther"] += int((other > mine).sum())
    found["ours_farther"] += int((mine > other).sum())


def measure(model: ClientModel) -> Row:
    theirs, ours = model.module(), model.module()
    # before the patch, as they are the same
    names = list(vqtriton.patch(ours).modules)
    # a module around one that is patched only passes on
    names = [
        name
        for name in names
        if not any(n.startswith(f"{name}.") or (not name and n) for n in names)
    ]
    with torch.no_grad():
        speed = compare_speed(model, theirs, ours)
        tokens = {str(d)[6:]: compare_tokens(model, theirs, ours, names, d) for d in DTYPES}
    package = PACKAGES.get(model.project, model.project)
    return {
        "client": model.name,
        "version": version(package),
        "shape": {"K": model.codebook_size, "D": model.dim, "levels": model.levels},
        "speed": speed,
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--store", action="store_true", help=f"write {RESULTS.name} and the docs")
    arguments = parser.parse_args()
    about = {
        "commit": provenance.commit(),
        "command": shlex.join(["python", "-m", "bench.clients", *sys.argv[1:]]),
        "device": provenance.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = []
    for model in MODELS:
        if arguments.names and not any(name in model.name for name in arguments.names):
            continue
        try:
            row = {**measure(model), **about}
        except ModuleNotFoundError as error:
            print(f"{model.name}: {error.name} is not installed", file=sys.stderr)
            continue
        rows.append(row)
        print(report.client_table([row]).splitlines()[-1], flush=True)
    if arguments.store:
        report.write_rows(RESULTS, rows)
        report.write_docs()


if __name__ == "__main__":
    main()
