"""Every notebook runs from a clean kernel, and a page shows a picture of each."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

from sla.cli.main import main
from sla.figures.notebooks import MAX_BYTES, TAG, execute, picture

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = ROOT / "docs" / "pictures"
# Those that look at a model take any through this variable, those that read files through these.
VARIABLES = {
    "01": "CHECKPOINT",
    "02": "CHECKPOINT",
    "03": "CHECKPOINT",
    "04": "RUN",
    "05": "RESULTS",
}


@pytest.fixture
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a kernel beside each of the tests' workers


def text_of(notebook: Any) -> str:
    """What the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow  # each loads torch in a kernel of its own
@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = execute(path)
    assert picture(notebook, path.name).width > 300
    if path.stem.startswith("03"):  # it has asserted each
        assert text_of(notebook).count("max abs difference") == 12
    if path.stem.startswith("04"):
        assert "val/loss_full_attention" in text_of(notebook)


@pytest.mark.slow  # captures from the demo model, then a kernel
@pytest.mark.usefixtures("in_the_repository")
def test_a_notebook_reads_a_capture(tmp_path: Path) -> None:
    config, folder = "configs/finetune/demo.yaml", tmp_path / "capture"
    command = ["capture", "--config", config, "--out", str(folder), "--timesteps", "700,400"]
    some = ["--layers", "2,3", "--heads", "0,2", "--query-blocks", "4"]
    assert main([*command, *some]) == 0
    source = nbformat.read(ROOT / "notebooks" / "02_sparse_plus_low_rank.ipynb", as_version=4)
    cell = next(c for c in source.cells if c.source.startswith("CHECKPOINT = "))
    cell.source += f"\nCHECKPOINT = {str(folder)!r}"
    path = tmp_path / "02.ipynb"
    nbformat.write(source, path)
    assert "layers [2, 3], 2 heads, 4,096 tokens" in text_of(execute(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_the_others(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert path.read_text().isascii()
    assert cells[0]["cell_type"] == "markdown"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "".join(code[0]["source"]).startswith(f"{VARIABLES[path.stem[:2]]} = ")
    assert [cell["metadata"].get("tags") for cell in code].count([TAG]) == 1
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("name", [*(path.stem for path in NOTEBOOKS), "tensorboard"])
def test_a_page_shows_a_small_picture_of_it(name: str) -> None:
    path = PICTURES / f"{name}.png"
    assert f"(pictures/{name}.png)" in (ROOT / "docs" / "figures.md").read_text()
    assert path.stat().st_size <= MAX_BYTES
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 400


def test_pictures_are_small_together() -> None:
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) <= 2**20
