"""The order of samples out of shards, and that no kill changes it."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sla.data.module import DataConfig, VideoDataModule
from sla.data.order import BucketOrder, PassOrder, ShardOrder, nearest_bucket
from sla.data.testing import write_shards
from sla.files import write_text

COUNTS = [7, 4, 9, 1, 6]
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, COUNTS, frames=6, height=16, width=24)
    return root


def config(root, **changes):
    defaults = {"num_frames": 4, "height": 16, "width": 16, "batch_size": 2, "seed": 5}
    return DataConfig(
        source="webdataset",
        shards=[str(root / "*.tar")],
        shard_cache=str(root / "cache"),
        **{"shuffle_window": 4, "shard_lanes": 4, "val_fraction": 0.0, **defaults, **changes},
    )


def train_batches(cfg, count, start=0, rank=0, world_size=1):
    data = VideoDataModule(cfg)
    data._rank = lambda: (rank, world_size)
    data.start_sample = start
    return list(itertools.islice(iter(data.train_dataloader()), count))


def samples_of(batches):
    """{sample index: (name, caption, video)}"""
    return {
        index: (batch["clip_id"][k], batch["caption"][k], batch["video"][k])
        for batch in batches
        for k, index in enumerate(batch["sample_index"].tolist())
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for index in a:
        assert a[index][:2] == b[index][:2]
        assert torch.equal(a[index][2], b[index][2])


# Orders


orders = st.builds(
    ShardOrder,
    st.integers(0, 5),
    st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    lanes=st.integers(1, 6),
    run=st.integers(1, 5),
    window=st.integers(1, 30),
)


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 3))
def test_a_pass_has_every_sample_once(order, pass_index):
    indices = range(pass_index * order.count, (pass_index + 1) * order.count)
    places = [order.place(index) for index in indices]
    assert {p for p, _ in places} == {pass_index}
    positions = [p for _, p in places]
    assert sorted(positions) == list(range(order.count))
    assert order.positions(pass_index).tolist() == positions
    middle = indices[len(indices) // 2]
    others = list(order.instead(middle))
    assert sorted([order.place(middle)[1], *others]) == list(range(order.count))


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(1, 4), st.integers(1, 4))
def test_buckets_lose_and_repeat_nothing(base, batch, kinds):
    buckets = np.arange(base.count) ** 2 % 7 % kinds
    order = BucketOrder(base, buckets, batch)
    passes = 4
    total = order._batches_before(passes) * batch
    places = [order.place(index) for index in range(total)]
    assert len(set(places)) == total
    for first in range(0, total, batch):
        group = places[first : first + batch]
        assert {int(buckets[p]) for _, p in group} == {order.bucket(first)}
    # What is missing of the passes waits in a queue: fewer than a batch of each bucket.
    missing = {(e, p) for e in range(passes) for p in range(base.count)} - set(places)
    assert max(Counter(int(buckets[p]) for _, p in missing).values(), default=0) < batch
    position = places[-1][1] if places else 0
    if places:
        others = list(order.instead(total - 1))
        assert sorted([position, *others]) == np.flatnonzero(buckets == buckets[position]).tolist()


def test_the_seed_and_the_pass_decide():
    def first_pass(seed, pass_index=0):
        return ShardOrder(seed, [20] * 5, 4, 2, 10).positions(pass_index).tolist()

    assert first_pass(1) == first_pass(1)
    assert first_pass(1) != first_pass(2)
    assert first_pass(1) != first_pass(1, 1)


def test_a_lane_reads_few_shards_and_moves_samples_less_than_a_window():
    counts, lanes, window = [50] * 40, 8, 20
    order = ShardOrder(0, counts, lanes, 4, window)
    shard = order.positions(0) // 50
    lane = (np.arange(2000) // 4) % lanes
    for k in range(lanes):
        own = shard[lane == k]
        # 250 samples are 5 shards, or parts of 6.
        assert len(set(own.tolist())) <= 6
        # In any stretch of the window's length, no more shards than it and its fringes span.
        for start in range(0, 250 - window, 7):
            assert len(set(own[start : start + window].tolist())) <= 3
        positions = order.positions(0)[lane == k]
        unshuffled = ShardOrder(0, counts, lanes, 4, 1).positions(0)[lane == k]
        places = {p: i for i, p in enumerate(unshuffled.tolist())}
        moved = np.array([i - places[p] for i, p in enumerate(positions.tolist())])
        assert np.abs(moved).max() < window
        assert np.abs(moved).mean() > window / 5


def test_workers_and_ranks_have_shards_of_their_own():
    """With lanes a multiple of ranks x workers: on a border at most, a shard is shared."""
    ranks, workers, batch = 2, 2, 4
    order = ShardOrder(3, [40] * 32, 8, batch, 30)
    readers = {}
    for index in range(order.count):
        step, rank = divmod(index // batch, ranks)
        shard = order.place(index)[1] // 40
        readers.setdefault(shard, set()).add((rank, step % workers))
    shared = [shard for shard, who in readers.items() if len(who) > 1]
    assert len(shared) < 8
    assert len(readers) == 32


def test_orders_travel_to_spawned_workers():
    order = BucketOrder(ShardOrder(1, [5, 9], 2, 2, 3), [k % 2 for k in range(14)], 2)
    order.place(3)
    again = pickle.loads(pickle.dumps(order))
    assert [again.place(k) for k in range(20)] == [order.place(k) for k in range(20)]


def test_a_very_large_set_is_planned_quickly():
    order = ShardOrder(0, [1000] * 10_000, 16, 8, 4096)
    start = time.perf_counter()
    places = [order.place(5 * 10**7 + k)[1] for k in range(64)]
    assert time.perf_counter() - start < 5
    assert len(set(places)) == 64


def test_nearest_bucket():
    sizes = [(64, 64), (48, 80), (80, 48)]
    assert [nearest_bucket(h, w, sizes) for h, w in ((9, 10), (9, 16), (1920, 1080))] == [0, 1, 2]
    assert nearest_bucket(1, 1000, sizes) == 1


def test_a_pass_order_names_the_next_ones():
    order = PassOrder(2, 9)
    row = order.positions(1).tolist()
    assert [order.place(9 + k) for k in range(9)] == [(1, p) for p in row]
    assert list(order.instead(9 + 7)) == [*row[8:], *row[:7]]


# The stream


def test_batch(root):
    (batch,) = train_batches(config(root, height=12, width=20, batch_size=3), 1)
    assert batch["video"].shape == (3, 3, 4, 12, 20)
    assert batch["video"].dtype == torch.float32
    assert -1 <= batch["video"].min() < batch["video"].max() <= 1
    assert batch["sample_index"].tolist() == [0, 1, 2]
    assert all(name.count("/") == 1 for name in batch["clip_id"])


@pytest.mark.filterwarnings("ignore:.*worker processes")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_workers(root, workers):
    plain = samples_of(train_batches(config(root), 20))
    assert_same(plain, samples_of(train_batches(config(root, num_workers=workers), 20)))


def test_ranks_share_out_what_one_process_reads(root):
    single = samples_of(train_batches(config(root), 24))
    ranks = [train_batches(config(root), 12, rank=r, world_size=2) for r in range(2)]
    assert_same(single, {**samples_of(ranks[0]), **samples_of(ranks[1])})


def test_every_sample_once_per_pass_with_its_own_draws(root):
    found = samples_of(train_batches(config(root, caption_dropout=0.3), 3 * TOTAL // 2))
    names = [found[k][0] for k in range(len(found))]
    for p in range(2):
        assert len(set(names[p * TOTAL : (p + 1) * TOTAL])) == TOTAL
    dropped = 0
    for name, caption, _ in found.values():
        dropped += caption == ""
        assert caption in ("", f"sample {int(name.split('/')[1])}")
    assert 10 <= dropped <= 45
    # Draws are of (seed, pass, sample), so another order leaves them.
    other = samples_of(train_batches(config(root, shuffle_window=50, caption_dropout=0.3), 13))
    by_name = {name: (caption, video) for name, caption, video in other.values()}
    same = [k for k in range(TOTAL) if names[k] in by_name]
    assert len(same) > TOTAL / 2
    assert [names[k] for k in same] != [other[k][0] for k in sorted(other)][: len(same)]
    for k in same:
        caption, video = by_name[names[k]]
        assert caption == found[k][1]
        assert torch.equal(video, found[k][2])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_where_training_stood(root, workers):
    whole = samples_of(train_batches(config(root), 22))
    data = VideoDataModule(config(root, num_workers=workers))
    batches = iter(data.train_dataloader())
    before = [next(batches) for _ in range(7)]  # workers have fetched more by now
    data.set_consumed(14)
    state = json.loads(json.dumps(data.state_dict()))
    del batches
    again = VideoDataModule(config(root, num_workers=workers))
    again.load_state_dict(state)
    after = list(itertools.islice(iter(again.train_dataloader()), 15))
    assert_same(whole, samples_of(before + after))


def test_validation_of_shards(root):
    cfg = config(root, val_fraction=0.4, val_windows=2, batch_size=3)
    data = VideoDataModule(cfg)
    whole = samples_of(list(data.val_dataloader()))
    trained = {b["clip_id"][k] for b in train_batches(cfg, 12) for k in range(3)}
    names = [whole[k][0] for k in range(len(whole))]
    assert len(names) == 2 * len(set(names))
    assert not set(names) & trained
    assert len(set(names)) + len(trained) == TOTAL
    assert [c.caption for c in data.val_clips] == [whole[k][1] for k in range(0, len(whole), 2)]
    few = VideoDataModule(config(root, val_fraction=0.4, val_clips=3))
    assert [len(b["clip_id"]) for b in few.val_dataloader()] == [2, 1]
    assert len(few.val_clips) == 3
    assert VideoDataModule(config(root)).val_dataloader() == []


# Kill -9


STEPS, EVERY = 36, 5


def train_rank(rank, root, folder, attempt, workers):
    """A rank of a run: logs what it consumes, keeps checkpoints, goes on from the last one."""
    os.setpgrp()
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{attempt}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    data = VideoDataModule(config(root, num_workers=workers))
    step = 0
    checkpoint = folder / "checkpoint.json"
    if checkpoint.exists():
        stored = json.loads(checkpoint.read_text())
        step = stored["step"]
        data.load_state_dict(stored["data"])
    with (folder / f"log-{rank}").open("a") as log:
        for batch in data.train_dataloader():
            torch.distributed.all_reduce(torch.zeros(1))  # the step of both
            line = [step, attempt, batch["clip_id"], batch["caption"], float(batch["video"].sum())]
            log.write(json.dumps(line) + "\n")
            log.flush()
            step += 1
            data.set_consumed(data.consumed + 2 * len(batch["clip_id"]))
            time.sleep(0.01)
            if step % EVERY == 0 and rank == 0:
                write_text(checkpoint, json.dumps({"step": step, "data": data.state_dict()}))
            if step == STEPS:
                break
    write_text(folder / f"done-{rank}", "")


def lines_of(folder, rank):
    path = folder / f"log-{rank}"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_again_and_again_sees_what_it_would_have_seen(root, tmp_path, workers):
    context = multiprocessing.get_context("fork")
    random.seed(workers)
    kills = 0
    for attempt in range(20):
        processes = [
            context.Process(target=train_rank, args=(rank, root, tmp_path, attempt, workers))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        target = random.randint(2, 14)  # steps of this attempt after which it is killed
        deadline = time.monotonic() + 60
        victims = 0
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, "a run hangs"
            ran = sum(line[1] == attempt for line in lines_of(tmp_path, 0))
            if kills < 4 and ran >= target:
                for process in processes:
                    os.killpg(process.pid, signal.SIGKILL)
                victims = 1
                break
            time.sleep(0.005)
        for process in processes:
            process.join()
        kills += victims
        if not victims:
            break
    assert kills == 4
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(2))

    for rank in range(2):
        expected = train_batches(config(root), STEPS, rank=rank, world_size=2)
        lines = lines_of(tmp_path, rank)
        repeated = 0
        seen = {}
        for step, _, names, captions, total in lines:
            batch = expected[step]
            assert (names, captions) == (batch["clip_id"], batch["caption"])
            assert total == pytest.approx(float(batch["video"].sum()), rel=1e-6)
            repeated += step in seen
            seen[step] = names
        assert sorted(seen) == list(range(STEPS))
        assert repeated > 0, "no kill fell between two checkpoints"
    both = [
        name
        for step in range(STEPS)
        for rank in range(2)
        for name in [n for line in lines_of(tmp_path, rank) if line[0] == step for n in line[2]][:2]
    ]
    for p in range(len(both) // TOTAL):
        assert len(set(both[p * TOTAL : (p + 1) * TOTAL])) == TOTAL
