"""`python -m sla consolidate`: sharded checkpoints as one file, and checkpoints as models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment
from sla.training import strategy
from sla.training.run import export_checkpoint
from sla.training.run_folder import RunError


def consolidate(checkpoint: Path, out: Path) -> None:
    """Put a checkpoint's parts together.

    Args:
        checkpoint: of a run, such as `runs/NAME/checkpoints/last.ckpt`.
        out: `FILE.ckpt`, one checkpoint file that any strategy goes on from with `run.resume`; or
            a folder, in which the model is written as at the end of a run. The run's config is
            read from its `config.json`.

    Raises:
        RunError: no such checkpoint, not a sharded one for a file, or no config beside it.
        OSError: the output cannot be written.
    """
    quiet_lightning()
    warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single.*")
    if not checkpoint.exists():
        raise RunError(f"no checkpoint {checkpoint}")
    if out.suffix == ".ckpt":
        strategy.consolidate(checkpoint, out)
        print(f"{out}: go on from it with run.resume={out}")
        return
    config = checkpoint.resolve().parent.parent / "config.json"
    if not config.is_file():
        raise RunError(
            f"no {config}: to write a model the checkpoint must be in its run's folder, as "
            "runs/NAME/checkpoints/last.ckpt; OUT.ckpt would write a checkpoint file without it"
        )
    resolved = json.loads(config.read_text())
    written = export_checkpoint(load_experiment(config), resolved, checkpoint, out)
    print(written)


__all__ = ["consolidate"]
