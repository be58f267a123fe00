"""What users install: the wheel and an editable install, each where there is no Triton."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from vqtriton import __version__

ROOT = Path(__file__).parents[1]
# what is of this checkout and not of the project
NOT_SOURCES = (".*", "venv", "runs", "build", "dist", "*.egg-info", "__pycache__")
# what an environment without Triton, with a vqtriton of its own, must not see of this one
NOT_LINKED = ("triton", "vqtriton", "__editable__", "pip", "__pycache__")

IMPORT = """
import json, sys
import torch
import vqtriton, vqtriton.kernels
print(json.dumps({
    "package": vqtriton.__file__,
    "kernels": list(vqtriton.kernels.__path__),
    "version": vqtriton.__version__,
    "has_triton": any(name.split(".")[0] == "triton" for name in sys.modules),
    "touched_gpu": torch.cuda.is_initialized(),
}))
"""

USE = """
import json
from importlib.metadata import version
import torch
import vqtriton

try:
    import triton
except ModuleNotFoundError:
    triton = None
vq = vqtriton.VectorQuantize(dim=4, codebook_size=8)
before = vq.codebook.clone()
x = torch.randn(32, 4, requires_grad=True)
quantized, indices, loss = vq(x)
(quantized.sum() + loss).backward()
error = None
try:
    vqtriton.VectorQuantize(dim=4, codebook_size=8, backend="triton")(x)
except ModuleNotFoundError as raised:
    error = str(raised)
print(json.dumps({
    "triton": triton is not None,
    "learned": not torch.equal(vq.codebook, before),
    "gradient": x.grad is not None and bool(x.grad.isfinite().all()),
    "indices": torch.equal(indices, torch.cdist(x.double(), before.double()).argmin(1)),
    "error": error,
    "version": version("vqtriton"),
}))
"""


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A command that sees neither this checkout nor this environment but through its arguments."""
    hidden = (
        "PYTHONPATH",
        "PYTHONHOME",
        "TRITON_INTERPRET",
        "VIRTUAL_ENV",
        "PIP_REQUIRE_VIRTUALENV",
    )
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | {"PYTHONNOUSERSITE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_json(python: Path | str, script: str, cwd: Path) -> dict:
    done = run(python, "-W", "error", "-c", script, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pip(*arguments: str | Path, cwd: Path) -> None:
    done = run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy, so that no build folder lands in the checkout."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sources, cwd=folder)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed_here(tmp_path_factory) -> Path:
    """Links to all that is installed here, but Triton, vqtriton and pip. Nothing is copied."""
    folder = tmp_path_factory.mktemp("links")
    for path in map(Path, sys.path):
        if path.name not in ("site-packages", "dist-packages") or not path.is_dir():
            continue
        for entry in path.iterdir():
            is_hidden = entry.name.lower().startswith(NOT_LINKED)
            if not is_hidden and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def make_environment(folder: Path, installed: Path) -> Path:
    """An environment with nothing of its own -> its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = folder.glob("[Ll]ib/**/site-packages")
    (site_packages / "installed_here.pth").write_text(f"{installed}\n")
    (python,) = [p for p in (folder / "bin/python", folder / "Scripts/python.exe") if p.exists()]
    return python


@pytest.fixture(scope="module")
def wheel_python(wheel, installed_here, tmp_path_factory) -> Path:
    """Python of an environment where the wheel, and no Triton, is installed.

    With the dependencies to be resolved: what is missing from them would have to be downloaded.
    """
    folder = tmp_path_factory.mktemp("from wheel")
    python = make_environment(folder / "venv", installed_here)
    pip("--python", python, "install", "--no-index", wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def editable_python(sources, installed_here, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("editable")
    python = make_environment(folder / "venv", installed_here)
    options = ["--no-build-isolation", "--no-deps", "-e"]
    pip("--python", python, "install", *options, sources, cwd=folder)
    return python


@pytest.fixture(params=["wheel", "editable"])
def python(request) -> Path:
    return request.getfixturevalue(f"{request.param}_python")


def test_wheel_holds_the_package_and_nothing_else(wheel, sources):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"vqtriton-{__version__}.dist-info"
    package = {f"vqtriton/{file.name}" for file in (sources / "vqtriton").glob("*.py")}
    kernels = {f"vqtriton/kernels/{file.name}" for file in (sources / "kernels").glob("*.py")}
    packages = sources / "vqtriton"
    tuning = {
        f"vqtriton/{folder}/{file.name}"
        for folder in ("clients", "residual", "tiles", "tuning")
        for file in (packages / folder).glob("*.py")
    }
    assert "vqtriton/kernels/nearest_code.py" in kernels
    assert {name for name in names if not name.startswith(f"{info}/")} == (
        package | kernels | tuning | {"vqtriton/py.typed"}
    )
    assert f"{info}/licenses/LICENSE" in names
    # wheel names say what it runs on: any Python 3, any machine
    assert wheel.name == f"vqtriton-{__version__}-py3-none-any.whl"


def test_sdist_gives_the_same_wheel(wheel, sources, tmp_path):
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = run(sys.executable, "-c", script, cwd=sources)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("vqtriton-*.tar.gz")
    folder = tmp_path / "wheel"
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist, cwd=tmp_path)
    (other,) = folder.iterdir()
    contents = [
        {name: archive.read(name) for name in archive.namelist()}
        for archive in map(zipfile.ZipFile, (wheel, other))
    ]
    assert contents[0] == contents[1]


def test_wheel_metadata(wheel):
    text = zipfile.ZipFile(wheel).read(f"vqtriton-{__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "vqtriton"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    # a Triton of our own beside the one that torch brings would break ROCm
    assert {line.split(">")[0] for line in required} == {"torch", "einops", "safetensors", "numpy"}
    assert "triton" in metadata.get_all("Provides-Extra")


def test_works_without_triton(python, tmp_path):
    assert run_json(python, USE, tmp_path) == {
        "triton": False,
        "learned": True,
        "gradient": True,
        "indices": True,
        "error": "backend='triton' needs Triton: pip install 'vqtriton[triton]'",
        "version": __version__,
    }


def check_import(python: Path | str, cwd: Path) -> tuple[Path, Path]:
    """Importing touches neither Triton nor a GPU -> file of vqtriton, folder of its kernels."""
    found = run_json(python, IMPORT, cwd)
    assert not found["has_triton"]
    assert not found["touched_gpu"]
    assert found["version"] == __version__
    (kernels,) = found["kernels"]
    return Path(found["package"]), Path(kernels)


def test_import_of_wheel(wheel_python, tmp_path):
    package, kernels = check_import(wheel_python, tmp_path)
    assert package.is_relative_to(wheel_python.parents[1])
    assert kernels == package.parent / "kernels"


def test_import_of_editable_install_is_the_checkout(editable_python, sources, tmp_path):
    package, kernels = check_import(editable_python, tmp_path)
    assert package == sources / "vqtriton" / "__init__.py"
    assert kernels == sources / "kernels"


def test_import_where_there_is_triton(tmp_path):
    """The environment of the tests usually has it."""
    check_import(sys.executable, tmp_path)


def test_env_command(wheel_python, tmp_path):
    done = run(wheel_python, "-m", "vqtriton", "env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # names have single spaces; two or more part them from the value
    lines = [re.split(" {2,}", line, maxsplit=1) for line in done.stdout.splitlines()]
    assert ["vqtriton", __version__] in lines
    assert ["triton", "not installed"] in lines
    assert ["backend on cpu", "torch (auto); no kernels"] in lines


PROBE = """
import importlib.util, json
spec = importlib.util.find_spec("kernels")
import kernels
print(json.dumps({"origin": spec.origin, "file": kernels.__file__}))
"""


@pytest.mark.parametrize("which", ["wheel", "editable", "bare"])
def test_whoever_probes_for_kernels_is_not_disturbed(which, sources, request, tmp_path):
    """Other libraries look for a package of that name, and in the checkout there is a folder.

    Without an __init__.py, they do not take it for a package, and an installed one is preferred.
    """
    python = request.getfixturevalue(f"{which}_python")
    assert run_json(python, PROBE, sources) == {"origin": None, "file": None}
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    script = f"import sys; sys.path.append({str(tmp_path)!r})" + PROBE
    file = str(tmp_path / "kernels" / "__init__.py")
    assert run_json(python, script, sources) == {"origin": file, "file": file}


@pytest.fixture(scope="module")
def bare_python(installed_here, tmp_path_factory) -> Path:
    """Without vqtriton."""
    return make_environment(tmp_path_factory.mktemp("bare") / "venv", installed_here)


@pytest.mark.parametrize("which", ["wheel", "editable", "bare"])
def test_in_a_checkout_its_own_files_are_used(which, sources, request):
    """Wherever else it is installed, and if it is not: with the kernels."""
    python = request.getfixturevalue(f"{which}_python")
    assert check_import(python, sources) == (
        sources / "vqtriton" / "__init__.py",
        sources / "kernels",
    )
    if which == "bare":
        done = run(python, "-m", "vqtriton", "env", cwd=sources)
        assert done.returncode == 0, done.stderr


def test_a_copy_of_both_folders_works(bare_python, sources, tmp_path):
    for name in ("vqtriton", "kernels"):
        shutil.copytree(sources / name, tmp_path / "copy" / name)
    package, kernels = check_import(bare_python, tmp_path / "copy")
    assert package == tmp_path / "copy" / "vqtriton" / "__init__.py"
    assert kernels == tmp_path / "copy" / "kernels"


@pytest.mark.parametrize("which", ["wheel", "editable"])
def test_a_folder_of_the_same_name_is_not_taken_for_it(which, sources, request, tmp_path):
    """A script beside a clone, whose folder has the package's name."""
    python = request.getfixturevalue(f"{which}_python")
    (tmp_path / "vqtriton").mkdir()
    package, _ = check_import(python, tmp_path)
    assert not package.is_relative_to(tmp_path)
