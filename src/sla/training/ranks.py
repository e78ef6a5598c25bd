"""The processes of a run: none outlives the one that started it, nor its own failure."""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import cache

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

_EVERY = 1.0  # seconds
_GRACE = 20.0  # seconds


@cache
def end_with_launcher() -> None:
    """End this process when the one that started it, rank 0 or torchrun, is gone; once a process.

    Does nothing in a process that no launcher started as a rank. A rank whose launcher was killed
    (kill -9, out of memory) waits in a collective until NCCL gives up, 10 minutes or more, and
    holds its GPU. (The other way round, launchers end the rest when a rank dies.)
    """
    # Lightning and torchrun give it to those they start; in rank 0 of Lightning's it comes later.
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_EVERY)
    os._exit(1)  # the main thread is in a collective that does not end


class EndOnFailure(Callback):
    """Ends a rank that failed, where several work together, and so the run.

    Torn down, it may wait for its GPU, which is in a collective that the others never reach, and
    they wait for it: the error would be seen, if at all, when NCCL gives up.
    """

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size == 1 or not isinstance(exception, Exception):
            return
        log.error("rank %d failed", trainer.global_rank, exc_info=exception)
        end = threading.Timer(_GRACE, os._exit, (1,))
        end.daemon = True
        end.start()


__all__ = ["EndOnFailure", "end_with_launcher"]
