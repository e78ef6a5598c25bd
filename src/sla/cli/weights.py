"""Which weights a command works on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from sla.models.checkpoint import load_model
from sla.models.text import ByteTextEncoder
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
    path = Path(experiment.run.dir) / experiment.run.name / "model.safetensors"
    return path if path.is_file() else None


def pretrained(experiment: Experiment) -> Path:
    """The weights that the config starts from.

    Raises:
        RunError: the config names none, or they are not there.
    """
    path = Path(experiment.run.init_weights)
    if not experiment.run.init_weights or not path.is_file():
        raise RunError(
            f"run.init_weights is {experiment.run.init_weights!r}, which is no file; give weights "
            "with CKPT=model.safetensors, or make some with `make pretrain`"
        )
    return path


def load(experiment: Experiment, path: Path, *, swap: bool = False) -> Loaded:
    """Load weights with the attention they were saved with.

    Args:
        swap: use the config's attention instead, its own parameters at their initial values.

    Raises:
        RunError: no such file.
        CheckpointError: not one of our files, or damaged.
    """
    if not path.is_file():
        raise RunError(f"no weights {path}")
    loaded = load_model(path, attention=experiment.attention if swap else None)
    text_encoder = loaded.text_encoder or load_text_encoder(
        experiment.text_encoder, experiment.text
    )
    if loaded.text_encoder is None and isinstance(text_encoder, ByteTextEncoder):
        raise RunError(
            f"{path} holds no text encoder; name the frozen one that it was trained with "
            "(text_encoder.name, text_encoder.source)"
        )
    experiment = replace(
        experiment,
        model=loaded.header.model,
        text=loaded.header.text or experiment.text,
        attention=loaded.model.attention_config,
    )
    module = build_module(experiment, loaded.model, text_encoder).eval()
    return Loaded(experiment.attention.name, path, module, experiment)
