"""The folder of a run: which one a command uses, and how an interrupted one goes on.

runs/<name>/
    config.json            the resolved config
    baseline.json          what was measured before any fine-tuning
    checkpoints/           Lightning's: last.ckpt and best.ckpt (folders with `fsdp2`)
    tensorboard/           event files
    samples/               videos and picture strips
    model.safetensors      final weights (the average, where there is one), with model.json
    summary.json           what the run measured; its presence means that the run is finished
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sla.files import write_text
from sla.training.config import RunConfig

log = logging.getLogger(__name__)


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what would do."""


# A run that goes on may change how it is run, not what it computes.
_MAY_CHANGE = (
    *("run.resume", "run.dir", "run.name", "sampling", "data.num_workers", "router", "latents"),
    *("data.verify_cache", "eval"),
    *(f"trainer.{name}" for name in ("max_steps", "accelerator", "devices", "strategy")),
    *(
        f"trainer.{name}"
        for name in ("num_nodes", "compile", "cuda_graphs", "activation_checkpointing")
    ),
    "trainer.sequence_parallel",
    *(f"trainer.{name}" for name in ("val_every", "checkpoint_every", "log_every", "progress_bar")),
)


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files."""
    return getattr(rank_zero_only, "rank", 0) == 0


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Attributes:
        path: the folder.
        checkpoint: checkpoint to go on from, or None for a fresh run.
    """

    path: Path
    checkpoint: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        if not self.summary.is_file():
            return None
        summary = json.loads(self.summary.read_text())
        assert isinstance(summary, dict)
        return summary

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write a JSON file of the run, whole or not at all."""
        path = self.path / name
        write_text(path, json.dumps(values, indent=2) + "\n")
        return path


def open_run(config: RunConfig, resolved: Mapping[str, Any]) -> RunFolder:
    """Choose the folder of a run and the checkpoint that it continues from.

    Args:
        config: name, folder and resume policy.
        resolved: the whole experiment as plain values, to be kept and compared.

    Raises:
        RunError: the checkpoint named by `run.resume` is missing, or the folder holds an unfinished
            run of another config. (A finished one is renamed.)
    """
    path = Path(config.dir) / config.name
    changed = _changes(path, resolved)
    finished = (path / "summary.json").is_file()
    if config.resume == "never" or (config.resume == "auto" and changed and finished):
        _set_aside(path)
        changed = []
    checkpoint: Path | None = None
    if config.resume not in ("auto", "never"):
        checkpoint = Path(config.resume)
        if not checkpoint.exists():
            raise RunError(f"run.resume: no checkpoint {checkpoint}")
    elif config.resume == "auto" and has_checkpoint(path / "checkpoints" / "last.ckpt"):
        checkpoint = path / "checkpoints" / "last.ckpt"
    if changed and checkpoint is not None:
        listing = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, old, new in changed)
        raise RunError(
            f"{path} holds an unfinished run of another config:\n{listing}\n"
            "give this run another name (run.name=...), or set run.resume=never: the old run "
            "is renamed and a new one starts"
        )
    folder = RunFolder(path, checkpoint)
    if is_rank_zero():
        folder.write_json("config.json", resolved)
    return folder


def has_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, a file or a folder, there or where it was being replaced.

    (Two renames replace a folder; a run that is killed between them leaves the old one under the
    other name.)
    """
    previous = previous_checkpoint(path)
    if is_rank_zero() and previous.exists() and not path.exists():
        previous.rename(path)
    return path.exists() or previous.exists()  # rank 0 may be about to rename it


def previous_checkpoint(path: Path) -> Path:
    """Where a checkpoint is while another takes its place."""
    return path.with_name(f"{path.name}.previous")


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of what differs and may not."""
    found: list[tuple[str, Any, Any]] = []
    for key in [*old, *(key for key in new if key not in old)]:
        name = f"{prefix}{key}"
        if name in _MAY_CHANGE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append((name, before, after))
    return found


def _changes(path: Path, resolved: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    stored = path / "config.json"
    return differences(json.loads(stored.read_text()), resolved) if stored.is_file() else []


def _set_aside(path: Path) -> None:
    """Rename an older run of this name, so that nothing of it is lost."""
    if is_rank_zero() and path.exists():
        kept = path.rename(_unused(path))
        log.info("the older run %s is kept as %s", path, kept)


def _unused(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
