"""The benchmark measures, checks and records."""

import json
from pathlib import Path

import pytest

from sla.benchmark import kernels
from sla.benchmark.__main__ import main

SMALL = ["kernels", "--tokens", "256", "--heads", "1", "--repeats", "3", "--device", "cpu"]


def test_rows_are_printed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--record"]) == 0
    (path,) = tmp_path.glob("results/kernels/*.jsonl")
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert head["provenance"]["seed"] == 0
    assert {(row["method"], row["direction"]) for row in rows} == {
        (method, direction)
        for method in ("sdpa", "sla")
        for direction in ("forward", "forward_backward")
    }
    for row in rows:
        assert row["tokens"] == 256
        assert row["critical"] == 0.05
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert "sla" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "sla", lambda inputs: inputs.query * 2)
    assert main(SMALL) == 1
    captured = capsys.readouterr()
    assert "wrong result" in captured.err
    assert "forward " not in captured.out.split("\n", 1)[1]
