"""Frames of the videos of `make eval`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sla.data.video import write_video
from sla.figures import eval_strips
from sla.figures.figure6a import FigureError


def write(folder: Path, prompts: list[str], width: int = 32) -> dict[str, Any]:
    """A report of two methods, the grey value of whose videos tells method, prompt and frame."""
    methods: dict[str, Any] = {}
    for m, label in enumerate(("full (reference)", "sla (not fine-tuned)")):
        videos = []
        for p in range(len(prompts)):
            name = f"{label.split()[0]}/{p:05d}.mp4"
            shades = 40 + 100 * m + 10 * p + 3 * np.arange(11)
            frames = np.broadcast_to(shades[:, None, None, None], (11, 16, width, 3))
            write_video(folder / name, np.ascontiguousarray(frames).astype(np.uint8), fps=8)
            videos.append(name)
        entry = {"weights": f"w{m}", "attention": label.split()[0], "swapped": bool(m)}
        methods[label] = {**entry, "videos": videos}
    provenance = {"device": "a card", "torch": "2", "commit": "c" * 40, "command": "sla eval"}
    report = {"provenance": provenance, "prompts": prompts, "methods": methods}
    (folder / "report.json").write_text(json.dumps(report))
    return report


def test_frames_stand_by_prompt_method_and_time(tmp_path: Path, shown: list[Any]) -> None:
    write(tmp_path, ["one", "two"])
    files = eval_strips.draw(tmp_path / "out", tmp_path)
    assert [file.name for file in files] == [f"frames_eval.{e}" for e in ("png", "pdf", "txt")]
    for p, axes in enumerate(shown[0].axes):
        picture = np.asarray(axes.images[0].get_array()).astype(float)
        for m in range(2):
            for k in range(6):  # frames 0, 2, .. 10; coding may move a shade a little
                shade = picture[18 * m : 18 * m + 16, 34 * k : 34 * k + 32].mean()
                assert shade == pytest.approx(40 + 100 * m + 10 * p + 3 * 2 * k, abs=2.5)
        assert axes.get_title() == f"{p + 1}: {('one', 'two')[p]}"
        assert [t.get_text() for t in axes.get_xticklabels()] == [
            f"frame {2 * k}" for k in range(6)
        ]
    labels = [t.get_text() for t in shown[0].axes[0].get_yticklabels()]
    assert labels == ["full (reference)", "sla (not fine-tuned)"]
    caption = files[2].read_text()
    assert "sla (not fine-tuned): sla attention, weights w1" in caption
    assert "`sla eval`" in caption


def test_large_frames_are_drawn_smaller(tmp_path: Path) -> None:
    write(tmp_path, ["one"], width=416)
    _, frames = eval_strips._frames(tmp_path / "sla/00000.mp4")
    assert frames.shape == (6, 8, 208, 3)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FigureError, match=r"no .*report.json; `make eval` writes it"):
        eval_strips.draw(tmp_path / "out", tmp_path)
    report = write(tmp_path, ["one"])
    (tmp_path / "sla/00000.mp4").unlink()
    with pytest.raises(FigureError, match=r"sla/00000.mp4.*; run `make eval` again"):
        eval_strips.draw(tmp_path / "out", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**report, "prompts": []}))
    with pytest.raises(FigureError, match="has no videos"):
        eval_strips.draw(tmp_path / "out", tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FigureError, match="is no report of `make eval`: KeyError"):
        eval_strips.draw(tmp_path / "out", tmp_path)
