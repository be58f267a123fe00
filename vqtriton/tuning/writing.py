"""How rows get into a table: any number of processes may write to it, and be killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vqtriton.tiles.problems import Problem, problem_of
from vqtriton.tiles.tables import (
    MOST_BYTES,
    SCHEMA,
    SOURCES,
    Row,
    fault,
    forget,
    keeps_default,
    read_all,
)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a table, whoever else tunes into the folder; on Windows only by chance."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def merge(path: Path, device: str, rows: Iterable[Row]) -> None:
    """Adds rows to a table; each replaces an older one for the same problem.

    A static row replaces no measured one. Written beside it and put in its place: whoever is
    interrupted leaves the table as it was.

    Raises:
        ValueError, OSError: there is a file, and it is no table.
    """
    with locked(path):
        there = read_all(path) if path.exists() or path.is_symlink() else []
        # rows that this version does not understand stay where they are
        strange = [row for row in there if fault(row)]
        kept: dict[Problem, Row] = {}
        for row in [*(row for row in there if not fault(row)), *rows]:
            before = kept.get(problem_of(row))
            if before is None or SOURCES.index(row["source"]) >= SOURCES.index(before["source"]):
                kept[problem_of(row)] = row
        ordered = [kept[problem] for problem in sorted(kept)] + strange
        tiles = [row for row in ordered if not keeps_default(row)]
        text = json.dumps({"schema": SCHEMA, "device": device})[:-1] + _listed("rows", tiles)
        if defaults := [row for row in ordered if keeps_default(row)]:
            bare = [{name: row[name] for name in row if name != "config"} for row in defaults]
            text += _listed("default_is_best", bare)
        text += "}\n"
        if len(text) > MOST_BYTES:
            raise ValueError(f"{path} would have more than {MOST_BYTES >> 20} MiB")
        # a link stays one
        _replace(Path(os.path.realpath(path)), text)
    forget()


def _listed(name: str, rows: list[Any]) -> str:
    """A list of a JSON object, a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f', "{name}": [\n{lines}\n]'


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            # it may be in its place already
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
