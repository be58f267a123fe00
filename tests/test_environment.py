"""``python -m vqtriton env``: what a bug report has to say."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from vqtriton import __version__
from vqtriton.__main__ import main


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "vqtriton", *arguments],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def described(cwd: Path, **env: str) -> dict[str, str]:
    """The lines of the description, name to value."""
    done = run("env", cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    # names have single spaces; two or more part them from the value
    lines = [re.split(" {2,}", line, maxsplit=1) for line in done.stdout.splitlines()]
    assert all(len(line) == 2 for line in lines), done.stdout
    return dict(lines)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def test_names_versions_and_backends(tmp_path):
    lines = described(tmp_path, OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    assert lines["vqtriton"] == __version__
    assert lines["python"] == platform.python_version()
    for package in ("torch", "triton", "einops", "safetensors", "numpy"):
        assert lines[package] == installed(package), package
    assert lines["cuda / hip"] == f"{torch.version.cuda} / {torch.version.hip}"
    assert lines["cpu threads"] == "1"
    assert lines["triton interpreter"] == "off"
    assert lines["backend on cpu"] == "torch (auto); no kernels"
    assert lines["float32 matmul"] == "float32"
    assert "tables" in lines
    if torch.cuda.is_available():
        automatic = "torch" if lines["triton"] == "not installed" else "triton"
        assert lines["backend on cuda"].startswith(automatic)
    else:
        assert lines["backend on cuda"] == "no such device"
        assert lines["device"] == "cpu"


def test_says_whether_the_interpreter_is_on(tmp_path):
    lines = described(tmp_path, TRITON_INTERPRET="1")
    assert lines["triton interpreter"] == "on"
    # "auto" leaves it alone: it is for tests
    kernels = "no kernels" if lines["triton"] == "not installed" else "kernels can run"
    assert lines["backend on cpu"] == f"torch (auto); {kernels}"


@pytest.mark.parametrize("arguments", [["environment"], [], ["env", "--all"]], ids=str)
def test_bad_command_is_a_usage_error(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vqtriton", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "usage: python -m vqtriton" in said.err
    assert not said.out


def test_its_exit_status_is_that_of_the_command(tmp_path):
    done = run("environment", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
