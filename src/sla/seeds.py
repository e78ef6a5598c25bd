"""Random numbers of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Inside, what is drawn on the CPU is of this seed; outside nothing changes.

    GPUs' generators are left alone: to keep their state PyTorch would start every GPU that the
    process sees, and each rank sees all of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


__all__ = ["drawing"]
