"""The table and the figure of the end-to-end benchmark, from made-up rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from sla.cli.main import main
from sla.figures import figure6b, tables
from sla.figures.figure6a import FigureError
from sla.figures.paper import PAPER_GENERATION
from sla.results import ResultsFile

MS = {
    "flash_attention_2": {"step": 900.0, "train": 5000.0, "generation": 90_000.0},
    "cudnn": {"step": 600.0, "train": 4000.0, "generation": 60_000.0},
    "sla": {"step": 300.0, "train": 2000.0, "generation": 30_000.0},
    "none": {"decode": 2500.0},
}


def made_up(method: str, what: str, mode: str = "eager", **changes: Any) -> dict[str, Any]:
    """A row as the benchmark writes it."""
    blocks = 128 if method == "sla" else None
    ms = MS[method][what]
    by_events = mode == "eager" and what in ("step", "generation")
    return {
        "method": method,
        "mode": mode,
        "what": what,
        "size": "1.3b",
        "device": "cuda",
        "dtype": "bfloat16",
        "block_q": blocks,
        "block_kv": blocks,
        "steps": 50 if what == "generation" else None,
        "checkpointing": True if what == "train" else None,
        "ms_median": ms,
        "ms_attention": 0.25 * ms if by_events else None,
        "attention_share": 0.25 if by_events else None,
        "peak_bytes": 30 * 2**30,
        "estimated_bytes": 31 * 2**30 if what == "train" else None,
        "error": None,
        **changes,
    }


def keep(root: Path, rows: list[dict[str, Any]]) -> Path:
    file = ResultsFile("e2e", root=root, command=["bench", "e2e"])
    for row in rows:
        file.append(row)
    return file.path


def every_row() -> list[dict[str, Any]]:
    methods = ("sla", "flash_attention_2", "cudnn")
    return [made_up(m, what) for m in methods for what in MS[m]] + [made_up("none", "decode")]


def lines_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_has_a_line_for_each_method_baselines_first(tmp_path: Path) -> None:
    path = keep(tmp_path, every_row())
    table = tables.end_to_end(tmp_path)
    head, _, *body = lines_of(table)
    assert [len(line) for line in body] == [len(head)] * 3
    assert [line[1] for line in body] == ["FlashAttention-2", "cuDNN attention", "SLA"]
    assert body[2] == [
        *("1.3b", "SLA", "128x128", "eager", "300", "3.00 / 2.00"),
        *("2000 (blocks recomputed)", "2.50 / 2.00", "30.0 (50 steps)", "3.00 / 2.00"),
        *("25%", "30.0", "31.0"),
    ]
    assert "decoder at 1.3b's size: 2.50 s" in table
    assert "`bench e2e`" in table
    assert path.exists()


def test_times_are_compared_with_those_of_the_same_task_alone(tmp_path: Path) -> None:
    rows = [
        made_up("cudnn", "generation", steps=20),
        made_up("cudnn", "step", mode="compiled"),
        made_up("cudnn", "train", ms_median=None, error="out of memory"),
        *(made_up("sla", what) for what in MS["sla"]),
    ]
    keep(tmp_path, rows)
    by_mode = {(line[1], line[3]): line for line in lines_of(tables.end_to_end(tmp_path))[2:]}
    sla, cudnn = by_mode["SLA", "eager"], by_mode["cuDNN attention", "eager"]
    assert (sla[5], sla[7], sla[9]) == ("- / -",) * 3
    assert cudnn[6] == "failed"
    assert by_mode["cuDNN attention", "compiled"][4:6] == ["600", "- / 1.00"]


def test_each_gpu_has_a_part_the_most_measured_one_first(tmp_path: Path) -> None:
    keep(tmp_path, every_row())
    path = keep(tmp_path, [made_up("sla", "step")])
    head, *rows = path.read_text().splitlines()
    provenance = json.loads(head)["provenance"] | {"device": "B9"}
    path.write_text("\n".join([json.dumps({"provenance": provenance}), *rows]))
    parts = tables.end_to_end(tmp_path).split("B9:\n")
    assert [len(lines_of(part)) for part in parts] == [2 + 3, 2 + 1]
    assert lines_of(parts[1])[2][5] == "- / -", "times of two GPUs do not compare"
    assert len(figure6b.bars(tmp_path)) == 3


def test_ratios_of_two_sessions_are_marked(tmp_path: Path) -> None:
    path = keep(tmp_path, [made_up("flash_attention_2", "step"), made_up("cudnn", "step")])
    path.write_text(path.read_text().replace('"date": "20', '"date": "19'))
    keep(tmp_path, [made_up("cudnn", "step"), made_up("sla", "step")])
    sla = next(line for line in lines_of(tables.end_to_end(tmp_path)) if line[1] == "SLA")
    assert sla[5] == "~3.00 / 2.00"


def test_rows_of_a_cpu_do_not_count(tmp_path: Path) -> None:
    keep(tmp_path, [made_up("sla", "step", device="cpu", dtype="float32", size="tiny")])
    assert tables.end_to_end(tmp_path).startswith("(no record yet")
    assert tables.end_to_end(tmp_path / "nothing").startswith("(no record yet")


def test_bars_are_attention_and_the_rest(tmp_path: Path) -> None:
    slow = made_up("cudnn", "generation")
    compiled = made_up("sla", "generation", mode="compiled", ms_median=20_000.0)
    rows = [slow, made_up("sla", "generation"), compiled]
    rows += [made_up("sla", "generation", size="14b"), made_up("flash_attention_2", "step")]
    rows += [made_up("cudnn", "step"), made_up("sla", "step"), made_up("sla", "step", size="14b")]
    keep(tmp_path, rows)
    found = figure6b.bars(tmp_path)
    assert {name: (bar.attention, bar.rest) for name, bar in found.items()} == {
        "cuDNN": (15.0, 45.0),
        "SLA": (7.5, 22.5),
        "SLA\ncompiled": (7.5, 12.5),  # two forwards a step, attention as in the uncompiled model
    }
    # Fewer steps stand beside no others; without an uncompiled step there is no attention's part.
    keep(tmp_path, [made_up("cudnn", "generation", steps=4)])
    assert set(figure6b.bars(tmp_path)) == {"SLA", "SLA\ncompiled"}
    alone = tmp_path / "alone"
    keep(alone, [compiled])
    assert figure6b.bars(alone) == {}


def test_the_figure_is_written_with_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keep(tmp_path / "results", every_row())
    monkeypatch.chdir(tmp_path)
    assert main(["figures", "--out", "drawn"]) == 0
    printed = capsys.readouterr()
    assert "--suite wan-1.3b" in printed.err, "the other figure has no record"
    out = tmp_path / "drawn"
    assert sorted(p.name for p in out.iterdir()) == [f"figure6b.{e}" for e in ("pdf", "png", "txt")]
    assert (out / "figure6b.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figure6b.pdf").read_bytes().startswith(b"%PDF")
    caption = (out / "figure6b.txt").read_text()
    for part in (f"e2e/{path.name}", "`bench e2e`", "RTX5090", "50 steps"):
        assert part in caption


def test_without_results_it_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FigureError, match="--what generation --record"):
        figure6b.draw(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_papers_generations() -> None:
    totals = {name: sum(parts) for name, parts in PAPER_GENERATION.items()}
    assert (totals["full attention"], totals["SLA"]) == (159, 73)
    assert totals["full attention"] / totals["SLA"] == pytest.approx(2.2, abs=0.05)
    assert totals["full attention"] / totals["SLA2"] == pytest.approx(2.30, abs=0.01)
    attention = PAPER_GENERATION["full attention"][0] / PAPER_GENERATION["SLA"][0]
    assert attention == pytest.approx(8.8, abs=0.05)
