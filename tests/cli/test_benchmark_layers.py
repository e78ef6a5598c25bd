"""The benchmark of what stands beside attention, on a tiny Wan."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sla.benchmark import layers
from sla.benchmark.__main__ import main


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
SIZES = layers.Sizes(tokens=24, text=7, dim=32, heads=2, ffn_dim=64)


@pytest.mark.parametrize("name", layers.PIECES)
def test_all_ways_of_a_piece_compute_the_same(name: str) -> None:
    piece = layers.PIECES[name](draw, SIZES)
    first, *others = (way() for way in piece.ways.values())
    for other in others:
        torch.testing.assert_close(list(_flat(other)), list(_flat(first)), rtol=1e-4, atol=1e-4)


def _flat(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def test_each_way_of_a_piece_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ["projections", "cross_attention"]
    options = ["--size", "tiny", "--device", "cpu", "--pieces", *pieces, "--repeats", "2"]
    assert main(["layers", *options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("layers/*-tiny.jsonl")
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert head["provenance"]["seed"] == layers.SEED
    assert [row["piece"] for row in rows] == ["projections"] * 3 + ["cross_attention"]
    for row in rows:
        assert row["error"] is None
        assert row["ms_median"] > 0
        assert row["tokens"] == 72
    assert rows[0]["flops"] == 6 * 72 * 32**2
    printed = capsys.readouterr().out
    assert "three products" in printed
    assert "torch's choice" in printed


def test_a_way_that_fails_is_a_row_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no room")

    def piece(draw: layers.Draw, sizes: layers.Sizes) -> layers.Piece:
        return layers.Piece({"broken": fail, "fine": lambda: None})

    monkeypatch.setitem(layers.PIECES, "norm_rotary", piece)
    options = ["--size", "tiny", "--device", "cpu", "--pieces", "norm_rotary"]
    assert main(["layers", *options, "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("layers/*.jsonl")
    _, broken, fine = (json.loads(line) for line in path.read_text().splitlines())
    assert broken["error"] == "RuntimeError: no room"
    assert fine["ms_median"] > 0
