"""Tables of tiles: what is chosen from them, what breaks them, and what tuning puts into them."""

from __future__ import annotations

import argparse
import ast
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, REAL_DEVICE

import vqtriton
from vqtriton import environment, torch_backend
from vqtriton.tiles import tables, trace
from vqtriton.tiles.problems import DTYPES, Problem, problem_of
from vqtriton.tuning import tune, writing
from vqtriton.tuning.outcomes import Found, Outcome, decide

pytest.importorskip("triton")
candidates = pytest.importorskip("vqtriton.tiles.candidates")
tunables = pytest.importorskip("vqtriton.tuning.tunables")
measure = pytest.importorskip("vqtriton.tuning.measure")
predict = pytest.importorskip("vqtriton.tuning.predict")

TILES, candidates_of = candidates.TILES, candidates.candidates_of
screen_candidates, screen_default = candidates.screen_candidates, candidates.screen_default
CPU = torch.device("cpu")
PROBLEM = Problem("nearest_code", "float32", 8, 1024, 4096)
OTHER = screen_candidates(8)[5]
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
# docs/versions.md
NEEDS_LINKER = pytest.mark.skipif(
    TRITON < (3, 6) and not shutil.which("ld.lld"), reason="compiling for AMD needs ROCm's linker"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder of tables, empty."""
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tables, "BUNDLED", tmp_path / "bundled")
    tables.forget()
    yield tmp_path
    tables.forget()


def row(problem: Problem = PROBLEM, tiles=OTHER, **changes) -> dict:
    found = {**problem._asdict(), "config": None, "shared": 1000, "source": "static"}
    return found | {"config": asdict(tiles)} | changes


def write(path: Path, rows: list, **changes) -> None:
    path.write_text(json.dumps({"schema": 1, "device": "sm_90", "rows": rows} | changes))
    tables.forget()


def choose(problem: Problem = PROBLEM):
    dtype = DTYPES[problem.dtype]
    return tables.choose(
        problem.op, dtype, problem.dim, problem.codebook_size, problem.num_rows, CPU, problem.heads
    )


# --- what is chosen ---


@pytest.mark.once
def test_without_a_table_it_is_the_default(caplog) -> None:
    with caplog.at_level("INFO", logger="vqtriton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() is None
        assert choose(PROBLEM._replace(dim=16)) is None
    # a line for each table that there might be, once
    assert len(caplog.records) == len(tables.device_names(CPU))


@pytest.mark.once
def test_the_nearest_row_is_chosen(folder) -> None:
    configs = screen_candidates(8)
    rows = [
        row(PROBLEM._replace(num_rows=2**12), configs[3]),
        row(PROBLEM._replace(num_rows=2**16), configs[4]),
        row(PROBLEM._replace(num_rows=2**16, codebook_size=2**14), configs[6]),
        row(PROBLEM._replace(dtype="float16"), configs[7]),
    ]
    write(folder / "sm_90.json", rows)
    assert choose(PROBLEM._replace(num_rows=5000)) == configs[3]
    assert choose(PROBLEM._replace(num_rows=2**18)) == configs[4]
    assert choose(PROBLEM._replace(num_rows=2**18, codebook_size=2**13)) == configs[6]
    assert choose(PROBLEM._replace(dtype="float16")) == configs[7]
    # an empty batch is far from all of them
    assert choose(PROBLEM._replace(num_rows=0)) is None
    # too far, or of another kind
    for other in ({"num_rows": 2**30}, {"dim": 9}, {"heads": 64}, {"dtype": "bfloat16"}):
        assert choose(PROBLEM._replace(**other)) is None
    assert choose(PROBLEM._replace(op="grad_x")) is None


@pytest.mark.once
def test_a_row_for_a_shape_is_chosen_for_it(folder) -> None:
    """Though both have as many bits."""
    configs = screen_candidates(8)
    rows = [row(PROBLEM._replace(num_rows=n), configs[i]) for i, n in ((3, 4097), (4, 8000))]
    write(folder / "sm_90.json", rows)
    assert choose(PROBLEM._replace(num_rows=4097)) == configs[3]
    assert choose(PROBLEM._replace(num_rows=8000)) == configs[4]


@pytest.mark.once
@pytest.mark.parametrize("name", ["nowhere", "a file", "~nobody-of-that-name/x", "x" * 300])
def test_a_folder_that_is_none_is_said(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tables.VARIABLE, name)
    tables.forget()
    with pytest.warns(UserWarning, match=f"{tables.VARIABLE} is {name}, which is no folder"):
        assert choose() is None
    tables.forget()
    with pytest.warns(UserWarning, match="is no folder"):
        assert "(default)" in environment.describe([(9, 9, 9, "float32")])


@pytest.mark.once
def test_a_tilde_is_the_same_for_reading_and_writing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(tables.VARIABLE, "~/tabs")
    assert tables.user_folder() == tmp_path / "tabs"
    assert tune.folder_of(argparse.Namespace(out=None)) == tmp_path / "tabs"


@pytest.mark.once
def test_the_users_folder_and_the_device_come_first(folder) -> None:
    configs = screen_candidates(8)
    (folder / "bundled").mkdir()
    write(folder / "bundled" / "interpreter.json", [row(tiles=configs[3])])
    assert choose() == configs[3]
    write(folder / "sm_90.json", [row(tiles=configs[4])])
    assert choose() == configs[4]
    write(folder / "interpreter.json", [row(tiles=configs[5])])
    assert choose() == configs[5]


@pytest.mark.once
def test_where_the_default_is_best_no_row_of_another_shape_is_chosen(folder) -> None:
    """Nor are its tiles written: they may be others in another version."""
    path, near = folder / "sm_90.json", PROBLEM._replace(num_rows=8192)
    writing.merge(path, "sm_90", [row(near)])
    assert choose() == choose(near) == OTHER
    writing.merge(path, "sm_90", [row() | {"config": None}])
    assert (choose(), choose(near)) == (None, OTHER)
    written = json.loads(path.read_text())
    assert [found["num_rows"] for found in written["rows"]] == [8192]
    (default,) = written["default_is_best"]
    assert default["num_rows"] == 4096
    assert "config" not in default
    lines = environment.describe([(4096, 1024, 8, "float32")]).splitlines()
    (tiles,) = (line for line in lines if line.startswith("nearest_code"))
    assert str(screen_default("sm_90", 8)) in tiles
    # and back
    writing.merge(path, "sm_90", [row(tiles=screen_candidates(8)[6])])
    assert choose() == screen_candidates(8)[6]
    assert "default_is_best" not in json.loads(path.read_text())


@pytest.mark.once
def test_what_does_not_fit_is_not_chosen(folder, monkeypatch) -> None:
    write(folder / "sm_90.json", [row(shared=100_000), row(tiles=screen_candidates(8)[6])])
    monkeypatch.setattr(tables, "shared_limit", lambda device: 99_999)
    assert choose() == screen_candidates(8)[6]
    # what a launch has refused is not tried again
    with pytest.warns(UserWarning, match="does not fit"):
        tables.reject(screen_candidates(8)[6])
    assert choose() is None


@pytest.mark.once
def test_a_look_up_takes_less_than_two_microseconds(folder) -> None:
    write(folder / "sm_90.json", [row()])
    assert choose() == OTHER
    arguments = ("nearest_code", torch.float32, 8, 1024, 4096, CPU)
    seconds = min(timeit.repeat(lambda: tables.choose(*arguments), number=2000, repeat=20))
    assert seconds / 2000 < 2e-6


@pytest.mark.kernel
@pytest.mark.needs_interpreter
def test_the_search_uses_the_row(folder, monkeypatch) -> None:
    from vqtriton.kernels import nearest_code as module

    x, codebook = torch.randn(40, 8), torch.randn(600, 8)
    want = vqtriton.nearest_code(x, codebook, backend="triton")
    config = replace(OTHER, block_n=64, block_k=128, num_warps=8)
    assert config in screen_candidates(8)
    write(folder / "sm_90.json", [row(PROBLEM._replace(codebook_size=600, num_rows=40), config)])
    used = []
    screen = module.screen_codes
    monkeypatch.setattr(
        module,
        "screen_codes",
        lambda *a, **k: used.append(a[5]) or screen(*a, **k),
    )
    assert torch.equal(vqtriton.nearest_code(x, codebook, backend="triton"), want)
    assert used == [config]
    assert torch.equal(want, vqtriton.reference.nearest_code(x, codebook))


@pytest.mark.once
def test_env_shows_what_is_chosen(folder) -> None:
    write(folder / "sm_90.json", [row()])
    lines = environment.describe([(4096, 1024, 8, "float32")]).splitlines()
    (tiles,) = (line for line in lines if line.startswith("nearest_code"))
    assert str(OTHER) in tiles
    assert "(static, sm_90.json)" in tiles
    assert any("sm_90.json, 1 shapes" in line for line in lines)
    (tiles,) = (line for line in lines if line.startswith("grad_x"))
    assert tiles.endswith("(default)")


# --- what breaks a table ---


def spoil(path: Path, kind: str) -> None:
    whole = json.dumps({"schema": 1, "device": "sm_90", "rows": [row()]})
    texts = {
        "empty": "",
        "truncated": whole[:-40],
        "junk": "x" * (10 << 20),
        "nested": "[" * 100_000,
        "a number": "7",
        "no rows": json.dumps({"schema": 1}),
        "rows of no list": json.dumps({"schema": 1, "rows": {"a": 1}}),
        "defaults of no list": json.dumps({"schema": 1, "rows": [], "default_is_best": 7}),
        "wrong schema": whole.replace('"schema": 1', '"schema": 99'),
        "no schema": whole.replace('"schema": 1, ', ""),
        "a true schema": whole.replace('"schema": 1', '"schema": true'),
        "a broken schema": whole.replace('"schema": 1', '"schema": 1.0'),
    }
    if kind in texts:
        path.write_text(texts[kind])
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 9)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "no permission":
        path.write_text(whole)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")


@pytest.mark.once
@pytest.mark.parametrize(
    "kind",
    [
        *("empty", "truncated", "junk", "nested", "a number", "no rows", "rows of no list"),
        *("a true schema", "a broken schema"),
        *(
            "defaults of no list",
            "wrong schema",
            "no schema",
            "binary",
            "a directory",
            "a pipe",
            "a dangling link",
        ),
        *("a link to itself", "no permission"),
    ],
)
def test_a_broken_table_is_named_and_not_used(folder, kind) -> None:
    path = folder / "sm_90.json"
    spoil(path, kind)
    with pytest.warns(UserWarning, match=r"sm_90\.json"):
        assert choose() is None
    # once is enough
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(PROBLEM._replace(num_rows=7)) is None


@pytest.mark.once
def test_a_table_that_may_not_be_read(folder, monkeypatch) -> None:
    write(folder / "sm_90.json", [row()])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "sm_90.json")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match=r"Permission denied: 'sm_90\.json'; the defaults"):
        assert choose() is None


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": asdict(replace(OTHER, block_n=-64))}, "none that is tried"),
        ({"config": asdict(replace(OTHER, block_k=96))}, "none that is tried"),
        ({"config": asdict(replace(OTHER, block_k=1 << 20))}, "none that is tried"),
        ({"config": asdict(OTHER) | {"num_wraps": 4}}, "none that is tried"),
        ({"config": asdict(OTHER) | {"num_warps": "4"}}, "none that is tried"),
        # equal to Python, and not to a kernel
        ({"config": asdict(OTHER) | {"block_n": float(OTHER.block_n)}}, "none that is tried"),
        ({"config": asdict(OTHER) | {"hold_rows": 1}}, "none that is tried"),
        ({"dim": 5000}, "dim is 5000: .* at most 4094"),
        ({"config": [1]}, r"config is \[1\]"),
        ({"op": "nearest"}, "op is 'nearest'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"num_rows": 0}, "num_rows is 0"),
        ({"num_rows": float("nan")}, "num_rows is nan"),
        ({"dim": True}, "dim is True"),
        ({"shared": None}, "shared is None"),
        ({"source": "dreamt"}, "source is 'dreamt'"),
    ],
)
def test_a_broken_row_costs_no_other(folder, changes, message) -> None:
    good = row(PROBLEM._replace(codebook_size=2**16))
    write(folder / "sm_90.json", [row(**changes), 7, good])
    with pytest.warns(UserWarning, match="is left out") as caught:
        found = choose(), choose(PROBLEM._replace(codebook_size=2**16))
    assert found == (None, OTHER)
    first, second = (str(warning.message) for warning in caught)
    assert f"row 0 of {folder}/sm_90.json is left out" in first
    assert re.search(message, first)
    assert "row 1 of" in second
    # and what is not understood is not lost when rows are added
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writing.merge(folder / "sm_90.json", "sm_90", [row(PROBLEM._replace(num_rows=99))])
    kept = json.loads((folder / "sm_90.json").read_text())["rows"]
    assert len(kept) == 4
    assert 7 in kept


@pytest.mark.once
def test_many_rows_take_no_time_and_many_warnings_are_few(folder) -> None:
    problems = [PROBLEM._replace(num_rows=n) for n in range(1, 4001)]
    write(folder / "sm_90.json", [*map(row, problems), *[0] * 100_000])
    start = time.process_time()
    with pytest.warns(UserWarning, match="left out") as caught:
        assert choose() == OTHER
    assert time.process_time() - start < 3
    assert len(caught) == tables.MOST_NAMED + 1
    assert f"{100_000 - tables.MOST_NAMED} more rows of {folder}/sm_90.json" in str(caught[-1])


@pytest.mark.once
def test_no_table_is_written_that_cannot_be_read(folder, monkeypatch) -> None:
    path = folder / "sm_90.json"
    writing.merge(path, "sm_90", [row()])
    before = path.read_text()
    monkeypatch.setattr(writing, "MOST_BYTES", len(before) + 100)
    with pytest.raises(ValueError, match="would have more than"):
        writing.merge(path, "sm_90", [row(PROBLEM._replace(num_rows=7))])
    assert path.read_text() == before
    assert {p.name for p in folder.iterdir()} == {"sm_90.json", ".sm_90.json.lock"}


@pytest.mark.once
def test_a_link_stays_a_link(folder) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "sm_90.json").symlink_to("elsewhere/mine.json")
    with pytest.raises(ValueError, match="no regular file"):
        writing.merge(folder / "sm_90.json", "sm_90", [row()])
    write(folder / "elsewhere" / "mine.json", [])
    writing.merge(folder / "sm_90.json", "sm_90", [row()])
    assert (folder / "sm_90.json").is_symlink()
    assert len(tables.read(folder / "elsewhere" / "mine.json")) == 1


# --- writing ---


@pytest.mark.once
def test_measured_rows_replace_static_ones_and_not_the_reverse(folder) -> None:
    path, configs = folder / "sm_90.json", screen_candidates(8)
    for source, config, left in (
        ("static", configs[3], 3),
        ("static", configs[4], 4),
        ("measured", configs[5], 5),
        ("static", configs[6], 5),
        ("measured", configs[7], 7),
    ):
        writing.merge(path, "sm_90", [row(tiles=config, source=source)])
        (found,) = tables.read(path)
        assert found["config"] == asdict(configs[left])
        assert choose() == configs[left]


def merge_some(path: Path, start: int) -> None:
    for number in range(start, start + 12):
        writing.merge(path, "sm_90", [row(PROBLEM._replace(num_rows=number + 1))])


@pytest.mark.once
def test_processes_into_one_folder_make_a_union(folder) -> None:
    context = multiprocessing.get_context("fork")
    path = folder / "sm_90.json"
    workers = [context.Process(target=merge_some, args=(path, 12 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert {found["num_rows"] for found in tables.read(path)} == set(range(1, 49))
    # nothing is left beside it but the lock
    assert {p.name for p in folder.iterdir()} == {"sm_90.json", ".sm_90.json.lock"}


PROBLEMS = [PROBLEM._replace(num_rows=2**i) for i in range(12)]


def quick(problem: Problem) -> Outcome:
    time.sleep(0.004)
    config = screen_candidates(8)[problem.num_rows.bit_length()]
    found = {"config": asdict(config), "shared": 0, "ms": 1.0, "default_ms": 2.0}
    return Outcome(problem, 2.0, 1.0, found, 3, 0)


def tune_quickly(folder: Path) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    predict.predict = lambda problem, target, say: quick(problem)
    tune.problems_of = lambda asked, ops: PROBLEMS
    sys.argv = ["vqtriton", "tune", "--static", "--resume", "--out", str(folder)]
    from vqtriton.__main__ import main

    main()


@pytest.mark.once
def test_interrupts_lose_nothing(folder) -> None:
    """Killed or interrupted at 20 random moments: the table can be read, and ends up whole."""
    context = multiprocessing.get_context("fork")
    path, draw = folder / "sm_90.json", random.Random(3)
    seen = 0
    for turn in range(20):
        worker = context.Process(target=tune_quickly, args=(folder,))
        worker.start()
        time.sleep(draw.uniform(0, 0.12))
        os.kill(worker.pid, signal.SIGKILL if turn % 2 else signal.SIGINT)
        worker.join(60)
        if path.exists():
            found = tables.read(path)
            assert len(found) >= seen
            seen = len(found)
        # another run for its end, from the beginning
        if seen == len(PROBLEMS):
            path.unlink()
            seen = 0
    worker = context.Process(target=tune_quickly, args=(folder,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    found = {problem_of(r): r["config"] for r in tables.read(path)}
    assert found == {problem: quick(problem).row["config"] for problem in PROBLEMS}


# --- tuning ---


@pytest.mark.once
def test_prediction_leaves_out_what_spills_and_keeps_a_default_that_is_best(monkeypatch) -> None:
    default = screen_candidates(8)[1]
    starved = replace(default, max_registers=32)
    tiles = TILES["nearest_code"]._replace(
        candidates=lambda dim: [starved], default=lambda target, dim: default
    )
    monkeypatch.setitem(TILES, "nearest_code", tiles)
    outcome = predict.predict(PROBLEM, "sm_90")
    assert (outcome.tried, outcome.left_out) == (2, 1)
    assert tables.keeps_default(outcome.row)
    assert outcome.default_ms == outcome.best_ms > 0


@pytest.mark.once
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=NEEDS_LINKER if target == "gfx942" else ())
        for target in tune.TARGETS
    ],
)
def test_every_target_is_predicted_or_keeps_a_default_that_can_be_used(monkeypatch, target) -> None:
    assert set(tune.TARGETS) == set(tunables.screen_tiles.ACCUMULATOR_ORDER)
    _, *others = candidates_of(PROBLEM, target)
    tiles = TILES["nearest_code"]._replace(candidates=lambda dim: others[:1])
    monkeypatch.setitem(TILES, "nearest_code", tiles)
    is_predicted = predict.predict(PROBLEM, target).default_ms > 0
    assert is_predicted == (target == "sm_90")
    if is_predicted:
        return
    assert tables.keeps_default(predict.predict(PROBLEM, target).row)
    # one that cannot be used is replaced by what can
    monkeypatch.setattr(predict, "usages", lambda *_: [None, predict.Usage(9, 0, 1, None, 0, 0)])
    found = predict.predict(PROBLEM, target).row
    assert found["config"] == asdict(others[0])
    assert found["ms"] is None


@pytest.mark.once
@pytest.mark.parametrize(("gain", "is_kept"), [(0.01, True), (0.029, True), (0.031, False)])
def test_a_gain_that_may_be_noise_changes_nothing(gain, is_kept) -> None:
    candidates = screen_candidates(8)[:2]
    times = 1 - gain, 1.0
    found = [Found(one, ms, {}) for one, ms in zip(reversed(candidates), times, strict=True)]
    outcome = decide(PROBLEM, candidates, found)
    assert tables.keeps_default(outcome.row) == is_kept
    assert ("none" in tune.summary([outcome], "measured")) == is_kept


@pytest.mark.once
def test_it_says_what_it_will_do(folder, monkeypatch, capsys) -> None:
    from vqtriton.__main__ import main

    monkeypatch.setattr(predict, "predict", lambda problem, *_: quick(problem))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    shapes = ("--shape", "9,9,8", "--shape", "8,9,8", "--shape", "9,9,16")
    count = sum(len(candidates_of(PROBLEM._replace(dim=d), "sm_90")) for d in (8, 16))
    for budget, words in (
        ("1000", f"roughly {count / 2:.0f} s\n"),
        ("2", "no shape starts after 2 s (--budget)"),
    ):
        arguments = ["vqtriton", "tune", "--static", *shapes, "--budget", budget]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="0"):
            main()
        first = capsys.readouterr().err.splitlines(keepends=True)[0]
        assert f"3 to tune, each an op at a shape: {count} candidates to compile on 4" in first
        assert words in first
    assert "to check and time" in tune.plan([PROBLEM], "sm_80", "measured", math.inf, False)
    assert "interpreter" in tune.plan([PROBLEM], "sm_90", "measured", math.inf, True)


@pytest.mark.once
@pytest.mark.parametrize(
    ("rows", "codes", "times"),
    [
        # two programs for each of 132, and one more than that
        (2 * 132 * 128, 64, 1),
        (2 * 132 * 128 + 1, 64, 1.5),
        # a tile, where a row and a code would do; no part has fewer than 64 tiles
        (1, 1, 132 * 128 * 64),
        (128, 127 * 64, 132),
        # in two parts
        (128, 128 * 64, 66),
    ],
)
def test_few_rows_leave_processors_idle(rows, codes, times) -> None:
    problem = PROBLEM._replace(num_rows=rows, codebook_size=codes)
    tiles = replace(screen_candidates(8)[0], block_n=128, block_k=64)
    assert tunables.screen_unevenness(problem, tiles, 132) == pytest.approx(times, rel=1e-4)


@pytest.mark.once
def test_prediction_prefers_small_tiles_for_few_rows(monkeypatch) -> None:
    """Where large ones take fewer instructions for a pair, whatever the compiler makes of them."""

    def usages(problem, target, configs, say):
        for config in configs:
            work = predict.Work(config.block_n, 2 * 32, 32, uses_mma=True)
            yield predict.Usage(100, 0, 2, work, 1.4, 3.0 if config.block_n == 128 else 3.5)

    monkeypatch.setattr(predict, "usages", usages)
    few, many = (
        predict.predict(PROBLEM._replace(dim=32, num_rows=n, codebook_size=256), "sm_90")
        for n in (640, 1 << 20)
    )
    assert few.row["config"]["block_n"] == 64
    assert tables.keeps_default(many.row) or many.row["config"]["block_n"] == 128


@pytest.mark.once
@pytest.mark.parametrize("op", tunables.TUNABLES)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 64, 100, 256, 512, 4000])
def test_a_default_may_stand_in_a_table(op, dim) -> None:
    tiles = TILES[op]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        problem = Problem(op, "float16", dim, 9, 9)
        assert tables.fault(row(problem, tiles.default(target, dim))) is None


@pytest.mark.once
def test_a_wrong_candidate_never_wins(monkeypatch) -> None:
    """The fastest is off by one in a row of 4096; another leaves memory as it was; one raises."""
    configs = screen_candidates(8)
    problem = PROBLEM._replace(codebook_size=50)

    def run(inputs, config):
        place = configs.index(config)
        time.sleep({0: 0.03, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.01}.get(place, 0.05))
        indices = vqtriton.nearest_code(inputs.x, inputs.codebook)
        if place == 1:
            indices[777] = (indices[777] + 1) % 50
        if place == 2:
            indices = torch.empty_like(indices)
        if place == 3:
            raise RuntimeError("out of shared memory")
        return (indices,)

    tunable = replace(
        tunables.TUNABLES["nearest_code"],
        prepare=tunables.as_they_are,
        run=run,
    )
    monkeypatch.setitem(tunables.TUNABLES, "nearest_code", tunable)
    tiles = TILES["nearest_code"]._replace(default=lambda target, dim: configs[0])
    monkeypatch.setitem(TILES, "nearest_code", tiles)
    said = []
    outcome = measure.measure(problem, CPU, said.append)
    assert outcome.row["config"] == asdict(configs[4])
    assert outcome.left_out == 3
    assert sum("it is wrong" in text for text in said) == 2
    assert sum("out of shared memory" in text for text in said) == 1


@pytest.mark.once
def test_a_candidate_that_goes_wrong_later_never_wins(monkeypatch) -> None:
    """Right when it is first looked at: then wrong, or raising, and the fastest."""
    configs = screen_candidates(8)
    calls = dict.fromkeys(range(9), 0)

    def run(inputs, config):
        place = configs.index(config)
        calls[place] += 1
        time.sleep({0: 0.03, 1: 0.0, 2: 0.0, 3: 0.01}.get(place, 0.05))
        indices = vqtriton.nearest_code(inputs.x, inputs.codebook)
        if place == 1 and calls[place] > 1:
            indices[5] = (indices[5] + 1) % 50
        if place == 2 and calls[place] > 1:
            raise RuntimeError("an illegal memory access")
        return (indices,)

    tunable = replace(
        tunables.TUNABLES["nearest_code"],
        prepare=tunables.as_they_are,
        run=run,
    )
    monkeypatch.setitem(tunables.TUNABLES, "nearest_code", tunable)
    tiles = TILES["nearest_code"]._replace(
        candidates=lambda dim: configs[:5], default=lambda target, dim: configs[0]
    )
    monkeypatch.setitem(TILES, "nearest_code", tiles)
    said = []
    outcome = measure.measure(PROBLEM._replace(codebook_size=50, num_rows=200), CPU, said.append)
    assert outcome.row["config"] == asdict(configs[3])
    assert outcome.left_out == 2
    assert sum("it is wrong" in text for text in said) == 1
    assert sum("an illegal memory access" in text for text in said) == 1


@pytest.mark.once
def test_one_problem_costs_no_other(folder, monkeypatch, capsys) -> None:
    from vqtriton.__main__ import main

    def some(problem, target, say):
        if problem.num_rows == 8:
            raise torch.OutOfMemoryError("Tried to allocate 99 TiB")
        return quick(problem)

    monkeypatch.setattr(predict, "predict", some)
    shapes = [word for n in (4, 8, 16) for word in ("--shape", f"{n},1024,8")]
    monkeypatch.setattr(sys, "argv", ["vqtriton", "tune", "--static", *shapes])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "99 TiB" in capsys.readouterr().err
    found = tables.read(folder / "sm_90.json")
    assert [kept["num_rows"] for kept in found] == [4, 16]
    # thousands of rows have it
    assert all(len(kept["command"]) < 500 for kept in found)


@pytest.mark.once
def test_what_is_left_out_of_a_table_is_of_no_use(folder, monkeypatch, capsys) -> None:
    from vqtriton.__main__ import main

    default = screen_default("sm_90", 8)
    write(folder / "sm_90.json", [row(tiles=default), row(tiles=replace(default, block_k=96))])
    monkeypatch.setattr(sys, "argv", ["vqtriton", "tune", "--check"])
    with pytest.warns(UserWarning, match="is left out"), pytest.raises(SystemExit, match="1"):
        main()
    assert "2 shapes, 1 of no use" in capsys.readouterr().out


@pytest.mark.once
def test_what_cannot_win_is_not_timed(monkeypatch, capsys) -> None:
    """On a GPU: what spills or does not fit, and those that are predicted to be far behind."""
    gpu = torch.device("cuda")
    default, *others = candidates_of(PROBLEM, "sm_90")[:9]
    starved = replace(default, max_registers=32)
    monkeypatch.setattr(measure, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(measure, "MOST_TIMED", 3)
    monkeypatch.setattr(measure, "shared_limit", lambda device: 1 << 20)

    said = []

    def kept():
        candidates = [default, starved, *others]
        return measure.promising(PROBLEM, gpu, candidates, said.append)

    ranked = predict.usable(PROBLEM, "sm_90", [default, *others])
    assert len(ranked) > 5
    best = [one.config for one in ranked[:3]]
    assert {config for config, _ in kept()} == {default, *best}
    # why, in a line, and not the thousands that Triton prints
    assert len(said) <= 1
    assert all(len(text.splitlines()) == 1 for text in said)
    assert not capsys.readouterr().out
    # the largest shared memory that is allowed
    sizes = sorted(one.about["shared"] for one in ranked)
    monkeypatch.setattr(measure, "shared_limit", lambda device: sizes[1])
    assert kept()
    assert all(about["shared"] <= sizes[1] for _, about in kept())


@pytest.mark.once
@pytest.mark.parametrize("op", tunables.TUNABLES)
def test_tiles_that_are_tried_can_be_used(op) -> None:
    """Of the kernels that are not modelled all; of each, the default."""
    problem = PROBLEM._replace(op=op, dim=64)
    candidates = candidates_of(problem, "sm_90")
    few = candidates[:1] if op == "nearest_code" else candidates
    if op == "code_sums":
        # the rows of a chunk are no part of the programs
        few = [one for one in candidates if one.least_chunk == candidates[0].least_chunk]
    assert [one.config for one in predict.usable(problem, "sm_90", few)] == few


@pytest.mark.once
def test_time_that_is_the_hosts_is_said() -> None:
    said = []
    measure.say_whose_time(PROBLEM, 0.1, 0.15, said.append)
    assert said == []
    measure.say_whose_time(PROBLEM, 0.0312, 0.924, said.append)
    assert "a call takes 0.924 ms, and the GPU works 0.031 ms of it" in said[0]


@pytest.mark.once
def test_on_a_gpu_replays_are_timed(monkeypatch) -> None:
    """Each candidate is captured once for each copy of the inputs, or left out."""
    captured, replayed, said = [], [], []

    def capture(step, pool):
        on, config = step.args
        if config == "breaks":
            raise RuntimeError("no capture")
        captured.append((on, config))
        return lambda: replayed.append((on, config))

    def one_ms(step, device):
        step()
        return {"fast": 1.0, "slow": 3.0}[replayed[-1][1]]

    empty = torch.empty
    monkeypatch.setattr(measure, "captured", capture)
    monkeypatch.setattr(measure, "one_ms", one_ms)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 8)
    monkeypatch.setattr(measure, "HEAD_START_BYTES", 8)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch, "empty", lambda *size, device, dtype: empty(*size, dtype=dtype))
    run = pytest.fail
    configs = ["slow", "breaks", "fast"]
    found = measure.median_ms(run, configs, ["a", "b"], torch.device("cuda"), said.append)
    assert (found[0], found[2]) == (3.0, 1.0)
    assert math.isnan(found[1])
    assert said == ["left out, breaks: no capture"]
    assert captured == [("a", "slow"), ("a", "fast"), ("b", "slow"), ("b", "fast")]
    assert len(replayed) == 2 * (measure.WARM_UP + measure.REPEATS)


@pytest.mark.once
def test_one_thread_parses_at_a_time(monkeypatch) -> None:
    """Python 3.11 fails by chance where two do, and a good tile would be left out."""
    problem = PROBLEM._replace(op="grad_x", dim=40)
    threads, parse = set(), ast.parse

    def slow_parse(*args, **kwargs):
        threads.add(threading.get_ident())
        assert len(threads) == 1
        # others may run
        time.sleep(0.01)
        tree = parse(*args, **kwargs)
        threads.clear()
        return tree

    monkeypatch.setattr(ast, "parse", slow_parse)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # so that nothing is found among what was compiled before
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    candidates = candidates_of(problem, "sm_90")[:6]
    assert len(predict.usable(problem, "sm_90", candidates)) == 6


@pytest.mark.once
def test_what_cannot_be_counted_can_be_used() -> None:
    """Tensor memory's products do not tell their shape, so nothing is predicted of such a loop."""
    problem = PROBLEM._replace(dim=64)
    (one,) = predict.usable(problem, "sm_100", candidates_of(problem, "sm_100")[:1])
    assert one.ms != one.ms
    assert one.about["shared"] > 0


@pytest.mark.once
@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress(monkeypatch, capsys, is_terminal) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    progress = tune.Progress(4)
    progress.show(0, "first")
    progress.say("left out: one")
    progress.show(1, "second")
    said = capsys.readouterr().err
    lines = said.split("\r\x1b[2K")[1:] if is_terminal else said.splitlines()
    assert lines[0] == f"[{'.' * 20}] 0/4   first"
    assert lines[1].strip() == "left out: one"
    assert re.fullmatch(r"\[#####\.{15}\] 1/4 +\d+ s left  second", lines[2])


@pytest.mark.once
def test_a_case_that_takes_long_shows_that_it_goes_on(monkeypatch, capsys) -> None:
    monkeypatch.setattr(tune, "HEARTBEAT_SECONDS", 0.02)
    progress = tune.Progress(4)
    progress.show(1, "second")
    with progress.beating():
        time.sleep(0.2)
    said = capsys.readouterr().err
    time.sleep(0.1)
    assert said.count("1/4") >= 3
    assert "second, for 0 s" in said
    assert not capsys.readouterr().err


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.real_device
@pytest.mark.parametrize("op", tunables.TUNABLES)
def test_each_op_is_measured_and_checked(monkeypatch, op) -> None:
    """With kernels: results are right with every candidate; a wrong one is told from them."""
    problem = Problem(op, "float32", 8, 40, 40 if op == "ema_update" else 60)
    tunable = tunables.TUNABLES[op]
    few = TILES[op].candidates(8)[-2:]
    monkeypatch.setitem(TILES, op, TILES[op]._replace(candidates=lambda dim: few))
    device = torch.device(REAL_DEVICE)
    outcome = measure.measure(problem, device)
    assert outcome.left_out == 0
    assert outcome.tried >= 2
    inputs = tunables.make_inputs(problem, device)
    results = tunable.run(tunable.prepare(inputs), few[0])
    assert tunable.is_right(inputs, results)
    results[0].view(-1)[3] += 1
    assert not tunable.is_right(inputs, results)


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.real_device
@pytest.mark.parametrize("op", tunables.TUNABLES)
@pytest.mark.parametrize("dim", [8, 136])
def test_whatever_stands_in_a_table_is_right(op, dim) -> None:
    """Held and streamed rows; on a GPU what does not fit is no candidate."""
    device = torch.device(REAL_DEVICE)
    problem = Problem(op, "float16" if op != "ema_update" else "float32", dim, 40, 60)
    inputs = tunables.make_inputs(problem, device)
    tunable = tunables.TUNABLES[op]
    candidates = TILES[op].candidates(dim)
    if INTERPRETED:
        # what a compiler does with them, the interpreter does not
        names = {"num_warps", "num_stages", "max_registers"}
        different = {
            str([asdict(c)[n] for n in asdict(c) if n not in names]): c for c in candidates
        }
        candidates = list(different.values())
    for config, _ in measure.promising(problem, device, candidates, print):
        # as they run where there are many rows, too
        is_of_sums = op == "code_sums"
        for tiles in (config, *([replace(config, most_elements=0)] if is_of_sums else [])):
            results = tunable.run(tunable.prepare(inputs), tiles)
            assert tunable.is_right(inputs, results), tiles


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to tune for"),
        (["--shape", "1,2"], "is not N,K,D"),
        (["--shape", "1,2,0"], "must be from 1"),
        (["--shape", "1,2,3,int8"], "DTYPE one of"),
        (["--from-trace", "nowhere"], "--from-trace: "),
        (["--preset", "mine"], "invalid choice"),
        (["--budget", "0", "--preset", "real-models"], "0 is not above 0"),
        (["--static", "--target", "sm_75"], "invalid choice"),
        (["--static", "--device", "cuda", "--shape", "9,9,9"], "--static does not measure"),
        (["--device", "cpu", "--shape", "9,9,9"], "only under TRITON_INTERPRET=1"),
        (["--device", "foo", "--shape", "9,9,9"], "--device is 'foo'"),
        (["--device", "meta", "--shape", "9,9,9"], "--device is meta"),
        (["--shape", f"{10**20},9,9"], "N, K and D must be"),
        (["--shape", "9,9,5000"], "at most D = 4094"),
        (["--check", "--out", "nowhere"], "nowhere"),
        (["--preset", "real-models", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["--shape", "9,9,9", "--dtype", "float16"], "--dtype only applies to --preset"),
    ],
)
def test_bad_arguments_are_named(monkeypatch, capsys, arguments, message) -> None:
    from vqtriton.__main__ import main

    monkeypatch.setattr(sys, "argv", ["vqtriton", "tune", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


@pytest.mark.once
def test_a_broken_table_stops_tuning_before_it_begins(folder, monkeypatch, capsys) -> None:
    from vqtriton.__main__ import main

    (folder / "sm_90.json").write_text("mine, and no table")
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["vqtriton", "tune", "--static", "--shape", "9,9,9"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "nothing was tuned" in capsys.readouterr().err
    assert (folder / "sm_90.json").read_text() == "mine, and no table"


# --- traces and warm-up ---


@pytest.mark.once
def test_a_trace_has_each_shape_once(tmp_path, monkeypatch) -> None:
    file = tmp_path / "trace.jsonl"
    monkeypatch.setenv(trace.VARIABLE, str(file))
    vq = vqtriton.VectorQuantize(6, 30)
    for rows in (20, 20, 50):
        x = torch.randn(rows, 6).requires_grad_()
        vq(x).loss.backward()
    found = trace.read(file)
    assert len(file.read_text().splitlines()) == len(found)
    assert set(found) == {
        *(
            Problem(op, "float32", 6, 30, n)
            for op in ("nearest_code", "code_sums")
            for n in (20, 50)
        ),
        *(Problem("grad_x", "float32", 6, 30, n) for n in (20, 50)),
        Problem("ema_update", "float32", 6, 30, 30),
    }
    # as many more as another process sees
    words = "import torch, vqtriton; vqtriton.nearest_code(torch.ones(9, 6), torch.ones(30, 6))"
    subprocess.run([sys.executable, "-c", words], check=True, timeout=120)
    assert set(trace.read(file)) - set(found) == {Problem("nearest_code", "float32", 6, 30, 9)}


@pytest.mark.once
def test_tuning_from_a_trace_is_for_exactly_its_shapes(tmp_path, monkeypatch) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [PROBLEM, PROBLEM._replace(op="grad_x"), PROBLEM._replace(dim=9)]
    file.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in rows))
    tuned = []

    def note(problem, target, say):
        tuned.append(problem)
        return quick(PROBLEM)

    monkeypatch.setattr(predict, "predict", note)
    from vqtriton.__main__ import main

    arguments = ["vqtriton", "tune", "--static", "--from-trace", str(file), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="0"):
        main()
    # of the gradient nothing can be predicted
    assert tuned == [PROBLEM, PROBLEM._replace(dim=9)]


@pytest.mark.once
def test_a_trace_that_cannot_be_written_is_said_and_costs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(trace.VARIABLE, str(tmp_path))
    x, codebook = torch.randn(5, 4), torch.randn(7, 4)
    with pytest.warns(UserWarning, match=trace.VARIABLE):
        indices = vqtriton.nearest_code(x, codebook)
    assert torch.equal(indices, vqtriton.reference.nearest_code(x, codebook))


@pytest.mark.once
def test_a_line_that_is_no_shape_is_named(tmp_path) -> None:
    file = tmp_path / "trace.jsonl"
    good = json.dumps(PROBLEM._asdict())
    for text, message in (
        ("7\n", "line 1 .* no object"),
        ("\n\n", "has no shapes"),
        ('{"op": 1}', "line 1 .*op is 1"),
        ("[" * 100_000, "line 1"),
        *(
            (f"\n{good}\n{json.dumps(PROBLEM._asdict() | changes)}\n", f"line 3 .*{words}")
            for changes, words in (
                ({"dtype": "float99"}, "dtype is 'float99'"),
                ({"dim": "8"}, "dim is '8'"),
                ({"dim": 0}, "dim is 0"),
                ({"dim": 5000}, "dim is 5000"),
                ({"num_rows": -64}, "num_rows is -64"),
                ({"codebook_size": float("nan")}, "codebook_size is nan"),
                ({"heads": 2}, "heads is 2"),
                ({"op": "nearest"}, "op is 'nearest'"),
            )
        ),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            trace.read(file)


@pytest.mark.once
def test_a_trace_into_a_pipe_holds_nothing_up(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv(trace.VARIABLE, str(tmp_path / "pipe"))
    with pytest.warns(UserWarning, match="no regular file"):
        vqtriton.nearest_code(torch.randn(5, 4), torch.randn(7, 4))


@pytest.mark.once
def test_warmup_takes_the_steps_of_training(monkeypatch) -> None:
    """Compiled for the strides of a decoder's gradient; with hooks, contexts and frozen codes."""
    vq = vqtriton.VectorQuantize(4, 9, codebook_update="gradient").requires_grad_(False)
    vq.register_forward_hook(lambda *_: pytest.fail("a hook of the module's user"))
    seen = []
    grad_x = torch_backend.grad_x
    monkeypatch.setattr(
        torch_backend,
        "grad_x",
        lambda grad, *rest: seen.append(grad.stride()) or grad_x(grad, *rest),
    )
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            vqtriton.warmup(vq, (7, 4))
    assert seen == [(4, 1)] * 3
    for shape in (8, (), (4.0, 4), "ab", None, (-1, 4)):
        with pytest.raises(ValueError, match=r"shapes has|x has shape"):
            vqtriton.warmup(vq, shape)
    for dtype in (torch.int64, torch.bool, "float32"):
        with pytest.raises(TypeError, match="dtype is"):
            vqtriton.warmup(vq, (7, 4), dtype=dtype)


@pytest.mark.once
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_warmup_leaves_the_module_as_it_is(monkeypatch, update) -> None:
    vq = vqtriton.VectorQuantize(4, 9, codebook_update=update, kmeans_init=True)
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    random = torch.get_rng_state()
    vqtriton.warmup(vq, (2, 7, 4), (3, 4), dtype=torch.bfloat16)
    vqtriton.warmup(vq, (5, 4), has_mask=True)
    assert torch.equal(torch.get_rng_state(), random)
    after = vq.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert vq.training
    assert vq.codebook.grad is None
    with pytest.raises(TypeError, match="module is a Linear"):
        vqtriton.warmup(torch.nn.Linear(2, 2), (3, 4))
    with pytest.raises(ValueError, match="shapes is empty"):
        vqtriton.warmup(vq)


@pytest.mark.once
@pytest.mark.parametrize(
    "module",
    [
        vqtriton.VectorQuantize(4, 9, heads=2),
        vqtriton.ResidualVectorQuantize(4, 9, 3, quantize_dropout=True, kmeans_init=True),
        vqtriton.ResidualVectorQuantize(4, 9, 3, use_cosine_sim=True, accept_image_fmap=True),
        vqtriton.GroupedResidualVectorQuantize(4, 9, 3, groups=2, codebook_update="gradient"),
    ],
    ids=["heads", "residual", "images", "grouped"],
)
def test_warmup_of_residual_quantizers(monkeypatch, module) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen, forward = [], type(module).forward

    def spy(self, x, mask=None):
        results = forward(self, x, mask=mask)
        seen.append((self.training, mask is not None, results.indices))
        return results

    monkeypatch.setattr(type(module), "forward", spy)
    random = torch.get_rng_state()
    shape = (3, 4, 5, 2) if module.accept_image_fmap else (3, 7, 4)
    vqtriton.warmup(module, shape, has_mask=True)
    assert torch.equal(torch.get_rng_state(), random)
    steps = [(training, has_mask) for training, has_mask, _ in seen]
    assert steps == [(True, False), (False, False), (True, True), (False, True)]
    # all levels, whatever dropout would leave
    assert all((indices >= 0).all() for _, _, indices in seen)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
