"""The figures of attention, from a tiny capture and its record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sla.analysis.capture_files import Capture, Captured, CapturePlan, start_folder, write_captured
from sla.analysis.measure import MeasureConfig, evenly, measure
from sla.analysis.weights import attention_weights, stable_rank
from sla.attention import FullConfig, SLAConfig
from sla.cli.main import main
from sla.figures import attention_trends, figure1, figure3, figure4, method_errors, recall
from sla.figures.analysis import newest
from sla.figures.figure6a import FigureError
from sla.figures.paper import PAPER_DROP_ERRORS, PAPER_STABLE_RANKS, PAPER_WEIGHTS_ABOVE
from sla.results import ResultsFile

GRID, TOKENS, BLOCK = (4, 8, 8), 256, 64


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_capture(folder: Path, rows: int = TOKENS) -> Capture:
    plan = CapturePlan(
        samples=({"kind": "clip"},),
        timesteps=(900.0, 100.0),
        layers=(0, 1),
        heads=(0, 2),
        grid=GRID,
        num_heads=3,
        head_dim=8,
        query_blocks=None,
        block=BLOCK,
        orders=(None,),
        dtype="float32",
        values=True,
        attention=asdict(FullConfig()),
        probe=asdict(SLAConfig()),
        probe_is_model=False,
        weights="some/weights.safetensors",
        weights_sha256="f" * 64,
        seed=0,
        config={"model": {"name": "dit"}, "run": {"name": "r"}},
    )
    made_by = {"command": "sla capture --it", "device": "d", "torch": "t", "commit": "c" * 40}
    generator = torch.Generator().manual_seed(0)
    for moment in start_folder(folder, plan, made_by):
        query, key, value = (2 * torch.randn(2, TOKENS, 8, generator=generator) for _ in range(3))
        errors = torch.tensor([0.25, 0.5])
        captured = Captured(
            *(moment, plan.heads, GRID, torch.arange(rows), query[:, :rows].contiguous()),
            *(key, value, None, errors, errors.clone(), 0.5),
        )
        write_captured(folder, captured, plan, made_by)
    return Capture(folder)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return write_capture(tmp_path_factory.mktemp("figures") / "capture")


@pytest.fixture(scope="module")
def rows(capture: Capture) -> list[dict[str, Any]]:
    return measure(capture, MeasureConfig(rows=TOKENS, tiles=(None, (4, 4, 4))))


def keep(root: Path, rows: list[dict[str, Any]]) -> Path:
    file = ResultsFile("analysis", root=root, seed=0, command=["sla", "analyse"])
    for row in rows:
        file.append(row)
    return file.path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("results")
    keep(folder, rows)
    return folder


OF_RESULTS = {
    "figure1": figure1.draw,
    "method_errors": method_errors.draw,
    "recall": recall.draw,
    "attention_trends": attention_trends.draw,
}


@pytest.mark.parametrize("name", OF_RESULTS)
def test_figures_of_the_record(name: str, root: Path, tmp_path: Path) -> None:
    files = OF_RESULTS[name](tmp_path, root)
    assert [file.name for file in files] == [f"{name}.png", f"{name}.pdf", f"{name}.txt"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert files[1].read_bytes().startswith(b"%PDF")
    caption = files[2].read_text()
    (record,) = (root / "analysis").iterdir()
    assert f"analysis/{record.name}" in caption
    assert "`sla analyse`" in caption
    assert "`sla capture --it`" in caption
    assert "some/weights.safetensors" in caption
    assert "256 tokens (4 x 8 x 8)" in caption


def test_figures_of_the_capture(capture: Capture, tmp_path: Path) -> None:
    for name, draw in (("figure3", figure3.draw), ("figure4", figure4.draw)):
        files = draw(tmp_path, capture.folder)
        assert [file.name for file in files] == [f"{name}.png", f"{name}.pdf", f"{name}.txt"]
        assert files[0].read_bytes().startswith(b"\x89PNG")
        caption = files[2].read_text()
        assert "`sla capture --it`" in caption
        moment, head = figure3.choose_map(capture)
        assert f"ayer {moment.layer}, head {head}, " in caption
        assert f"timestep {moment.timestep:g} (the map of the first sample whose share" in caption


def test_the_papers_marks_are_labelled(root: Path, tmp_path: Path) -> None:
    caption = (figure1.draw(tmp_path, root)[2]).read_text()
    assert "Hollow diamonds: published in the paper" in caption
    assert PAPER_DROP_ERRORS == {0.45: 0.03, 0.919: 0.33}
    assert PAPER_STABLE_RANKS == (6226, 6230, 9)


def test_the_map_is_chosen_by_its_rule(capture: Capture) -> None:
    shares = {}
    for moment in capture.moments:
        captured = capture.read(moment)
        for index, head in enumerate(captured.heads):
            rows = captured.query[index, evenly(captured.rows, 32)]
            share = (attention_weights(rows, captured.key[index]) > 1 / TOKENS).float().mean()
            shares[moment, head] = abs(share.item() - PAPER_WEIGHTS_ABOVE)
    assert len(set(shares.values())) > 1
    assert figure3.choose_map(capture) == min(shares, key=shares.__getitem__)


def test_the_parts_of_a_map(capture: Capture) -> None:
    moment, head = figure3.choose_map(capture)
    assert head in capture.plan.heads
    captured = capture.read(moment, heads=[head])
    weights = attention_weights(captured.query[0], captured.key[0])
    whole, top, rest = figure3.parts(captured).values()
    torch.testing.assert_close(whole[0], weights)
    torch.testing.assert_close(top[0] + rest[0], weights)
    assert ((top[0] > 0).sum(-1) == round(0.08 * TOKENS)).all()
    assert whole[1] == pytest.approx(stable_rank(weights))
    assert figure3.pooled(torch.ones(600, 300), 100).shape == (100, 100)
    assert figure3.pooled(torch.eye(4), 2).tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_the_block_map_is_the_routings(capture: Capture) -> None:
    moment, head = figure3.choose_map(capture)
    captured = capture.read(moment, heads=[head])
    config = SLAConfig(critical=0.25, negligible=0.25)
    picture = figure4.block_picture(captured, config)
    pooled = [t[0].unflatten(0, (4, BLOCK)).mean(1) for t in (captured.query, captured.key)]
    expected = torch.softmax(pooled[0] @ pooled[1].T / 8**0.5, -1)
    torch.testing.assert_close(picture.pooled, expected)
    assert picture.blocks.tolist() == [0, 1, 2, 3]
    for row, labels in zip(expected, picture.labels, strict=True):
        assert labels[row.argmax()] == 1
        assert labels[row.argmin()] == -1
        assert (labels == 0).sum() == 2


def test_lines_of_the_methods(root: Path) -> None:
    found = method_errors.lines(newest(root))
    assert "full" not in {label.split(",")[0] for label in found}
    assert len(found["vsa, defaults"]) == 1
    points = [1 - point["exact_fraction"] for point in found["sparse_only"]]
    assert points == sorted(points)
    assert len(points) == 3


def test_dropped_weights_are_of_the_methods_timesteps(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    kept = [row for row in rows if row["measure"] != "method" or row["timestep"] != 900.0]
    keep(tmp_path, kept)
    sparsity, errors = method_errors.dropped(newest(tmp_path))
    curves = [
        row["renormalised"]
        for row in rows
        if row["measure"] == "drop_error" and row["timestep"] == 100.0
    ]
    assert len(curves) == 4
    expected = [sum(curve[i] for curve in curves) / 4 for i in range(len(sparsity))]
    assert errors == pytest.approx(expected)


def test_the_newest_record_is_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    old = keep(tmp_path, rows)
    newer = old.with_name("newer.jsonl")
    changed = [{**row, "weights": "newer"} for row in rows]
    lines = [old.read_text().splitlines()[0].replace('"date": "2', '"date": "3')]
    newer.write_text("\n".join([*lines, *(json.dumps(row) for row in changed)]) + "\n")
    (old.parent / "later-of-something-else.jsonl").write_text(lines[0] + "\n")
    stage = {"measure": "capture", "stage": "before training"}
    later = lines[0].replace('"date": "3', '"date": "4')
    (old.parent / "later-of-a-stage.jsonl").write_text(f"{later}\n{json.dumps(stage)}\n")
    assert newest(tmp_path).path == newer


def test_what_is_missing_is_said(
    root: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for draw in OF_RESULTS.values():
        with pytest.raises(FigureError, match="make capture, then make analyse"):
            draw(tmp_path / "out", tmp_path / "nothing")
    for of_capture in (figure3.draw, figure4.draw):
        with pytest.raises(FigureError, match=r"make capture .*--capture"):
            of_capture(tmp_path / "out", tmp_path / "nothing")
    part = write_capture(tmp_path / "part", rows=BLOCK - 1)
    with pytest.raises(FigureError, match=r"no whole block of 64 queries"):
        figure4.draw(tmp_path / "out", part.folder)
    (part.folder / part.moments[0].file).unlink()
    with pytest.raises(FigureError, match="lacks 1 of 4 files"):
        figure3.draw(tmp_path / "out", part.folder)
    keep(tmp_path / "few", [row for row in rows if row["measure"] == "capture"])
    with pytest.raises(FigureError, match="has no methods"):
        method_errors.draw(tmp_path / "out", tmp_path / "few")
    with pytest.raises(FigureError, match="has no row"):
        figure1.draw(tmp_path / "out", tmp_path / "few")
    assert not (tmp_path / "out").exists()

    arguments = ("--out", "--results", "--capture", "--videos")
    values = (tmp_path / "out", root, tmp_path / "nothing", tmp_path / "nothing")
    pairs = zip(arguments, values, strict=True)
    assert main(["figures", *(str(x) for pair in pairs for x in pair)]) == 0
    printed = capsys.readouterr()
    assert "figure1.png" in printed.out
    assert "figure3" not in printed.out
    # 3, 4, the two of kernels, the videos of `make eval`, the three of the study.
    assert printed.err.count("not drawn") == 8
