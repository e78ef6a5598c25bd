"""A whole study in seconds, for tests."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from sla.data.video import Frames, write_video
from sla.training.testing import TINY

COLOURS = {"red": (230, 40, 40), "green": (40, 210, 60), "blue": (50, 60, 230)}
MOTIONS = {"left": -1, "right": 1}

_BASE = """
include: [tiny.yaml]
run:
  init_weights: {weights}
data:
  source: webdataset
  shards: [{root}/train-*.tar]
  val_shards: [{root}/val-*.tar]
  shard_cache: {root}/cache
  frame_stride: [1]
  crop_scale: [1.0]
optim:
  ema_decay: 0.0
trainer:
  max_steps: 4
  checkpoint_every: 2
"""

_ARMS = """
study: tiny
base: base.yaml
seeds: [0, 1]
curve: [0, 2]
measures:
  attention_clips: 2
  prompt_shards: ["{root}/test-*.tar"]
  prompts: 2
  video_metrics: [psnr, temporal_flickering]
evaluator:
  weights: {root}/evaluator.safetensors
  attributes: [colour, motion]
  stills: [colour]
  width: 8
  features: 8
  steps: 4
  batch_size: 4
groups:
  main:
    question: does SLA keep up?
    arms:
      full: {{attention.name: full}}
      sla:
        attention.name: sla
        attention.critical: 0.1
        attention.block_q: 16
        attention.block_kv: 16
"""


def coloured_square(colour: str, motion: str, shade: int, frames: int = 4) -> Frames:
    """uint8 (frames, 16, 16, 3): a square of a colour that moves to a side over gray."""
    video = np.full((frames, 16, 16, 3), shade, dtype=np.uint8)
    for t in range(frames):
        left = 5 + 2 * t if MOTIONS[motion] > 0 else 11 - 2 * t
        video[t, 4:12, max(0, left - 4) : left + 4] = COLOURS[colour]
    return video


def write_coloured_shards(root: Path, *, train: int = 12, val: int = 4, test: int = 6) -> None:
    """Write `train-00000.tar`, `val-...`, `test-...` of such clips, attributes in their JSON."""
    root.mkdir(parents=True, exist_ok=True)
    pairs = [(colour, motion) for colour in COLOURS for motion in MOTIONS]
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", train), ("val", val), ("test", test)):
            with tarfile.open(root / f"{split}-00000.tar", "w") as tar:
                for k in range(count):
                    colour, motion = pairs[k % len(pairs)]
                    path = Path(folder) / f"{split}-{k}.mp4"
                    write_video(path, coloured_square(colour, motion, 60 + 7 * k % 60), fps=8)
                    record = {
                        "caption": f"A {colour} square moves to the {motion}.",
                        "colour": colour,
                        "motion": motion,
                    }
                    _add(tar, f"{k:06d}.mp4", path.read_bytes())
                    _add(tar, f"{k:06d}.json", json.dumps(record).encode())


def write_tiny_study(folder: Path) -> Path:
    """Write clips, `tiny.yaml`, `base.yaml` and `arms.yaml`; returns the last.

    `base.yaml` names pretrained weights `weights.safetensors` and the study an evaluator
    `evaluator.safetensors`, both of which are still to be made.
    """
    write_coloured_shards(folder)
    # The clip set of `TINY` is not used.
    tiny = TINY.format(runs=json.dumps(str(folder / "runs")), data=json.dumps(str(folder)))
    (folder / "tiny.yaml").write_text(tiny)
    weights = folder / "weights.safetensors"
    (folder / "base.yaml").write_text(_BASE.format(weights=weights, root=folder))
    arms = folder / "arms.yaml"
    arms.write_text(_ARMS.format(root=folder))
    return arms


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
