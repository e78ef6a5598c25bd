"""Measured numbers with their provenance: `results/<benchmark>/<device>-<date>-<commit>.jsonl`.

The first line of a file is {"provenance": {...}}, each further line one measurement. The newest
file of a benchmark (and device) is the current one; where a benchmark has several parts, in files
`...-<commit>-<part>.jsonl`, the newest row of each measurement is. Tables and figures read nothing
else.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla.files import write_text

RESULTS = Path("results")
_PACKAGES = ("torch", "triton", "lightning", "diffusers")


class ResultsError(RuntimeError):
    """A results file that cannot be read or found."""


@dataclass(frozen=True)
class Results:
    """One results file.

    Attributes:
        path: the file.
        provenance: how, when and on what its rows were measured.
        rows: one measurement each.
    """

    path: Path
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]


def provenance(seed: int | None = None, command: Sequence[str] | None = None) -> dict[str, Any]:
    """What a measurement made by this process must be kept with.

    Args:
        seed: seed of the run, if it has one.
        command: the command line; this process's own if None.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(command if command is not None else _own_command()),
        "commit": _commit(),
        "dirty": _dirty(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def write_results(
    benchmark: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    seed: int | None = None,
    command: Sequence[str] | None = None,
    root: Path = RESULTS,
) -> Path:
    """Write the measurements of one run to a file of their own, which replaces none.

    Args:
        benchmark: folder under `root`.
        rows: one mapping of JSON values a measurement.
        seed, command: see `provenance`.

    Returns:
        The file.
    """
    head = provenance(seed, command)
    path = _new_path(root / benchmark, _stem(head))
    lines = [{"provenance": head}, *rows]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def _new_path(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.jsonl", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.jsonl"
    return path


class ResultsFile:
    """A results file that grows a row at a time, so that a run that is killed keeps its rows.

    Args:
        benchmark: folder under `root`.
        label: part of the benchmark; goes into the file's name.
        seed, command: see `provenance`.

    Attributes:
        path: the file; made by the first row. Never one that was there before: its name is final
            only then, as another process may begin a file at the same time.
    """

    def __init__(
        self,
        benchmark: str,
        *,
        root: Path = RESULTS,
        seed: int | None = None,
        label: str = "",
        command: Sequence[str] | None = None,
    ) -> None:
        self._head = provenance(seed, command)
        self._stem = _stem(self._head) + (f"-{label}" if label else "")
        self._begun = False
        self.path = _new_path(root / benchmark, self._stem)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one measurement."""
        if self._begun:
            _write(self.path, "a", [row])
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._begun:  # another process may have begun a file of this name since
            try:
                _write(self.path, "x", [{"provenance": self._head}, row])
                self._begun = True
            except FileExistsError:
                self.path = _new_path(self.path.parent, self._stem)


def _write(path: Path, mode: str, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Measurement:
    """One row and the file that it is from."""

    row: dict[str, Any]
    source: Results


def read_results(path: Path) -> Results:
    """Read a results file.

    A row at the end that is cut off is being written, or of a process that was killed, and is left
    out.

    Raises:
        ResultsError: it is not one.
    """
    try:
        *whole, last = path.read_text().split("\n")
        lines = [json.loads(line) for line in whole if line.strip()]
        with contextlib.suppress(json.JSONDecodeError):
            lines += [json.loads(last)]
        return Results(path, lines[0]["provenance"], lines[1:])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ResultsError(f"{path} is not a results file: {error}") from error


def read_all(benchmark: str, root: Path = RESULTS) -> list[Results]:
    """All files of a benchmark that have been begun, newest first."""
    paths = sorted((root / benchmark).glob("*.jsonl"))
    found = [read_results(path) for path in paths if path.stat().st_size]
    return sorted(found, key=lambda results: results.provenance["date"], reverse=True)


def read_newest_per_device(benchmark: str, root: Path = RESULTS) -> list[Results]:
    """The current file of each device that a benchmark was run on, newest first."""
    newest: dict[str, Results] = {}
    for results in read_all(benchmark, root):
        newest.setdefault(results.provenance["device"], results)
    return list(newest.values())


def read_newest_rows(
    benchmark: str, identity: Sequence[str], root: Path = RESULTS
) -> dict[str, list[Measurement]]:
    """Of each device, the newest row of every measurement over all its files.

    Args:
        identity: fields whose values tell one measurement from another.

    Returns:
        Device to rows; the device with the newest file first.
    """
    found: dict[str, dict[tuple[Any, ...], Measurement]] = {}
    for results in read_all(benchmark, root):
        rows = found.setdefault(results.provenance["device"], {})
        for row in reversed(results.rows):
            rows.setdefault(tuple(row.get(name) for name in identity), Measurement(row, results))
    return {device: list(rows.values()) for device, rows in found.items()}


def _stem(head: Mapping[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    return f"{device}-{head['date'][:10].replace('-', '')}-{head['commit'][:8]}"


def _own_command() -> list[str]:
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = getattr(module, "name", None)
    if name is None:
        return ["python", *sys.argv]
    return ["python", "-m", name.removesuffix(".__main__"), *sys.argv[1:]]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    # A copy of the tree, with no repository or an older one, can be told the commit, as CI
    # systems do.
    return os.environ.get("GIT_COMMIT") or _git("rev-parse", "HEAD") or "unknown"


def _dirty() -> bool | None:
    if os.environ.get("GIT_COMMIT", "") not in ("", _git("rev-parse", "HEAD")):
        return None  # what differs from another commit says nothing of this one
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} {os.cpu_count()} cores"


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip()
