"""bench/: the docs say what the result files say, and a difference is more than the spread."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
cases = importlib.import_module("bench.cases")
command = importlib.import_module("bench.__main__")
compare = importlib.import_module("bench.compare")
devices = importlib.import_module("bench.devices")
machines = importlib.import_module("vqtriton.tuning.machines")
measuring = importlib.import_module("bench.measure")
gpu_report = importlib.import_module("bench.gpu_report")
report = importlib.import_module("bench.report")
subjects = importlib.import_module("bench.subjects")

OURS, PEER = subjects.OURS, subjects.PEER
OTHERS = {report.RESULTS / name for name in ("clustering_cpu.jsonl", "clients_cpu.jsonl")}
FILES = sorted(set(report.RESULTS.glob("*.jsonl")) - OTHERS)


def row(subject: str, seconds: list[float], **changes) -> dict:
    return {
        "case": "rq-vae",
        "scope": "training",
        "subject": subject,
        "shape": {"N": 640, "K": 256, "D": 32},
        "dtype": "float32",
        "device": "a processor",
        "threads": 2,
        "mismatches": 0,
        "rows_checked": 640,
        "peak_memory_bytes": 3 << 20,
        "tflop_per_s": 0.25,
        "gb_per_s": 1.5,
        "floor_fraction": 0.5,
        "seconds": seconds,
        **{f"p{q}_s": measuring.quantile(seconds, q / 100) for q in (20, 50, 80)},
        **changes,
    }


@pytest.mark.parametrize("path", report.DOCS, ids=lambda path: path.name)
def test_the_docs_are_those_of_the_result_files(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert report.with_tables(text) == text


def test_the_page_about_the_gpu_is_that_of_the_result_files():
    text = (report.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert all(f"<!-- gpu: {name} -->" in text for name in gpu_report.MADE)
    assert gpu_report.with_tables(text) == text
    # the figures that README.md quotes
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    readme = " ".join(readme.split())
    slower = re.findall(r"\| [1-9]\.\d× \|", gpu_report.latency())
    cases = gpu_report.latency().count("\n") - 1
    assert f"slower than vector-quantize-pytorch at {len(slower)} of {cases} real" in readme
    assert "100,280,560 rows" in gpu_report.correctness()
    assert "0 of 100,280,560 rows wrong" in readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_result_files_are_whole(path):
    rows = report.read_rows(path)
    assert rows
    for found in rows:
        case = cases.CASES[found["case"]]
        shape = {"N": case.num_rows, "K": case.codebook_size, "D": case.dim}
        assert found["shape"] == shape
        assert found["commit"] != "no commit"
        assert not found["commit"].endswith("-dirty")
        assert {r["command"] for r in rows} == {found["command"]}
        # the figures are those of the turns
        for q in (20, 50, 80):
            assert found[f"p{q}_s"] == measuring.quantile(found["seconds"], q / 100)
        if subjects.SUBJECTS[found["subject"]].is_exact:
            assert found["mismatches"] == 0
        # nothing is faster than the machine
        assert 0 < found["floor_fraction"] < 1
        if found["memory_limit_bytes"] is not None:
            assert found["peak_memory_bytes"] <= found["memory_limit_bytes"]


def test_patched_quantizers_are_right_and_hold_less():
    rows = report.read_rows(report.RESULTS / "clients_cpu.jsonl")
    assert not any(row["commit"].endswith("-dirty") for row in rows)
    assert {(row["commit"], row["command"]) for row in rows} == {
        (rows[0]["commit"], "python -m bench.clients --store")
    }
    for row in rows:
        assert all(found["ours_farther"] == 0 for found in row["tokens"].values()), row["client"]
        for size in row["speed"]:
            theirs, ours = size["peak_bytes"]
            assert ours <= theirs, (row["client"], size["size"])


def test_the_search_is_no_slower_than_cdist_and_takes_little():
    """What the two large searches are held to on a CPU."""
    found = report.by_case(report.read_rows(report.RESULTS / "assign_cpu.jsonl"))
    for name in ("square", "wide"):
        of = {r["subject"]: r for r in found["assign", name]}
        assert report.ratio(of["torch.cdist+argmin"], of[OURS])[0] >= 1
        assert of[OURS]["peak_memory_bytes"] <= 64 << 20


def test_five_models_stand_beside_the_peer():
    rows = report.read_rows(report.RESULTS / "training_cpu.jsonl")
    assert len(report.peer_table(rows).splitlines()) >= 2 + 5


def test_the_table_beside_the_peer():
    rows = [row(OURS, [1.0, 2.0, 3.0]), row(PEER, [4.0, 10.0, 18.0], peak_memory_bytes=30 << 20)]
    other = row(OURS, [1.0], case="taming")
    *_, last = report.peer_table([*rows, other]).splitlines()
    # ratios of the turns are 4, 5 and 6; a case that only one has is no line
    ours, peer = "2000 ms, 3.0 MiB", "10000 ms, 30.0 MiB"
    assert last == f"| 640, 256, 32 (rq-vae) | {ours} | {peer} | 5.0× (4.4 to 5.6) | 10× |"


def test_what_is_printed():
    rows = [row(OURS, [1.0, 2.0, 3.0]), row("it", [4.0, 4.0, 4.0], mismatches=7)]
    title, _, ours, it = report.table(rows).splitlines()[1:]
    assert title.startswith("rq-vae: N=640 K=256 D=32 float32, training, 3 repeats")
    assert "all rows (640)" in title
    assert ours.split() == (f"{OURS} 0 2000 ms 1400 to 2600 1.00 3.0 MiB 250 1.5 50.0%".split())
    assert it.split()[:4] == ["it", "7", "4000", "ms"]
    assert "a sample (64)" in report.table([row("it", [1.0], rows_checked=64)])
    assert "not measured" in report.table([row("it", [1.0], peak_memory_bytes=None)])


def test_docs_are_filled_and_the_rest_is_left():
    text = "a\n<!-- bench: one -->\nold\n<!-- end -->\nb\n<!-- other: one -->\nx\n<!-- end -->\n"
    made = report.fill(text, "bench", str.upper)
    assert made == text.replace("old", "ONE")
    assert report.fill(made, "bench", str.upper) == made


def test_the_picture_has_a_bar_for_each_row():
    pytest.importorskip("matplotlib")
    rows = [row(OURS, [1.0]), row(PEER, [4.0]), row(OURS, [1.0], case="taming")]
    for panel in report.draw(rows).axes:
        assert len(panel.patches) == 4
    heights = [bar.get_height() for bar in report.draw(rows).axes[0].patches]
    assert heights == [1, 1, 4, 0]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([10, 11, 12], [5, 5.5, 6], "faster by 2.00x"),
        ([5, 5.5, 6], [10, 11, 12], "slower by 2.00x"),
        # medians apart, spreads not
        ([10, 11, 12], [9, 10, 11.5], "no difference beyond the spread"),
        # one outlier is not the spread
        ([10] * 9 + [1], [5] * 9 + [50], "faster by 2.00x"),
        ([10, 10], [5, 5, 5], "no verdict from fewer than 3 repeats"),
    ],
)
def test_a_verdict_is_beyond_the_spread(before, after, words):
    assert compare.verdict(before, after) == words


def test_files_are_compared_by_what_they_share(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for path, rows in zip(
        paths,
        (
            [row(OURS, [2.0] * 3), row(PEER, [1.0])],
            [row(PEER, [1.0], device="another"), row(OURS, [1.0] * 3)],
        ),
        strict=True,
    ):
        report.write_rows(Path(path), rows)
    assert command.main(["--compare", *paths]) == 0
    # the peer was on another device
    assert capsys.readouterr().out == (
        f"training, rq-vae, {OURS}: faster by 2.00x: "
        "2000 (2000 to 2000) -> 1000 (1000 to 1000) ms, 3.0 -> 3.0 MiB\n"
    )
    with pytest.raises(ValueError, match="share no row"):
        compare.compare_files(Path(paths[0]), write(tmp_path / "c.jsonl", [row("x", [1.0])]))


def write(path: Path, rows: list[dict]) -> Path:
    report.write_rows(path, rows)
    return path


def git(*arguments: str, cwd: Path) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=cwd, check=True, capture_output=True)


def test_commits_are_compared_in_one_run(tmp_path, monkeypatch, capsys):
    """A library that sleeps is slower, one that is wrong is refused; this bench measures both."""
    repository = tmp_path / "repository"
    for folder in ("vqtriton", "kernels"):
        shutil.copytree(ROOT / folder, repository / folder)
    (repository / "bench").symlink_to(ROOT / "bench")
    git("init", "-q", cwd=repository)
    main = repository / "vqtriton" / "__init__.py"
    honest = main.read_text()
    slow = "\n\n_fast = nearest_code\n\n\ndef nearest_code(*args, **kwargs):\n"
    for name, spoiled in {
        "honest": "",
        "slow": f"{slow}    import time; time.sleep(0.2)\n    return _fast(*args, **kwargs)\n",
        "wrong": f"{slow}    return _fast(*args, **kwargs).flip(0)\n",
    }.items():
        main.write_text(honest + spoiled)
        git("add", "vqtriton", "kernels", cwd=repository)
        git("commit", "-qm", name, cwd=repository)
        git("tag", name, cwd=repository)
    monkeypatch.setattr(compare, "ROOT", repository)
    flags = ["--case", "rq-vae", "--scope", "assign", "--repeats", "3", "--compare"]
    assert command.main([*flags, "honest", "slow"]) == 0
    assert f"assign, rq-vae, {OURS}: slower by" in capsys.readouterr().out
    assert command.main([*flags, "honest", "wrong"]) == 1
    assert "640 indices are not the nearest code" in capsys.readouterr().err
    assert command.main([*flags, "honest", "nonesuch"]) == 1
    assert "nonesuch is neither a file nor a commit" in capsys.readouterr().err


class Quick(devices.Cpu):
    def rates(self):
        return machines.Rates(dot=1e12, memory=1e11)


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "make_device", lambda name: Quick())
    file = tmp_path / "rows.jsonl"
    flags = ["--case", "rq-vae", "--scope", "assign", "--subject", OURS, "--repeats", "2"]
    flags += ["--json", str(file)]
    assert command.main(flags) == 0
    printed = capsys.readouterr().out
    (found,) = report.read_rows(file)
    assert f"{report.milliseconds(found['p50_s'])} ms" in printed
    assert found["command"] == f"python -m bench {' '.join(flags).replace(OURS, repr(OURS))}"
    if Quick().can_weigh():
        assert 0 < found["peak_memory_bytes"] < found["memory_limit_bytes"]


def test_command_fails_when_a_subject_is_refused(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise measuring.Refused("it is wrong")

    monkeypatch.setattr(command, "make_device", lambda name: Quick())
    monkeypatch.setattr(measuring, "check", refuse)
    file = tmp_path / "rows.jsonl"
    flags = ["--case", "rq-vae", "--scope", "assign", "--subject", OURS, "--json", str(file)]
    assert command.main(flags) == 1
    assert "it is wrong" in capsys.readouterr().err
    assert not file.exists()


def test_unknown_names_are_usage_errors(capsys):
    for flags in (["--case", "nonesuch"], ["--subject", "nobody"], ["--repeats", "0"]):
        with pytest.raises(SystemExit) as raised:
            command.main(flags)
        assert raised.value.code == 2
    assert "rq-vae" in capsys.readouterr().err


def test_it_is_a_command():
    """As `make bench` runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--help"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cases.CASES)


def test_the_floors_are_those_of_the_roofline():
    """With the H100's rates, and half precision: memory and dot of docs/design.md's table."""
    case = cases.CASES["roofline-1M-16384-128"]
    floors = machines.H100.floors(case.least_bytes("inference", 2), case.products)
    assert 1e3 * floors["dot"] == pytest.approx(5.5, rel=0.02)
    # int64 indices and float32 codes take a little more than there
    assert 1e3 * floors["memory"] == pytest.approx(0.18, rel=0.05)
    assert json.dumps(floors)


def test_the_picture_is_of_the_result_file() -> None:
    drawn = report.RESULTS / "training_cpu.jsonl"
    assert f"{drawn.name}, sha256 {report.checksum(drawn)}" in report.PICTURE.read_text()
    drawn = gpu_report.FILES / "latency.jsonl"
    text = (ROOT / "docs" / "gpu.svg").read_text()
    assert f"{drawn.name}, sha256 {report.checksum(drawn)}" in text


def test_the_picture_of_a_gpu_has_wall_and_gpu_time_of_each_subject() -> None:
    pytest.importorskip("matplotlib")
    panels = gpu_report.draw(gpu_report.rows_of("latency")).axes
    # ten shapes that all subjects have been timed at
    assert [len(panel.patches) for panel in panels] == [2 * 2 * 10, 2 * 3 * 10]
    for panel in panels:
        pairs = zip(panel.containers[::2], panel.containers[1::2], strict=True)
        assert all(
            0 < gpu.get_height() < 1.1 * wall.get_height()
            for walls, gpus in pairs
            for wall, gpu in zip(walls, gpus, strict=True)
        )


def test_clustering_is_as_good_as_that_of_others() -> None:
    """Of the result file: from the same kind of start, no mean inertia below 0.99 of ours."""
    rows = report.read_rows(report.RESULTS / "clustering_cpu.jsonl")
    packages = {row["subject"].split(",")[0] for row in rows}
    assert packages == {"vqtriton", "scikit-learn", "faiss"}
    ours = {(r["data"], r["init"]): r for r in rows if r["subject"].startswith("vqtriton")}
    assert len(ours) == 2 * len({row["data"] for row in rows})
    for row in rows:
        mine = ours[row["data"], row["init"]]
        of_seeds = (sum(r["inertia"]) / len(r["inertia"]) for r in (row, mine))
        theirs, of_ours = of_seeds
        assert theirs >= 0.99 * of_ours, (row["data"], row["subject"])


def test_the_bench_and_its_tables_need_no_triton() -> None:
    words = "import sys; sys.modules['triton'] = None; import bench.__main__"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_later_runs_found_is_in_the_table(monkeypatch) -> None:
    rows = gpu_report.rows_of("correctness")
    for row in rows:
        row["part"] = row["part"].replace("recompiles", "programs")
    rows += [{"part": "accumulation", "part_of_bound": part} for part in (0.25, 0.5)]
    rows += [{"part": "sanitizer", "found": found} for found in ("", "ERROR SUMMARY: 3 errors")]
    before = gpu_report.correctness()
    monkeypatch.setattr(gpu_report, "rows_of", lambda name: rows)
    *same, accumulation, sanitizer = gpu_report.correctness().splitlines()
    assert same == before.splitlines()
    assert accumulation.endswith("| 2 sets of data built to err | at most 0.50 of the bound |")
    assert sanitizer.endswith("| 2 runs, a kernel each | 1 found something |")
