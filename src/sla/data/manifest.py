"""Lists of captioned clips: a manifest (JSONL, CSV, Parquet), or a folder of videos with texts."""

from __future__ import annotations

import csv
import io
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sla.data.decode import VideoFile
from sla.data.video import VIDEO_SUFFIXES, VideoError
from sla.files import stable_number

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
MANIFEST_SUFFIXES = (".jsonl", ".csv", ".parquet")
NO_DATA = "run `make data` for the demo set, or set data.root to a folder of videos with captions"


class DataError(RuntimeError):
    """The data cannot be used: none found, or too many faults. The message says what to do."""


@dataclass(frozen=True)
class Clip:
    """A video file with its caption.

    Attributes:
        id: unique name in its set.
        video: the file.
        caption: one line of text, not empty.
        split: `train` or `val`.
        info: the manifest's other fields (source, frame rate, ...), as they are.
    """

    id: str
    video: Path
    caption: str
    split: str
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipSet:
    """Clips by split, in the order of the manifest (or of the file names), and what was left out.

    Attributes:
        faults: reason by name, of the entries that cannot be used.
        short: reason by name, of the sound entries with fewer frames than were asked for.
    """

    train: list[Clip]
    val: list[Clip]
    faults: Mapping[str, str]
    short: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Entries that were found, usable or not."""
        return len(self.train) + len(self.val) + len(self.faults) + len(self.short)


def too_many_faults(bad: int, total: int, limit: float, faults: Mapping[str, str]) -> str | None:
    """The summary of an intolerable share of bad entries, None if `bad / total <= limit`."""
    if bad <= limit * total:
        return None
    shown = [f"  {name}: {reason}" for name, reason in list(faults.items())[:10]]
    if bad > len(shown):
        shown.append(f"  ... and {bad - len(shown)} more (see the log)")
    head = f"{bad} of {total} clips cannot be used; data.max_bad_fraction allows {limit:g}"
    return "\n".join([head, *shown])


class FaultLog:
    """Counts the clips that fail while training reads them; shared by the loader's processes.

    Each clip is named once in the log. The count lives in shared memory, so it is one per rank, not
    one per worker.

    Args:
        clips: clips that may fail.
        total: entries of the whole set, the denominator.
        before: faults found at loading; they count too.
        limit: tolerated share of bad entries.
    """

    def __init__(self, clips: int, total: int, before: Mapping[str, str], limit: float) -> None:
        self._flags = multiprocessing.Array("b", max(1, clips))
        self._total = total
        self._reasons = dict(before)
        self._before = len(before)
        self._limit = limit

    @property
    def count(self) -> int:
        """Bad clips so far, in all processes of this rank, those found at loading included."""
        with self._flags.get_lock():
            return self._before + sum(self._flags.get_obj())

    def report(self, position: int, name: str, reason: str) -> None:
        """Counts a bad clip.

        Raises:
            DataError: the share of bad clips is now over the limit.
        """
        self._reasons[name] = reason
        with self._flags.get_lock():
            first = not self._flags[position]
            self._flags[position] = 1
        if first:
            log.warning("clip %s is left out: %s", name, reason)
        summary = too_many_faults(self.count, self._total, self._limit, self._reasons)
        if summary:
            raise DataError(summary)


def validation_by_hash(clip_id: str, fraction: float) -> bool:
    """Whether a clip without a stated split validates: by its name alone, so that adding clips to a
    folder never moves another clip from one split to the other."""
    return stable_number(clip_id) < fraction * 2**64


def load_clips(
    root: str | os.PathLike[str],
    manifest: str = "",
    *,
    val_fraction: float = 0.1,
    max_bad_fraction: float = 0.1,
    min_frames: int = 1,
    probe_videos: bool = True,
    video_field: str = "video",
    caption_field: str = "caption",
    folder_only: bool = False,
) -> ClipSet:
    """Reads the list of clips and checks each entry.

    A manifest has an entry a line (JSONL), a header line (CSV) or columns (Parquet). Its fields are
    `video` (path, relative to the manifest) and `caption`, perhaps `id` and `split` (`train` or
    `val`); others are kept in `Clip.info`. Without a manifest every video below `root` is taken,
    with its caption in the .txt file of the same name.

    An entry without a caption, or whose video is missing or unreadable, is left out, counted, and
    named once in the log. So is a video shorter than `min_frames`, but that is no fault: it does
    not count towards `max_bad_fraction`.

    Args:
        root: folder of the set.
        manifest: file name in `root` or a path; empty: manifest.jsonl, .csv or .parquet in `root`
            if there is one, else the folder itself.
        val_fraction: share of the clips without a stated split that validate.
        max_bad_fraction: tolerated share of entries that are left out.
        min_frames: frames a video must have.
        probe_videos: open every video now (a few milliseconds each) instead of at first use.
        video_field, caption_field: the manifest's names of these two fields.
        folder_only: take the folder itself, whatever manifests lie in it.

    Raises:
        DataError: nothing found, or too many bad entries.
        ValueError: a split that is neither `train` nor `val`.
    """
    root = Path(root)
    path = None if folder_only else _manifest_path(root, manifest)
    found: Iterator[tuple[str, dict[str, Any] | str]]
    if path is not None:
        found = _read_manifest(path, video_field, caption_field)
    elif root.is_dir():
        found = _read_folder(root)
    else:
        raise DataError(f"data.root: no folder {root}: {NO_DATA}")
    clips: dict[str, Clip] = {}
    faults: dict[str, str] = {}
    short: dict[str, str] = {}
    for name, entry in found:
        clip = _check_entry(entry, val_fraction) if isinstance(entry, dict) else entry
        if isinstance(clip, str):
            faults[name] = clip
        elif clip.id in clips:
            faults[name] = f"its id {clip.id!r} is taken by an earlier entry"
        else:
            try:
                frames = _frames(clip, probe_videos)
            except VideoError as error:
                faults[name] = f"{error.reason} ({clip.video})"
            else:
                if frames is None or frames >= min_frames:
                    clips[clip.id] = clip
                    continue
                short[name] = f"it has {frames} frames, {min_frames} are needed"
        log.warning("clip %s is left out: %s", name, faults.get(name) or short[name])
    split = {name: [c for c in clips.values() if c.split == name] for name in SPLITS}
    result = ClipSet(split["train"], split["val"], faults, short)
    if result.total == 0:
        raise DataError(f"no clips in {path or root}: {NO_DATA}")
    summary = too_many_faults(len(faults), result.total, max_bad_fraction, faults)
    if summary:
        raise DataError(summary)
    return result


def _manifest_path(root: Path, manifest: str) -> Path | None:
    if manifest:
        # A bare name lies in root; a path may also be given as seen from the working folder.
        candidates = [root / manifest, Path(manifest)]
    else:
        candidates = [root / f"manifest{suffix}" for suffix in MANIFEST_SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    if manifest:
        raise DataError(f"data.manifest: no file {root / manifest}: {NO_DATA}")
    return None


def _read_manifest(
    path: Path, video_field: str, caption_field: str
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields (name for the log, fields with `video` resolved, or why the line is bad)."""
    if path.suffix not in MANIFEST_SUFFIXES:
        allowed = ".jsonl or .csv or .parquet"
        raise DataError(f"data.manifest: must end in {allowed}, got {path}")
    rows: Iterator[tuple[int, Any]]
    if path.suffix == ".parquet":
        rows = enumerate(_parquet_rows(path), start=1)
    elif path.suffix == ".csv":
        rows = enumerate(_csv_rows(_text(path), path), start=1)
    else:
        lines = enumerate(_text(path).split("\n"), start=1)
        rows = ((number, line) for number, line in lines if line.strip())
    for number, row in rows:
        name = f"{path.name} {'line' if path.suffix == '.jsonl' else 'row'} {number}"
        try:
            fields = json.loads(row) if isinstance(row, str) else row
        except json.JSONDecodeError as error:
            yield name, f"not JSON: {error}"
            continue
        if not isinstance(fields, dict) or not isinstance(fields.get(video_field), str):
            yield name, f"no field `{video_field}`"
            continue
        if not fields[video_field].strip():
            yield name, f"the field `{video_field}` is empty"
            continue
        fields["video"] = fields.pop(video_field)
        if caption_field != "caption":
            fields["caption"] = fields.pop(caption_field, None)
        fields.setdefault("id", Path(fields["video"]).with_suffix("").as_posix())
        fields["video"] = path.parent / fields["video"]
        yield f"{name} ({fields['id']})", fields


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", errors="replace")


def _csv_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield {k: v for k, v in row.items() if k}  # cells beyond the header have no name
    except csv.Error as error:
        raise DataError(f"data.manifest: {path} is not a CSV file: {error}") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"data.manifest: {path} needs pyarrow: pip install 'sla-reproduction[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            # In batches: a list of millions of clips is never twice in memory.
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.manifest: {path} cannot be read as Parquet: {error}") from None


def _read_folder(root: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for video in sorted(root.rglob("*")):
        if video.suffix.lower() not in VIDEO_SUFFIXES or video.name.startswith("."):
            continue
        name = video.relative_to(root).as_posix()
        captions = video.with_suffix(".txt")
        try:
            caption = captions.read_text(encoding="utf-8")
        except FileNotFoundError:
            yield name, f"no caption file {captions.name}"
            continue
        except (OSError, UnicodeDecodeError) as error:
            yield name, f"caption file {captions.name} cannot be read: {error}"
            continue
        stem = video.relative_to(root).with_suffix("").as_posix()
        yield name, {"id": stem, "video": video, "caption": caption}


def _check_entry(fields: dict[str, Any], val_fraction: float) -> Clip | str:
    fields = dict(fields)
    clip_id, video = str(fields.pop("id")), fields.pop("video")
    caption, split = fields.pop("caption", None), fields.pop("split", None)
    if caption is None:
        return "no caption"
    if not isinstance(caption, str) or "\ufffd" in caption:
        return "the caption is not UTF-8 text"
    caption = " ".join(caption.split())
    if not caption:
        return "the caption is empty"
    if not split:
        split = "val" if validation_by_hash(clip_id, val_fraction) else "train"
    if split not in SPLITS:
        raise ValueError(f"split of clip {clip_id!r} must be one of {SPLITS}, got {split!r}")
    return Clip(clip_id, Path(video), caption, split, fields)


def _frames(clip: Clip, probe_video: bool) -> int | None:
    """Number of frames, None where the file was only looked for. Raises VideoError."""
    if probe_video:
        with VideoFile(clip.video) as video:
            return video.track.frames
    if not clip.video.is_file():
        raise VideoError(str(clip.video), "no such file")
    return None
