"""`python -m sla router`: stage 1 of SLA2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sla.cli.data import ensure
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment, to_dict
from sla.training.router import train_routers


def train(config: Path, overrides: Sequence[str]) -> None:
    """Train the routers of a pretrained model's layers; ends with a table and what to run next."""
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    ensure(experiment.data)
    path, reports = train_routers(experiment, to_dict(experiment))
    print(f"{'layer':<7}{'recall':>8}{'after':>8}{'error':>10}{'after':>10}{'alpha':>8}")
    for layer, report in enumerate(reports):
        print(
            f"{layer:<7}{report.before.recall:>8.3f}{report.after.recall:>8.3f}"
            f"{report.before.error:>10.3g}{report.after.error:>10.3g}{report.alpha:>8.3f}"
        )
    print(
        "recall: mass of exact attention on the critical blocks; error: mean squared, with hard "
        f"top-k\n{path}; fine-tune from it with run.router_weights={path}"
    )
