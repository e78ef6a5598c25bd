"""The short tables of README.md and docs/, beside those that have test files of their own."""

import json
import re
from pathlib import Path

from sla.figures import tables
from sla.figures.claims import CLAIMS
from sla.figures.markdown import origin
from sla.results import Results


def record(root: Path, benchmark: str, rows: list[dict[str, object]]) -> None:
    head = {
        "device": "card",
        "date": "2026-01-02",
        "torch": "2.11",
        "commit": "abcdef123456",
        "dirty": False,
        "command": "python -m bench",
    }
    folder = root / benchmark
    folder.mkdir()
    lines = [json.dumps(line) for line in ({"provenance": head}, *rows)]
    (folder / "card.jsonl").write_text("\n".join(lines) + "\n")


def body(text: str) -> list[list[str]]:
    """Cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_papers_speeds_are_those_that_it_prints() -> None:
    assert [cells[1] for cells in body(tables.paper_speed())] == ["13.7", "6.8", "8.8", "2.2"]


def test_origins_name_a_device_and_a_command_once() -> None:
    def file(device: str, command: str) -> Results:
        head = {"device": device, "torch": "2.11", "date": "2026-01-02T03", "commit": "a" * 40}
        return Results(Path("x"), {**head, "dirty": False, "command": command}, [])

    text = origin([file("one", "a"), file("two", "a"), file("one", "b"), file("one", "a")])
    at = "torch 2.11, 2026-01-02, commit aaaaaaaa"
    assert text == f"<sub>one, {at}, `a`, `b`; two, {at}, `a`</sub>"
    shares = [file("one", f"study --share {i}/2 x=1 --begin-within {9 - i}") for i in (1, 2)]
    assert origin(shares) == f"<sub>one, {at}, `study x=1` in 2 parts</sub>"
    assert origin(shares[:1]) == f"<sub>one, {at}, `{shares[0].provenance['command']}`</sub>"


def test_every_claim_is_counted(tmp_path: Path) -> None:
    text = tables.claims_summary(tmp_path)
    total, judged, missing, beyond = map(int, re.findall(r"\b\d+\b(?! %)", text))
    assert total == len(CLAIMS) == missing + beyond
    assert judged == 0
    assert body(text) == []


def test_scores_of_videos_are_no_speeds(tmp_path: Path) -> None:
    speed = {
        "what": "throughput",
        "metric": "psnr",
        "needs_weights": False,
        "device": "cuda",
        "workers": 0,
        "videos": 8,
        "frames": 16,
        "height": 32,
        "width": 64,
        "videos_per_s": 12.34,
        "videos_per_s_core": None,
    }
    score = {"method": "sla", "metric": "psnr", "value": 30.0}
    newer = {**speed, "weights": "none", "videos_per_s": 20.0, "gpu_busy": 0.914}
    network = {**speed, "metric": "fvd", "needs_weights": True, "weights": "random"}
    record(tmp_path, "eval", [score, speed, newer, network])
    assert body(tables.metrics_speed(tmp_path)) == [
        ["card", "psnr", "none", "8", "16 x 32 x 64", "1", "20.0", "", "91%"],
        ["card", "fvd", "random", "8", "16 x 32 x 64", "1", "12.3", "", ""],
    ]


def test_a_summary_takes_the_quickest_mode_and_compares_it_with_its_own(tmp_path: Path) -> None:
    common = {
        "size": "1.3b",
        "what": "step",
        "device": "cuda",
        "dtype": "bfloat16",
        "steps": None,
        "checkpointing": False,
        "block_q": None,
        "block_kv": None,
    }
    times = {("cudnn", "eager"): 60.0, ("cudnn", "compiled"): 50.0, ("sla", "compiled"): 20.0}
    rows = [
        {**common, "method": method, "mode": mode, "ms_median": time}
        for (method, mode), time in times.items()
    ]
    rows.append({**common, "method": "sla2", "mode": "eager", "ms_median": 30.0, "block_q": 128})
    rows[-1]["block_kv"] = 64
    record(tmp_path, "e2e", rows)
    cells = [line[1:4] for line in body(tables.end_to_end_summary(tmp_path))]
    assert cells == [
        ["cuDNN attention", "50", "- / 1.00"],
        ["SLA", "20", "- / 2.50"],
        ["SLA2, blocks of 128x64", "30 (eager)", "- / 2.00"],
    ]
