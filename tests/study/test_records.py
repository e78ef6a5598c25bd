"""Rows of results/study: what counts, and what is written."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sla.results import ResultsError
from sla.study import parts
from sla.study import records as records_module
from sla.study.plan import StudyError
from sla.study.records import StudyResults, measurement, pack, read_records, unpack, withdrawal


def rows_of(arm: str = "sla", digest: str = "a", seed: int = 0, loss: float = 1.0) -> list[Any]:
    common = {"study": "video", "group": "main", "arm": arm, "digest": digest, "seed": seed}
    return [
        {**common, **measurement(0, "val_loss", [loss, loss + 2])},
        {**common, "status": "finished", "date": f"2026-01-0{1 + (digest > 'a')}"},
    ]


def test_arrays_survive() -> None:
    array = np.asarray([[1.5, -2.0, math.inf], [0.1, 1e-30, 7.0]], dtype=np.float32)
    packed = json.loads(json.dumps(pack(array)))
    assert np.array_equal(unpack(packed), array)
    with pytest.raises(ResultsError, match="not an array"):
        unpack({"shape": [5], "float32": packed["float32"]})


def test_a_measurement_has_mean_and_values() -> None:
    row = measurement(3, "val_loss", [1.0, 2.0])
    assert (row["value"], row["n"]) == (1.5, 2)
    assert "values" not in measurement(3, "speed", 2.0)
    assert json.loads(json.dumps(measurement(0, "psnr", [math.inf])))["value"] == "inf"


def test_only_finished_runs_count(tmp_path: Path) -> None:
    results = StudyResults(tmp_path)
    results.append(rows_of())
    results.append(rows_of(seed=1)[:-1])  # killed
    failed = {"study": "video", "arm": "bad", "digest": "c", "seed": 0, "status": "failed"}
    results.append([{**failed, "reason": "no memory"}])
    found = read_records(tmp_path)
    assert list(found.runs) == [("video", "sla", "a", 0)]
    assert list(found.failures.values()) == ["no memory"]
    (run,) = found.of("video", "sla")
    assert run.value("val_loss") == 2
    assert run.value("val_loss", 5) is None
    values = run.values("val_loss")
    assert values is not None
    assert values.tolist() == [1, 3]


def test_runs_of_other_numbers_are_not_averaged(tmp_path: Path) -> None:
    results = StudyResults(tmp_path)
    results.append(rows_of(digest="a", seed=0))
    results.append(rows_of(digest="b", seed=1))
    found = read_records(tmp_path)
    assert len(found.runs) == 2
    assert [run.digest for run in found.of("video", "sla")] == ["b"]


def test_a_run_that_failed_and_then_finished_has_finished(tmp_path: Path) -> None:
    common = {"study": "video", "arm": "sla", "digest": "a", "seed": 0}
    results = StudyResults(tmp_path)
    results.append([{**common, "status": "failed", "reason": "no memory"}])
    results.append(rows_of())
    found = read_records(tmp_path)
    assert found.runs
    assert not found.failures


def test_a_run_that_was_withdrawn_is_missing_until_it_is_run_again(tmp_path: Path) -> None:
    results = StudyResults(tmp_path)
    for seed in (0, 1):
        results.append(rows_of(seed=seed))
    first = read_records(tmp_path).runs["video", "sla", "a", 0]
    results.append([withdrawal(first, "Wrong gradients.", "2026-01-01")])
    found = read_records(tmp_path)
    assert [run.seed for run in found.of("video", "sla")] == [1]
    assert not found.failures
    assert [(run.key, reason) for run, reason in found.withdrawn] == [
        (first.key, "Wrong gradients.")
    ]
    again = rows_of(loss=4.0)
    results.append([{**again[-1], "status": "failed", "reason": "no memory"}])
    assert list(read_records(tmp_path).failures) == [first.key]
    results.append([*again[:-1], {**again[-1], "date": "2026-01-02"}])
    found = read_records(tmp_path)
    assert [run.value("val_loss") for run in found.of("video", "sla")] == [5, 2]
    assert not found.withdrawn
    assert not found.failures


def test_files_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "_MOST_BYTES", 2500)
    results = StudyResults(tmp_path, "video")
    for seed in range(8):
        results.append(rows_of(seed=seed))
    assert len(results.paths) > 1
    assert all(path.stat().st_size < 2500 for path in results.paths)
    assert len(read_records(tmp_path).of("video", "sla")) == 8


def test_a_file_travels_in_parts(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    whole.write_bytes(bytes(range(256)) * 5)
    written = parts.split(whole, tmp_path / "parts", 500)
    assert [path.name for path in written] == [
        *(f"model.safetensors.{k:02d}" for k in range(3)),
        "model.safetensors.parts.json",
    ]
    joined = tmp_path / "parts" / "model.safetensors"
    assert parts.join(joined).read_bytes() == whole.read_bytes()
    assert parts.join(tmp_path / "again" / whole.name, tmp_path / "parts").read_bytes()
    joined.unlink()
    written[1].write_bytes(b"x" * 500)
    with pytest.raises(StudyError, match="do not make the file"):
        parts.join(joined)
    written[1].unlink()
    with pytest.raises(StudyError, match=r"\.01 is missing"):
        parts.join(joined)
    assert not joined.exists()
    with pytest.raises(StudyError, match="no file"):
        parts.join(tmp_path / "nothing")
    with pytest.raises(StudyError, match="no file"):
        parts.split(tmp_path / "nothing", tmp_path)
