"""Measured numbers are kept with where they come from."""

import json
from pathlib import Path

import pytest

from sla.results import (
    ResultsError,
    ResultsFile,
    provenance,
    read_all,
    read_newest_per_device,
    read_newest_rows,
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


def test_a_file_grows_and_never_replaces_another(tmp_path: Path) -> None:
    first = ResultsFile("speed", root=tmp_path, seed=1, label="suite-a", command=["bench"])
    assert not first.path.exists()
    for ms in (1.0, 2.0):
        first.append({"ms": ms})
        assert read_results(first.path).rows[-1] == {"ms": ms}
    assert first.path.stem.endswith("-suite-a")
    assert read_results(first.path).provenance["command"] == "bench"
    second = ResultsFile("speed", root=tmp_path, label="suite-a")
    second.append({"ms": 3.0})
    assert second.path.stem == f"{first.path.stem}-2"
    assert len(read_results(first.path).rows) == 2


def test_files_of_one_name_that_are_begun_together_stay_two(tmp_path: Path) -> None:
    files = [ResultsFile("speed", root=tmp_path, command=["bench"]) for _ in range(2)]
    assert files[0].path == files[1].path
    for ms in (1.0, 2.0):
        for number, file in enumerate(files):
            file.append({"ms": ms, "file": number})
    assert files[0].path != files[1].path
    for number, file in enumerate(files):
        rows = [{"ms": 1.0, "file": number}, {"ms": 2.0, "file": number}]
        assert read_results(file.path).rows == rows


def test_a_row_that_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    """Its writer was killed, the disk was full, or it is being written."""
    file = ResultsFile("speed", root=tmp_path, command=["bench"])
    for ms in (1.0, 2.0):
        file.append({"ms": ms})
    text = file.path.read_text()
    for missing, found in ((1, [1.0, 2.0]), (2, [1.0]), (4, [1.0])):  # the first: its line break
        file.path.write_text(text[:-missing])
        assert read_results(file.path).rows == [{"ms": ms} for ms in found]
    (tmp_path / "speed" / "begun.jsonl").touch()
    assert [r.path for r in read_all("speed", tmp_path)] == [file.path]


def test_runs_of_one_commit_and_day_do_not_replace_each_other(tmp_path: Path) -> None:
    first, second = (write_results("speed", [{"ms": ms}], root=tmp_path) for ms in (1.0, 2.0))
    assert [read_results(path).rows for path in (first, second)] == [[{"ms": 1.0}], [{"ms": 2.0}]]


def test_newest_rows_come_from_all_files_of_a_device(tmp_path: Path) -> None:
    folder = tmp_path / "speed"
    folder.mkdir()
    for name, device, date, rows in (
        ("a", "x", "2026-01-02", [("p", 1), ("q", 2)]),
        ("b", "x", "2026-01-03", [("p", 3), ("p", 4)]),
        ("c", "y", "2026-01-01", [("p", 5)]),
    ):
        head = {"provenance": {"device": device, "date": date}}
        lines = [head, *({"method": method, "ms": ms} for method, ms in rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = read_newest_rows("speed", ["method", "absent"], tmp_path)
    assert list(found) == ["x", "y"]
    assert {(m.row["method"], m.row["ms"], m.source.path.stem) for m in found["x"]} == {
        ("p", 4, "b"),
        ("q", 2, "a"),
    }
