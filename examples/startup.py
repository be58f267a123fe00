"""What each script does first, before torch is imported: ``import startup`` is its first import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(sys.argv[0]).name

# OpenMP's threads spin while they wait. Without an end to it they starve other processes, and one
# another; threads that sleep at once are slow to wake.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuBLAS reads this when it starts; without it deterministic algorithms are refused
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NEEDED = ("torch", "vqtriton", "matplotlib", "PIL", "tqdm")
if missing := [name for name in NEEDED if find_spec(name) is None]:
    raise SystemExit(
        f"{SCRIPT}: {', '.join(missing)} cannot be imported. In the folder of the clone: "
        "pip install '.[examples]' (or make venv, and then .venv/bin/python)"
    )


def run(main: Callable[[], None]) -> None:
    """Calls main. Ctrl-C and errors of the operating system end the program with one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print(f"{SCRIPT}: stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        raise SystemExit(f"{SCRIPT}: {error}") from error


is_script = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
# a process that reads images may import the script again; Ctrl-C is for its parent to answer
if is_script and multiprocessing.parent_process() is None:
    # imports take seconds, in which Ctrl-C would print a traceback; `run` ends this
    signal.signal(signal.SIGINT, signal.SIG_DFL)
