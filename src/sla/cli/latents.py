"""`python -m sla latents`: encode a set into a latent cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sla.cli.data import ensure
from sla.cli.quiet import quiet_lightning
from sla.config import ConfigError, load_experiment, to_dict
from sla.data.latents import write_cache
from sla.results import provenance
from sla.training.build import load_autoencoder, load_text_encoder

DEFAULT = Path("data/latents")


def encode(
    config: Path,
    overrides: Sequence[str],
    out: Path | None,
    rank: int | None,
    world_size: int | None,
) -> None:
    """Write this process's share of a cache; a share that is there already is left as it is.

    Args:
        out: folder of the cache; None takes `data.cache`, or `data/latents` if that is empty.
        rank, world_size: None takes the environment's RANK and WORLD_SIZE, as torchrun sets them.

    Raises:
        ConfigError: no set to encode, or ranks that are no numbers or out of range.
        CacheError, DataError, OSError: from `write_cache`.
    """
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    folder = out or (Path(experiment.data.cache) if experiment.data.cache else DEFAULT)
    if experiment.data.source == "latents":
        raise ConfigError(
            "data.source is 'latents'; to write a cache it must be what is to be encoded, such as "
            "'manifest'"
        )
    rank = _environment("RANK", 0) if rank is None else rank
    world_size = _environment("WORLD_SIZE", 1) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}; it must be at least 0 and below {world_size}")
    ensure(experiment.data)
    summary = write_cache(
        folder,
        experiment.data,
        load_autoencoder(experiment.autoencoder),
        load_text_encoder(experiment.text_encoder, experiment.text),
        experiment.latents,
        rank=rank,
        world_size=world_size,
        notes={
            "provenance": provenance(experiment.data.seed),
            "autoencoder": to_dict(experiment.autoencoder),
            "text_encoder": to_dict(experiment.text_encoder),
            "data": to_dict(experiment.data),
        },
    )
    print(summary)
    if not summary.missing:
        print(f"train from it with data.source=latents data.cache={folder}")


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"${name} is {text!r}; it must be a whole number")
    return int(text)
