"""Rows as a table on the screen, as JSON lines, and as the tables and the picture of the docs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import CASES
from bench.measure import quantile
from bench.provenance import ROOT
from bench.subjects import OURS, PEER

Row = dict[str, Any]
MIB = 1 << 20
RESULTS = ROOT / "bench" / "results"
DOCS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "models.md")
PICTURE = ROOT / "docs" / "benchmarks.svg"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All of them or, where that is interrupted, the file as it was."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)


def read_rows(path: Path) -> list[Row]:
    """
    Raises:
        ValueError: something in it is no row.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has a line that is no row of a table")
    return rows


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that were measured side by side, by scope and case."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["scope"], row["case"]), []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Of one case, for the screen."""
    first = rows[0]
    checked = "all rows" if first["rows_checked"] == first["shape"]["N"] else "a sample"
    lines = [
        "",
        f"{CASES[first['case']]} {first['dtype']}, {first['scope']}, "
        f"{len(first['seconds'])} repeats, indices of {checked} ({first['rows_checked']}) checked",
        f"{'':<28}{'wrong':>5}{'median':>10}{'p20 to p80':>18}{'x ours':>8}"
        f"{'peak memory':>14}{'GFLOP/s':>9}{'GB/s':>9}{'of floor':>10}",
    ]
    ours = next((row for row in rows if row["subject"] == OURS), None)
    for row in rows:
        low, middle, high = (milliseconds(row[f"p{q}_s"]) for q in (20, 50, 80))
        times = f"{ratio(row, ours)[1]:.2f}" if ours else ""
        lines.append(
            f"{row['subject']:<28}{row['mismatches']:>5}{middle:>7} ms{low + ' to ' + high:>18}"
            f"{times:>8}{mebibytes(row):>14}{1e3 * row['tflop_per_s']:>9.3g}"
            f"{row['gb_per_s']:>9.2g}{row['floor_fraction']:>10.1%}"
        )
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three digits, and none of them with an exponent."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(row: Row) -> str:
    peak = row["peak_memory_bytes"]
    return "not measured" if peak is None else f"{peak / MIB:.1f} MiB"


def ratio(row: Row, ours: Row) -> tuple[float, float, float]:
    """p20, p50 and p80 of its time over ours, turn by turn: the steps of one met one machine."""
    ratios = [a / b for a, b in zip(row["seconds"], ours["seconds"], strict=True)]
    return quantile(ratios, 0.2), quantile(ratios, 0.5), quantile(ratios, 0.8)


def fill(text: str, source: str, make: Callable[[str], str]) -> str:
    """The text with what stands between <!-- source: name --> and <!-- end --> made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{make(match[2])}\n<!-- end -->"

    pattern = rf"(<!-- {source}: (\w+) -->).*?<!-- end -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def with_tables(text: str) -> str:
    """The text of a page, with its tables as the result files have them."""
    made = {
        "training": lambda: peer_table(read_rows(RESULTS / "training_cpu.jsonl")),
        "training_all": lambda: full_table(read_rows(RESULTS / "training_cpu.jsonl")),
        "training_run": lambda: run_line(RESULTS / "training_cpu.jsonl"),
        "assign_all": lambda: full_table(read_rows(RESULTS / "assign_cpu.jsonl")),
        "assign_run": lambda: run_line(RESULTS / "assign_cpu.jsonl"),
        "clustering": lambda: clustering_table(read_rows(RESULTS / "clustering_cpu.jsonl")),
        "clustering_run": lambda: clustering_line(RESULTS / "clustering_cpu.jsonl"),
        "clients": lambda: client_table(read_rows(RESULTS / "clients_cpu.jsonl")),
        "clients_run": lambda: client_line(RESULTS / "clients_cpu.jsonl"),
        "cases": case_table,
    }
    return fill(text, "bench", lambda name: made[name]())


def peer_table(rows: Iterable[Row]) -> str:
    """Markdown: ours beside vector-quantize-pytorch, a line for each case that both have."""
    lines = [
        "| N, K, D | vqtriton, exact | vector-quantize-pytorch | time | memory |",
        "|---|---|---|---|---|",
    ]
    for (_, name), of_case in by_case(rows).items():
        subjects = {row["subject"]: row for row in of_case}
        if {OURS, PEER} <= subjects.keys():
            ours, peer = subjects[OURS], subjects[PEER]
            low, middle, high = ratio(peer, ours)
            memory = peer["peak_memory_bytes"] / ours["peak_memory_bytes"]
            cells = [f"{milliseconds(r['p50_s'])} ms, {mebibytes(r)}" for r in (ours, peer)]
            lines.append(
                f"| {sizes(name)} ({name}) | {' | '.join(cells)} "
                f"| {middle:.1f}× ({low:.1f} to {high:.1f}) | {memory:.0f}× |"
            )
    return "\n".join(lines)


def full_table(rows: Iterable[Row]) -> str:
    """Markdown: all that was measured."""
    lines = [
        "| | wrong, of rows | median ms (p20 to p80) | × ours | peak memory | GFLOP/s | of floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for (_, name), of_case in by_case(rows).items():
        lines.append(f"| **{name}**: {sizes(name)} | | | | | | |")
        ours = next(row for row in of_case if row["subject"] == OURS)
        for row in of_case:
            low, middle, high = (milliseconds(row[f"p{q}_s"]) for q in (20, 50, 80))
            lines.append(
                f"| {row['subject']} | {row['mismatches']}, {row['rows_checked']} "
                f"| {middle} ({low} to {high}) | {ratio(row, ours)[1]:.2f} | {mebibytes(row)} "
                f"| {1e3 * row['tflop_per_s']:.3g} | {row['floor_fraction']:.0%} |"
            )
    return "\n".join(lines)


def clustering_table(rows: Sequence[Row]) -> str:
    """Markdown: inertia of each seed's codebook and time, beside ours from the same start."""
    ours = {(r["data"], r["init"]): r for r in rows if r["subject"].startswith("vqtriton")}
    lines = [
        "| data: N, K, D | | median inertia (of seeds) | over ours | median s | over ours |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mine = ours[row["data"], row["init"]]
        shape = ", ".join(str(row["shape"][name]) for name in "NKD")
        middle, least, most = (quantile(row["inertia"], q) for q in (0.5, 0, 1))
        low, times, high = ratio(row, mine)
        inertia = f"{middle:.4g} ({least:.4g} to {most:.4g})"
        lines.append(
            f"| {row['data']}: {shape} | {row['subject']} | {inertia} "
            f"| {middle / quantile(mine['inertia'], 0.5):.3f} "
            f"| {quantile(row['seconds'], 0.5):.3g} | {times:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def clustering_line(path: Path) -> str:
    """Markdown: where and how the rows of a file were measured."""
    row = read_rows(path)[0]
    return (
        f"[{path.name}](../{path.relative_to(ROOT)}), from `{row['command']}` at commit "
        f"{row['commit']}: {row['device']}, {row['threads']} threads, {row['iters']} iterations, "
        f"{len(row['seconds'])} seeds, torch {row['torch']}."
    )


def client_table(rows: Sequence[Row]) -> str:
    """Markdown: time and memory of patched quantizers beside the same as they are, and tokens."""
    lines = [
        "| quantizer: K, D, levels | one vector | one frame | one batch | memory of a batch "
        "| float32 | float16 | bfloat16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = ", ".join(str(number) for number in row["shape"].values())
        cells = [f"{row['client']} {row['version']}: {shape}"]
        for size in row["speed"]:
            (_, theirs, _), (_, ours, _) = size["seconds"]
            number = size["vectors"]
            cells.append(
                f"{number}: {milliseconds(theirs)} → {milliseconds(ours)} ms, {theirs / ours:.2f}×"
            )
        before, after = (peak / MIB for peak in row["speed"][-1]["peak_bytes"])
        cells.append(f"{before:.3g} → {after:.3g} MiB")
        for found in row["tokens"].values():
            if found["refused"]:
                cells.append("does not run without the patch")
            else:
                wrong = found["theirs_farther"]
                cells.append(f"{wrong} ({wrong / found['tokens']:.2%})" if wrong else "0")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def client_line(path: Path) -> str:
    """Markdown: how often the patched were wrong; where and how the rows were measured."""
    rows = read_rows(path)
    row = rows[0]
    found = [of_dtype for one in rows for of_dtype in one["tokens"].values()]
    wrong, tokens = (sum(of[name] for of in found) for name in ("ours_farther", "tokens"))
    return (
        f"The patched quantizers chose a farther code for {wrong} of all {tokens} tokens. Source: "
        f"[{path.name}](../{path.relative_to(ROOT)}), from `{row['command']}` at commit "
        f"{row['commit']}: {row['device']}, {row['threads']} threads, torch {row['torch']}."
    )


def run_line(path: Path) -> str:
    """Markdown: where, when and how the rows of a file were measured."""
    # the last knows the best rates
    row = read_rows(path)[-1]
    return (
        f"[{path.name}](../{path.relative_to(ROOT)}), from `{row['command']}` at commit "
        f"{row['commit']}: {row['device']}, {row['threads']} threads, {row['dtype']}, torch "
        f"{row['torch']}, {len(row['seconds'])} turns; a matmul reached "
        f"{row['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s there and a copy "
        f"{row['copy_bytes_per_s'] / 1e9:.1f} GB/s."
    )


def case_table() -> str:
    lines = ["| case | N, K, D | |", "|---|---|---|"]
    for name, case in CASES.items():
        remarks = ["unit norm"] * case.is_unit_norm
        remarks += [f"one of {case.codebooks} codebooks"] * (case.codebooks > 1)
        lines.append(f"| {name} | {sizes(name)} | {', '.join(remarks)} |")
    return "\n".join(lines)


def sizes(name: str) -> str:
    case = CASES[name]
    return f"{case.num_rows}, {case.codebook_size}, {case.dim}"


def write_docs() -> None:
    for path in DOCS:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    save_picture(draw, RESULTS / "training_cpu.jsonl", PICTURE)


def save_picture(draw: Callable[[list[Row]], Any], drawn: Path, picture: Path) -> None:
    """Draws the rows of a file; the picture names the file, so that a test can hold it to that."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{picture.name} is left as it is: matplotlib is not installed")
        return
    matplotlib.use("svg")
    # the same rows give the same file
    matplotlib.rcParams |= {"svg.hashsalt": "vqtriton", "svg.fonttype": "none"}
    metadata = {"Date": None, "Description": f"{drawn.name}, sha256 {checksum(drawn)}"}
    draw(read_rows(drawn)).savefig(picture, metadata=metadata, bbox_inches="tight")


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(rows: Iterable[Row]) -> Any:
    """Time and peak memory over ours, a group of bars for each case."""
    from matplotlib.figure import Figure

    cases = by_case(rows)
    names = list(dict.fromkeys(row["subject"] for of in cases.values() for row in of))
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    for panel, key, title in zip(
        panels, ("p50_s", "peak_memory_bytes"), ("time", "peak memory"), strict=True
    ):
        for place, name in enumerate(names):
            values = []
            for of_case in cases.values():
                found = {row["subject"]: row for row in of_case}
                values.append(found[name][key] / found[OURS][key] if name in found else 0)
            width = 0.8 / len(names)
            left = [i + (place - (len(names) - 1) / 2) * width for i in range(len(cases))]
            panel.bar(left, values, width, label=name)
        panel.axhline(1, color="black", linewidth=0.5)
        panel.set_yscale("log")
        panel.set_ylabel(f"{title} over vqtriton exact's")
    panels[0].legend(fontsize="small")
    panels[1].set_xticks(range(len(cases)), [name for _, name in cases], fontsize="small")
    return figure
