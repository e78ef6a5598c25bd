"""Running a notebook and keeping its picture."""

import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from sla.cli.main import main
from sla.figures.notebooks import NotebookError, execute, picture, render, write_small_png

DRAW = """
from IPython.display import Image, display
import os, sys
from PIL import Image as Picture
Picture.new("RGB", ({width}, 20), "red").save("picture.png")
display(Image("picture.png"))
assert os.environ["MPLBACKEND"].endswith("backend_inline")
"""


def write_notebook(path: Path, *sources: str, tagged: int = 0) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[tagged].metadata["tags"] = ["picture"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_picture_is_that_of_the_tagged_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")  # not what the kernel gets
    path = write_notebook(tmp_path / "01_one.ipynb", DRAW.format(width=30), DRAW.format(width=40))
    write_notebook(tmp_path / "02_two.ipynb", "1 / 0")  # not asked for
    before = path.read_bytes()
    command = ["notebooks", "01", "--folder", ".", "--out", "pictures"]
    assert main(command) == 0
    assert capsys.readouterr().out == "pictures/01_one.png\n"
    with Image.open(tmp_path / "pictures" / "01_one.png") as image:
        assert image.size == (30, 20)
    assert path.read_bytes() == before


def test_a_failing_cell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_notebook(tmp_path / "one.ipynb", "print('before')", "1 / 0")
    with pytest.raises(NotebookError, match=r"(?s)one\.ipynb.*1 / 0.*ZeroDivisionError"):
        execute(path)


def test_a_wrong_name_lists_the_notebooks(tmp_path: Path) -> None:
    write_notebook(tmp_path / "01_one.ipynb", "1")
    with pytest.raises(NotebookError, match="begins with '07'; found: 01_one"):
        render(["07"], folder=tmp_path, out=tmp_path)
    with pytest.raises(NotebookError, match="there are: 01_one"):
        execute(tmp_path / "07.ipynb")
    with pytest.raises(NotebookError, match="no notebooks in"):
        render(folder=tmp_path / "nothing", out=tmp_path)


def test_a_notebook_without_a_picture_is_an_error() -> None:
    cell = nbformat.v4.new_code_cell("1")
    with pytest.raises(NotebookError, match=r"one\.ipynb has 0 cells"):
        picture(nbformat.v4.new_notebook(cells=[cell]), "one.ipynb")
    cell.metadata["tags"] = ["picture"]
    with pytest.raises(NotebookError, match="shows no picture"):
        picture(nbformat.v4.new_notebook(cells=[cell]), "one.ipynb")


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    size = write_small_png(path, Image.fromarray(noise), 50_000)
    assert size == path.stat().st_size <= 50_000
    with Image.open(path) as image:
        assert 200 < image.width < 400
        assert abs(image.width - 2 * image.height) <= 1
    with pytest.raises(ValueError, match="max_bytes is 1000"):
        write_small_png(path, Image.fromarray(noise), 1000)
    assert path.stat().st_size == size  # the old one is still whole
    assert os.listdir(tmp_path) == ["picture.png"]
