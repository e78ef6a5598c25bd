"""Rows under `results/study`, and which of them count. Needs no torch.

A measurement is a row {"study", "group", "arm", "digest", "seed", "method", "sparsity", "step",
"metric", "value", "n"}; one that has a value for each clip, prompt or layer keeps them all in
"values", so that arms can be compared pair by pair. An (arm, seed) ends with a row {..., "status":
"finished"} or {"status": "failed", "reason"}; measurements without a "finished" after them in their
file are of a run that was cut off, and do not count. Times of steps can also be measured apart, by
`study --times`: rows that end with {..., "status": "timed"}, and belong to the (arm, seed)'s run.
What turns out to be wrong is taken back by `study --withdraw`, with a row {..., "status":
"withdrawn", "reason"} for each (arm, seed): its rows stay, count no more, and it is missing again.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sla.results import RESULTS, Results, ResultsError, ResultsFile, read_all

BENCHMARK = "study"
FINISHED, FAILED, TIMED, WITHDRAWN = "finished", "failed", "timed", "withdrawn"
STEP_TIMES = ("train_step_ms", "train_kernel_ms", "denoise_step_ms")
# Metrics of the evaluator network: share of prompts that it finds shown, `accuracy/colour` of one
# attribute; Frechet distance of its features to those of real held-out clips.
ACCURACY, FRECHET = "accuracy", "evaluator_frechet"
REAL_CLIPS = "real_clips"  # "what" of rows of no arm: the evaluator's accuracy on them
# A file that is to be committed stays below a MiB; another one is begun before.
_MOST_BYTES = 900_000

Key = tuple[str, str, str, int]  # study, arm, digest, seed


def timestamp() -> str:
    """The time in UTC, as the last row of a run has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def pack(values: ArrayLike) -> dict[str, Any]:
    """An array as JSON: its shape, and base64 of its little-endian float32 numbers."""
    array = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def unpack(packed: Mapping[str, Any]) -> NDArray[np.float32]:
    """The array that `pack` was given, as float32.

    Raises:
        ResultsError: it is not one.
    """
    try:
        data = base64.b64decode(packed["float32"], validate=True)
        return np.frombuffer(data, dtype="<f4").reshape(packed["shape"])
    except (KeyError, ValueError, TypeError) as error:
        raise ResultsError(f"not an array: {error}") from error


def measurement(step: int, metric: str, values: ArrayLike, *, keep: bool = True) -> dict[str, Any]:
    """The fields of a row that say what was measured.

    Args:
        values: one number, or one for each of something.
        keep: store them all, not their mean alone.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    # JSON has no infinity: it is written as a word.
    value: float | str = mean if np.isfinite(mean) else str(mean)
    row: dict[str, Any] = {"step": step, "metric": metric, "value": value, "n": int(array.size)}
    if keep and array.ndim:
        row["values"] = pack(array)
    return row


@dataclass(frozen=True)
class Run:
    """All that is known of one finished (arm, seed).

    Attributes:
        study, arm, digest, seed: which.
        group: of the arm.
        end: its last row.
        rows: its measurements, by (step, metric).
        source: the file.
        timed: the file of its times, if they were measured apart.
    """

    study: str
    arm: str
    digest: str
    seed: int
    group: str
    end: dict[str, Any]
    rows: dict[tuple[int, str], dict[str, Any]]
    source: Results
    timed: Results | None = None

    @property
    def has_times(self) -> bool:
        """Whether the times of its steps were measured."""
        return any(metric in STEP_TIMES for _, metric in self.rows)

    @property
    def sources(self) -> list[Results]:
        """The files that its numbers are from."""
        return [self.source] if self.timed is None else [self.source, self.timed]

    @property
    def key(self) -> Key:
        """What names it."""
        return (self.study, self.arm, self.digest, self.seed)

    @property
    def origin(self) -> tuple[Any, Any]:
        """Digests of the weights it began from and of the evaluator that judged its videos."""
        return (self.end.get("weights_sha256"), self.end.get("evaluator_sha256"))

    @property
    def last(self) -> int:
        """The last step measured."""
        return max((step for step, _ in self.rows), default=0)

    @property
    def trained(self) -> bool:
        """Whether it was fine-tuned at all."""
        return self.last > 0

    def value(self, metric: str, step: int | None = None) -> float | None:
        """A measurement's number at a step, at the last one for None; None if there is none."""
        row = self.rows.get((self.last if step is None else step, metric))
        return None if row is None else float(row["value"])

    def values(self, metric: str, step: int | None = None) -> NDArray[np.float32] | None:
        """All its numbers, or None."""
        row = self.rows.get((self.last if step is None else step, metric))
        return None if row is None or "values" not in row else unpack(row["values"])


@dataclass
class Records:
    """What results/study holds.

    Attributes:
        runs: finished ones; of an (arm, seed, digest) the newest.
        failures: reasons of those that failed and were never finished.
        plain: measurements of no arm (the evaluator's of real clips), newest first.
        times: times of steps that were measured apart, and their file.
        withdrawn: runs that were taken back and not run again, and why.
    """

    runs: dict[Key, Run] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)
    plain: list[dict[str, Any]] = field(default_factory=list)
    times: dict[Key, tuple[dict[tuple[int, str], dict[str, Any]], Results]] = field(
        default_factory=dict
    )
    withdrawn: list[tuple[Run, str]] = field(default_factory=list)

    def of(self, study: str, arm: str) -> list[Run]:
        """The finished runs of an arm's newest numbers, by seed: those that may be averaged."""
        found = [run for run in self.comparable(study) if run.arm == arm]
        if not found:
            return []
        newest = max(found, key=_date)
        return sorted((r for r in found if r.digest == newest.digest), key=lambda r: r.seed)

    def studies(self) -> list[str]:
        """Names of the studies that have a finished run, in the order of the files."""
        return list(dict.fromkeys(run.study for run in self.runs.values()))

    def arms(self, study: str) -> list[str]:
        """Names of the arms that `of` has runs of, in the order of the files."""
        return list(dict.fromkeys(run.arm for run in self.comparable(study)))

    def comparable(self, study: str) -> list[Run]:
        """The runs that began from, and were judged by, the same weights as the newest one."""
        runs = [run for run in self.runs.values() if run.study == study]
        newest = max(runs, key=_date, default=None)
        return [run for run in runs if newest is not None and run.origin == newest.origin]

    def superseded(self, study: str) -> list[Run]:
        """The runs that are not `comparable`: of earlier weights."""
        kept = {run.key for run in self.comparable(study)}
        return [r for r in self.runs.values() if r.study == study and r.key not in kept]


def _date(run: Run) -> str:
    return str(run.end.get("date", ""))


def read_records(root: Path = RESULTS) -> Records:
    """Read results/study.

    Raises:
        ResultsError: a file there is not a results file.
    """
    found, withdrawals = Records(), list[dict[str, Any]]()
    for results in reversed(read_all(BENCHMARK, root)):  # later ones replace earlier ones
        _read(results, found, withdrawals)
    for row in withdrawals:
        _take_back(row, found)
    found.failures = {k: why for k, why in found.failures.items() if k not in found.runs}
    found.plain.reverse()
    for key, (rows, results) in found.times.items():
        run = found.runs.get(key)
        if run is not None and not run.has_times:
            found.runs[key] = replace(run, rows={**run.rows, **rows}, timed=results)
    return found


def withdrawal(run: Run, reason: str, date: str) -> dict[str, Any]:
    """The row that takes a run back."""
    common = {"study": run.study, "group": run.group, "arm": run.arm, "digest": run.digest}
    status = {"status": WITHDRAWN, "reason": reason, "date": date}
    return {**common, "seed": run.seed, **status}


def _take_back(row: dict[str, Any], found: Records) -> None:
    """Apply a withdrawal to what is older than it."""
    key, date = _key(row), str(row["date"])
    run, times = found.runs.get(key), found.times.get(key)
    if run is not None and _date(run) <= date:
        found.withdrawn.append((found.runs.pop(key), str(row.get("reason", ""))))
    if times is not None and str(times[1].provenance["date"]) <= date:
        del found.times[key]


def _key(row: Mapping[str, Any]) -> Key:
    return row["study"], row["arm"], row["digest"], row["seed"]


def _read(results: Results, found: Records, withdrawals: list[dict[str, Any]]) -> None:
    begun: dict[Key, dict[tuple[int, str], dict[str, Any]]] = {}
    for row in results.rows:
        if "digest" not in row:
            found.plain.append(row)
            continue
        key = _key(row)
        status = row.get("status")
        if status is None:
            begun.setdefault(key, {})[row["step"], row["metric"]] = row
        elif status == FINISHED:
            rows = begun.pop(key, {})
            found.runs.pop(key, None)
            found.runs[key] = Run(*key, str(row.get("group", "")), row, rows, results)
            found.failures.pop(key, None)
        elif status == TIMED:
            found.times[key] = begun.pop(key, {}), results
        elif status == WITHDRAWN:
            withdrawals.append(row)
        elif status == FAILED:
            begun.pop(key, None)
            found.failures[key] = str(row.get("reason", ""))


class StudyResults:
    """Writes rows of a session, to a new file and, as that grows, to further ones.

    Args:
        root: the results folder.
        label: part of the files' names.
        command: see `sla.results.provenance`.

    Attributes:
        paths: files written so far.
    """

    def __init__(
        self, root: Path = RESULTS, label: str = "", command: Sequence[str] | None = None
    ) -> None:
        self.root = root
        self.label = label
        self.command = command
        self.paths: list[Path] = []
        self._file: ResultsFile | None = None

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows that belong together, into one file.

        Raises:
            OSError: the file cannot be written.
        """
        rows = list(rows)
        if not rows:
            return
        size = sum(len(json.dumps(row)) + 1 for row in rows)
        file = self._file
        if file is None or file.path.stat().st_size + size > _MOST_BYTES:
            file = ResultsFile(BENCHMARK, root=self.root, label=self.label, command=self.command)
        for row in rows:
            file.append(row)
        if self._file is not file:
            self._file = file
            self.paths.append(file.path)
