"""bench/gpu_check/: no part stops the others, and what is wrong is found."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vqtriton import blocked

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
checking = importlib.import_module("bench.gpu_check.check")
command = importlib.import_module("bench.gpu_check.__main__")
exactness = importlib.import_module("bench.gpu_check.exactness")
parts = importlib.import_module("bench.gpu_check.parts")
repeats = importlib.import_module("bench.gpu_check.repeats")
runner = importlib.import_module("bench.gpu_check.runner")
checks = importlib.import_module("bench.check")
machines = importlib.import_module("vqtriton.tuning.machines")

CPU = torch.device("cpu")

# processes that end in every way, without torch, so that they start at once
NOTE = """
import json, sys
def note(**row):
    with open(sys.argv[1] + "/rows.jsonl", "a") as file:
        file.write(json.dumps({"part": sys.argv[2], **row}) + "\\n")
"""
ENDINGS = {
    "right": "note(outcome='run', text='all is well')",
    "wrong": "note(outcome='failed', text='3 rows are wrong'); sys.exit(1)",
    "crash": "print('so far', flush=True); import os; os.abort()",
    "silent": "print('no outcome')",
    "liar": "note(outcome='run', text='all is well'); sys.exit(3)",
    "slow": """
import subprocess, time
print('began', flush=True)
child = subprocess.Popen(['sleep', '600'])
print(child.pid, flush=True)
time.sleep(600)
""",
    "absent": "note(outcome='skipped', text='no such program')",
    "last": "note(outcome='run', text='the last')",
}


def run_endings(
    out: Path, seconds: float = 60, names=tuple(ENDINGS), limit: float = 20, least: float = 3.0
):
    def make(part, out, is_dry, seconds):
        return [sys.executable, "-c", NOTE + ENDINGS[part.name], str(out), part.name]

    limits = {"slow": 0.8}
    listed = [parts.Part(name, "", limits.get(name, limit), least=least) for name in names]
    return runner.run_all(listed, out, False, seconds, make)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, run_endings(out)


def test_every_part_runs_whatever_becomes_of_the_others(ended) -> None:
    _, outcomes = ended
    assert [outcome.part for outcome in outcomes] == list(ENDINGS)
    assert {outcome.part: outcome.status for outcome in outcomes} == {
        "right": "run",
        "wrong": "failed",
        "crash": "failed",
        "silent": "failed",
        # a part is not run because it says so, if its process then fails
        "liar": "failed",
        "slow": "failed",
        "absent": "skipped",
        "last": "run",
    }
    texts = {outcome.part: outcome.text for outcome in outcomes}
    assert texts["wrong"] == "3 rows are wrong"
    assert texts["crash"] == "ended with status -6; the last that it printed: so far"
    assert texts["absent"] == "no such program"


def test_a_part_is_killed_with_what_it_started(ended) -> None:
    out, outcomes = ended
    (slow,) = (outcome for outcome in outcomes if outcome.part == "slow")
    assert slow.text.startswith("killed after 1 s")
    assert slow.seconds < 5
    log = (out / "log.txt").read_text()
    # what it had printed is kept
    child = int(log.split("began\n")[1].split()[0])
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_summary_has_failures_first_and_files_are_few(ended) -> None:
    out, _ = ended
    heading, *lines = (out / "summary.txt").read_text().splitlines()
    assert heading.startswith("8 parts: 5 failed, 1 skipped, 2 run;")
    assert [line.split()[1] for line in lines] == [
        *("wrong", "crash", "silent", "liar", "slow"),
        *("absent", "right", "last"),
    ]
    assert [line.split()[0] for line in lines] == ["FAILED"] * 5 + ["skipped"] + ["run"] * 2
    assert {path.name for path in out.iterdir()} == {"summary.txt", "log.txt", "rows.jsonl"}


def test_no_part_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    outcomes = run_endings(tmp_path, seconds=1, names=("right", "last"))
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    assert outcomes[0].text == "not begun: no time was left for it"
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_part_that_can_wait_is_skipped_where_no_time_is_left(tmp_path: Path) -> None:
    (part,) = (part for part in parts.PARTS.values() if part.can_wait)
    # the results of all others are worth more
    assert part.name == list(parts.PARTS)[-1]
    (outcome,) = runner.run_all([part], tmp_path, False, part.least - 1, pytest.fail)
    assert outcome.status == "skipped"
    assert outcome.text == "not begun: no time was left for it"


def test_the_time_of_all_is_a_limit_of_each(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(ENDINGS, "long", ENDINGS["slow"])
    start = time.monotonic()
    outcomes = run_endings(tmp_path, seconds=1.5, names=("long", "right"), limit=600, least=0.1)
    assert time.monotonic() - start < 6
    assert outcomes[0].text.startswith("killed after")
    assert outcomes[1].text == "not begun: no time was left for it"


def test_a_long_output_is_cut_in_the_middle(tmp_path: Path, monkeypatch) -> None:
    words = "print('first'); print('x' * 10**6); print('end'); note(outcome='run', text='')"
    monkeypatch.setitem(ENDINGS, "long", words)
    run_endings(tmp_path, names=("long",))
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 3 * runner.KEPT
    assert "first\n" in log
    assert log.rstrip().endswith("end")


@pytest.mark.parametrize(("status", "code"), [("run", 0), ("skipped", 0), ("failed", 1)])
def test_the_exit_status_says_whether_one_failed(monkeypatch, tmp_path, capsys, status, code):
    def run_all(chosen, out, is_dry, seconds):
        assert is_dry
        assert [part.name for part in chosen] == ["large"]
        return [runner.Outcome("large", status, "why", 1.0)]

    monkeypatch.setattr(command.runner, "run_all", run_all)
    assert command.main(["large", "--dry", "--out", str(tmp_path)]) == code
    last = capsys.readouterr().out
    assert "DRY" in last
    assert "why" in last


def test_without_a_gpu_it_says_so_at_once(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.runner, "run_all", lambda *_: pytest.fail("it began"))
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_are_modules_and_fit_into_ten_minutes() -> None:
    for name, part in parts.PARTS.items():
        assert name == part.name
        assert (ROOT / "bench" / "gpu_check" / f"{name}.py").exists()
        assert part.limit < command.SECONDS < 540


def make_check(tmp_path: Path, seconds: float = 100.0):
    return checking.Check("part", tmp_path, True, seconds)


def test_a_failing_step_does_not_end_its_part(tmp_path, monkeypatch) -> None:
    def run(check):
        with check.step("the first"):
            raise ValueError("no luck")
        check.expect(1 + 1 == 3, "sums are off")
        check.note(found=7)
        return "the end"

    monkeypatch.setattr(exactness, "run", run)
    assert checking.run_here(parts.PARTS["exactness"], tmp_path, True, 9.0) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["found"] == 7
    assert rows[1]["outcome"] == "failed"
    assert rows[1]["text"] == "the first: ValueError: no luck; sums are off | the end"


def test_a_skipped_part_with_a_failure_has_failed(tmp_path, monkeypatch) -> None:
    def run(check):
        check.expect(False, "it was wrong")
        raise checking.Skipped("no GPU")

    monkeypatch.setattr(exactness, "run", run)
    assert checking.run_here(parts.PARTS["exactness"], tmp_path, True, 9.0) == 1


# --- what the parts find ---


def honest(x, codebook):
    return blocked.search(x, codebook, "exact")


def test_exactness_passes_what_is_right_and_covers_every_case(tmp_path) -> None:
    check = make_check(tmp_path)
    text = exactness.run(check, honest)
    assert check.failures == []
    assert text.startswith("0 wrong of 768 rows, 32 of 32 cases")


@pytest.mark.parametrize("case", ["gaussian", "near_ties", "not_finite", "collapsed"])
def test_one_index_off_by_one_is_found(tmp_path, case) -> None:
    spoiled = []

    def search(x, codebook):
        indices, in_doubt = honest(x, codebook)
        if not spoiled:
            indices[17] = (indices[17] + 1) % len(codebook)
        spoiled.append(True)
        return indices, in_doubt

    trial = exactness.Trial(case, 24, 20, 5, "float32", 3)
    row = exactness.check_trial(trial, CPU, search)
    assert row["mismatches"] == 1
    assert row["first"][0][0] == 17
    assert exactness.check_trial(trial, CPU, search)["mismatches"] == 0
    # and in the run of the part it is a failure
    spoiled.clear()
    check = make_check(tmp_path)
    assert exactness.run(check, search).startswith("1 wrong of 768")
    assert len(check.failures) == 1


def test_too_few_rows_are_a_failure(tmp_path) -> None:
    check = make_check(tmp_path, seconds=0.0)
    exactness.run(check, honest)
    assert check.failures == ["the time was up after 0 rows of 768"]


def test_trials_meet_every_case_dim_and_dtype() -> None:
    found = []
    for trial in exactness.trials(["a", "b", "c", "d"], False):
        found.append(trial)
        if len(found) == 400:
            break
    assert {trial.dim for trial in found} == set(exactness.DIMS)
    assert len({(trial.case, trial.dtype) for trial in found[:12]}) == 12
    for trial in found:
        assert trial.codes <= exactness.MOST_CODES
        assert trial.rows * trial.dim <= exactness.MOST_ELEMENTS
        assert trial.rows * trial.codes * trial.dim <= exactness.MOST_PRODUCTS
    # as many as are asked for, in a few rounds of all cases
    assert sum(trial.rows for trial in found) > 2 * exactness.ROWS


@pytest.mark.parametrize("dtype", exactness.DTYPES)
def test_the_truth_is_the_oracle_on_all_hard_data(dtype) -> None:
    """What is not finite included, which the searches of the bench never hold."""
    import data
    import oracle

    for place, case in enumerate(data.HARD):
        for codes in (1, 19):
            torch.manual_seed(place)
            x, codebook = (t.to(dtype) for t in data.HARD[case](40, codes, 6))
            want = oracle.nearest_code(x, codebook)
            assert torch.equal(checks.nearest_codes(x, codebook), want), case


def test_a_result_that_does_not_repeat_is_found() -> None:
    turns = iter(range(100))

    def step(odd: int):
        value = torch.ones(9)
        # the last bit of one element, in one repeat of five
        value.view(torch.int32)[4] ^= next(turns) == odd
        return {"steady": torch.tensor([torch.nan]), "loss": value}

    assert repeats.differences(lambda: step(3), 5, CPU) == ["loss"]
    assert repeats.differences(lambda: step(-1), 5, CPU) == []


def test_predictions_are_those_of_the_docs(monkeypatch) -> None:
    """The table of docs/design.md, made with Triton 3.7.1; and what counts as a miss."""
    predictions = importlib.import_module("bench.gpu_check.predictions")
    monkeypatch.setattr(predictions.provenance, "version", lambda name: "3.7.1")
    table = (ROOT / "docs" / "design.md").read_text()
    for shape in machines.SHAPES:
        row = predictions.predict(shape)
        name = f"| {shape.num_rows}, {shape.codebook_size}, {shape.dim} |"
        (line,) = (line for line in table.splitlines() if line.startswith(name))
        cells = [cell.strip(" *") for cell in line.split("|")]
        assert float(cells[7]) == pytest.approx(row["floor"], rel=0.06)
    assert predictions.misses(1.0, 1.29) == ""
    assert predictions.misses(1.0, 1.35) == "1.35× the prediction"
    assert predictions.misses(1.0, 0.6) == "0.60× the prediction"


def test_a_dry_walk_of_a_part(tmp_path) -> None:
    """The command itself, on the part whose programs are counted without a GPU."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "recompiles", "--dry", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 parts" not in done.stdout
    assert "run     recompiles" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["programs"]["screen_codes_kernel"] == 1
    assert len(rows) == 7


def test_a_row_that_was_cut_off_costs_its_own_part_alone(tmp_path: Path, monkeypatch) -> None:
    cut = "open(sys.argv[1] + '/rows.jsonl', 'a').write('{\"part\": \"cu')"
    monkeypatch.setitem(ENDINGS, "cut", cut)
    outcomes = run_endings(tmp_path, names=("right", "cut", "last"))
    assert [outcome.status for outcome in outcomes] == ["run", "failed", "run"]


def test_an_interrupt_is_in_the_summary(tmp_path: Path, monkeypatch) -> None:
    run_part = runner.run_part

    def interrupted(part, *args):
        if part.name == "wrong":
            raise KeyboardInterrupt
        return run_part(part, *args)

    monkeypatch.setattr(runner, "run_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_endings(tmp_path, names=("right", "wrong", "last"))
    text = (tmp_path / "summary.txt").read_text()
    assert "2 failed, 0 skipped, 1 run" in text
    assert text.count("interrupted") >= 2


def test_a_last_bit_of_the_sums_that_does_not_repeat_is_found(tmp_path: Path, monkeypatch) -> None:
    turn = 0

    def restless(x, indices, codebook_size, backend):
        nonlocal turn
        turn += 1
        sums, counts = blocked.code_sums(x, indices, codebook_size)
        if turn % 2:
            fullest = counts.argmax()
            sums[fullest, 0] = sums[fullest, 0].nextafter(torch.tensor(torch.inf))
        return sums, counts

    monkeypatch.setattr(repeats.ops, "code_sums", restless)
    steps = repeats.make_steps(make_check(tmp_path))
    of_sums = [step for name, step in steps.items() if name.startswith("sums")]
    assert of_sums
    assert all(repeats.differences(step, 2, CPU) == ["sums"] for step in of_sums)


def test_errors_that_persist_do_not_use_up_the_time(tmp_path: Path) -> None:
    calls = []

    def search(x, codebook):
        calls.append(1)
        raise RuntimeError("no such kernel")

    check = make_check(tmp_path)
    exactness.run(check, search)
    assert len(calls) == exactness.MOST_ERRORS
    assert check.failures[-1].startswith("given up after 5 errors")


def test_without_triton_it_says_so_at_once(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command.runner, "run_all", lambda *_: pytest.fail("it began"))
    assert command.main(["--dry", "--out", str(tmp_path / "out")]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "soon"])
def test_no_seconds_are_an_error_of_the_argument(seconds, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--dry", f"--seconds={seconds}"])
    assert "--seconds" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_named(tmp_path, capsys) -> None:
    pytest.importorskip("triton")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--dry", "--out", str(tmp_path / "out")])
    assert "which is no folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_tool_that_hangs_is_ended_and_its_output_kept() -> None:
    sanitizer = importlib.import_module("bench.gpu_check.sanitizer")
    words = "import os, time; print(os.environ['SAID'], flush=True); time.sleep(60)"
    start = time.monotonic()
    status, printed = sanitizer.run_within(2, [sys.executable, "-c", words], SAID="so far")
    assert status is None
    assert printed == "so far\n"
    assert time.monotonic() - start < 20
    assert sanitizer.run_within(60, [sys.executable, "-c", "exit(3)"]) == (3, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_part_that_runs_and_keeps_its_output(tmp_path: Path, number) -> None:
    """The command in a process of its own, with a part that sleeps."""
    words = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench.gpu_check import __main__ as command, runner
slow = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
make = lambda part, out, is_dry, seconds: [sys.executable, "-c", slow]
run_all = runner.run_all
runner.run_all = lambda *args: run_all(*args, make)
command.main(["large", "--dry", "--out", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", words], stderr=subprocess.DEVNULL)
    child = wait_for(lambda: children(process.pid))[0]
    # its first line
    wait_for(lambda: is_running(child) and b"pid" in stdout_of(child))
    process.send_signal(number)
    assert process.wait(30) != 0
    wait_for(lambda: not is_running(child))
    assert f"pid {child}" in (tmp_path / "log.txt").read_text()
    assert "interrupted" in (tmp_path / "summary.txt").read_text()


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def stdout_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/fd/1").read_bytes()
    except OSError:
        return b""


def wait_for(find, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
