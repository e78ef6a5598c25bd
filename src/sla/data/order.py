"""The order of training samples: index in the stream to (pass over the set, position in the set).

Everything here is a pure function of (seed, index) and of how many samples there are. So nothing
has to be replayed or stored to resume: a checkpoint holds the number of samples consumed, and
whichever process is asked for sample i finds the same one. No library does that for tar files:
webdataset reads them front to back and knows no position in them, so that resuming means reading
all again (`python -m sla.benchmark data` measures it beside ours); litdata resumes, but reads a
format of its own, to which terabytes would have to be converted. What it costs: the number of
samples in each shard must be known before training, see `sla.data.shards`.

A shuffle buffer holds samples in memory and gives out a random one of them. Here the buffer is one
of positions (`shuffle_window`): no sample is read before its turn, and the place of each is known,
so reading it is a seek within the few shards that the window spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

# What a random generator is for; part of its seed, so that the draws are independent.
ORDER, SAMPLE, SHARDS, WINDOW = 0, 1, 2, 3


class Order(Protocol):
    """Which sample of the set stands where in the stream."""

    count: int

    def place(self, index: int) -> tuple[int, int]:
        """(pass over the set, position in the set) of sample `index` of the stream."""
        ...

    def instead(self, index: int) -> Iterator[int]:
        """Positions to try, one after the other, where that of `index` cannot be read.

        They are of the same pass (and bucket), so they are shown twice in it.
        """
        ...

    def positions(self, pass_index: int) -> Positions:
        """int64: the positions of one pass, in the order of the stream."""
        ...


@lru_cache(maxsize=4)
def pass_order(seed: int, pass_index: int, clips: int) -> Positions:
    """int64 (clips,): the order of the clips in one pass over the set."""
    order = np.random.default_rng([seed, ORDER, pass_index]).permutation(clips)
    order.flags.writeable = False  # it is shared
    return order


class PassOrder:
    """A permutation of the whole set per pass.

    Args:
        seed: of the order.
        count: samples of the set.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed = seed
        self.count = count

    def place(self, index: int) -> tuple[int, int]:
        """See `Order`."""
        pass_index, place = divmod(index, self.count)
        return pass_index, int(self.positions(pass_index)[place])

    def instead(self, index: int) -> Iterator[int]:
        """See `Order`."""
        order = self.positions(index // self.count)
        for step in range(1, self.count):
            yield int(order[(index + step) % self.count])

    def positions(self, pass_index: int) -> Positions:
        """See `Order`."""
        return pass_order(self.seed, pass_index, self.count)


class ShardOrder:
    """Shards in random order, dealt to lanes, each lane shuffled within a window.

    A pass lays the samples of all shards one after the other, the shards permuted, and cuts this
    row into `lanes` equal stretches. The stream takes `run` samples of lane 0, then of lane 1, and
    so on. With batches of `run` samples, batch g is of lane g % lanes. If lanes is a multiple of
    ranks x workers, a worker meets the same lanes always, so it has shards of its own (of a shard
    across a border two workers have a part). But the order itself knows no ranks or workers.

    Args:
        seed: of the order.
        counts: samples of each shard.
        lanes: how many stretches.
        run: samples that are taken of a lane in a row; the batch size.
        window: samples of a lane among which the order is random: each is moved by less than that.
    """

    def __init__(self, seed: int, counts: Sequence[int], lanes: int, run: int, window: int) -> None:
        self.seed = seed
        self.counts = np.asarray(counts, dtype=np.int64)
        self.count = int(self.counts.sum())
        self.lanes = lanes
        self.run = run
        self.window = window
        self._firsts = np.concatenate([[0], self.counts.cumsum()[:-1]])
        # A process reads one pass, at its end two, and of all lanes in the worst case.
        self._lane = lru_cache(maxsize=2 * lanes)(self._make_lane)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_lane"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lane = lru_cache(maxsize=2 * self.lanes)(self._make_lane)

    def place(self, index: int) -> tuple[int, int]:
        """See `Order`."""
        pass_index = index // self.count
        order, k = self._in_lane(index)
        return pass_index, int(order[k])

    def instead(self, index: int) -> Iterator[int]:
        """See `Order`: the next ones of the lane, then those of other lanes."""
        pass_index = index // self.count
        order, k = self._in_lane(index)
        for step in range(1, len(order)):
            yield int(order[(k + step) % len(order)])
        own = self.lane_of(index)
        for lane in range(self.lanes):
            if lane != own:
                yield from self._lane(pass_index, lane).tolist()

    def positions(self, pass_index: int) -> Positions:
        """See `Order`."""
        first = pass_index * self.count
        lane = (np.arange(first, first + self.count) // self.run) % self.lanes
        order = np.empty(self.count, dtype=np.int64)
        for k in range(self.lanes):
            order[lane == k] = self._lane(pass_index, k)
        return order

    def lane_of(self, index: int) -> int:
        """The lane that sample `index` of the stream is taken from."""
        return (index // self.run) % self.lanes

    def _in_lane(self, index: int) -> tuple[Positions, int]:
        lane = self.lane_of(index)
        pass_index = index // self.count
        k = self._taken(index, lane) - self._taken(pass_index * self.count, lane)
        return self._lane(pass_index, lane), k

    def _taken(self, index: int, lane: int) -> int:
        """How many of the samples before `index` are of a lane."""
        cycles, rest = divmod(index, self.run * self.lanes)
        return cycles * self.run + min(max(rest - lane * self.run, 0), self.run)

    def _make_lane(self, pass_index: int, lane: int) -> Positions:
        begin, end = pass_index * self.count, (pass_index + 1) * self.count
        lengths = [self._taken(end, k) - self._taken(begin, k) for k in range(self.lanes)]
        start, length = sum(lengths[:lane]), lengths[lane]
        shards = np.random.default_rng([self.seed, SHARDS, pass_index]).permutation(
            len(self.counts)
        )
        ends = self.counts[shards].cumsum()
        parts = [np.empty(0, dtype=np.int64)]
        for k in range(
            int(np.searchsorted(ends, start, side="right")), len(shards) if length else 0
        ):
            shard_start = int(ends[k] - self.counts[shards[k]])
            if shard_start >= start + length:
                break
            low, high = max(start, shard_start), min(start + length, int(ends[k]))
            parts.append(np.arange(low, high) - shard_start + self._firsts[shards[k]])
        order = np.concatenate(parts)
        # A sample's turn is its place and up to a window's length more: sorting by that moves each
        # by less than a window, as a buffer does.
        draw = np.random.default_rng([self.seed, WINDOW, pass_index, lane])
        turns = np.arange(len(order)) + draw.random(len(order)) * self.window
        return order[np.argsort(turns, kind="stable")]


class BucketOrder:
    """Regroups an order so that each batch is of one bucket, with no sample left out or repeated.

    Each bucket is an endless queue that the passes fill in the order of `base`; whenever `batch` of
    its samples are there, they are the next batch. What is left of a pass waits for the next one.

    Args:
        base: the order that is regrouped.
        buckets: int (count,): bucket of each position.
        batch: samples of a batch.
    """

    def __init__(self, base: Order, buckets: Sequence[int] | NDArray[np.int8], batch: int) -> None:
        self.base = base
        self.count = base.count
        self.batch = batch
        self.buckets = np.asarray(buckets)
        self._sizes = {int(k): int(n) for k, n in zip(*np.unique(self.buckets, return_counts=True))}  # noqa: B905
        self._table = lru_cache(maxsize=2)(self._make_table)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_table"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._table = lru_cache(maxsize=2)(self._make_table)

    def place(self, index: int) -> tuple[int, int]:
        """See `Order`. The pass is the one that the sample is of, not that of its batch."""
        filled, row, k = self._locate(index)
        passes, positions = self._table(filled)
        return int(passes[row, k]), int(positions[row, k])

    def bucket(self, index: int) -> int:
        """The bucket of the batch that sample `index` of the stream is in."""
        filled, row, _ = self._locate(index)
        return int(self.buckets[self._table(filled)[1][row, 0]])

    def instead(self, index: int) -> Iterator[int]:
        """See `Order`."""
        _, position = self.place(index)
        of_bucket = np.flatnonzero(self.buckets == self.buckets[position])
        here = int(np.searchsorted(of_bucket, position))
        for step in range(1, len(of_bucket)):
            yield int(of_bucket[(here + step) % len(of_bucket)])

    def positions(self, pass_index: int) -> Positions:
        """The positions of the batches that a pass completes, in the order of the stream."""
        return self._table(pass_index)[1].reshape(-1)

    def _batches_before(self, pass_index: int) -> int:
        return sum(size * pass_index // self.batch for size in self._sizes.values())

    def _locate(self, index: int) -> tuple[int, int, int]:
        """(pass that completes its batch, which batch of that pass, place in the batch)."""
        batch, k = divmod(index, self.batch)
        filled = batch * self.batch // self.count
        while self._batches_before(filled + 1) <= batch:
            filled += 1
        while self._batches_before(filled) > batch:
            filled -= 1
        return filled, batch - self._batches_before(filled), k

    def _make_table(self, pass_index: int) -> tuple[Positions, Positions]:
        """int64 (batches, batch): pass and position of each sample, of the batches completed."""
        order = self.base.positions(pass_index)
        buckets = self.buckets[order]
        done: list[tuple[int, Positions, Positions]] = []
        for bucket, size in self._sizes.items():
            places = np.flatnonzero(buckets == bucket)
            waiting = size * pass_index % self.batch
            passes, queue = self._waiting(bucket, size, pass_index, waiting)
            queue = np.concatenate([queue, order[places]])
            passes = np.concatenate([passes, np.full(size, pass_index, dtype=np.int64)])
            for end in range(self.batch, len(queue) + 1, self.batch):
                rows = slice(end - self.batch, end)
                done.append((int(places[end - 1 - waiting]), passes[rows], queue[rows]))
        done.sort(key=lambda item: item[0])
        empty = np.empty((0, self.batch), dtype=np.int64)
        if not done:
            return empty, empty
        return np.stack([row[1] for row in done]), np.stack([row[2] for row in done])

    def _waiting(
        self, bucket: int, size: int, pass_index: int, waiting: int
    ) -> tuple[Positions, Positions]:
        """Pass and position of the samples of a bucket that earlier passes left in its queue."""
        passes = [np.empty(0, dtype=np.int64)]
        positions = [np.empty(0, dtype=np.int64)]
        earlier = pass_index - 1
        while waiting:
            order = self.base.positions(earlier)
            last = order[self.buckets[order] == bucket][-min(waiting, size) :]
            positions.insert(0, last)
            passes.insert(0, np.full(len(last), earlier, dtype=np.int64))
            waiting -= len(last)
            earlier -= 1
        return np.concatenate(passes), np.concatenate(positions)


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """The size (height, width) whose aspect ratio is nearest, as a ratio of ratios."""
    ratio = height / width
    return min(range(len(sizes)), key=lambda k: abs(np.log(ratio * sizes[k][1] / sizes[k][0])))
