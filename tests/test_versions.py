"""What pyproject.toml promises is what `make test-versions` runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROWS = {row.name: row for row in versions.ROWS}


def parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_floor_is_the_least_that_is_promised() -> None:
    floor = ROWS["floor"]
    pins = dict(pin.split("==") for pin in floor.others.split())
    pins |= {name: getattr(floor, name) for name in ("torch", "triton", "numpy")}
    extras = PROJECT["optional-dependencies"]
    promised = dict(line.split(">=") for line in PROJECT["dependencies"] + extras["triton"])
    assert promised.keys() == pins.keys()
    for name, least in promised.items():
        # 2.8 is what pip takes for 2.8.0
        assert re.fullmatch(rf"{re.escape(least)}(\.0)*", pins[name]), name
    assert PROJECT["requires-python"] == f">={floor.python}"


def test_a_python_is_named_if_and_only_if_it_is_tested() -> None:
    named = re.findall(r"Python :: (\d\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert sorted({row.python for row in versions.ROWS}, key=parts) == named


def test_development_is_what_is_installed_for_it() -> None:
    pins = dict(re.findall(r"^(\w+)==(.*)$", (ROOT / "constraints.txt").read_text(), re.M))
    row = ROWS["development"]
    assert pins == {"torch": row.torch, "triton": row.triton}


def test_newest_is_the_newest_row() -> None:
    for name in ("python", "torch", "triton"):
        newest = max((getattr(row, name) for row in versions.ROWS if getattr(row, name)), key=parts)
        assert getattr(ROWS["newest"], name) == newest


def test_sources_and_no_triton_are_among_the_rows() -> None:
    assert {row.source for row in versions.ROWS} == {"wheel", "sdist"}
    assert not ROWS["bare"].triton


def test_core_leaves_out_only_files_that_are_there() -> None:
    for name in versions.NOT_CORE.split() + [
        name for _, omitted, _ in versions.KINDS.values() for name in omitted.split()
    ]:
        assert list((ROOT / "tests").glob(f"test_{name}.py")), name


def test_what_is_not_to_be_had_is_said_and_not_a_success(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions, "build", lambda: None)
    monkeypatch.setattr(versions, "ROWS", (ROWS["floor"]._replace(python="9.9"),))
    monkeypatch.setattr("sys.argv", ["versions.py"])
    assert versions.main() == 1
    assert "| floor | not run: there is no Python 9.9 |" in capsys.readouterr().out


REPORT = '<testsuites><testsuite tests="9" failures="{}" errors="{}" skipped="2"/></testsuites>'


@pytest.mark.parametrize(
    ("report", "code", "want"),
    [
        (REPORT.format(0, 0), 0, "7 passed, 0 failed, 2 skipped"),
        (REPORT.format(1, 2), 1, "FAILED: 4 passed, 3 failed, 2 skipped"),
        # it ends badly after its last test
        (REPORT.format(0, 0), 139, "FAILED: 7 passed, 0 failed, 2 skipped"),
        (None, 139, "FAILED: "),
    ],
)
def test_only_a_run_that_ends_well_has_passed(report, code, want, tmp_path) -> None:
    if report:
        (tmp_path / "floor-core.xml").write_text(report)
    assert versions.result_of(tmp_path / "floor-core.xml", code).startswith(want)
