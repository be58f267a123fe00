"""bench/: it refuses what is wrong before it times it, and weighs what it says it weighs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
training_step = importlib.import_module("bench.training_step")
command = importlib.import_module("bench.__main__")
cases = importlib.import_module("bench.cases")

TINY = cases.Case("tiny", 96, 40, 12)
NUM_TIMED = 3


class Planted:
    """A maker of our subject whose indices are then spoiled; counts the steps."""

    def __init__(self, spoil, *, is_exact: bool = True) -> None:
        self.spoil, self.is_exact, self.steps = spoil, is_exact, 0

    def __call__(self, inputs):
        subject = training_step.make_ours(inputs)

        def step():
            self.steps += 1
            return self.spoil(subject.step())

        return dataclasses.replace(subject, step=step, is_exact=self.is_exact)


def off_by_one(indices):
    indices = indices.clone()
    indices[17] = (indices[17] + 1) % TINY.codebook_size
    return indices


def measure(maker, **kwargs):
    makers = {training_step.OURS: maker}
    return training_step.measure(TINY, [training_step.OURS], NUM_TIMED, makers, **kwargs)


def run_bench(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def _no_memory(monkeypatch):
    """Saves the start of a process where its result is not looked at."""
    monkeypatch.setattr(training_step, "can_measure_memory", lambda: False)


@pytest.mark.usefixtures("_no_memory")
def test_right_subject_is_timed():
    maker = Planted(lambda indices: indices)
    (result,) = measure(maker)
    assert maker.steps == 1 + NUM_TIMED
    assert len(result.seconds) == NUM_TIMED
    assert min(result.seconds) > 0
    assert result.mismatches == 0
    assert result.peak_memory is None


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(off_by_one, id="one row off by one"),
        pytest.param(lambda i: i.flip(0), id="other order"),
        pytest.param(lambda i: i - TINY.codebook_size, id="negative"),
        pytest.param(lambda i: i + TINY.codebook_size, id="beyond K"),
        pytest.param(lambda i: i[:-1], id="a row short"),
    ],
)
@pytest.mark.usefixtures("_no_memory")
def test_wrong_subject_is_refused_before_it_is_timed(spoil, is_exact):
    maker = Planted(spoil, is_exact=is_exact)
    with pytest.raises(ValueError, match=r"^vqtriton: .*indices are not"):
        measure(maker)
    assert maker.steps == 1


def close_call():
    """A row between two codes, 1e-7 of its distance nearer to the second; and a tie."""
    codebook = torch.tensor([[1.0, 0], [-1.0, 0], [9.0, 9.0], [9.0, 9.0]])
    x = torch.tensor([[-1e-7, 0], [9.0, 9.0]])
    return training_step.Inputs(x, codebook, torch.zeros(2, 2))


@pytest.mark.parametrize("is_exact", [True, False])
def test_only_rounding_excuses_a_wrong_index(is_exact):
    inputs = close_call()
    subject = training_step.Subject("it", "1", is_exact, lambda: None, lambda: None)
    assert training_step.count_mismatches(subject, inputs, torch.tensor([1, 2])) == 0
    for wrong in ([0, 2], [1, 3]):
        if is_exact:
            with pytest.raises(ValueError, match=r"1 of 2 indices are not the nearest code"):
                training_step.count_mismatches(subject, inputs, torch.tensor(wrong))
        else:
            assert training_step.count_mismatches(subject, inputs, torch.tensor(wrong)) == 1


def test_subjects_take_turns_and_start_anew():
    inputs = training_step.make_inputs(TINY)
    log = []

    def subject(name):
        real = training_step.make_ours(inputs)

        def reset():
            log.append(f"reset {name}")
            real.reset()

        def step():
            log.append(f"step {name}")
            return real.step()

        return dataclasses.replace(real, name=name, reset=reset, step=step)

    training_step.time_steps([subject("a"), subject("b")], inputs, repeats=2)
    turns = [entry.split()[1] for entry in log if entry.startswith("step")]
    assert turns == ["a", "b", "a", "b", "b", "a"]
    assert log[::2] == [entry.replace("step", "reset") for entry in log[1::2]]


def trajectory(subject):
    """Indices of 100 steps from the start, [100, N]."""
    subject.reset()
    return torch.stack([subject.step() for _ in range(100)])


@pytest.mark.parametrize("name", training_step.available())
def test_step_learns_and_reset_forgets(name):
    inputs = training_step.make_inputs(TINY)
    subject = training_step.MAKERS[name](inputs)
    first = trajectory(subject)
    assert not torch.equal(first[0], first[-1])
    assert torch.equal(first, trajectory(subject))
    assert inputs.x.grad is None


@pytest.mark.skipif(training_step.PEER not in training_step.available(), reason="needs the peer")
def test_subjects_do_the_same_work():
    inputs = training_step.make_inputs(TINY)
    ours, peer = (trajectory(make(inputs)) for make in training_step.MAKERS.values())
    assert torch.equal(ours, peer)


@pytest.mark.skipif(not training_step.can_measure_memory(), reason="needs /proc/self/clear_refs")
def test_peak_memory_is_that_of_the_step(tmp_path):
    """A subject that takes and drops 64 MiB weighs about that much, tiny as its inputs are."""
    hog = tmp_path / "hog.py"
    hog.write_text(
        "import torch\n"
        "from bench import training_step\n"
        "from bench.cases import Case\n"
        "def make(inputs):\n"
        "    step = lambda: torch.ones(inputs.x.shape[0], 1 << 20).sum().item()\n"
        "    return training_step.Subject('hog', '1', True, lambda: None, step)\n"
        "training_step.MAKERS['hog'] = make\n"
        # a peak of 256 MiB before the step, and as much that stays: neither is the step's
        "torch.ones(1 << 26)\n"
        "held = torch.ones(1 << 26)\n"
        "print(training_step._weigh('hog', Case('c', 16, 8, 4)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(hog)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) == pytest.approx(64 << 20, rel=0.05)


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "CASES", {"tiny": TINY})
    monkeypatch.setattr(command, "available", lambda: [training_step.OURS])
    file = tmp_path / "rows.json"
    assert command.main(["--case", "tiny", "--repeats", "3", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(file.read_text())
    assert row["shape"] == {"N": 96, "K": 40, "D": 12}
    assert row["torch"] == torch.__version__
    assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
    assert f"{1e3 * row['p50_s']:.1f} ms" in printed
    assert row["mismatches"] == 0
    if training_step.can_measure_memory():
        assert 0 < row["peak_memory_bytes"] < 64 << 20
    for field in ("commit", "device", "threads", "dtype", "version", "case", "subject"):
        assert row[field]
    # without the peer it says so, and how to get it
    assert "vector-quantize-pytorch is not installed" in printed
    assert "pip install" in printed
    assert "ratio" not in printed


@pytest.mark.usefixtures("_no_memory")
def test_command_refuses(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "CASES", {"tiny": TINY})
    monkeypatch.setattr(command, "available", lambda: [training_step.OURS])
    monkeypatch.setitem(training_step.MAKERS, training_step.OURS, Planted(off_by_one))
    file = tmp_path / "rows.json"
    assert command.main(["--case", "tiny", "--json", str(file)]) == 1
    captured = capsys.readouterr()
    assert "1 of 96 indices are not the nearest code" in captured.err
    assert " ms" not in captured.out
    assert not file.exists()


def test_ratio_is_peer_over_ours():
    ours = training_step.Result(training_step.OURS, "1", 0, (1.0, 2.0, 3.0), 1 << 20)
    peer = training_step.Result(training_step.PEER, "1", 2, (4.0, 10.0, 18.0), 30 << 20)
    last = command.table(TINY, [ours, peer]).splitlines()[-1]
    assert "5.00 x less" in last
    assert "30.0 x less" in last
    # of the turns: 4, 5, 6
    assert "4.40 to 5.60 x" in last


def test_runs_from_the_root_with_or_without_the_peer():
    """The command that `make bench` runs, on the smallest of its cases."""
    done = run_bench("--case", "rq-vae", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    has_peer = training_step.PEER in training_step.available()
    assert ("ratio" in done.stdout) == has_peer
    assert ("is not installed" in done.stdout) == (not has_peer)
    assert "rq-vae: N=640 K=256 D=32" in done.stdout


def test_unknown_case_is_a_usage_error(capsys):
    for arguments in (["--case", "nonesuch"], ["--repeats", "0"]):
        with pytest.raises(SystemExit) as raised:
            command.main(arguments)
        assert raised.value.code == 2
    assert "rq-vae" in capsys.readouterr().err
