"""The benchmark of the attention methods."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sla.attention import AttentionContext, SLAConfig, SparseOnlyConfig
from sla.attention.sparse_only import SparseOnlyAttention
from sla.benchmark.__main__ import main
from sla.benchmark.attention import ARMS, Arm, derive, line

SMALL = ["attention", "--grid", "4", "6", "8", "--heads", "1", "--head-dim", "16"]
OPTIONS = [*SMALL, "--device", "cpu", "--repeats", "2"]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("attention/*.jsonl")
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert head["provenance"]["seed"] == 0
    return rows


def test_every_method_is_timed_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert [(row["method"], row["direction"]) for row in rows] == [
        (arm.label, direction) for arm in ARMS for direction in ("forward", "backward")
    ]
    for row in rows:
        assert row["error"] is None
        assert row["relative_error"] < 1e-4
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert (row["exact_fraction"] == 0) == (row["method"] == "linear_only")
        assert row["flops"] > 0
    assert "vmoba-3d" in capsys.readouterr().out


def test_a_chosen_method_brings_its_baseline(tmp_path: Path) -> None:
    options = [*OPTIONS, "--methods", "sparge-5%", "--directions", "forward"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert [row["method"] for row in rows_in(tmp_path)] == ["sparse_only-128x64", "sparge-5%"]


def test_what_a_method_takes_beyond_its_exact_work_is_told_apart() -> None:
    baseline = {
        "exact_fraction": 0.05,
        "stages": {"forward": 0.9, "row_table": 0.1, "pool": 7.0},
    }
    row = {"exact_fraction": 0.10, "stages": {"forward": 2.5, "aten::sort": 3.0}}
    found = derive(row, baseline)
    assert found == {
        "sparse_ms": 2.5,
        "extras_ms": 3.0,
        "predicted_ms": pytest.approx(2.0),
        "ratio": pytest.approx(1.25),
    }
    assert set(derive({"exact_fraction": 0.1, "stages": None}, baseline).values()) == {None}
    linear = derive({**row, "exact_fraction": 0.0}, baseline)
    assert (linear["sparse_ms"], linear["extras_ms"], linear["ratio"]) == (None, 5.5, None)


def test_a_wrong_result_is_an_error_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = SparseOnlyAttention.attend

    def wrong(
        self: SparseOnlyAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        output = plain(self, query, key, value, context)
        return output if self.config.backend == "eager" else torch.zeros_like(output)

    monkeypatch.setattr(SparseOnlyAttention, "attend", wrong)
    options = [*OPTIONS, "--methods", "sparse_only-64x64", "--out", str(tmp_path)]
    assert main(options) == 1
    for row in rows_in(tmp_path):
        assert "relative error 1.0e+00" in row["error"]
        assert row["ms_median"] is None
        assert row["error"] in line(row)
    assert "relative error" in capsys.readouterr().out


def test_blocks_of_an_arm() -> None:
    assert Arm("a", SLAConfig(block_q=128, block_kv=64)).blocks == (128, 64)
    assert Arm("b", SparseOnlyConfig()).blocks == (64, 64)
    by_label = {arm.label: arm.blocks for arm in ARMS}
    assert by_label["vsa-11%-3x5x4"] == (64, 64)
    assert len(by_label) == len(ARMS)
