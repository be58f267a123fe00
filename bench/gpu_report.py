"""The tables of docs/gpu.md, from the files in bench/results/h200."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import fit
from bench.report import (
    RESULTS,
    Row,
    by_case,
    fill,
    mebibytes,
    milliseconds,
    read_rows,
    save_picture,
)

FILES = RESULTS / "h200"


def rows_of(name: str) -> list[Row]:
    return read_rows(FILES / f"{name}.jsonl")


def markdown(header: str, lines: Sequence[Sequence[str]]) -> str:
    columns = header.count("|") + 1
    bars = "|".join(["---"] * columns)
    return "\n".join([f"| {header} |", f"|{bars}|", *(f"| {' | '.join(x)} |" for x in lines)])


def run_line() -> str:
    """What it was measured with."""
    found = next(row for row in rows_of("correctness") if "driver" in row)
    files = ", ".join(f"`{path.name}`" for path in sorted(FILES.iterdir()))
    return (
        f"One {found['device']}, driver {found['driver']}, torch {found['torch']}, Triton "
        f"{found['triton']}, Python {found['python']}, vqtriton at commit {found['commit']}. A "
        f"copy reached {found['copy_bytes_per_s'] / 1e12:.2f} TB/s there, a float16 matrix product "
        f"{found['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s. The files are in "
        f"[bench/results/h200](../bench/results/h200): {files}."
    )


def correctness() -> str:
    """What each part found, and on how much it looked."""
    parts = defaultdict(list)
    for row in rows_of("correctness"):
        parts[row["part"]].append(row)
    exact = [row for row in parts["exactness"] if "seed" in row]
    wrong, rows, doubt = (sum(row[k] for row in exact) for k in ("mismatches", "rows", "in_doubt"))
    repeats, graphs, compiled = ([row for row in parts[p] if "outcome" not in row]
                                 for p in ("repeats", "graphs", "compiled"))  # fmt: skip
    programs = sum(sum(row.get("programs", {}).values())
                   for row in [*parts["recompiles"], *parts["programs"]])  # fmt: skip
    large = next(row for row in parts["large"] if "elements" in row)
    kinds = len({row["case"] for row in exact})

    def differing(part: list[Row], name: str = "differing") -> str:
        return f"{sum(bool(row.get(name)) for row in part)} of {len(part)} differ"

    accumulation = [row["part_of_bound"] for row in parts["accumulation"]]
    unclean = [row for row in parts["sanitizer"] if row.get("found")]
    # these two were not there at first
    later = [
        ["accumulation of the tensor cores", f"{len(accumulation)} sets of data built to err",
         f"at most {max(accumulation, default=0):.2f} of the bound"],
        ["memcheck and racecheck", f"{len(parts['sanitizer'])} runs, a kernel each",
         f"{len(unclean)} found something"],
    ]  # fmt: skip
    return markdown("what | on what | found", [
        ["`exact` against float64", f"{rows:,} rows, {kinds} kinds of hard data, "
         f"{doubt / rows:.1%} of them in doubt after the screen", f"{wrong} wrong indices"],
        ["the same step again", f"{len(repeats)} steps, {repeats[0]['repeats']} times each",
         differing(repeats)],
        ["a replayed CUDA graph", f"{len(graphs)} replays of searches and training steps",
         differing(graphs) + f", {sum(row.get('mismatches', 0) for row in graphs)} wrong indices"],
        ["`torch.compile(fullgraph=True)`", f"{len(compiled)} training steps, bit by bit",
         differing(compiled, "differing_in_bits")],
        ["programs compiled", "every op at 50 batch sizes", str(programs)],
        ["more than 2³¹ elements", f"{large['elements']:,} elements, two layouts",
         "0 wrong indices"],
        *(later if accumulation else []),
    ])  # fmt: skip


def latency(dtype: str = "float32") -> str:
    """Wall time of a call beside the time that the GPU works, at the shapes of real models."""
    cases: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows_of("latency"):
        if row["dtype"] == dtype:
            cases.setdefault(row["case"], {})[row["what"], row["subject"]] = row
    lines = []
    for name, found in cases.items():
        ours, peer = found.get(("train", "ours")), found.get(("train", "vqp"))
        if not ours or not peer:
            continue
        search = [found["assign", who] for who in ("ours exact", "addmm+argmin", "flash-kmeans")]
        lines.append([
            f"{name}: {ours['N']}, {ours['K']}, {ours['D']}",
            *(f"{row['wall_us'] / 1e3:.1f} ms, {sum(k[2] for k in row['kernels']):.0f} µs"
              for row in (ours, peer)),
            f"{ours['wall_us'] / peer['wall_us']:.1f}×",
            *(f"{row['wall_us']:.0f}, {row['graph_us']:.0f} µs" for row in search),
        ])  # fmt: skip
    return markdown(
        "N, K, D | step, vqtriton: wall, GPU | step, vector-quantize-pytorch: wall, GPU | "
        "ours over theirs, wall | search, vqtriton: wall, in a graph | addmm + argmin | "
        "flash-kmeans", lines)  # fmt: skip


def peers() -> str:
    """Wall time of the search of every subject, wrong rows, memory."""
    lines = []
    for (scope, case), rows in by_case(rows_of("peers")).items():
        if scope != "assign":
            continue
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            of_dtype = [row for row in rows if row["dtype"] == dtype]
            ours = next(row for row in of_dtype if row["subject"] == "vqtriton exact")
            n, k, d = ours["shape"].values()
            lines.append([f"**{case}**, {dtype}: {n}, {k}, {d}", "", "", "", ""])
            lines += [
                [row["subject"], f"{row['mismatches']:,}", f"{milliseconds(row['p50_s'])} ms",
                 f"{row['p50_s'] / ours['p50_s']:.2f}", mebibytes(row)]
                for row in of_dtype
            ]  # fmt: skip
    return markdown("search | wrong rows | median wall time | over ours | peak memory", lines)


def sums() -> str:
    """Wall time of the sums per code, even and uneven codes."""
    rows = [row for row in rows_of("sums") if "ms" in row]
    names = list(rows[0]["ms"])
    lines = [
        [
            row["case"].replace(" float", ", float"),
            *(f"{row['ms'][name]:.3f}" if name in row["ms"] else "–" for name in names),
        ]
        for row in rows
        if row["case"].endswith(("uniform", "zipf"))
    ]  # fmt: skip
    return markdown("sums per code, ms | " + " | ".join(names), lines)


def kmeans() -> str:
    return markdown("N, K, D | subject, start | 10 iterations and start, ms | inertia per row", [
        [f"{row['N']}, {row['K']}, {row['D']}", row["subject"], f"{row['ms']:.1f}",
         f"{row['inertia_per_row']:.3f}"]
        for row in rows_of("kmeans")
    ])  # fmt: skip


def predictions() -> str:
    """The screen of each shape as measured and as predicted."""
    shapes = defaultdict(list)
    for row in fit.rows():
        shapes[fit.shape_of(row)].append(row)
    lines = []
    for (n, k, d), rows in sorted(shapes.items(), key=lambda one: one[1][0]["screen_ms"]):
        ratios = [fit.ratio(row) for row in rows]
        first = rows[0]
        lines.append([
            f"{n}, {k}, {d}", milliseconds(first["screen_ms"] / 1e3), f"{ratios[0]:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f} ({len(rows)})" if len(rows) > 1 else "–",
        ])  # fmt: skip
    header = "N, K, D | measured ms, default tiles | predicted / measured | with all tiles tried"
    return markdown(header, lines)


MADE = {
    "predictions": predictions,
    "run": run_line,
    "correctness": correctness,
    "latency": latency,
    "peers": peers,
    "sums": sums,
    "kmeans": kmeans,
}


def with_tables(text: str) -> str:
    return fill(text, "gpu", lambda name: MADE[name]())


def write(path: Path) -> None:
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    save_picture(draw, FILES / "latency.jsonl", path.with_suffix(".svg"))


def draw(rows: Sequence[Row]) -> Any:
    """What a caller waits for, beside what the GPU works: training steps, and searches."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["dtype"] == "float32"]
    figure = Figure(figsize=(9, 7), layout="constrained")
    for panel, (title, what, subjects) in zip(figure.subplots(2), PANELS, strict=True):
        found = {(row["case"], row["subject"]): row for row in rows if row["what"] == what}
        # those that all of them have
        cases = [
            case
            for case in dict.fromkeys(case for case, _ in found)
            if all((case, subject) in found for subject in subjects)
        ]
        width = 0.8 / len(subjects)
        for place, (subject, name) in enumerate(subjects.items()):
            left = [i + (place - (len(subjects) - 1) / 2) * width for i in range(len(cases))]
            of_subject = [found[case, subject] for case in cases]
            bars = panel.bar(left, [row["wall_us"] for row in of_subject], width, alpha=0.35)
            color = bars.patches[0].get_facecolor()[:3]
            panel.bar(left, [gpu_us(row) for row in of_subject], width, color=color, label=name)
        panel.set_yscale("log")
        panel.set_ylabel("µs: pale, wall; full, GPU")
        panel.set_title(title, loc="left")
        above = {"bbox_to_anchor": (1, 1), "loc": "lower right", "ncols": len(subjects)}
        panel.legend(fontsize="small", frameon=False, **above)
        panel.set_xticks(range(len(cases)), cases, fontsize="small")
    return figure


def gpu_us(row: Row) -> float:
    """In a CUDA graph; where it was not captured, the sum of the kernels."""
    return row.get("graph_us") or sum(us for _, _, us in row["kernels"])


# title, kind of row, and subjects with the names that readers know
PANELS = (
    ("A training step", "train", {"ours": "vqtriton", "vqp": "vector-quantize-pytorch"}),
    (
        "A search",
        "assign",
        {
            "ours exact": "vqtriton",
            "addmm+argmin": "torch addmm + argmin (not exact)",
            "flash-kmeans": "flash-kmeans (not exact)",
        },
    ),
)
