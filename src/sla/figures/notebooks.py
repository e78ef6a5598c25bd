"""Executes the notebooks and keeps a picture of each: `python -m sla notebooks`.

The picture of a notebook is the first one that its cell with the tag `picture` shows.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sla.files import atomic_path

NOTEBOOKS = Path("notebooks")
PICTURES = Path("docs/pictures")
TAG = "picture"
MAX_BYTES = 150 * 2**10
_COLOURS = 256
_SMALLEST = 200


class NotebookError(RuntimeError):
    """A notebook that cannot be run, or that shows no picture; the message says which and why."""


def execute(path: Path, *, timeout: int = 300) -> Any:
    """Run a notebook from a clean kernel in the working folder; the file stays as it is.

    Args:
        path: the `.ipynb`.
        timeout: seconds that a cell may take.

    Returns:
        The executed notebook, as nbformat has it.

    Raises:
        NotebookError: no such file, the libraries are not installed, or a cell failed.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.ipynb"))) or "none"
        raise NotebookError(f"no notebook {path}; there are: {known}")
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError
    except ImportError as error:
        raise NotebookError(
            f"{error.name} is not installed; notebooks need the extra dev: pip install -e '.[dev]'"
        ) from error
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(Path.cwd())}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources)
    # A caller's own choice, such as Agg, would leave the cells without pictures.
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError) as error:
        raise NotebookError(f"{path}: {error}") from error
    return notebook


def picture(notebook: Any, name: str) -> Image.Image:
    """The picture of an executed notebook.

    Args:
        notebook: what `execute` returned.
        name: for messages.

    Raises:
        NotebookError: not exactly one cell has the tag, or it shows no picture.
    """
    tagged = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise NotebookError(f"{name} has {len(tagged)} cells with the tag {TAG!r}; it must have 1")
    for output in tagged[0].get("outputs", ()):
        data = output.get("data", {}).get("image/png")
        if data is not None:
            return Image.open(io.BytesIO(base64.b64decode(data)))
    raise NotebookError(f"the cell of {name} with the tag {TAG!r} shows no picture")


def write_small_png(path: Path, image: Image.Image, max_bytes: int = MAX_BYTES) -> int:
    """Write a PNG of 256 colours, made smaller until the file is small enough; returns its size.

    Raises:
        ValueError: not even a picture 200 pixels wide fits.
        OSError: the file cannot be written.
    """
    image = image.convert("RGB")
    width = image.width
    while True:
        height = max(1, round(image.height * width / image.width))
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        scaled.quantize(_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= max_bytes:
            break
        if width <= _SMALLEST:
            raise ValueError(f"max_bytes is {max_bytes}; {path.name} needs {buffer.tell()}")
        width = max(_SMALLEST, round(0.9 * width))
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return buffer.tell()


def render(
    names: Sequence[str] = (), *, folder: Path = NOTEBOOKS, out: Path = PICTURES
) -> list[Path]:
    """Execute notebooks and write the picture of each, `NAME.png`.

    Args:
        names: of notebooks, or beginnings of names such as `02`; empty for all.
        folder: where the notebooks are.
        out: folder to write.

    Raises:
        NotebookError: as `execute` and `picture`; or a name that no notebook has.
    """
    known = sorted(folder.glob("*.ipynb"))
    for name in names:
        if not any(path.stem.startswith(name) for path in known):
            listing = ", ".join(path.stem for path in known) or "none"
            raise NotebookError(f"no notebook in {folder} begins with {name!r}; found: {listing}")
    written = []
    for path in known:
        if names and not any(path.stem.startswith(name) for name in names):
            continue
        target = out / f"{path.stem}.png"
        write_small_png(target, picture(execute(path), path.name))
        written.append(target)
    if not written:
        raise NotebookError(f"no notebooks in {folder}; run this in the repository's root")
    return written


__all__ = ["NotebookError", "execute", "picture", "render", "write_small_png"]
