"""What `make test` prints, and that it fails where a part fails, dies or tests nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import textwrap
import threading
from pathlib import Path

import parts
import pytest

PASSES = """
    import os, pytest

    @pytest.mark.parametrize("n", range(3))
    def test_passes(n):
        # each part has its own
        assert n < 3 and os.environ["TRITON_INTERPRET"] in "01"

    @pytest.mark.skip(reason="of a planted reason")
    def test_skipped():
        pass
"""
SKIPS = """
    import pytest

    @pytest.mark.skip(reason="of a planted reason")
    def test_skipped():
        pass
"""
FAILS = """
    import os

    def test_fails():
        assert os.environ["TRITON_INTERPRET"] == "0", "the planted failure"
"""
DIES = """
    import os

    def test_dies():
        os._exit(7)
"""
IS_SLOW = """
    import time

    def test_is_slow():
        time.sleep(4)
"""


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(parts.GROUPS, "all", {"package": [], "interpreted": []})
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra -p no:cacheprovider\n")

    def run(*modules: str, names=()) -> tuple[int, list[str]]:
        for place, text in enumerate(modules):
            (tmp_path / f"test_{place}.py").write_text(textwrap.dedent(text))
        status = parts.main([*names, "-c", str(tmp_path / "pytest.ini"), str(tmp_path)])
        return status, capfd.readouterr().out.splitlines()

    return run


def test_the_last_line_counts_all_parts(run) -> None:
    status, lines = run(PASSES)
    assert status == 0
    assert lines[-1] == "6 passed, 0 failed, 2 skipped"
    assert lines[0].startswith("package:       0 %")
    assert "package:     1 skipped, of a planted reason" in lines
    assert any(re.match(r"interpreted: 3 passed, 0 failed, 1 skipped in", line) for line in lines)


def test_a_failure_is_shown_in_full(run) -> None:
    status, lines = run(PASSES, FAILS)
    assert status == 1
    assert lines[-1] == "7 passed, 1 failed, 2 skipped"
    # at once, and all of it when the part has ended
    assert any(re.match(r"interpreted: FAILED .*::test_fails", line) for line in lines)
    assert any("AssertionError: the planted failure" in line for line in lines)


def test_an_interrupt_ends_all_parts(run, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    was = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status, lines = run(IS_SLOW)
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)
    assert status == 1
    assert lines[-1] == "0 passed, 2 failed, 0 skipped"
    assert [process.wait(10) for process in started] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(
    ("modules", "counts"),
    [
        ([DIES], "0 passed, 1 failed, 0 skipped"),
        ([PASSES, DIES], "3 passed, 1 failed, 1 skipped"),
        ([""], "0 passed, 1 failed, 0 skipped"),
        (["import nothing_of_that_name"], "0 passed, 1 failed, 0 skipped"),
        ([SKIPS], "0 passed, 1 failed, 1 skipped"),
    ],
)
def test_a_part_that_dies_or_tests_nothing_has_failed(run, modules: list[str], counts: str) -> None:
    status, lines = run(*modules, names=["package"])
    assert status == 1
    assert lines[-1] == counts
    assert any("pytest ended with status" in line for line in lines)


def test_a_slow_test_gives_signs_of_life(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SECONDS_BETWEEN_SIGNS", 0.5)
    status, lines = run(IS_SLOW, names=["package"])
    signs = [line for line in lines if "now test_0.py::test_is_slow" in line]
    assert status == 0
    # on a busy machine there are fewer
    assert len(signs) >= 3
    assert "0 of 1 passed, 0 failed" in signs[0]


def test_a_gpu_is_checked_with_every_file_that_has_kernels() -> None:
    of_gpu = parts.GROUPS["gpu"]
    assert {"gpu_exactness", "gpu_sanitizer", "nearest_code", "code_sums"} <= set(of_gpu)
    assert "train_mnist" not in of_gpu
    # every test of it is for the interpreter: its part would have none
    assert "stub_device" not in of_gpu
    # each has a limit, as a borrowed machine is there for minutes
    assert all("--session-timeout=180" in flags for flags in of_gpu.values())
    assert set(parts.CHECKS) == {name for name in parts.FILES if name.startswith("gpu_")}
