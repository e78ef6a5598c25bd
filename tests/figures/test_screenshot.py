"""The screenshot of TensorBoard: with a browser where there is one, and its errors without."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from sla.cli.main import main
from sla.figures import screenshot
from sla.figures.screenshot import ScreenshotError, take


class PlaywrightError(Exception):
    pass


class Chromium:
    """Stands for Playwright's: only the executable `good` starts."""

    def launch(self, executable_path: str | None = None) -> str:
        if executable_path == "good":
            return "opened"
        raise PlaywrightError(f"no executable at {executable_path}\nmore lines")


DRIVER: Any = SimpleNamespace(chromium=Chromium())


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run with a curve."""
    folder = tmp_path / "runs"
    writer = EventFileWriter(str(folder / "one" / "tensorboard"))
    for step in range(5):
        value = Summary.Value(tag="train/loss", simple_value=1.0 / (1 + step))
        writer.add_event(Event(step=step, wall_time=1e9 + step, summary=Summary(value=[value])))
    writer.close()
    return folder


def test_without_playwright_the_error_says_what_to_install(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "playwright", None)
    out = runs / "picture.png"
    assert main(["screenshot", "--logdir", str(runs), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "pip install -e '.[screenshot]'" in error
    assert "playwright install chromium" in error
    assert not out.exists()


def test_without_runs_the_error_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screenshot, "_playwright", SimpleNamespace)
    with pytest.raises(ScreenshotError, match=r"no event files under .*make finetune"):
        take(tmp_path, tmp_path / "picture.png")


def test_a_browser_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ScreenshotError, match=r"no browser.*playwright install chromium"):
        screenshot._open(DRIVER, PlaywrightError, None)
    monkeypatch.setattr(shutil, "which", lambda name: "good" if name == "chrome" else None)
    assert screenshot._open(DRIVER, PlaywrightError, None) == "opened"


def test_a_browser_that_does_not_start_is_named() -> None:
    with pytest.raises(ScreenshotError, match=r"^bad does not start.*no executable at bad$"):
        screenshot._open(DRIVER, PlaywrightError, Path("bad"))


def test_tensorboard_serves_the_scalars(runs: Path) -> None:
    assert screenshot._serve(runs, timeout=30).startswith("http://127.0.0.1:")


@pytest.mark.slow  # starts a browser
@pytest.mark.skipif(
    not any(shutil.which(name) for name in screenshot._BROWSERS), reason="no browser on the PATH"
)
def test_the_page_is_photographed(runs: Path) -> None:
    pytest.importorskip("playwright")
    out = take(runs, runs / "picture.png")
    with Image.open(out) as image:
        assert image.size == screenshot.SIZE
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 20  # not an empty page
    with pytest.raises(ScreenshotError, match=r"no scalar of .*'nothing'"):
        take(runs, runs / "none.png", tags="nothing", timeout=3)
