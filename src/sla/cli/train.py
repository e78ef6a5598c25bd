"""`python -m sla pretrain` and `python -m sla finetune`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sla.cli import weights
from sla.cli.data import ensure
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment, to_dict
from sla.results import write_results
from sla.training import run
from sla.training.config import Experiment


def pretrain(config: Path, overrides: Sequence[str], *, record: bool = False) -> None:
    """Train the model that fine-tuning starts from."""
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    _ensure_data(experiment.data)
    summary = run.pretrain(experiment, to_dict(experiment))
    _finish("pretrain", summary, experiment, record)
    _print(summary)


def finetune(config: Path, overrides: Sequence[str], *, record: bool = False) -> None:
    """The paper's experiment; ends with a summary."""
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    _ensure_data(experiment.data)
    summary = run.finetune(experiment, to_dict(experiment))
    _finish("finetune", summary, experiment, record)
    _print_finetune(summary, experiment)


@rank_zero_only
def _finish(kind: str, summary: dict[str, Any], experiment: Experiment, record: bool) -> None:
    if record:
        path = write_results(kind, [summary], seed=experiment.run.seed)
        print(f"recorded in {path}")


@rank_zero_only
def _ensure_data(config: Any) -> None:
    ensure(config)


@rank_zero_only
def _print(summary: dict[str, Any]) -> None:
    print(json.dumps(summary, indent=2))


@rank_zero_only
def _print_finetune(summary: dict[str, Any], experiment: Experiment) -> None:
    name, folder = summary["attention"], Path(experiment.run.dir) / experiment.run.name
    rows = [
        ("validation loss", "full attention", f"{summary['full_val_loss']:.5f}"),
        ("", f"{name} swapped in", f"{summary['sla_val_loss_before']:.5f}"),
        ("", f"after {summary['steps']} steps", f"{summary['sla_val_loss_after']:.5f}"),
        ("attention error", "swapped in", f"{summary['attention_error_before']:.4f}"),
        ("", f"after {summary['steps']} steps", f"{summary['attention_error_after']:.4f}"),
        ("attention FLOPs", "saved", f"{1 - summary['attention_flops_ratio']:.1%}"),
        ("wall time", "", f"{summary['wall_seconds']:.0f} s"),
        ("peak memory", "", f"{summary['peak_bytes'] / 2**30:.2f} GiB"),
        ("curves", "", f"{folder / 'tensorboard'} (make tensorboard)"),
        ("samples", "", f"{folder / 'samples'} (side_by_side.mp4: before and after)"),
        ("weights", "", str(weights.newest(experiment))),
        ("summary", "", str(folder / "summary.json")),
    ]
    blocks = ", ".join(
        f"{summary[f'{kind}_fraction']:.1%} {kind}"
        for kind in ("critical", "marginal", "negligible")
    )
    print(f"\n{name} against full attention at {summary['tokens']} tokens; blocks: {blocks}")
    for what, when, value in rows:
        print(f"  {what:<17}{when:<24}{value}")
