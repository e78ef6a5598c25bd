"""The processes of a run: none of them outlives the one that started it."""

from __future__ import annotations

import os
import threading
import time
from functools import cache

_EVERY = 1.0  # seconds


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


__all__ = ["end_with_launcher"]
