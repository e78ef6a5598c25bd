"""A picture of TensorBoard on our runs, taken with a headless browser: `python -m sla screenshot`.

Needs the extra `screenshot` (Playwright) and a Chromium: Playwright's own, or the system's.
"""

from __future__ import annotations

import io
import json
import shutil
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from sla.figures.notebooks import PICTURES, write_small_png

TARGET = PICTURES / "tensorboard.png"
# The cards to show, by their tags; a page has twelve.
TAGS = r"/loss$|/error$|/critical|overlap|over_sparse|/self_attention|_method$|pg1|tokens|tflops"
SIZE = (1500, 1500)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_HOW = "`playwright install chromium`, or a system's package such as `apt-get install chromium`"


class ScreenshotError(RuntimeError):
    """No screenshot can be taken; the message says what is missing."""


def take(
    logdir: Path = Path("runs"),
    out: Path = TARGET,
    *,
    tags: str = TAGS,
    browser: Path | None = None,
    timeout: float = 60.0,
) -> Path:
    """Serve a folder with TensorBoard, on a free port of this machine, and photograph the page.

    Args:
        logdir: folder of runs with event files.
        out: the PNG to write.
        tags: regular expression of the scalars to show.
        browser: executable of a Chromium; None for Playwright's own, or else the system's.
        timeout: seconds to wait for each of TensorBoard and the page.

    Raises:
        ScreenshotError: Playwright or a browser is missing, there are no event files, or the page
            does not show the tags in time.
    """
    playwright = _playwright()
    if not any(logdir.rglob("events.out.tfevents.*")):
        raise ScreenshotError(f"no event files under {logdir}; make a run: make finetune")
    address = _serve(logdir, timeout)
    with playwright.sync_playwright() as driver:
        opened = _open(driver, playwright.Error, browser)
        try:
            width, height = SIZE
            page = opened.new_page(viewport={"width": width, "height": height})
            page.goto(f"{address}?smoothing=0&tagFilter={quote(tags)}#timeseries")
            milliseconds = 1000 * timeout
            page.wait_for_selector("scalar-card line-chart", timeout=milliseconds)
            _tidy(page, playwright.Error)
            page.wait_for_selector("mat-spinner", state="detached", timeout=milliseconds)
            page.wait_for_timeout(1500)  # lines are drawn with an animation
            picture = page.screenshot()
        except playwright.Error as error:
            reason = str(error).splitlines()[0]
            raise ScreenshotError(
                f"TensorBoard's page shows no scalar of {logdir} that matches {tags!r}: {reason}"
            ) from error
        finally:
            opened.close()
    write_small_png(out, Image.open(io.BytesIO(picture)))
    return out


def _playwright() -> Any:
    try:
        from playwright import sync_api
    except ImportError as error:
        raise ScreenshotError(
            "playwright is not installed; a screenshot needs the extra screenshot: "
            f"pip install -e '.[screenshot]', and a browser: {_HOW}"
        ) from error
    return sync_api


def _serve(logdir: Path, timeout: float) -> str:
    """Address of a TensorBoard in a thread of this process, once it has read the scalars."""
    from tensorboard import program

    server = program.TensorBoard()
    # Not its separate reader, which would outlive this process if that is killed.
    how = ["--port", "0", "--host", "127.0.0.1", "--load_fast", "false"]
    server.configure(argv=["tensorboard", "--logdir", str(logdir), *how])
    address: str = server.launch()
    stop = time.monotonic() + timeout
    while True:
        with urllib.request.urlopen(f"{address}data/plugin/timeseries/tags") as answer:
            if json.load(answer).get("scalars", {}).get("runTagInfo"):
                return address
        if time.monotonic() > stop:
            raise ScreenshotError(f"TensorBoard found no scalars under {logdir} in {timeout:g} s")
        time.sleep(0.2)


def _open(driver: Any, error_class: type[Exception], browser: Path | None) -> Any:
    """A headless browser."""
    if browser is None:
        with suppress(error_class):  # not downloaded
            return driver.chromium.launch()
        found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
        if found is None:
            raise ScreenshotError(
                f"there is no browser: neither Playwright's Chromium nor any of "
                f"{', '.join(_BROWSERS)} on the PATH; install one: {_HOW}; or name one: --browser"
            )
        browser = Path(found)
    try:
        return driver.chromium.launch(executable_path=str(browser))
    except error_class as error:
        reason = str(error).splitlines()[0]
        raise ScreenshotError(f"{browser} does not start as headless Chromium: {reason}") from error


def _tidy(page: Any, error_class: type[Exception]) -> None:
    """Close the settings and the tables below the curves; another version of the page may have
    neither."""
    with suppress(error_class):
        page.get_by_label("Enable step selection and data table").uncheck(timeout=3000)
    with suppress(error_class):
        page.get_by_label("Close side pane").click(timeout=3000)


__all__ = ["ScreenshotError", "take"]
