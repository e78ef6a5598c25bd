"""Measured numbers are kept with where they come from."""

import json
from pathlib import Path

import pytest

from sla.results import (
    ResultsError,
    provenance,
    read_all,
    read_newest_per_device,
    read_results,
    write_results,
)


def test_rows_come_back_with_provenance(tmp_path: Path) -> None:
    rows = [{"method": "sla", "ms": 1.5}, {"method": "sdpa", "ms": 3.0}]
    path = write_results("speed", rows, seed=3, command=["make", "bench it"], root=tmp_path)
    assert path.parent == tmp_path / "speed"
    found = read_results(path)
    assert found.rows == rows
    assert found.provenance["seed"] == 3
    assert found.provenance["command"] == "make 'bench it'"
    assert found.provenance["torch"]


def test_newest_per_device(tmp_path: Path) -> None:
    folder = tmp_path / "speed"
    folder.mkdir()
    for name, device, date in (("a", "x", "2026-01-02"), ("b", "x", "2026-01-03"), ("c", "y", "1")):
        head = {"provenance": {"device": device, "date": date}}
        (folder / f"{name}.jsonl").write_text(json.dumps(head) + "\n")
    assert [r.path.stem for r in read_all("speed", tmp_path)] == ["b", "a", "c"]
    assert [r.path.stem for r in read_newest_per_device("speed", tmp_path)] == ["b", "c"]
    assert read_all("nothing", tmp_path) == []


def test_a_file_that_is_not_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(ResultsError, match=r"bad\.jsonl"):
        read_results(path)


def test_commit_can_be_told_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    assert provenance()["commit"] == "abc123"
