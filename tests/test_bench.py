"""bench/: what is wrong has no time, and what is weighed and timed is what is said to be."""

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

from vqtriton import torch_backend

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
cases = importlib.import_module("bench.cases")
checks = importlib.import_module("bench.check")
command = importlib.import_module("bench.__main__")
devices = importlib.import_module("bench.devices")
machines = importlib.import_module("vqtriton.tuning.machines")
measuring = importlib.import_module("bench.measure")
report = importlib.import_module("bench.report")
subjects = importlib.import_module("bench.subjects")

TINY = cases.Case("tiny", 96, 40, 12)
ALL = float("inf")
OURS, PEER = subjects.OURS, subjects.PEER
HAS_PEER = subjects.SUBJECTS[PEER].is_installed()
weighs = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)


class Planted(subjects.Run):
    """A run whose outputs are spoiled; counts the steps."""

    steps = 0

    def __init__(self, spoil, scope="assign", name=OURS, case=TINY, **changes):
        subject = dataclasses.replace(subjects.SUBJECTS[name], **changes)
        super().__init__(subject, scope, subjects.make_inputs(case))
        self.spoil = spoil

    def step(self):
        self.steps += 1
        return self.spoil(super().step())

    def state(self):
        return self.spoil(super().state())


def check(run):
    return checks.check(run, checks.find_truth(run.inputs, ALL))


def in_indices(spoil):
    return lambda out: out | {"indices": spoil(out["indices"])} if "indices" in out else out


def off_by_one(row, size):
    def spoil(indices):
        indices = indices.clone()
        indices[row] = (indices[row] + 1) % size
        return indices

    return in_indices(spoil)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(off_by_one(17, TINY.codebook_size), id="one row off by one"),
        pytest.param(in_indices(lambda i: i.flip(0)), id="other order"),
        pytest.param(in_indices(lambda i: i - TINY.codebook_size), id="negative"),
        pytest.param(in_indices(lambda i: i + TINY.codebook_size), id="beyond K"),
        pytest.param(in_indices(lambda i: i[:-1]), id="a row short"),
    ],
)
def test_wrong_indices_are_refused(spoil, is_exact):
    with pytest.raises(checks.Refused, match=r"^vqtriton exact: .*indices are not"):
        check(Planted(spoil, is_exact=is_exact))


def test_one_wrong_index_of_a_million_is_seen():
    """All rows of the million-row case of the roofline's are looked at, by default."""
    real = cases.CASES["roofline-1M-1024-8"]
    assert real.num_rows >= 10**6
    assert real.products <= devices.Cpu.check_products
    million = cases.Case("million", real.num_rows, 16, 2)
    run = Planted(off_by_one(777_777, 16), case=million)
    truth = checks.find_truth(run.inputs, devices.Cpu.check_products)
    with pytest.raises(checks.Refused, match=rf" 1 of {real.num_rows} indices are not"):
        checks.check(run, truth)


def test_a_sample_says_so_and_comes_from_all_rows():
    inputs = subjects.make_inputs(TINY)
    truth = checks.find_truth(inputs, TINY.products / 4)
    assert truth.rows.tolist() == list(range(0, 96, 4))
    assert torch.equal(truth.nearest, checks.find_truth(inputs, ALL).nearest[::4])
    # a wrong index between the rows that are looked at is not seen, and the row says how many were
    run = Planted(off_by_one(17, TINY.codebook_size))
    assert checks.check(run, truth) == (0, 24, True)


@pytest.mark.parametrize("block", [1 << 22, 16])
def test_the_truth_is_the_reference(monkeypatch, block):
    """On a lattice, on data far from the origin, and where scores in float64 cannot tell."""
    monkeypatch.setattr(checks, "BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    lattice = torch.randint(-1, 2, (300, 3), generator=generator).float()
    codes = torch.randint(-1, 2, (40, 3), generator=generator).float()
    spread = torch.randn(300, 3, generator=generator)
    base = torch.randn(64, generator=generator).view(torch.int32)
    ulps = torch.randint(-1, 2, (340, 64), generator=generator, dtype=torch.int32)
    near = (base + ulps).view(torch.float32)
    for x, codebook in (
        (lattice, codes),
        (spread + 1e4, codes),
        (spread + 1e4, codes + 1e4),
        (near[:300], near[300:]),
    ):
        truth = checks.find_truth(subjects.Inputs(x, codebook, x), ALL)
        assert torch.equal(truth.nearest, checks.reference.nearest_code(x, codebook))


@pytest.mark.parametrize("is_exact", [True, False])
def test_only_rounding_excuses_a_wrong_index(is_exact):
    # a row between two codes, 1e-7 of its distance nearer to the second; and a tie
    codebook = torch.tensor([[1.0, 0], [-1.0, 0], [9.0, 9.0], [9.0, 9.0]])
    x = torch.tensor([[-1e-7, 0], [9.0, 9.0]])
    inputs = subjects.Inputs(x, codebook, x)
    subject = dataclasses.replace(subjects.SUBJECTS[OURS], is_exact=is_exact)
    truth = checks.find_truth(inputs, ALL)
    assert checks.count_mismatches(subject, inputs, truth, torch.tensor([1, 2])) == 0
    for wrong in ([0, 2], [1, 3]):
        if is_exact:
            with pytest.raises(checks.Refused, match=r"1 of 2 indices are not the nearest code"):
                checks.count_mismatches(subject, inputs, truth, torch.tensor(wrong))
        else:
            assert checks.count_mismatches(subject, inputs, truth, torch.tensor(wrong)) == 1


OUTPUTS = ("quantized", "loss", "grad_x", *subjects.STATE[:2])


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_outputs_are_refused(name):
    """A thousandth of the largest value in one element, the same each time."""

    def spoil(out):
        if name in out:
            out = out | {name: out[name].clone()}
            out[name].view(-1)[-1] += out[name].abs().max() / 1000
        return out

    with pytest.raises(checks.Refused, match=f"{name} is .* beside float64"):
        check(Planted(spoil, "training"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_step_that_does_not_repeat_is_refused(name):
    """The last bit of one element, as of a sum whose order is left to chance."""
    flips = iter(range(100))

    def spoil(out):
        if name in out:
            out = out | {name: out[name].clone()}
            bits = out[name].view(-1).view(torch.int32)
            bits[0] ^= next(flips) % 2
        return out

    with pytest.raises(checks.Refused, match=f"vqtriton exact: {name} of a step that is repeated"):
        check(Planted(spoil, "training"))
    # who does not promise it is not refused, but the row says so
    assert not check(Planted(spoil, "training", is_repeatable=False)).is_repeatable


def test_what_is_wrong_is_not_timed(monkeypatch):
    made = []

    def make(subject, scope, inputs):
        made.append(Planted(off_by_one(17, TINY.codebook_size), scope))
        return made[-1]

    monkeypatch.setattr(measuring, "Run", make)
    report = measure_tiny(monkeypatch, [OURS])
    assert not report.rows
    assert "tiny: N=96 K=40 D=12, assign: vqtriton exact: 1 of 96" in report.refused[0]
    # the two of the check
    assert made[0].steps == 2


class Weightless(devices.Cpu):
    """Saves the start of a process where its result is not looked at, and large matmuls."""

    def can_weigh(self):
        return False

    def rates(self):
        return machines.Rates(dot=1e12, memory=1e11)


def measure_tiny(monkeypatch, names, device=None, **options):
    monkeypatch.setitem(cases.CASES, "tiny", TINY)
    return measuring.measure(
        ["assign"],
        lambda scope: ["tiny"],
        lambda scope: names,
        device or Weightless(),
        measuring.Options(repeats=3, **options),
    )


def test_a_row_says_what_was_measured(monkeypatch):
    (row,) = measure_tiny(monkeypatch, [OURS], command="the command").rows
    assert row["shape"] == {"N": 96, "K": 40, "D": 12}
    assert len(row["seconds"]) == 3
    assert min(row["seconds"]) == pytest.approx(row["p20_s"], rel=1)
    assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
    assert (row["mismatches"], row["rows_checked"], row["is_repeatable"]) == (0, 96, True)
    assert row["peak_memory_bytes"] is None
    assert row["command"] == "the command"
    # x once, codebook once, int64 indices
    num_bytes = 4 * 12 * (96 + 40) + 8 * 96
    floor = max(num_bytes / 1e11, 2 * 96 * 40 * 12 / 1e12)
    assert row["floor_fraction"] == pytest.approx(floor / row["p50_s"])
    assert row["gb_per_s"] == pytest.approx(num_bytes / row["p50_s"] / 1e9)
    assert row["tflop_per_s"] == pytest.approx(2 * 96 * 40 * 12 / row["p50_s"] / 1e12)
    for field in ("commit", "device", "threads", "dtype", "version", "torch", "python"):
        assert row[field]
    assert json.loads(json.dumps(row)) == row


def test_floors_are_those_of_the_best_rates(monkeypatch):
    shown = iter([machines.Rates(1.0, 9.0), machines.Rates(2.0, 5.0)])
    device = Weightless()
    device.rates = lambda: next(shown)
    (row,) = measure_tiny(monkeypatch, [OURS], device).rows
    assert (row["matmul_flop_per_s"], row["copy_bytes_per_s"]) == (2.0, 9.0)
    assert row["floor_dot_s"] == 96 * 40 * 12


def test_what_is_left_out_is_said(monkeypatch):
    report = measure_tiny(monkeypatch, ["vqtriton.reference", "flash-kmeans"], memory_limit=1000)
    assert not report.rows
    assert "vqtriton.reference, tiny, assign: it would take about" in report.left_out[0]
    assert "flash-kmeans, tiny, assign: " in report.left_out[1]
    assert measure_tiny(monkeypatch, [OURS], budget=-1).left_out == ["tiny, assign: the time is up"]


def test_turns_are_taken_and_turn_around():
    log = []
    steps = [lambda name=name: log.append(name) or float(len(log)) for name in "abc"]
    assert measuring.interleave(steps, 3) == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert "".join(log) == "abccbaabc"


def test_a_step_meets_an_empty_cache():
    """Before it, more bytes are written than the cache holds; and that is not timed."""
    device = devices.Cpu()
    device.cache_bytes = 1 << 20
    held = []
    device.time = lambda step: held.append(device._other.clone()) or step()
    device.seconds(lambda: device._other.fill_(1))
    device.seconds(lambda: None)
    assert held[1].numel() == 2 << 20
    assert not held[1].any()


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        (name, scope)
        for name, subject in subjects.SUBJECTS.items()
        for scope in cases.SCOPES
        if subject.can_run(scope, "cpu", torch.float32)
        # it compiles for seconds, and is the same search
        and (name != "torch.compile of it" or scope == "assign")
    ],
)
def test_every_subject_passes_its_check(name, scope):
    subject = subjects.SUBJECTS[name]
    if not subject.is_installed():
        pytest.skip(f"{name} is not installed")
    run = subjects.Run(subject, scope, subjects.make_inputs(TINY))
    assert check(run).rows_checked == 96
    assert run.inputs.x.grad is None
    # all that the check looks at is there
    state = subjects.STATE if name == PEER else subjects.STATE[:2]
    expected = {
        "assign": {"indices"},
        "inference": {"indices", "quantized"},
        "forward": {"indices", "quantized", "loss", *state},
        "training": {"indices", "quantized", "loss", "grad_x", *state},
    }
    assert run.from_start().keys() == expected[scope]


@pytest.mark.parametrize("name", [OURS, "torch addmm+argmin", PEER])
def test_steps_learn_and_reset_forgets(name):
    if not subjects.SUBJECTS[name].is_installed():
        pytest.skip(f"{name} is not installed")
    run = subjects.Run(subjects.SUBJECTS[name], "training", subjects.make_inputs(TINY))

    def trajectory():
        run.reset()
        return torch.stack([run.step()["indices"] for _ in range(100)])

    first = trajectory()
    assert not torch.equal(first[0], first[-1])
    assert torch.equal(first, trajectory())
    if name == PEER:
        # it begins with other averages: see `Run.reset`
        return
    # whoever it is, the work is the same
    ours = subjects.Run(subjects.SUBJECTS[OURS], "training", run.inputs)
    ours.reset()
    assert torch.equal(first, torch.stack([ours.step()["indices"] for _ in range(100)]))


def test_half_precision_is_held_to_the_same_values():
    inputs = subjects.make_inputs(TINY, torch.float16)
    for scope in ("assign", "training"):
        check(subjects.Run(subjects.SUBJECTS[OURS], scope, inputs))


def test_cases_are_those_of_the_design():
    shapes = {(c.num_rows, c.codebook_size, c.dim) for c in cases.CASES.values()}
    assert {(16384, 8192, 64), (4096, 65536, 16)} <= shapes
    assert {(s.num_rows, s.codebook_size, s.dim) for s in machines.SHAPES} <= shapes
    assert {name for names in cases.DEFAULT.values() for name in names} <= cases.CASES.keys()
    llamagen = subjects.make_inputs(dataclasses.replace(cases.CASES["llamagen"], num_rows=9))
    for vectors in (llamagen.x, llamagen.codebook):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)))


SPOILED = """
import dataclasses, sys
import torch
from bench import subjects, worker

# makes the matrix and drops it
def matrix(x, codebook):
    torch.ones(len(x), len(codebook))
    return subjects.vqtriton.nearest_code(x, codebook)

ours = subjects.SUBJECTS[subjects.OURS]
subjects.SUBJECTS[subjects.OURS] = dataclasses.replace(ours, search=lambda: matrix)
# a peak of 256 MiB before the step, and as much that stays: neither is the step's
torch.ones(1 << 26)
held = torch.ones(1 << 26)
worker.serve(worker.json.loads(sys.argv[1]))
"""


@weighs
def test_a_matrix_is_refused(tmp_path):
    """Weighed in its process, a step that takes and drops 256 MiB weighs that, and is refused."""
    case = cases.Case("c", 4096, 16384, 4)
    spec = {
        "subject": OURS,
        "case": vars(case),
        "scope": "assign",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
    }
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(spec)],
        input="peak_memory\n",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    peak = int(done.stdout)
    assert peak == pytest.approx(case.matrix_bytes, rel=0.1)
    ours = subjects.SUBJECTS[OURS]
    with pytest.raises(checks.Refused, match=r"N×K matrix of float32 is 256 MiB"):
        checks.check_memory(ours, case, peak)
    # and as it is, it is far below
    run = subjects.Run(ours, "assign", subjects.make_inputs(case))
    honest = measuring.weigh(run, case, devices.Cpu(), measuring.Options())
    assert honest < checks.memory_limit(case) < case.matrix_bytes / 3


def test_more_memory_than_promised_is_not_timed(monkeypatch):
    class Heavy(Weightless):
        shares_memory = True

        def can_weigh(self):
            return True

        def peak_memory(self, step):
            return checks.memory_limit(TINY) + 1

    report = measure_tiny(monkeypatch, [OURS, "torch addmm+argmin"], Heavy())
    assert [row["subject"] for row in report.rows] == ["torch addmm+argmin"]
    assert "more than the 32 MiB of O(N + K·D)" in report.refused[0]


def test_the_limit_tells_a_matrix_from_none():
    """Wherever the matrix is large, and is more than some copies of the inputs."""
    for case in cases.CASES.values():
        is_many = min(case.num_rows, case.codebook_size) > 16 * case.dim
        if case.matrix_bytes >= 128 << 20 and is_many:
            assert checks.memory_limit(case) < 0.75 * case.matrix_bytes


class Event:
    """CUDA's, on a clock that the test moves."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def cuda_memory(monkeypatch):
    """As much of torch.cuda as the bench uses, of which none can be wrong in a step's time."""
    memory = {"now": 100, "peak": 100}

    class Properties:
        name, L2_cache_size = "fake", 1 << 20

    def reset():
        memory["peak"] = memory["now"]

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    return memory


def test_cuda_is_timed_by_events_and_weighed_by_its_allocator(cuda_memory):
    device = devices.Cuda()
    device.device = torch.device("cpu")

    def step():
        # milliseconds, and bytes
        Event.now += 4
        cuda_memory["peak"] = max(cuda_memory["peak"], cuda_memory["now"] + 50)

    assert device.seconds(step) == pytest.approx(4e-3)
    assert device.peak_memory(step) == 50
    assert device.cache_bytes == 1 << 20


def test_a_subject_that_raises_costs_no_other_its_row(monkeypatch):
    make = measuring.Run

    def broken(subject, scope, inputs):
        if subject.name == "torch.cdist+argmin":
            raise RuntimeError("no compiler\nand a long story")
        return make(subject, scope, inputs)

    monkeypatch.setattr(measuring, "Run", broken)
    found = measure_tiny(monkeypatch, ["torch.cdist+argmin", "vqtriton exact"])
    assert [row["subject"] for row in found.rows] == ["vqtriton exact"]
    (refusal,) = found.refused
    assert refusal.endswith("RuntimeError: no compiler")
    assert refusal.startswith("torch.cdist+argmin")


def test_a_last_bit_of_the_sums_is_not_hidden_by_their_average(monkeypatch):
    turn = 0
    honest = torch_backend._sums

    def restless(*args):
        nonlocal turn
        turn += 1
        sums, counts = honest(*args)
        if turn % 2:
            sums = sums.float().nextafter(torch.tensor(torch.inf))
        return sums, counts

    monkeypatch.setattr(torch_backend, "_sums", restless)
    inputs = subjects.make_inputs(TINY)
    run = subjects.Run(subjects.SUBJECTS[OURS], "training", inputs)
    with pytest.raises(checks.Refused, match=r"codebook of a step that is repeated"):
        checks.check(run, checks.find_truth(inputs, ALL))


# --- the command ---


@pytest.fixture
def tiny_command(monkeypatch, tmp_path):
    """The command, on a case that takes no time; its file."""
    monkeypatch.setitem(cases.CASES, "tiny", TINY)
    monkeypatch.setattr(devices.Cpu, "rates", lambda self: machines.Rates(1e9, 1e9))
    monkeypatch.setattr(devices.Cpu, "can_weigh", lambda self: False)
    monkeypatch.setattr(command, "DEFAULT", {"assign": ("tiny", "rq-vae")})
    file = tmp_path / "rows.jsonl"
    return file, ["--scope", "assign", "--subject", OURS, "--repeats", "2", "--json", str(file)]


def test_an_interrupt_loses_no_row(tiny_command, monkeypatch, capsys):
    file, arguments = tiny_command
    honest = measuring.measure_case

    def interrupted(case, *args):
        if case.name == "rq-vae":
            raise KeyboardInterrupt
        return honest(case, *args)

    monkeypatch.setattr(measuring, "measure_case", interrupted)
    assert command.main(arguments) == 130
    assert [row["case"] for row in report.read_rows(file)] == ["tiny"]
    assert f"interrupted after 1 rows; they are in {file}" in capsys.readouterr().err


def test_nothing_measured_is_a_failure_and_leaves_the_file(tiny_command, capsys):
    file, arguments = tiny_command
    file.write_text("of yesterday")
    assert command.main([*arguments, "--budget", "1e-9"]) == 1
    assert file.read_text() == "of yesterday"
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "-1"], "--memory: -1 is not above 0"),
        (["--budget", "nan"], "--budget: nan is not above 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--compare", "HEAD", ".", "--json", "rows.jsonl"], "--compare makes none"),
        (["--compare", __file__, "nowhere"], "is a file and nowhere is none"),
        (["--compare", "nowhere", __file__], "is a file and nowhere is none"),
        (["--compare", __file__, __file__], "has a line that is not JSON"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu_is_an_error_of_the_argument(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--device", "cuda"])
    assert "--device is cuda; torch sees no GPU" in capsys.readouterr().err
