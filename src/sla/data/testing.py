"""Small synthetic videos for tests of whatever reads data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sla.data.video import Frames, write_video


def moving_square(frames: int = 24, height: int = 48, width: int = 64, *, shade: int = 0) -> Frames:
    """uint8 (frames, height, width, 3): a bright square crossing a colour gradient.

    The mean brightness grows with the frame number, which makes frames recognisable after coding;
    `shade` in [0, 255] sets the background's red, which makes videos recognisable.
    """
    rows = np.linspace(0, 80, height, dtype=np.uint8)[:, None]
    columns = np.linspace(0, 80, width, dtype=np.uint8)[None, :]
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    side = max(4, min(height, width) // 4)
    for t in range(frames):
        video[t, :, :, 0] = shade
        video[t, :, :, 1] = rows + 5 * (t % 24)
        video[t, :, :, 2] = columns + 5 * (t % 24)
        left = t * (width - side) // max(1, frames - 1)
        video[t, side : 2 * side, left : left + side] = 235
    return video


def write_clip_set(
    root: str | os.PathLike[str],
    *,
    train: int = 6,
    val: int = 3,
    frames: int = 24,
    height: int = 48,
    width: int = 64,
) -> Path:
    """Writes a set of short synthetic clips with `manifest.jsonl` and returns its folder."""
    root = Path(root)
    lines = []
    for k in range(train + val):
        name = f"clip-{k:02d}"
        shade = 40 + 200 * k // (train + val)
        video = moving_square(frames, height, width, shade=shade)
        write_video(root / f"{name}.mp4", video, fps=12)
        entry = {
            "id": name,
            "video": f"{name}.mp4",
            "caption": f"A square moves to the right, take {k}.",
            "split": "train" if k < train else "val",
        }
        lines.append(json.dumps(entry))
    (root / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_shards(
    root: str | os.PathLike[str],
    counts: Sequence[int],
    *,
    frames: int = 8,
    height: int = 32,
    width: int = 48,
) -> list[Path]:
    """Writes tar files of short synthetic clips, as webdataset's writer does; returns their paths.

    Args:
        root: folder of the files `00000.tar`, `00001.tar`, ...
        counts: samples of each.
        frames, height, width: of each clip.

    Sample n of them all is `<shard>/<n>`, nine digits, with the caption "sample n": in a .txt for
    even n, in a .json for odd n.
    """
    import webdataset

    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    clips = []
    for k in range(4):
        path = root / f".clip-{k}.mp4"
        write_video(path, moving_square(frames, height, width, shade=60 * k), fps=8)
        clips.append(path.read_bytes())
        path.unlink()
    number = 0
    paths = []
    for shard, count in enumerate(counts):
        paths.append(root / f"{shard:05d}.tar")
        with webdataset.TarWriter(str(paths[-1]), encoder=False) as writer:
            for _ in range(count):
                caption = f"sample {number}"
                sample: dict[str, Any] = {"__key__": f"{number:09d}", "mp4": clips[number % 4]}
                if number % 2:
                    sample["json"] = json.dumps({"caption": caption, "key": number}).encode()
                else:
                    sample["txt"] = caption.encode()
                writer.write(sample)
                number += 1
    return paths
