"""Tar files of videos with captions, as webdataset and video2dataset write them.

A sample is the members of a tar file that share a name up to its first dot: a video (`.mp4`, ...)
with its caption in a `.txt`, or in a field of a `.json`. Names are split and braces are expanded by
webdataset's own functions; its readers are not used, as they know no position in a tar file.
Instead each shard is indexed once: where each member lies. Then reading any sample is a seek, and
the order of training a plan made from counts (`sla.data.order`). The index of a local shard
takes one seek a member and is kept in a file.

A remote shard is copied whole to a local folder when a sample of it is first needed: any server and
object store that fsspec knows can do that, one large transfer is what they do best, and a shuffled
order within a shard needs it at hand. The index wants the copy too, unless the shard's statistics
lie beside it, as video2dataset writes them (`00000_stats.json` with `successes`): they hold the
count, which is all that planning needs.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import re
import tarfile
import threading
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sla.data.decode import shown_size
from sla.data.manifest import DataError
from sla.data.video import VIDEO_SUFFIXES, VideoError
from sla.files import atomic_path, locked, sha256, stable_number, write_text

log = logging.getLogger(__name__)
T = TypeVar("T")

_CHUNK = 2**20
_INDEX_VERSION = 1
_OPEN_SHARDS = 16  # that a process keeps open
_FORGIVE = 300.0  # seconds after which a shard that could not be read is tried again
_LARGEST_TEXT = 2**20
_VIDEO, _TEXT, _JSON = range(3)


class ShardError(Exception):
    """A shard that cannot be fetched or read; says which and why."""


def is_remote(url: str) -> bool:
    """Whether it names a place that fsspec must be asked for."""
    return re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+://", url) is not None


def expand_urls(patterns: Sequence[str]) -> list[str]:
    """The shards that patterns name: braces expanded, then `*`, `?` and `[]` in paths and URLs.

    Returns:
        URLs and paths, each once, in the order of the patterns, sorted where one matches several.

    Raises:
        DataError: a pattern matches nothing, or braces that cannot be expanded.
    """
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"data.shards: {pattern!r}: {error}") from None
        matches: list[str] = []
        for name in names:
            matches += _match(name)
        if not matches:
            raise DataError(f"data.shards: nothing matches {pattern!r}")
        found |= dict.fromkeys(matches)
    compressed = [name for name in found if not name.split("?")[0].endswith(".tar")]
    if compressed:
        raise DataError(
            f"data.shards: {compressed[0]} must be an uncompressed .tar: samples are read by place"
        )
    return list(found)


def _match(name: str) -> list[str]:
    if is_remote(name):
        # A question mark is a URL's own; in http there is no list to match against anyway.
        if name.startswith(("http://", "https://")) or not re.search(r"[*\[]", name):
            return [name]
        import fsspec

        try:
            system, _ = fsspec.core.url_to_fs(name)
            return sorted(system.unstrip_protocol(path) for path in system.glob(name))
        except Exception as error:  # each store's client raises errors of its own
            raise DataError(f"data.shards: cannot list {name!r}: {_first_line(error)}") from None
    if glob.has_magic(name) and not os.path.exists(name):
        return sorted(glob.glob(name, recursive=True))
    return [name]  # a file that is not there is a fault that is counted


def with_patience(what: Callable[[Callable[[], None]], T], timeout: float) -> T:
    """Runs a function that calls its argument whenever it gets on, and gives up when it does not.

    It runs in a thread of its own, because a read from a dead connection may return never.

    Raises:
        TimeoutError: no progress within `timeout` seconds. The thread is left behind; at its next
            sign of life it ends.
    """
    state: dict[str, Any] = {"seen": time.monotonic()}
    done = threading.Event()

    def progress() -> None:
        if state.get("left"):
            raise TimeoutError("given up")
        state["seen"] = time.monotonic()

    def run() -> None:
        try:
            state["result"] = what(progress)
        except BaseException as error:
            state["error"] = error
        done.set()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(max(0.01, state["seen"] + timeout - time.monotonic())):
        if time.monotonic() - state["seen"] >= timeout:
            state["left"] = True
            raise TimeoutError(f"no progress for {timeout:g} seconds")
    if "error" in state:
        raise state["error"]
    result: T = state["result"]
    return result


class ShardStore:
    """Where shards lie on this machine: themselves, or copies of remote ones.

    Processes share the folder; a lock sees to it that one copies and the others wait.

    Args:
        folder: of copies (`shards/`) and indices (`index/`).
        limit_gib: GiB of copies that are kept; the longest unused go. A file that is open stays
            readable.
        retries: how often a transfer is tried again.
        timeout: seconds without progress after which a transfer fails.
        pause: seconds before the first retry; each further one waits twice as long.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit_gib: float = 20.0,
        retries: int = 4,
        timeout: float = 60.0,
        pause: float = 0.5,
    ) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_gib * 2**30
        self.retries = retries
        self.timeout = timeout
        self.pause = pause

    def local(self, url: str) -> Path:
        """The shard as a file, copied first if it is remote.

        Raises:
            ShardError: it cannot be had.
        """
        if not is_remote(url):
            if not os.path.isfile(url):
                raise ShardError(f"no shard {url}")
            return Path(url)
        path = self.folder / "shards" / f"{sha256(url.encode())[:24]}.tar"
        with locked(path.with_suffix(".lock")):
            if path.is_file():
                os.utime(path)  # used last now
            else:
                with atomic_path(path) as part:
                    self._copy(url, part)
                self._evict(path)
        return path

    def fetch(self, url: str) -> bytes | None:
        """A small remote file beside a shard, None if there is none or it cannot be had."""
        import fsspec

        def get(progress: Callable[[], None]) -> bytes:
            system, path = fsspec.core.url_to_fs(url)
            return bytes(system.cat_file(path))

        try:
            return with_patience(get, self.timeout)
        except Exception:  # it is a help, no more
            return None

    def _copy(self, url: str, target: Path) -> None:
        for number in range(self.retries + 1):
            # A name of its own: an attempt that was given up may still be writing.
            part = target.with_name(f"{target.name}.{number}")
            try:
                with_patience(partial(_transfer, url, part), self.timeout)
                os.replace(part, target)
                return
            except FileNotFoundError:
                raise ShardError(f"no shard {url}") from None
            except (ImportError, ValueError) as error:  # a client that is missing, or no protocol
                raise ShardError(f"{url}: {_first_line(error)}") from None
            except Exception as error:  # each store's client raises errors of its own
                if number == self.retries:
                    tries = f"{number + 1} attempt{'s' if number else ''}"
                    raise ShardError(f"{url}: {_first_line(error)} ({tries})") from None
                log.info("%s: %s; trying again", url, _first_line(error))
                time.sleep(self.pause * 2**number)
            finally:
                part.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        copies = sorted(
            ((path.stat(), path) for path in keep.parent.glob("*.tar") if path != keep),
            key=lambda item: item[0].st_mtime,
        )
        total = keep.stat().st_size + sum(stat.st_size for stat, _ in copies)
        for stat, path in copies:
            if total <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _transfer(url: str, target: Path, progress: Callable[[], None]) -> None:
    import fsspec

    class Progress(fsspec.callbacks.Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            progress()

    system, path = fsspec.core.url_to_fs(url)
    system.get_file(path, os.fspath(target), callback=Progress())
    progress()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard lie.

    Attributes:
        keys: name of each sample in its shard.
        places: int64 (samples, 3, 2): offset and size of video, .txt and .json in the file; size -1
            where there is none.
        damage: why the shard is readable only up to here, or empty. Then its last sample is the one
            that was cut, or stands for what was lost.
        sizes: int32 (samples, 2): height and width of the videos as shown, 0 where unreadable; None
            if they were not asked for.
    """

    keys: list[str]
    places: NDArray[np.int64]
    damage: str = ""
    sizes: NDArray[np.int32] | None = None


def index_tar(path: str | os.PathLike[str]) -> ShardIndex:
    """Lists the samples of a tar file by its headers; what lies between them is not read.

    A tar file that ends in mid-file, or has a header that is none, is listed up to there.

    Raises:
        ShardError: not a tar file, or it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            return _index_tar(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ShardError(f"{os.fspath(path)}: {error.strerror or error}") from None


def _index_tar(file: BinaryIO, size: int) -> ShardIndex:
    from webdataset.tariterators import base_plus_ext

    if size == 0:
        raise ShardError(f"{file.name}: the file is empty")
    keys: list[str] = []
    places: list[list[list[int]]] = []
    damage = ""
    end = 0
    try:
        tar: Any  # `members` is not in its declared interface
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep them all
                if member.offset_data + member.size > size:
                    damage = f"it ends in mid-file ({member.name})"
                elif not end <= member.offset < tar.offset or member.size < 0:
                    # Headers with negative sizes would lead back, and round and round.
                    damage = f"damaged at byte {end}"
                    break
                end = tar.offset
                key, suffix = base_plus_ext(member.name)
                if member.isfile() and key is not None and os.path.basename(key)[:2] != "__":
                    kind = _kind(suffix)
                    if not keys or keys[-1] != key:
                        keys.append(key)
                        places.append([[0, -1], [0, -1], [0, -1]])
                    if kind is not None:
                        places[-1][kind] = [member.offset_data, member.size]
                if damage:
                    break
    except tarfile.ReadError:
        if not end:
            raise ShardError(f"{file.name}: not a tar file") from None
        damage = f"damaged at byte {end}"
    except Exception:  # of spoiled headers tarfile raises ValueError, UnicodeError and others
        damage = f"damaged at byte {end}"
    if not damage and end < size:
        # tarfile takes a header that it cannot read for the end. The true end is a block of zeros.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            damage = f"damaged at byte {end}"
    if damage and not damage.startswith("it ends"):
        keys.append(f"(from byte {end} on)")
        places.append([[0, -1], [0, -1], [0, -1]])
    array = np.asarray(places, dtype=np.int64).reshape(-1, 3, 2)
    return ShardIndex(keys, array, damage)


def _kind(suffix: str) -> int | None:
    suffix = f".{suffix.lower()}"
    if suffix in VIDEO_SUFFIXES:
        return _VIDEO
    return {".txt": _TEXT, ".json": _JSON}.get(suffix)


def load_index(url: str, store: ShardStore, *, sizes: bool = False) -> ShardIndex:
    """The index of a shard: from the store's folder if it was made before, else made now and kept.

    Args:
        url: of the shard.
        store: where it lies.
        sizes: also open each video for its size.

    Raises:
        ShardError: the shard cannot be had, or is no tar file.
    """
    kept = store.folder / "index" / f"{sha256(url.encode())[:24]}.npz"
    signature = _signature(url)
    index = _read_index(kept, signature)
    if index is None:
        index = index_tar(store.local(url))
    elif not sizes or index.sizes is not None:
        return index
    if sizes:
        index = ShardIndex(index.keys, index.places, index.damage, _sizes(store.local(url), index))
    stored = {
        "signature": np.array(signature),
        "keys": np.array(index.keys, dtype=np.str_),
        "places": index.places,
        "damage": np.array(index.damage),
    }
    if index.sizes is not None:
        stored["sizes"] = index.sizes
    try:
        with atomic_path(kept) as part:
            np.savez_compressed(part, **stored)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"data.shard_cache: {error}") from None
    return index


def _signature(url: str) -> str:
    """What tells another file of the same name; a remote shard is taken to be always the same."""
    if is_remote(url):
        return f"{_INDEX_VERSION}"
    try:
        stat = os.stat(url)
    except OSError:
        raise ShardError(f"no shard {url}") from None
    return f"{_INDEX_VERSION} {stat.st_size} {stat.st_mtime_ns}"


def _read_index(path: Path, signature: str) -> ShardIndex | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["signature"]) != signature:
                return None
            sizes = stored.get("sizes")
            return ShardIndex(
                stored["keys"].tolist(), stored["places"], str(stored["damage"]), sizes
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _sizes(path: Path, index: ShardIndex) -> NDArray[np.int32]:
    sizes = np.zeros((len(index.keys), 2), dtype=np.int32)
    with path.open("rb") as file:
        for k, (offset, size) in enumerate(index.places[:, _VIDEO].tolist()):
            if size > 0:
                try:
                    sizes[k] = shown_size(io.BytesIO(os.pread(file.fileno(), size, offset)))
                except VideoError:
                    continue  # counted when its turn comes
    return sizes


@dataclass(frozen=True)
class RawSample:
    """A sample before decoding: its stable name, the video's bytes, the caption."""

    id: str
    video: io.BytesIO
    caption: str


@dataclass(frozen=True)
class Shard:
    """One shard of a set.

    Attributes:
        url: path or URL.
        name: what its samples' names begin with.
        members: int64: the samples of the shard that belong to the set.
        sizes: int32 (len(members), 2) or None, see `ShardIndex`.
    """

    url: str
    name: str
    members: NDArray[np.int64]
    sizes: NDArray[np.int32] | None = None


class ShardSource:
    """The samples of shards, by position: those of the first shard, of the second, and so on.

    Args:
        shards: as `plan_shards` lists them.
        store: where they lie.
        caption_field: field of a .json that holds the caption.
        max_file_mib: the largest video that is read.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        store: ShardStore,
        *,
        caption_field: str = "caption",
        max_file_mib: float = 1024,
    ) -> None:
        self.shards = list(shards)
        self.counts = [len(shard.members) for shard in self.shards]
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self._store = store
        self._caption_field = caption_field
        self._max_bytes = max_file_mib * 2**20
        self._open: OrderedDict[int, tuple[ShardIndex, BinaryIO]] = OrderedDict()
        self._failed: dict[int, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker opens its own files.
        return {**self.__dict__, "_open": OrderedDict(), "_failed": {}}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, position: int) -> tuple[int, int]:
        """(which shard, which of its samples) a position is."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        place = position - (int(self._ends[shard]) - self.counts[shard])
        return shard, int(self.shards[shard].members[place])

    def name(self, position: int) -> str:
        """The sample's name, `<shard>/<key>`; with its number if the shard cannot be read."""
        shard, member = self.locate(position)
        try:
            index, _ = self._shard(shard)
            return f"{self.shards[shard].name}/{index.keys[member]}"
        except (VideoError, IndexError):
            return f"{self.shards[shard].name}/#{member}"

    def read(self, position: int) -> RawSample:
        """A sample, not decoded.

        Raises:
            VideoError: its shard cannot be read, or it has no video, a video that is too large, no
                caption, or a caption that is not UTF-8.
        """
        shard, member = self.locate(position)
        index, file = self._shard(shard)
        shard_name = self.shards[shard].name
        if member >= len(index.keys):
            reason = f"the shard has {len(index.keys)} samples, more were announced"
            raise VideoError(f"{shard_name}/#{member}", reason)
        name = f"{shard_name}/{index.keys[member]}"
        (offset, size), text, record = index.places[member].tolist()
        if size < 0:
            reason = index.damage if member == len(index.keys) - 1 else ""
            raise VideoError(name, reason or "no video")
        if size == 0:
            raise VideoError(name, "the file is empty")
        if size > self._max_bytes:
            reason = f"{size / 2**20:.0f} MiB are more than data.max_file_mib"
            raise VideoError(name, reason)
        caption = self._caption(name, file, text, record)
        return RawSample(name, io.BytesIO(_pread(name, file, offset, size)), caption)

    def caption(self, position: int) -> str:
        """The caption alone. Raises VideoError."""
        shard, member = self.locate(position)
        index, file = self._shard(shard)
        name = self.name(position)
        if member >= len(index.keys):
            raise VideoError(name, "no such sample")
        return self._caption(name, file, *index.places[member, 1:].tolist())

    def _caption(self, name: str, file: BinaryIO, text: list[int], record: list[int]) -> str:
        for (offset, size), what in ((text, ".txt"), (record, ".json")):
            if size < 0:
                continue
            if size > _LARGEST_TEXT:
                raise VideoError(name, f"its {what} has {size} bytes")
            try:
                caption: Any = _pread(name, file, offset, size).decode("utf-8-sig")
            except UnicodeDecodeError:
                raise VideoError(name, f"the caption is not UTF-8 text ({what})") from None
            if what == ".json":
                try:
                    fields = json.loads(caption)
                except (ValueError, RecursionError):
                    raise VideoError(name, "its .json is not JSON") from None
                caption = fields.get(self._caption_field) if isinstance(fields, dict) else None
                if not isinstance(caption, str):
                    raise VideoError(name, f"no text in field {self._caption_field!r} of its .json")
            caption = " ".join(caption.split())
            if caption:
                return str(caption)
            raise VideoError(name, f"the caption is empty ({what})")
        raise VideoError(name, "no caption")

    def _shard(self, number: int) -> tuple[ShardIndex, BinaryIO]:
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        shard = self.shards[number]
        when, reason = self._failed.get(number, (-_FORGIVE, ""))
        if time.monotonic() - when < _FORGIVE:
            raise VideoError(shard.name, reason)
        try:
            index = load_index(shard.url, self._store)
            file = self._store.local(shard.url).open("rb")
        except (ShardError, OSError) as error:
            self._failed[number] = (time.monotonic(), str(error))
            raise VideoError(shard.name, str(error)) from None
        self._open[number] = index, file
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1][1].close()
        return index, file


def _pread(name: str, file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        # pread: workers that were forked share the file's position.
        data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise VideoError(name, f"cannot be read: {error.strerror}") from None
    if len(data) < size:
        raise VideoError(name, "the shard ends in mid-file")
    return data


@dataclass(frozen=True)
class ShardPlan:
    """The shards of a set, and what is wrong with others."""

    train: list[Shard]
    val: list[Shard]
    faults: dict[str, str]


def plan_shards(
    patterns: Sequence[str],
    val_patterns: Sequence[str],
    store: ShardStore,
    *,
    val_fraction: float,
    max_failure_share: float,
    sizes: bool = False,
    first: int = 0,
) -> ShardPlan:
    """Counts the samples of all shards and splits them.

    Args:
        patterns, val_patterns: see `expand_urls`; without the latter, `val_fraction` of the samples
            of each shard validate, the same ones always.
        store: where shards and indices are kept.
        val_fraction: see above.
        max_failure_share: tolerated share of shards that cannot be read.
        sizes: also find out the size of each video.
        first: where to begin. Ranks that begin in different places find each other's indices.

    Raises:
        DataError: nothing found, or too many shards cannot be read.
    """
    urls = expand_urls(patterns)
    val_urls = [url for url in expand_urls(val_patterns) if val_patterns]
    both = set(urls) & set(val_urls)
    if both:
        raise DataError(f"data.val_shards: {min(both)} is one of data.shards too")
    everything = [*urls, *val_urls]
    names = _names(everything)
    faults: dict[str, str] = {}
    counts: dict[str, tuple[int, NDArray[np.int32] | None]] = {}

    def count(url: str) -> None:
        try:
            counts[url] = _count(url, store, sizes)
        except ShardError as error:
            faults[names[url]] = str(error)

    turned = everything[first % len(everything) :] + everything[: first % len(everything)]
    with ThreadPoolExecutor(8) as pool:
        bar = tqdm(total=len(turned), desc="indexing shards", unit="shard", delay=3, disable=None)
        for _ in pool.map(count, turned):
            bar.update()
        bar.close()
    for name, reason in sorted(faults.items()):
        log.warning("shard %s is left out: %s", name, reason)
    if len(faults) > max_failure_share * len(everything):
        shown = "\n".join(f"  {name}: {reason}" for name, reason in list(faults.items())[:10])
        raise DataError(
            f"{len(faults)} of {len(everything)} shards cannot be read; "
            f"data.max_failure_share allows {max_failure_share:g}\n{shown}"
        )
    train: list[Shard] = []
    val: list[Shard] = []
    for url in everything:
        if url not in counts:
            continue
        number, shapes = counts[url]
        validates = np.ones(number, dtype=bool)
        if url not in val_urls:
            share = 0.0 if val_urls else val_fraction
            validates = np.random.default_rng(stable_number(names[url])).random(number) < share
        for shards, chosen in ((train, ~validates), (val, validates)):
            members = np.flatnonzero(chosen)
            if len(members):
                part = None if shapes is None else shapes[members]
                shards.append(Shard(url, names[url], members, part))
    return ShardPlan(train, val, faults)


def _count(url: str, store: ShardStore, sizes: bool) -> tuple[int, NDArray[np.int32] | None]:
    """Number of samples, and their sizes if asked for. Raises ShardError."""
    if is_remote(url) and not sizes:
        announced = _announced(url, store)
        if announced is not None:
            return announced, None
    index = load_index(url, store, sizes=sizes)
    if index.damage:
        log.warning("shard %s: %s; %d samples are listed", url, index.damage, len(index.keys))
    return len(index.keys), index.sizes


def _announced(url: str, store: ShardStore) -> int | None:
    """Number of samples by the statistics beside a remote shard, None if there are none.

    What they said first is kept: the order must not change when the shard itself is at hand.
    """
    kept = store.folder / "index" / f"{sha256(url.encode())[:24]}.count"
    with suppress(OSError, ValueError):
        return int(kept.read_text())
    beside = store.fetch(re.sub(r"\.tar$", "_stats.json", url))
    try:
        successes = json.loads(beside or b"")["successes"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(successes, int) or successes < 0:
        return None
    write_text(kept, str(successes))
    return successes


def _names(urls: Sequence[str]) -> dict[str, str]:
    """A short name of each: the file's without its ending, the whole path if several share one."""
    short = {url: os.path.basename(url.split("?")[0]).removesuffix(".tar") for url in urls}
    times = Counter(short.values())
    return {url: url if times[name] > 1 else name for url, name in short.items()}
