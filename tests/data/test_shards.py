"""Shards: what lies where in a tar file, and how remote ones come here."""

import http.server
import io
import itertools
import json
import os
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import webdataset

from sla.data import shards
from sla.data.manifest import DataError
from sla.data.module import DataConfig, VideoDataModule
from sla.data.shards import (
    ShardError,
    ShardSource,
    ShardStore,
    expand_urls,
    index_tar,
    load_index,
    plan_shards,
    with_patience,
)
from sla.data.testing import write_shards

COUNTS = [5, 3, 6]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, COUNTS)
    return root


def store(tmp_path, **changes):
    return ShardStore(tmp_path / "cache", **{"pause": 0.01, "timeout": 20.0, **changes})


def plan(patterns, where, **changes):
    defaults = {"val_fraction": 0.0, "max_failure_share": 0.0}
    return plan_shards(patterns, [], where, **{**defaults, **changes})


def config(tmp_path, *patterns, **changes):
    defaults = {"num_frames": 4, "height": 16, "width": 16, "batch_size": 2, "val_fraction": 0.0}
    return DataConfig(
        source="webdataset",
        shards=[str(p) for p in patterns],
        shard_cache=str(tmp_path / "cache"),
        **{**defaults, **changes},
    )


# Names


def test_braces_and_stars(root, tmp_path):
    names = [str(root / f"{k:05d}.tar") for k in range(3)]
    assert expand_urls([str(root / "{00000..00002}.tar")]) == names
    assert expand_urls([str(root / "*.tar")]) == names
    assert expand_urls([str(root / "0000{0,2}.tar"), str(root / "*.tar")]) == [
        *(names[0], names[2], names[1])
    ]
    urls = ["https://host/{0..2}.tar?key=a*b", "s3://bucket/x.tar"]
    assert expand_urls(urls) == [
        *(f"https://host/{k}.tar?key=a*b" for k in range(3)),
        "s3://bucket/x.tar",
    ]


def test_stars_in_urls_are_expanded_by_fsspec(root):
    assert expand_urls([f"file://{root}/0000[01].tar"]) == [
        f"file://{root}/0000{k}.tar" for k in range(2)
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere/*.tar", "nothing matches"),
        ("a/{0..3.tar", "Unbalanced"),
        ("a.tar.gz", "must be an uncompressed .tar"),
        ("neverheardof://x/*.tar", "cannot list"),
    ],
)
def test_wrong_patterns(pattern, message):
    with pytest.raises(DataError, match=message):
        expand_urls([pattern])


# The index


def test_samples_are_those_of_webdataset(root, tmp_path):
    names = expand_urls([str(root / "*.tar")])
    source = ShardSource(plan(names, store(tmp_path)).train, store(tmp_path))
    theirs = list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False))
    assert len(source) == len(theirs) == sum(COUNTS)
    for position, sample in enumerate(theirs):
        ours = source.read(position)
        assert ours.id == f"{os.path.basename(sample['__url__'])[:-4]}/{sample['__key__']}"
        assert ours.id == source.name(position)
        assert ours.video.getvalue() == sample["mp4"]
        text = sample.get("txt") or json.loads(sample["json"])["caption"].encode()
        assert ours.caption.encode() == text
        assert source.caption(position) == ours.caption == f"sample {position}"


def tar_of(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_other_members_folders_and_formats(tmp_path):
    members = [
        ("__meta__.json", b"{}"),
        ("deep/er/a.MP4", b"video a"),
        ("deep/er/a.other.txt", b"not the caption"),
        ("deep/er/a.txt", b"  text\n a "),
        ("readme", b"no ending"),
        ("b.webm", b"video b"),
        ("b.json", b'{"caption": null, "prompt": "text b"}'),
        ("long-" + 200 * "x" + ".mp4", b"video c"),
        ("long-" + 200 * "x" + ".txt", "größer".encode()),
        ("d.txt", b"a caption alone"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar_of(tmp_path / f"{form}.tar", members, format=form)
        source = ShardSource(plan([str(path)], store(tmp_path)).train, store(tmp_path))
        source._caption_field = "prompt"
        assert len(source) == 4
        read = [source.read(k) for k in range(3)]
        assert [r.video.getvalue() for r in read] == [b"video a", b"video b", b"video c"]
        assert [r.caption for r in read] == ["text a", "text b", "größer"]
        assert read[0].id == f"{form}/deep/er/a"


def test_the_index_is_kept_until_the_file_changes(root, tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    path.write_bytes((root / "00000.tar").read_bytes())
    first = load_index(str(path), store(tmp_path))
    monkeypatch.setattr(shards, "index_tar", None)  # not called any more
    again = load_index(str(path), store(tmp_path))
    assert again.keys == first.keys
    assert again.sizes is None
    np.testing.assert_array_equal(again.places, first.places)
    with_sizes = load_index(str(path), store(tmp_path), sizes=True)
    assert with_sizes.sizes.tolist() == [[32, 48]] * 5
    assert load_index(str(path), store(tmp_path), sizes=True).sizes.tolist() == [[32, 48]] * 5
    monkeypatch.undo()
    path.write_bytes((root / "00001.tar").read_bytes())
    assert len(load_index(str(path), store(tmp_path)).keys) == 3
    kept = next((tmp_path / "cache" / "index").glob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:50])
    assert len(load_index(str(path), store(tmp_path)).keys) == 3


def test_not_a_tar_file(tmp_path):
    for name, data in (("empty", b""), ("text", b"x" * 5000), ("zip", b"PK\3\4" + bytes(600))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ShardError, match=r"not a tar file|is empty"):
            index_tar(tmp_path / name)
    with pytest.raises(ShardError, match="No such file"):
        index_tar(tmp_path / "nowhere")


def test_every_cut_of_a_shard_keeps_what_lies_before_it(root, tmp_path):
    data = (root / "00000.tar").read_bytes()
    whole = index_tar(root / "00000.tar")
    ends = whole.places[:, :, :].sum(-1).max(-1)  # last byte of each sample
    path = tmp_path / "cut.tar"
    for cut in range(2000, len(data), 1777):
        path.write_bytes(data[:cut])
        index = index_tar(path)
        complete = int((ends <= cut).sum())
        assert index.keys[:complete] == whole.keys[:complete]
        assert len(index.keys) <= complete + 2  # one that lacks its caption, one for the rest
        np.testing.assert_array_equal(index.places[:complete, 0], whole.places[:complete, 0])
        # A cut among members leaves a sound file; one within a member is noticed.
        inside = any(o < cut < o + s for o, s in whole.places[:, 0].tolist())
        assert bool(index.damage) >= inside


def test_a_spoiled_header_ends_the_index(root, tmp_path):
    whole = index_tar(root / "00000.tar")
    data = bytearray((root / "00000.tar").read_bytes())
    header = int(whole.places[2, 0, 0]) - 512
    data[header : header + 512] = b"\x81" * 512
    (tmp_path / "bad.tar").write_bytes(data)
    index = index_tar(tmp_path / "bad.tar")
    assert index.keys[:2] == whole.keys[:2]
    assert index.damage == f"damaged at byte {header - 1024}"  # a PAX header lies before it
    assert len(index.keys) == 3  # one for what was lost
    # A size below zero would lead back to an earlier header.
    data = bytearray((root / "00000.tar").read_bytes())
    data[header + 124 : header + 136] = b"\xff" * 11 + b"\x80"
    total = sum(data[header : header + 148]) + 8 * 32 + sum(data[header + 156 : header + 512])
    data[header + 148 : header + 156] = f"{total:06o}\0 ".encode()
    (tmp_path / "back.tar").write_bytes(data)
    assert index_tar(tmp_path / "back.tar").keys[:2] == whole.keys[:2]


# Splits


def test_the_validation_share_of_a_shard_never_moves(root, tmp_path):
    pattern = [str(root / "*.tar")]
    half = plan(pattern, store(tmp_path), val_fraction=0.5)
    counts = Counter()
    for split in (half.train, half.val):
        for shard in split:
            counts[shard.name] += len(shard.members)
    assert [counts[f"{k:05d}"] for k in range(3)] == COUNTS
    assert 0 < sum(len(s.members) for s in half.val) < sum(COUNTS)
    fewer = plan([str(root / "0000[02].tar")], store(tmp_path), val_fraction=0.5)
    for shard in fewer.val:
        (same,) = [s for s in half.val if s.name == shard.name]
        np.testing.assert_array_equal(shard.members, same.members)


def test_shards_of_their_own_for_validation(root, tmp_path):
    given = {"val_fraction": 0.5, "max_failure_share": 0.0}
    train, val = [str(root / "0000{0,1}.tar")], [str(root / "00002.tar")]
    found = plan_shards(train, val, store(tmp_path), **given)
    assert [len(s.members) for s in found.train] == COUNTS[:2]
    assert [len(s.members) for s in found.val] == COUNTS[2:]
    with pytest.raises(DataError, match=r"data\.val_shards: .*00001\.tar is one of data\.shards"):
        plan_shards(train, [str(root / "00001.tar")], store(tmp_path), **given)


def test_names_that_several_shards_share_are_whole(root, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes((root / "00000.tar").read_bytes())
    found = plan([str(tmp_path / "*/0.tar"), str(root / "00001.tar")], store(tmp_path))
    assert [s.name for s in found.train] == [
        *(str(tmp_path / "a/0.tar"), str(tmp_path / "b/0.tar")),
        "00001",
    ]


# Remote shards


class Server:
    """Serves a folder; a path's first answers can be made to fail."""

    def __init__(self, root):
        self.requests = Counter()
        self.fail = {}  # name: list of what to do instead, one after the other
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                outer.requests[name] += 1
                how = outer.fail[name].pop(0) if outer.fail.get(name) else "answer"
                if how in ("404", "503") or not (root / name).is_file():
                    self.send_error(int(how) if how in ("404", "503") else 404)
                    return
                data = (root / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if how == "cut":
                    self.wfile.write(data[: len(data) // 2])
                elif how == "stall":
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    time.sleep(3)
                else:
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(root):
    made = Server(root)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_remote_shard_is_copied_once_and_read_as_a_local_one(root, tmp_path, server):
    where = store(tmp_path)
    remote = ShardSource(plan([f"{server.url}/00000.tar"], where).train, where)
    local = ShardSource(plan([str(root / "00000.tar")], where).train, where)
    for position in range(COUNTS[0]):
        a, b = remote.read(position), local.read(position)
        assert (a.id, a.caption, a.video.getvalue()) == (b.id, b.caption, b.video.getvalue())
    assert server.requests["00000.tar"] == 1


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_a_url_that_fails_twice_and_then_answers(root, tmp_path, server, fault):
    server.fail["00001.tar"] = [fault] * 2
    path = store(tmp_path, timeout=0.5).local(f"{server.url}/00001.tar")
    assert path.read_bytes() == (root / "00001.tar").read_bytes()
    assert server.requests["00001.tar"] == 3
    assert not list(path.parent.glob(".*"))  # nothing half-written


def test_a_url_that_never_answers(tmp_path, server):
    server.fail["00001.tar"] = ["503"] * 9
    with pytest.raises(ShardError, match=r"503.*\(3 attempts\)"):
        store(tmp_path, retries=2).local(f"{server.url}/00001.tar")
    assert server.requests["00001.tar"] == 3
    with pytest.raises(ShardError, match=r"no shard .*nothing\.tar"):
        store(tmp_path).local(f"{server.url}/nothing.tar")
    assert server.requests["nothing.tar"] == 1  # it will not come by asking again
    with pytest.raises(ShardError, match="neverheardof"):
        store(tmp_path, retries=0).local("neverheardof://x/0.tar")


def test_with_patience_lets_slow_but_moving_work_finish():
    def slow(progress):
        for _ in range(6):
            time.sleep(0.05)
            progress()
        return "done"

    assert with_patience(slow, 0.2) == "done"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no progress for 0\.1 seconds"):
        with_patience(lambda progress: time.sleep(5), 0.1)
    assert time.monotonic() - start < 2
    with pytest.raises(ZeroDivisionError):
        with_patience(lambda progress: 1 / 0, 1.0)


def test_old_copies_make_room(root, tmp_path, server):
    sizes = [(root / f"{k:05d}.tar").stat().st_size for k in range(3)]
    where = store(tmp_path, limit_gib=(sizes[0] + sizes[2] + 10) / 2**30)
    first = where.local(f"{server.url}/00000.tar")
    second = where.local(f"{server.url}/00001.tar")
    os.utime(second, (1, 1))  # longest unused
    with first.open("rb") as opened:
        third = where.local(f"{server.url}/00002.tar")
        assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
        small = store(tmp_path, limit_gib=0)
        small.local(f"{server.url}/00001.tar")
        assert [p.exists() for p in (first, second, third)] == [False, True, False]
        assert len(opened.read()) == sizes[0]


def test_statistics_beside_a_shard_spare_the_copy_at_the_start(root, tmp_path, server):
    (root / "00002_stats.json").write_text(json.dumps({"successes": COUNTS[2]}))
    data = VideoDataModule(config(tmp_path, f"{server.url}/00002.tar", seed=4))
    data.setup()
    assert server.requests == {"00002_stats.json": 1}
    copied = [b["clip_id"] for b in itertools.islice(iter(data.train_dataloader()), 3)]
    assert server.requests["00002.tar"] == 1
    # The same order as with the shard at hand, and no second question.
    local = VideoDataModule(config(tmp_path, root / "00002.tar", seed=4))
    assert copied == [b["clip_id"] for b in itertools.islice(iter(local.train_dataloader()), 3)]
    VideoDataModule(config(tmp_path, f"{server.url}/00002.tar")).setup()
    assert server.requests["00002_stats.json"] == 1
    (root / "00002_stats.json").unlink()


def test_two_processes_copy_a_shard_once(root, tmp_path, server):
    cfg = config(tmp_path, f"{server.url}/{{00000..00002}}.tar", num_workers=2, batch_size=1)
    data = VideoDataModule(cfg)
    found = [b["clip_id"][0] for b in itertools.islice(iter(data.train_dataloader()), sum(COUNTS))]
    assert len(set(found)) == sum(COUNTS)
    assert {server.requests[f"{k:05d}.tar"] for k in range(3)} == {1}
