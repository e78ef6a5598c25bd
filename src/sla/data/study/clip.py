"""One clip of the study set: drawn, simulated, checked, encoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sla.data.study.observe import centre, motion_fault, picture_fault, place_fault
from sla.data.study.physics import FPS, StudyError, simulate
from sla.data.study.render import Rendering, render
from sla.data.study.scene import SPLITS, Scene, Words, caption, draw_scene, draw_words

_TRIES = 400  # of a clip; ten suffice for most
_TRIES_A_SCENE = 16  # after which the words are drawn anew, all but object, colour and motion
CRF = 22


@dataclass(frozen=True)
class StudyClip:
    """A clip with all that is known of it.

    Attributes:
        frames: uint8 (T, 64, 64, 3), RGB.
        caption: true of the frames.
        scene: what was drawn.
        rendering: frames and what each pixel shows.
        attempt: how many scenes were drawn before this one.
        record: JSON values stored with the clip: caption, attributes, where it comes from, and the
            main object's `path` in the picture (first and last (column, row) of its visible part).
        refused: why earlier attempts were refused.
    """

    frames: NDArray[np.uint8]
    caption: str
    scene: Scene
    rendering: Rendering
    attempt: int
    record: dict[str, Any]
    refused: tuple[str, ...]


def make_clip(seed: int, split: str, index: int, words: Words | None = None) -> StudyClip:
    """Clip `index` of a split: a pure function of its arguments.

    Object, colour and motion are drawn once; a scene that does not show them clearly is drawn anew
    with other numbers, later with other cameras, floors and neighbours too. So the classes stay as
    frequent as they are drawn.

    Args:
        seed, split, index: which clip.
        words: what it is to say instead of what it would draw, of whatever split that is.

    Raises:
        ValueError: a negative seed or index, no such split, or words that cannot be said.
        StudyError: MuJoCo is missing, or no scene shows what it should.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0, got {seed} and {index}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    refused: list[str] = []
    key = [seed, SPLITS.index(split), index]
    if words is None:
        said = draw_words(np.random.default_rng(key), split)
    else:
        said = words
        said.check()
    for attempt in range(_TRIES):
        rng = np.random.default_rng([*key, attempt + 1])
        if attempt % _TRIES_A_SCENE == 0 and attempt and words is None:
            said = draw_words(rng, split, (said.object, said.colour, said.motion))
        scene = draw_scene(rng, said)
        rollout = simulate(scene)
        fault = motion_fault(scene, rollout) or place_fault(scene, rollout)
        if not fault:
            rendering = render(scene, rollout)
            fault = picture_fault(scene, rendering)
            if not fault:
                text = caption(said, index % 2)
                record = {
                    "caption": text,
                    **said.attributes(),
                    "split": split,
                    "seed": seed,
                    "index": index,
                    "path": [[round(x, 1) for x in centre(rendering, k)] for k in (0, -1)],
                }
                return StudyClip(
                    *(rendering.frames, text, scene, rendering, attempt, record),
                    tuple(refused),
                )
        refused.append(fault)
    raise StudyError(
        f"clip {index} of {split} with seed {seed}: {_TRIES} scenes of {caption(said)!r} were "
        f"refused, the last one because: {refused[-1]}"
    )


def encode(frames: NDArray[np.uint8], fps: float = FPS, crf: int = CRF) -> bytes:
    """An mp4 (H.264) of uint8 (T, H, W, 3), H and W even: the same bytes wherever the same PyAV
    runs.

    Args:
        frames: the pictures, RGB.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        # Colour at full resolution: halved, an object of 12 pixels loses its edges.
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        # Macroblock trees of pictures as small as these come out differently in every run (x264
        # reads beside them); the rest asks for true pixels rather than for pleasing ones.
        params = "mbtree=0:b-adapt=0:psy=0"
        stream.options = {"crf": str(crf), "preset": "slow", "x264-params": params}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()
