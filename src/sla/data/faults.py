"""Counting the samples of shards that cannot be read, over all processes of a rank."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Mapping

from sla.data.manifest import DataError

log = logging.getLogger(__name__)

_ENOUGH = 50  # samples tried before their share of failures says something
_SHOWN = 10


class FailureCount:
    """Counts the samples tried and the ones that failed; names each failing one once in the log.

    Samples are counted once each, however often they are read. The counts live in shared memory,
    so they are those of a rank, not of a worker.

    Args:
        samples: size of the set.
        limit: tolerated share of the samples tried.
        before: faults found before any sample was read (shards that cannot be used).
    """

    def __init__(self, samples: int, limit: float, before: Mapping[str, str] | None = None) -> None:
        self._state = multiprocessing.Array("b", max(1, samples))
        self._counts = multiprocessing.Array("q", 3)  # tried, failed, too short
        self._limit = limit
        self._reasons = dict(before or {})

    @property
    def tried(self) -> int:
        """Samples that were asked for."""
        return int(self._counts[0])

    @property
    def count(self) -> int:
        """Samples that could not be read."""
        return int(self._counts[1])

    @property
    def short(self) -> int:
        """Samples that are sound but too short; they count as no failure."""
        return int(self._counts[2])

    def succeeded(self, position: int) -> None:
        """Counts a sample that was read."""
        self._first(position)

    def too_short(self, position: int, name: str, reason: str) -> None:
        """Counts a sound sample that is left out."""
        if self._first(position):
            with self._counts.get_lock():
                self._counts[2] += 1
            log.info("sample %s is left out: %s", name, reason)

    def report(self, position: int, name: str, reason: str) -> None:
        """Counts a sample that cannot be read.

        Raises:
            DataError: the share of failures is now over the limit.
        """
        if not self._first(position):
            return
        with self._counts.get_lock():
            self._counts[1] += 1
            tried, failed = self._counts[0], self._counts[1]
        log.warning("sample %s is left out: %s", name, reason)
        if len(self._reasons) < 2 * _SHOWN:
            self._reasons[name] = reason
        # Before enough are tried, a share that even sound ones to come could not lower stops too.
        if failed > self._limit * max(tried, min(_ENOUGH, len(self._state))):
            raise DataError(self.summary())

    def summary(self) -> str:
        """How many failed, and the first reasons that this process met."""
        share = 100 * self.count / max(1, self.tried)
        shown = [f"  {name}: {reason}" for name, reason in list(self._reasons.items())[:_SHOWN]]
        if self.count > len(shown):
            shown.append(f"  ... and {self.count - len(shown)} more (see the log)")
        head = (
            f"{self.count} of {self.tried} samples tried ({share:.0f} %) cannot be read; "
            f"data.max_failure_share allows {self._limit:g}"
        )
        return "\n".join([head, *shown])

    def _first(self, position: int) -> bool:
        with self._state.get_lock():
            first = not self._state[position]
            self._state[position] = 1
        if first:
            with self._counts.get_lock():
                self._counts[0] += 1
        return first
