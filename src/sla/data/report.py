"""What a set holds and what is wrong with it: every clip opened, decoded and counted.

`examine` reads the clips in several processes, `summarize` counts, `markdown` and `contact_sheet`
show. Nothing here changes a set.
"""

from __future__ import annotations

import io
import math
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sla.data.decode import Cut, VideoFile
from sla.data.manifest import load_clips
from sla.data.module import DataConfig
from sla.data.shards import RawSample, ShardSource, ShardStore, plan_shards
from sla.data.video import VideoError
from sla.files import file_sha256, sha256

_CHUNK = 2048  # frames decoded at a time, of 32 x 32 pixels
_SMALL = 32
_THUMBNAIL = (192, 144)  # width, height
_LINES = 3  # of a caption on the contact sheet
_BINS = 10
_UNEVEN = 1.5  # longest over shortest distance of frames from which a rate counts as variable


@dataclass(frozen=True)
class Entry:
    """A clip to examine.

    Attributes:
        name: of the clip; empty if `video` knows it.
        video: its file, or a function that gives the file's bytes, name and caption.
        caption: one line of text; empty if `video` knows it.
        split: `train`, `val`, or empty where that is not known.
    """

    name: str
    video: Path | Callable[[], RawSample]
    caption: str = ""
    split: str = ""


@dataclass(frozen=True)
class ClipFacts:
    """What was found out of a clip.

    Attributes:
        entry: name, caption and split (without the video).
        num_bytes, checksum: of the file; 0 and empty if it could not be read.
        frames, fps, seconds, height, width: of the video as shown; 0 if it cannot be opened.
        variable_rate: distances between frames differ by more than rounding does.
        failure: why it cannot be read or decoded; empty if it can.
        thumbnail: uint8 (height, width, 3) of its middle frame, where one was asked for.
    """

    entry: Entry
    num_bytes: int = 0
    checksum: str = ""
    frames: int = 0
    fps: float = 0.0
    seconds: float = 0.0
    height: int = 0
    width: int = 0
    variable_rate: bool = False
    failure: str = ""
    thumbnail: NDArray[np.uint8] | None = None


def list_entries(config: DataConfig) -> tuple[list[Entry], dict[str, str]]:
    """The clips of a set, and by name why other entries are no clips.

    Raises:
        DataError: nothing found.
    """
    if config.source == "webdataset":
        return _list_shards(config)
    clips = load_clips(
        config.root,
        config.manifest,
        val_fraction=config.val_fraction,
        max_bad_fraction=1.0,  # to report them
        probe_videos=False,
        video_field=config.video_field,
        caption_field=config.caption_field,
        folder_only=config.source == "folder",
    )
    entries = [Entry(c.id, c.video, c.caption, c.split) for c in [*clips.train, *clips.val]]
    return entries, dict(clips.faults)


@dataclass(frozen=True)
class _OfShard:
    """Reads one sample of a shard."""

    source: ShardSource
    position: int

    def __call__(self) -> RawSample:
        return self.source.read(self.position)


def _list_shards(config: DataConfig) -> tuple[list[Entry], dict[str, str]]:
    store = ShardStore(
        config.shard_cache,
        limit_gib=config.shard_cache_gib,
        retries=config.url_retries,
        timeout=config.timeout,
    )
    plan = plan_shards(
        config.shards,
        config.val_shards,
        store,
        val_fraction=config.val_fraction,
        max_failure_share=1.0,  # to report them
    )
    entries = []
    for split, shards in (("train", plan.train), ("val", plan.val)):
        source = ShardSource(
            shards, store, caption_field=config.caption_field, max_file_mib=config.max_file_mib
        )
        entries += [Entry("", _OfShard(source, k), split=split) for k in range(len(source))]
    return entries, plan.faults


def examine(
    entries: Sequence[Entry],
    *,
    thumbnails: int = 0,
    whole: bool = True,
    workers: int = 0,
    timeout: float = math.inf,
    progress: bool = True,
) -> Iterator[ClipFacts]:
    """Opens every clip, in the order given.

    Args:
        thumbnails: how many clips to take a picture of, evenly spaced over the list.
        whole: decode all frames, else the middle one alone.
        workers: processes; 0 works in this one.
        timeout: seconds of decoding after which a clip counts as a failure.
        progress: show a progress bar on the terminal.
    """
    count = len(entries)
    chosen = {int((k + 0.5) * count / thumbnails) for k in range(min(thumbnails, count))}
    if count <= thumbnails:
        chosen = set(range(count))
    clips = _Clips(entries, chosen, whole, timeout)
    loader = DataLoader(clips, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    yield from tqdm(loader, unit="clip", desc="data-report", file=sys.stderr, disable=not progress)


def _as_it_is(item: Any) -> Any:
    return item


class _Clips(Dataset[ClipFacts]):
    def __init__(
        self, entries: Sequence[Entry], chosen: set[int], whole: bool, timeout: float
    ) -> None:
        self.entries = entries
        self.chosen = chosen
        self.whole = whole
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> ClipFacts:
        if index >= len(self.entries):
            raise IndexError(index)
        picture = index in self.chosen
        return examine_clip(
            self.entries[index], picture=picture, whole=self.whole, timeout=self.timeout
        )


def examine_clip(
    entry: Entry, *, picture: bool = False, whole: bool = True, timeout: float = math.inf
) -> ClipFacts:
    """Facts of one clip; arguments as `examine` has them."""
    facts = ClipFacts(replace(entry, video=Path()))
    try:
        source: Path | io.BytesIO
        if isinstance(entry.video, Path):
            source = path = entry.video
            if path.is_file():
                facts = replace(facts, num_bytes=path.stat().st_size, checksum=file_sha256(path))
        else:
            raw = entry.video()
            source, data = raw.video, raw.video.getvalue()
            known = replace(facts.entry, name=raw.id, caption=raw.caption)
            facts = replace(facts, entry=known, num_bytes=len(data), checksum=sha256(data))
        with VideoFile(source, timeout) as video:
            times = video.track.times
            count = len(times)
            # One more frame than distances: the last one is shown as long as the others.
            length = float(times[-1]) * count / (count - 1) if count > 1 else 0.0
            gaps = np.diff(times)
            uneven = count > 2 and float(gaps.max()) > _UNEVEN * float(gaps.min())
            facts = replace(
                facts,
                frames=count,
                seconds=length,
                fps=count / length if length > 0 else 0.0,
                variable_rate=uneven,
            )
            middle = video.read([count // 2])[0]
            height, width = middle.shape[:2]
            thumbnail = _thumbnail(middle) if picture else None
            facts = replace(facts, height=height, width=width, thumbnail=thumbnail)
            for first in range(0, count if whole else 0, _CHUNK):
                video.read(range(first, min(first + _CHUNK, count)), Cut(_SMALL, _SMALL))
    except VideoError as error:
        name = facts.entry.name or error.source
        return replace(facts, entry=replace(facts.entry, name=name), failure=error.reason)
    except OSError as error:
        return replace(facts, failure=error.strerror or str(error))
    return facts


def _thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = Image.fromarray(frame)
    picture.thumbnail(_THUMBNAIL)
    return np.asarray(picture)


def distribution(values: Sequence[float]) -> dict[str, Any] | None:
    """Smallest, median, largest, mean and sum of some numbers, with a histogram; None of none."""
    if not values:
        return None
    counts, edges = np.histogram(values, bins=_BINS)
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "mean": statistics.fmean(values),
        "sum": sum(values),
        "histogram": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }


def summarize(
    facts: Sequence[ClipFacts],
    left_out: Mapping[str, str] | None = None,
    *,
    num_frames: int = 1,
    fps: float = 0.0,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Counts of a set, as plain JSON values.

    Args:
        facts: of every clip that has a video and a caption.
        left_out: reason by name, of entries that are no clip (no caption, say).
        num_frames: frames of a sample: shorter clips are counted.
        fps: rate to which videos are resampled; 0 for none.
        max_bytes: bytes of a caption that the text encoder reads: longer ones are counted.
    """
    left_out = dict(left_out or {})
    good = [clip for clip in facts if not clip.failure]
    failures = {**left_out, **{clip.entry.name: clip.failure for clip in facts if clip.failure}}
    captions = [clip.entry.caption for clip in facts if clip.entry.caption]
    lengths = [len(caption.encode("utf-8", errors="replace")) for caption in captions]
    repeated = [count for count in Counter(captions).values() if count > 1]
    sizes = Counter(f"{clip.width}x{clip.height}" for clip in good)
    rates = Counter(f"{clip.fps:.3f}".rstrip("0").rstrip(".") for clip in good)
    same = defaultdict(list)
    for clip in facts:
        if clip.checksum:
            same[clip.checksum].append(clip.entry.name)
    splits = Counter(clip.entry.split for clip in good if clip.entry.split)
    return {
        "clips": {
            "found": len(facts) + len(left_out),
            "sound": len(good),
            "failed": len(failures),
            "shorter_than_a_sample": sum(_is_short(clip, num_frames, fps) for clip in good),
            "variable_frame_rate": sum(clip.variable_rate for clip in good),
            **{split: splits[split] for split in sorted(splits)},
        },
        "bytes": sum(clip.num_bytes for clip in facts),
        "frames": distribution([clip.frames for clip in good]),
        "seconds": distribution([clip.seconds for clip in good]),
        "frame_rates": dict(rates.most_common()),
        "resolutions": dict(sizes.most_common()),
        "aspect_ratios": distribution([clip.width / clip.height for clip in good]),
        "captions": {
            "bytes": distribution(lengths),
            "words": distribution([len(caption.split()) for caption in captions]),
            "not_unique": sum(repeated),
            "cut_off": None if max_bytes is None else sum(n > max_bytes for n in lengths),
        },
        "failures": failures,
        "failure_reasons": dict(Counter(failures.values()).most_common()),
        "duplicates": [names for names in same.values() if len(names) > 1],
    }


def _is_short(clip: ClipFacts, num_frames: int, fps: float) -> bool:
    if not fps:
        return clip.frames < num_frames
    last = clip.seconds * (clip.frames - 1) / clip.frames  # when the last frame begins
    return last * fps + 0.5 < num_frames - 1  # with the tolerance of `time_window`


def contact_sheet(facts: Sequence[ClipFacts], columns: int = 0) -> NDArray[np.uint8] | None:
    """The thumbnails of some clips, each over its name and caption.

    Args:
        facts: those without a thumbnail are left out.
        columns: pictures a row; 0 for a sheet that is about square.

    Returns:
        uint8 (H, W, 3), or None if no clip has a thumbnail.
    """
    shown = [clip for clip in facts if clip.thumbnail is not None]
    if not shown:
        return None
    font = ImageFont.load_default()
    width, height = _THUMBNAIL
    line = 13
    gap = 8
    cell = (width + gap, height + (_LINES + 1) * line + 2 * gap)
    columns = columns or math.ceil(math.sqrt(len(shown)))
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, clip in enumerate(shown):
        left, top = gap + k % columns * cell[0], gap + k // columns * cell[1]
        assert clip.thumbnail is not None
        picture = Image.fromarray(clip.thumbnail)
        place = (left + (width - picture.width) // 2, top + (height - picture.height) // 2)
        sheet.paste(picture, place)
        name = clip.entry.name[-32:]
        draw.text((left, top + height + 2), name, fill="gray", font=font)
        # What the font lacks, it draws as boxes.
        lines = textwrap.wrap(clip.entry.caption, 36, max_lines=_LINES, placeholder=" ...")
        for number, text in enumerate(lines, start=1):
            draw.text((left, top + height + 2 + number * line), text, fill="black", font=font)
    return np.asarray(sheet)


def markdown(summary: Mapping[str, Any], title: str, picture: str | None = None) -> str:
    """The summary for people.

    Args:
        picture: path of the contact sheet, seen from the file that is written.
    """
    clips, captions = summary["clips"], summary["captions"]
    parts = [f"# {title}", "", "| | |", "|---|---|"]
    splits = ", ".join(f"{clips[name]} {name}" for name in ("train", "val") if name in clips)
    seconds, frames = summary["seconds"], summary["frames"]
    rows: list[tuple[str, Any]] = [
        ("clips", f"{clips['found']} found, {clips['sound']} sound{f' ({splits})' * bool(splits)}"),
        ("failures", clips["failed"]),
        ("shorter than a sample", clips["shorter_than_a_sample"]),
        ("variable frame rate", clips["variable_frame_rate"]),
        ("duplicates", sum(len(names) - 1 for names in summary["duplicates"])),
        ("frames", frames["sum"] if frames else 0),
        ("duration", f"{seconds['sum']:.1f} s" if seconds else "0 s"),
        ("size of the files", f"{summary['bytes'] / 2**20:.1f} MiB"),
        ("captions that are not unique", captions["not_unique"]),
    ]
    if captions["cut_off"] is not None:
        rows.append(("captions that the text encoder cuts off", captions["cut_off"]))
    parts += [f"| {name} | {value} |" for name, value in rows]
    if picture:
        parts += ["", f"![a frame of each clip]({picture})"]
    parts += ["", "| | min | median | max |", "|---|---|---|---|"]
    measured = (
        ("seconds", seconds),
        ("frames", frames),
        ("width / height", summary["aspect_ratios"]),
        ("caption, bytes", captions["bytes"]),
        ("caption, words", captions["words"]),
    )
    for name, values in measured:
        if values:
            numbers = " | ".join(_number(values[key]) for key in ("min", "median", "max"))
            parts.append(f"| {name} | {numbers} |")
    for name, values in (("Seconds", seconds), ("Caption lengths in bytes", captions["bytes"])):
        if values:
            parts += ["", f"## {name}", "", "```", *_bars(values["histogram"]), "```"]
    for name, counts in (
        ("Resolutions", summary["resolutions"]),
        ("Frame rates", summary["frame_rates"]),
        ("Reasons of failures", summary["failure_reasons"]),
    ):
        if counts:
            parts += ["", f"## {name}", "", "| | clips |", "|---|---|"]
            parts += [f"| {_cell(key)} | {count} |" for key, count in _first(counts.items())]
    if summary["failures"]:
        parts += ["", "## Failures", ""]
        items = summary["failures"].items()
        parts += [f"- `{name}`: {_cell(reason)}" for name, reason in _first(items)]
    if summary["duplicates"]:
        parts += ["", "## Duplicates", "", "Files with the same bytes:", ""]
        parts += ["- " + ", ".join(f"`{n}`" for n in names) for names in summary["duplicates"][:50]]
    return "\n".join(parts) + "\n"


def _first(items: Any) -> Any:
    """The first 50; `report.json` has them all."""
    return list(items)[:50]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _bars(histogram: Mapping[str, Any]) -> list[str]:
    counts, edges = histogram["counts"], histogram["edges"]
    longest = max(counts)
    labels = [f"{_number(edges[k])} to {_number(edges[k + 1])}" for k in range(len(counts))]
    wide = max(map(len, labels))
    return [
        f"{label:>{wide}} {'#' * math.ceil(40 * count / longest):<40} {count}"
        for label, count in zip(labels, counts, strict=True)
    ]
