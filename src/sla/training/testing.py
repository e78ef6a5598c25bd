"""A whole run in seconds, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from sla.data.testing import write_clip_set

TINY = """
run:
  dir: {runs}
data:
  root: {data}
  num_frames: 4
  height: 16
  width: 16
  batch_size: 2
model:
  patch_size: [1, 2, 2]
  hidden_size: 32
  num_heads: 2
  depth: 2
  mlp_ratio: 2.0
  text_dim: 16
  time_frequencies: 32
text:
  text_dim: 16
  depth: 1
  mlp_ratio: 2.0
  max_tokens: 23
optim:
  learning_rate: 1.0e-3
  warmup_steps: 2
  schedule: cosine
  ema_decay: 0.5
trainer:
  accelerator: cpu
  max_steps: 6
  val_every: 3
  val_strata: 2
  checkpoint_every: 2
  log_every: 1
  progress_bar: false
sampling:
  num_prompts: 1
  steps: 2
"""

TINY_SLA = """
attention:
  name: sla
  critical: 0.1
  block_q: 16
  block_kv: 16
"""


def write_tiny_experiment(folder: Path) -> Path:
    """Write a tiny clip set and a config of a full-attention run on it; returns the config.

    256 tokens; `sla.yaml` beside it is the same with SLA.
    """
    data = write_clip_set(folder / "data", train=5, val=2, frames=12, height=32, width=32)
    text = TINY.format(runs=json.dumps(str(folder / "runs")), data=json.dumps(str(data)))
    path = folder / "full.yaml"
    path.write_text(text)
    path.with_name("sla.yaml").write_text(text + TINY_SLA)
    return path
