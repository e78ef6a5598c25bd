"""Which weights a command works on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from sla.models.families import RANDOM, family
from sla.models.text import TrainedTextEncoder
from sla.training.build import build_module, load_text_encoder
from sla.training.config import Experiment
from sla.training.module import DiffusionModule
from sla.training.run_folder import RunError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model to measure or sample.

    Attributes:
        name: short name for files and tables.
        path: where its weights are.
        module: the model with its text encoder and flow.
        experiment: the config, its sizes and attention being those of the weights.
    """

    name: str
    path: Path
    module: DiffusionModule
    experiment: Experiment


def newest(experiment: Experiment) -> Path | None:
    """Weights of the run that the config names, or None before it has finished."""
    folder = Path(experiment.run.dir) / experiment.run.name
    return family(experiment.model.name).exported(folder)


def pretrained(experiment: Experiment) -> Path:
    """The local path of the weights that the config starts from, fetched from a hub if need be.

    Raises:
        RunError: the config names none, or they are not there; says what would do.
    """
    source = experiment.run.init_weights
    if not source or source == RANDOM:
        raise RunError(
            f"run.init_weights is {source!r}, which is no file; give weights with CKPT=, or name "
            "pretrained ones in the config"
        )
    try:
        return family(experiment.model.name).locate(experiment.model, source)
    except FileNotFoundError as error:
        raise RunError(str(error)) from error


def load(experiment: Experiment, path: Path, *, swap: bool = False) -> Loaded:
    """Load weights with the attention they were saved with.

    Args:
        swap: use the config's attention instead, its own parameters at their initial values.

    Raises:
        RunError: no such file, or no text encoder for it.
        CheckpointError: not one of the family's files, or damaged.
    """
    if not path.exists():
        raise RunError(f"no weights {path}")
    restored = family(experiment.model.name).restore(
        experiment.model, path, experiment.attention if swap else None
    )
    text_encoder = restored.text_encoder or load_text_encoder(
        experiment.text_encoder, experiment.text
    )
    if restored.text_encoder is None and isinstance(text_encoder, TrainedTextEncoder):
        raise RunError(
            f"{path} holds no text encoder; name the frozen one that it was trained with "
            "(text_encoder.name, text_encoder.source)"
        )
    experiment = replace(
        experiment,
        model=restored.config,
        text=restored.text or experiment.text,
        attention=restored.model.attention_config,
    )
    module = build_module(experiment, restored.model, text_encoder).eval()
    return Loaded(experiment.attention.name, path, module, experiment)
