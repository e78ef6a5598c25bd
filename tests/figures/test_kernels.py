"""Tables and figures of the kernel benchmark, from made-up rows."""

from pathlib import Path
from typing import Any

import pytest

from sla.benchmark.kernels import derive
from sla.cli.main import main
from sla.figures import figure6a, tables
from sla.figures.paper import PAPER_TFLOPS, WAN_1_3B, WAN_14B_720P
from sla.results import ResultsFile, read_all

MS = {"flash_attention_2": 18.0, "cudnn": 12.0, "sla": 1.2, "flex_block_sparse": 0.9}
SCALE = {"forward": 1.0, "backward": 3.0, "forward_backward": 4.0}
GPU_TABLES = ("kernels_gpu", "kernels_lengths", "kernels_sparsity", "kernels_stages")


def made_up(
    method: str,
    direction: str = "forward",
    shape: tuple[int, int, int, int] = WAN_1_3B,
    **changes: Any,
) -> dict[str, Any]:
    """A row as the benchmark writes it."""
    is_exact = method in ("flash_attention_2", "cudnn")
    numbers: dict[str, Any] = {
        "sparsity": 0.95,
        "critical": 0.05,
        "negligible": 0.1,
        "block_q": 128,
        "block_kv": 128,
        "feature_map": "softmax",
        "map": "uniform",
    }
    row = {
        **dict(zip(("batch", "heads", "tokens", "head_dim"), shape, strict=True)),
        **(dict.fromkeys(numbers) if is_exact else numbers),
        "dtype": "bfloat16",
        "critical_measured": None if is_exact else 0.05,
        "device": "cuda",
        "suite": "wan-1.3b",
        "method": method,
        "direction": direction,
        "ms_median": MS[method] * SCALE[direction],
        "peak_extra_bytes": None,
        "stages": None,
        "error": None,
        **changes,
    }
    exact = {name: MS[name] * SCALE[direction] for name in ("flash_attention_2", "cudnn")}
    return row | derive(row, exact)


def keep(root: Path, rows: list[dict[str, Any]], label: str = "") -> Path:
    file = ResultsFile("kernels", root=root, label=label, command=["bench", label])
    for row in rows:
        file.append(row)
    return file.path


def lines_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", GPU_TABLES)
def test_without_gpu_results_a_table_names_the_command(name: str, tmp_path: Path) -> None:
    keep(tmp_path, [made_up("sla", device="cpu", dtype="float32")])
    assert "make bench ARGS=" in tables.TABLES[name](tmp_path)


def test_the_table_of_the_papers_shapes(tmp_path: Path) -> None:
    directions = ("forward", "backward", "forward_backward")
    rows = [made_up(m, d) for m in ("flash_attention_2", "cudnn", "sla") for d in directions]
    rows[-3]["peak_extra_bytes"] = 100 * 2**20
    rows += [made_up("sla", block_q=64, block_kv=64), made_up("sla", sparsity=0.9)]
    out = {"ms_median": None, "error": "out of memory"}
    rows += [made_up("sla", shape=WAN_14B_720P, **out), made_up("sla", map="skewed", **out)]
    keep(tmp_path, rows, "wan")
    table = tables.kernels_gpu(tmp_path)
    _, _, *body = lines_of(table)
    assert [line[:4] for line in body] == [
        ["12 x 32,760", "FlashAttention-2", "", "18.00"],
        ["12 x 32,760", "cuDNN attention", "", "12.00"],
        ["12 x 32,760", "SLA, whole operator", "128x128", "1.20"],
        ["12 x 32,760", "SLA, whole operator", "64x64", "1.20"],
        ["40 x 75,600", "SLA, whole operator", "128x128", "out of memory"],
    ]
    assert body[2][4:] == ["3.60", "4.80", "15.0 / 10.0", "15.0 / 10.0", "100", ""]
    assert "`bench wan`" in table


def test_lengths_and_sparsities(tmp_path: Path) -> None:
    directions = ("forward", "backward")
    lengths = [made_up("sla", d, (1, 12, n, 128)) for n in (8192, 4096) for d in directions]
    keep(tmp_path, lengths, "lengths")
    keep(tmp_path, [made_up("sla", sparsity=s) for s in (0.9, 0.8)], "sparsities")
    keep(tmp_path, [made_up("sla", block_q=64), made_up("sla", shape=(1, 4, 4096, 64))], "other")
    _, _, *body = lines_of(tables.kernels_lengths(tmp_path))
    assert [line[0] for line in body] == ["4,096", "8,192"]
    assert body[0][1:] == ["1.20", "15.0", "10.0", "3.60", "15.0", "10.0"]
    table = tables.kernels_sparsity(tmp_path)
    assert [line[0] for line in lines_of(table)[2:]] == ["80%", "90%"]
    assert "`bench sparsities`" in table
    assert "`bench lengths`" not in table


def test_stages_have_shares(tmp_path: Path) -> None:
    keep(tmp_path, [made_up("sla", stages={"_sparse": 0.9, "_route": 0.3})])
    _, _, *body = lines_of(tables.kernels_stages(tmp_path))
    assert body == [
        ["`_sparse`", "forward", "0.900", "75%"],
        ["`_route`", "forward", "0.300", "25%"],
    ]


def test_the_newest_row_counts_whatever_file_it_is_in(tmp_path: Path) -> None:
    rows = [made_up("sla"), made_up("sla", "backward"), made_up("sla", ms_median=2.0)]
    path = keep(tmp_path, rows)
    assert lines_of(tables.kernels_gpu(tmp_path))[2][3] == "2.00"
    later = tmp_path / "kernels" / "later.jsonl"
    later.write_text(path.read_text().splitlines()[0].replace('"date": "2', '"date": "3') + "\n")
    file = ResultsFile("kernels", root=tmp_path)
    file.path = later
    file.append(made_up("sla", ms_median=5.0))
    line = lines_of(tables.kernels_gpu(tmp_path))[2]
    assert line[3:5] == ["5.00", "3.60"]


def test_the_cpu_table_reads_cpu_files_alone(tmp_path: Path) -> None:
    common = {"tokens": 2048, "device": "cpu", "map": "uniform"}
    rows = [
        {**common, "method": method, "direction": direction, "ms_median": ms, "suite": None}
        for method, ms in (("sdpa", 30.0), ("sla", 10.0))
        for direction in ("forward", "forward_backward")
    ]
    path = keep(tmp_path, rows)
    text = path.read_text()
    later = text.replace('"date": "2', '"date": "3')
    head, *rest = later.splitlines()
    of_suite = [line.replace('"suite": null', '"suite": "lengths"') for line in rest]
    (path.parent / "suite.jsonl").write_text("\n".join([head, *of_suite]) + "\n")
    (path.parent / "gpu.jsonl").write_text(later.replace('"cuda": null', '"cuda": "13.0"'))
    if '"cuda": null' not in text:
        pytest.skip("torch is a CUDA build here")
    assert lines_of(tables.kernels_cpu(tmp_path))[2:] == [
        ["2,048", "30.0", "10.0", "3.0x", "30.0", "10.0", "3.0x"]
    ]


def test_figure_6a(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [made_up(m, d) for m in MS for d in ("forward", "backward")]
    rows.append(made_up("sla", block_q=64, block_kv=64))
    path = keep(tmp_path / "results", rows, "wan-1.3b")
    found = figure6a.bars(tmp_path / "results")
    assert set(found) == {
        *("FlashAttention2", "cuDNN", "SLA-95%", "SLA-95%\n128x128"),
        "Flex sparse-95%\n128x128",
    }
    assert found["SLA-95%"]["forward"].row["tflops_full"] == pytest.approx(5495, rel=1e-3)
    monkeypatch.chdir(tmp_path)
    assert main(["figures", "--out", "drawn"]) == 0
    out = tmp_path / "drawn"
    assert (out / "figure6a.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figure6a.pdf").read_bytes().startswith(b"%PDF")
    caption = (out / "figure6a.txt").read_text()
    assert f"kernels/{path.name}" in caption
    assert "`bench wan-1.3b`" in caption
    assert "RTX5090" in caption


def test_figure_6a_refuses_without_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, [made_up("sla", shape=WAN_14B_720P)])
    monkeypatch.chdir(tmp_path)
    assert main(["figures", "--out", str(tmp_path / "out"), "--results", str(tmp_path)]) == 1
    assert "--suite wan-1.3b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_papers_numbers() -> None:
    assert PAPER_TFLOPS["SLA-95%"] == (2996, 1479)
    assert PAPER_TFLOPS["SLA-95%"][0] / PAPER_TFLOPS["FlashAttention2"][0] == pytest.approx(
        13.7, abs=0.05
    )
    assert [both[1] for both in PAPER_TFLOPS.values()] == [218, 370, 1032, 620, 1011, 1479]


def test_attention_methods_are_one_line_each_in_the_order_of_the_run(tmp_path: Path) -> None:
    file = ResultsFile("attention", root=tmp_path, command=["bench"])
    for method in ("sparse_only-64x64", "vsa"):
        for direction in ("forward", "backward"):
            failed = method == "vsa" and direction == "backward"
            times = dict.fromkeys(("ms_median", "sparse_ms", "predicted_ms", "ratio", "extras_ms"))
            if not failed:
                times |= {"ms_median": 3.5, "sparse_ms": 2.25, "predicted_ms": 2.0, "ratio": 1.125}
            row = {
                "method": method,
                "direction": direction,
                "tokens": 32_760,
                "heads": 12,
                "head_dim": 128,
                "dtype": "bfloat16",
                "block_q": 64,
                "block_kv": 64,
                "exact_fraction": 0.085,
                "error": "RuntimeError: no" if failed else None,
            }
            file.append(row | times)
    heading, _, *lines = tables.attention_methods(tmp_path).splitlines()
    (results,) = read_all("attention", tmp_path)
    assert heading == f"{results.provenance['device']}:"
    assert lines[2].startswith("| sparse_only-64x64 | 64x64 | 8.5% | 3.50 | 2.25 | 2.00 | 1.12 |")
    assert lines[3].startswith("| vsa | 64x64 | 8.5% | 3.50 | 2.25 |")
    assert lines[3].endswith("| failed |  |  |  |  |")
    assert "`bench`" in lines[-1]
    assert "no record yet" in tables.attention_methods(tmp_path / "nothing")
