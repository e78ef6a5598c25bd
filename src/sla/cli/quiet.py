"""Fewer lines on the terminal than Lightning prints by default."""

from __future__ import annotations

import logging
import warnings


def quiet_lightning() -> None:
    """Each Trainer of a run would repeat its lines on the hardware, and its tips.

    To be called after lightning is imported: the import sets these loggers up.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    messages = [".*LeafSpec.*", ".*does not have many workers.*", ".*TensorFloat32.*"]
    # fully_shard's, for each module: no model of ours changes what a layer returned in place.
    messages += [".*returned a view tensor.*"]
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
