"""What the compiler makes of the kernels: ``python -m bench.sass``, no GPU needed.

Compiles every configuration for several targets with several versions of Triton, counts what one
(row, code) pair costs, and fails where a kernel spills, does not fit or is above a limit of
`bench.sass_kernels`, or where a figure is not that of bench/results/sass.json. After a change that
is meant, --store writes that file anew.

A version is looked for in .triton/VERSION, where `make sass` installs it, and then among what is
installed. Each compiles in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import triton

from bench.sass_kernels import KERNELS, Kernel
from vqtriton.tuning.compiling import Launch, compile_launch
from vqtriton.tuning.disassembly import Disassembly
from vqtriton.tuning.machines import ARCHITECTURES, SHAPES, floors

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "sass.json"
OTHERS = ROOT / ".triton"
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
# sm_120 is held to no spills by tests/test_compile.py; nothing is tuned for it
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# what tells one row from another
KEY = ("kernel", "D", "config", "target", "triton")
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sass",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--triton", nargs="+", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--store", action="store_true", help=f"write {STORED.relative_to(ROOT)}")
    # what the process of a version does
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--dims", nargs="*", type=int, default=(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rows:
        print(dumped(compile_all(targets=options.targets, dims=options.dims)))
        return 0

    rows: list[Row] = []
    for name in dict.fromkeys(options.triton):
        path = where(name)
        if path is None:
            print(f"SKIPPED: Triton {name} is neither in .triton/{name} nor installed; make sass")
            print("installs it where there is a network")
            continue
        found = rows_of(name, path)
        print(table(found), floor_table(found), sep="\n\n", end="\n\n", flush=True)
        rows += found
    if not rows:
        print("no Triton, so nothing was compiled", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(dumped(rows) + "\n")
    stored = json.loads(STORED.read_text()) if STORED.exists() else []
    found_versions = {row["triton"] for row in rows}
    wrong = failures(rows)
    if options.store:
        kept = [row for row in stored if row["triton"] not in found_versions]
        STORED.write_text(dumped(rows + kept) + "\n")
    else:
        wrong += changes([row for row in stored if row["triton"] in found_versions], rows)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def where(name: str) -> str | None:
    """What to put in front of PYTHONPATH for a version of Triton: nothing, if it is installed."""
    if (OTHERS / name / "triton").is_dir():
        return str(OTHERS / name)
    try:
        return "" if version("triton") == name else None
    except PackageNotFoundError:
        return None


def rows_of(
    name: str, path: str, targets: Sequence[str] = TARGETS, dims: Sequence[int] = ()
) -> list[Row]:
    """Compiles with another version; of ``dims``, unless there are none, these alone.

    Raises:
        RuntimeError: it does not, or the version is another.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [path, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench.sass", "--rows", "--targets", *targets]
    command += ["--dims", *map(str, dims)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Triton {name} does not compile the kernels:\n{done.stderr}")
    rows = json.loads(done.stdout)
    if {row["triton"] for row in rows} != {name}:
        raise RuntimeError(f"Triton {name} was asked for, {rows[0]['triton']} compiled")
    return rows


def compile_all(
    kernels: Iterable[Kernel] = KERNELS,
    targets: Iterable[str] = TARGETS,
    dims: Sequence[int] = (),
) -> list[Row]:
    """Rows of the Triton that this process has; of ``dims``, unless there are none, these alone."""
    return [
        compile_row(kernel, dim, config, launch, target)
        for kernel in kernels
        for target in targets
        for (dim, config), launch in kernel.launches(target).items()
        if not dims or dim in dims
    ]


def compile_row(kernel: Kernel, dim: int, config: str, launch: Launch, target: str) -> Row:
    compiled = compile_launch(launch, target)
    architecture = ARCHITECTURES[target]
    per_pair: dict[str, float | None] = {"alu": None, "fma": None, "total": None}
    if kernel.pairs and kernel.work and target.startswith("sm_"):
        threads = compiled.num_warps * architecture.warp_size
        pairs = kernel.pairs(launch.values) / threads
        try:
            loop = Disassembly(compiled.assembly).hot_loop(pairs, kernel.work(launch).inner)
        except ValueError as error:
            raise ValueError(f"{kernel.name}, D={dim}, {config}, {target}: {error}") from error
        if loop is not None:
            counts = {name: loop.counts.get(name, 0) for name in per_pair} | {"total": loop.total}
            per_pair = {name: round(count / loop.pairs, 3) for name, count in counts.items()}
    return {
        "kernel": kernel.name,
        "D": dim,
        "config": config,
        "target": target,
        "triton": triton.__version__,
        "registers": compiled.registers,
        "spills": compiled.spilled_bytes,
        "shared": compiled.shared,
        "ctas": architecture.resident_ctas(
            compiled.registers, compiled.shared, compiled.num_warps, compiled.tensor_memory
        ),
        **{f"{name}_per_pair": value for name, value in per_pair.items()},
    }


def failures(rows: Iterable[Row], kernels: Iterable[Kernel] = KERNELS) -> list[str]:
    """What no kernel may do, and what each is held to, in words."""
    wrong = []
    limits = {kernel.name: kernel.limits for kernel in kernels}
    for row in rows:
        if row["spills"]:
            wrong.append(f"{named(row)}: spills {row['spills']} bytes")
        if not row["ctas"]:
            wrong.append(f"{named(row)}: does not fit, {row['shared']} bytes of shared memory")
        for limit in limits[row["kernel"]]:
            if (limit.target, limit.dim) == (row["target"], row["D"]):
                wrong += [
                    f"{named(row)}: {name} is {row[name]}, more than {most}"
                    for name, most in limit.most.items()
                    # a figure that was not counted holds no limit
                    if row[name] is None or row[name] > most
                ]
    return wrong


def changes(stored: Iterable[Row], rows: Iterable[Row]) -> list[str]:
    """How rows differ from those stored, in words."""
    old, new = ({tuple(row[name] for name in KEY): row for row in r} for r in (stored, rows))
    lines = [f"{named(old[key])}: stored, but not compiled" for key in old.keys() - new.keys()]
    lines += [f"{named(new[key])}: not stored" for key in new.keys() - old.keys()]
    for key in old.keys() & new.keys():
        lines += [
            f"{named(new[key])}: {name} was {old[key].get(name)}, is {value}"
            for name, value in new[key].items()
            if old[key].get(name) != value
        ]
    return sorted(lines)


def named(row: Row) -> str:
    return f"{row['kernel']} D={row['D']} {row['target']} triton {row['triton']} ({row['config']})"


def in_order(row: Row) -> tuple[Any, ...]:
    """As the tables of kernels and targets have them."""
    names = [kernel.name for kernel in KERNELS]
    place, target = names.index(row["kernel"]), TARGETS.index(row["target"])
    return place, row["config"].split()[0], row["D"], row["config"], target


def dumped(rows: Iterable[Row]) -> str:
    """JSON with a line for each row, sorted, so that a change of a figure is a diff of its line."""
    ordered = sorted(rows, key=lambda row: [row[name] for name in KEY])
    return "[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]"


def table(rows: Sequence[Row]) -> str:
    """Rows of one version of Triton; the same configuration is named once."""
    lines = [
        f"Triton {rows[0]['triton']}; instructions of a thread per (row, code) pair",
        f"{'':<10}{'registers':>9}{'spills':>8}{'shared':>8}{'CTAs':>6}"
        f"{'ALU':>9}{'FMA':>9}{'all':>9}",
    ]
    heading = None
    for row in sorted(rows, key=in_order):
        if heading != (heading := (row["kernel"], row["D"], row["config"])):
            lines.append(f"{row['kernel']} D={row['D']} {row['config']}")
        counted = "".join(
            f"{'' if row[name] is None else format(row[name], '.2f'):>9}"
            for name in ("alu_per_pair", "fma_per_pair", "total_per_pair")
        )
        lines.append(
            f"  {row['target']:<8}{row['registers']:>9}{row['spills']:>8}{row['shared']:>8}"
            f"{row['ctas']:>6}{counted}"
        )
    return "\n".join(lines)


def floor_table(rows: Iterable[Row]) -> str:
    """The least time of each shape, from the counts for sm_90."""
    counted = {
        (row["kernel"], row["D"], row["config"]): row
        for row in rows
        if row["target"] == "sm_90" and row["total_per_pair"] is not None
    }
    columns = ("memory", "dot", "L2", "alu", "issue")
    lines = [
        "least ms on an H100, and what flash-kmeans 0.3.1 publishes",
        f"{'N, K, D':<22}" + "".join(f"{name:>9}" for name in (*columns, "floor", "flash")),
    ]
    heading = None
    for kernel in KERNELS:
        if not kernel.takes_all_rows or kernel.work is None:
            continue
        for (dim, config), launch in kernel.launches("sm_90").items():
            row = counted.get((kernel.name, dim, config))
            for shape in SHAPES:
                if row is None or shape.dim != dim:
                    continue
                if heading != (heading := f"{kernel.name} {config}"):
                    lines.append(heading)
                least = floors(
                    shape, kernel.work(launch), row["alu_per_pair"], row["total_per_pair"]
                )
                name = f"  {shape.num_rows}, {shape.codebook_size}, {dim}"
                values = [*(least[column] for column in columns), max(least.values())]
                published = "" if shape.flash_kmeans is None else f"{shape.flash_kmeans:.3g}"
                # two digits, and none of them with an exponent
                cells = [f"{float(f'{value:.2g}'):g}" for value in values]
                lines.append(f"{name:<22}" + "".join(f"{cell:>9}" for cell in [*cells, published]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
