"""Frames of an arm's samples, kept as one picture beside the rows. Needs no torch.

`results/study/frames/<study>/<arm>-<seed>-<digest's first 8>.png` is lossless: a row a prompt, a
column a frame, without gaps. What it shows is JSON in a text chunk of the PNG. Whether it counts is
for the rows to say: only frames of a finished run of the same digest do. `real_clips.png` has the
held-out clips whose captions the prompts are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from sla.files import atomic_path
from sla.results import RESULTS, ResultsError
from sla.study.records import BENCHMARK, REAL_CLIPS, Key

FOLDER = "frames"
COLUMNS = 6  # frames of a video, at most
_CHUNK = "sla"


@dataclass(frozen=True)
class Strips:
    """Some frames of a run's videos.

    Attributes:
        study, arm, digest, seed: of the run; of real clips the arm is `REAL_CLIPS`, without digest.
        prompts: their texts.
        clips: ids of the held-out clips that the prompts are from.
        noise_seeds: seed of each video's initial noise; none of real clips.
        indices: which frames of a video.
        frames: uint8 (prompts, indices, H, W, 3).
    """

    study: str
    arm: str
    digest: str
    seed: int
    prompts: tuple[str, ...]
    clips: tuple[str, ...]
    noise_seeds: tuple[int, ...]
    indices: tuple[int, ...]
    frames: NDArray[np.uint8]

    def __post_init__(self) -> None:
        wanted = (len(self.prompts), len(self.indices))
        if self.frames.dtype != np.uint8 or self.frames.ndim != 5 or self.frames.shape[4] != 3:
            raise ValueError(
                f"frames must be uint8 (prompts, indices, H, W, 3), got {self.frames.dtype} "
                f"{self.frames.shape}"
            )
        if self.frames.shape[:2] != wanted or len(self.clips) != len(self.prompts):
            raise ValueError(
                f"frames have shape {self.frames.shape} and there are {len(self.clips)} clips; "
                f"there are {wanted[0]} prompts and {wanted[1]} indices"
            )

    @property
    def key(self) -> Key:
        """The run's."""
        return (self.study, self.arm, self.digest, self.seed)


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers from 0 to total - 1, evenly, all if there are no more; none for 0."""
    count = min(count, total)
    return tuple(int((k + 0.5) * total / count) for k in range(count))


def frame_indices(total: int, columns: int = COLUMNS) -> tuple[int, ...]:
    """Evenly spaced frames of a video of `total`, first and last included."""
    count = min(columns, total)
    return tuple(int(i) for i in np.linspace(0, total - 1, count).round())


def write_strips(strips: Strips, root: Path = RESULTS) -> Path:
    """Write the picture; the same frames give the same file.

    Args:
        root: the results folder.

    Raises:
        OSError: it cannot be written.
    """
    rows, columns, height, width, _ = strips.frames.shape
    name = REAL_CLIPS
    if strips.arm != REAL_CLIPS:
        name = f"{strips.arm}-{strips.seed}-{strips.digest[:8]}"
    path = root / BENCHMARK / FOLDER / strips.study / f"{name}.png"
    about = {
        "study": strips.study,
        "arm": strips.arm,
        "digest": strips.digest,
        "seed": strips.seed,
        "prompts": strips.prompts,
        "clips": strips.clips,
        "noise_seeds": strips.noise_seeds,
        "frames": strips.indices,
    }
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(_CHUNK, json.dumps(about))
    picture = strips.frames.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG", optimize=True, pnginfo=chunks)
    return path


def read_strips(root: Path = RESULTS) -> dict[Key, Strips]:
    """All pictures of frames under a results folder, by what names the run.

    Raises:
        ResultsError: a PNG there is not one of them.
    """
    found = [_read(path) for path in sorted((root / BENCHMARK / FOLDER).glob("*/*.png"))]
    return {strips.key: strips for strips in found}


def real_clips_of(study: str) -> Key:
    """What names the frames of a study's real clips."""
    return (study, REAL_CLIPS, "", 0)


def _read(path: Path) -> Strips:
    try:
        with Image.open(path) as image:
            image.load()  # the chunks after the pixels too
            about = json.loads(image.info[_CHUNK])
            picture = np.asarray(image.convert("RGB"))
        rows, columns = len(about["prompts"]), len(about["frames"])
        height, width = picture.shape[0] // rows, picture.shape[1] // columns
        frames = picture.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
        return Strips(
            study=about["study"],
            arm=about["arm"],
            digest=about["digest"],
            seed=about["seed"],
            prompts=tuple(about["prompts"]),
            clips=tuple(about["clips"]),
            noise_seeds=tuple(about["noise_seeds"]),
            indices=tuple(about["frames"]),
            frames=np.ascontiguousarray(frames),
        )
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ResultsError(f"{path} is not a picture of a study's frames: {error}") from error


__all__ = ["Strips", "frame_indices", "read_strips", "real_clips_of", "spread", "write_strips"]
