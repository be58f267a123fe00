"""The core tests on each row of versions that the package is shown on: `make test-versions`.

A row gets an environment of its own under .versions/, where the wheel or the sdist is installed. It
takes about ten minutes and, where torch is a CUDA build, 3 GB of downloads and 7 GB of disk. The
environment is removed after the tests, and the logs stay; `--keep` keeps both.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"


class Row(NamedTuple):
    name: str
    python: str
    torch: str
    triton: str  # "": not installed
    numpy: str  # "": the newest that fits
    source: str
    others: str = ""


# a row has the Triton that its torch was released with; docs/versions.md has the results
ROWS = (
    Row("floor", "3.11", "2.8.0", "3.4.0", "1.26.0", "wheel", "einops==0.8.0 safetensors==0.5.0"),
    # the interpreter of Triton before 3.7 needs numpy before 2.4
    Row("between", "3.12", "2.11.0", "3.6.0", "2.3.5", "sdist"),
    Row("newest", "3.13", "2.14.1", "3.8.0", "", "wheel"),
    Row("bare", "3.11", "2.13.0", "", "", "sdist"),
    Row("development", "3.11", "2.13.0", "3.7.1", "", "sdist"),
)
# no core tests: examples, benchmarks, the checkout itself, what compilers make of the kernels
NOT_CORE = (
    "train* mnist* tokens* semantic* bench* gpu_* fit layers readme api_page packaging parts "
    "versions compile sass quick_interpreter"
)
# of each kind: what else is left out, as it takes minutes and depends least on versions
KINDS = {
    "core": ("not slow", "screen_codes prepare_planes rescue_rows memory adversarial", {}),
    "kernels": (
        "kernel and not slow",
        "tuning codebook memory adversarial",
        {"TRITON_INTERPRET": "1"},
    ),
}
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "VIRTUAL_ENV")
CLEAN = {name: value for name, value in os.environ.items() if name not in HIDDEN}
# versions differ in what they can do at all, for which few examples are enough
CLEAN.setdefault("HYPOTHESIS_PROFILE", "few")


def output_of(*command: str | Path, cwd: Path = FOLDER) -> str:
    done = subprocess.run(command, cwd=cwd, env=CLEAN, capture_output=True, text=True)
    if done.returncode:
        # pip says much else, before its error and after it
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError(
            (errors or [f"{Path(command[0]).name}: exit code {done.returncode}"])[-1]
        )
    return done.stdout


def build() -> None:
    """Wheel and sdist of the checkout, and a copy of its tests with no vqtriton beside them."""
    for folder, names in {"sources": ("vqtriton", "kernels"), "tests": ("tests", "bench")}.items():
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
        for name in names:
            shutil.copytree(ROOT / name, FOLDER / folder / name)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, FOLDER / folder)
    output_of(sys.executable, "-c", BUILD, cwd=FOLDER / "sources")


def find_python(version: str) -> Path:
    """The interpreter that runs this, one on PATH or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [sys.executable, shutil.which(f"python{version}") or ""]
    for python in (*found, *pyenv.glob(f"versions/{version}.*/bin/python")):
        try:
            said = output_of(python, "-c", "import sys; print(*sys.version_info[:2], sep='.')")
        except (OSError, RuntimeError):
            continue
        if said.strip() == version:
            return Path(python)
    raise RuntimeError(f"there is no Python {version}")


def install(row: Row, venv: Path) -> None:
    output_of(find_python(row.python), "-m", "venv", "--clear", venv)
    (file,) = FOLDER.glob("sources/dist/*." + {"wheel": "whl", "sdist": "tar.gz"}[row.source])
    pins = [f"torch=={row.torch}", *row.others.split()]
    pins += [f"{name}=={getattr(row, name)}" for name in ("triton", "numpy") if getattr(row, name)]
    output_of(venv / "bin/pip", "install", f"{file}[test]", *pins)
    if not row.triton:
        # a CUDA build of torch brings one
        output_of(venv / "bin/pip", "uninstall", "--yes", "triton")


def versions(venv: Path) -> list[str]:
    try:
        said = output_of(venv / "bin/python", "-m", "vqtriton", "env")
    except RuntimeError as error:
        return [f"FAILED: {error}"]
    has = dict(re.split(" {2,}", line, maxsplit=1) for line in said.splitlines())
    return [has[name] for name in ("python", "torch", "triton", "numpy")]


def run_tests(row: Row, venv: Path) -> list[str]:
    """Both kinds of tests at once -> the counts of each."""
    running = []
    for kind in KINDS if row.triton else ["core"]:
        marks, omitted, extra = KINDS[kind]
        report = FOLDER / f"{row.name}-{kind}.xml"
        report.unlink(missing_ok=True)
        ignored = [f"--ignore-glob=*/test_{name}.py" for name in f"{NOT_CORE} {omitted}".split()]
        command = [venv / "bin/python", "-m", "pytest", "-m", marks, *ignored]
        # a busy machine is no fault of a version
        command += [f"--junit-xml={report}", "--timeout=1200"]
        with report.with_suffix(".txt").open("w") as log:
            process = subprocess.Popen(
                command, cwd=FOLDER / "tests", env=CLEAN | extra, stdout=log, stderr=log
            )
        running.append((report, process))
    results = [result_of(report, process.wait()) for report, process in running]
    return results if row.triton else [*results, "none without Triton"]


def result_of(report: Path, code: int) -> str:
    """The counts in pytest's report, behind FAILED unless all went well to the end."""
    try:
        suite = ElementTree.parse(report).find("testsuite").attrib
    except FileNotFoundError:
        return f"FAILED: {report.with_suffix('.txt')} says why"
    tests, skipped, *bad = (int(suite[name]) for name in ("tests", "skipped", "failures", "errors"))
    text = f"{tests - skipped - sum(bad)} passed, {sum(bad)} failed, {skipped} skipped"
    return text if code == 0 and not any(bad) else f"FAILED: {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--keep", action="store_true", help="the environments as well")
    args = parser.parse_args()
    if unknown := set(args.rows) - {row.name for row in ROWS}:
        parser.error(f"no such row: {', '.join(unknown)}")
    FOLDER.mkdir(exist_ok=True)
    build()
    rows = [row for row in ROWS if row.name in args.rows or not args.rows]
    print(f"{len(rows)} rows of about 10 minutes each; logs in {FOLDER}", flush=True)
    lines, passed = [], []
    for row in rows:
        venv = FOLDER / row.name
        print(f"{row.name}: installing", flush=True)
        try:
            install(row, venv)
        except RuntimeError as error:
            lines.append(f"| {row.name} | not run: {error} |")
        else:
            print(f"{row.name}: testing", flush=True)
            cells = [row.name, *versions(venv), row.source, *run_tests(row, venv)]
            passed.append(not any(cell.startswith("FAILED") for cell in cells))
            lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if not args.keep:
            shutil.rmtree(venv, ignore_errors=True)
    print("", "| row | Python | torch | Triton | numpy | from | core | kernels |", *lines, sep="\n")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
