"""Frames as the networks of the metrics take them.

Letters: T frames, C colours, H and W pixels. Videos are uint8 (T, C, H, W), levels 0 to 255.
VBench resizes tensors with torchvision and without antialiasing; torchvision does that with
`torch.nn.functional.interpolate`, which is called here, so that torchvision is not needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def chunks(video: Tensor, size: int) -> Iterator[Tensor]:
    """A video's frames, at most `size` at a time, so that no wide copy of all of them is made."""
    for start in range(0, len(video), size):
        yield video[start : start + size]


def frames_at_once(video: Tensor) -> int:
    """How many frames to work on in one call: one on a CPU, where it stays in a core's cache.

    On a GPU each call costs the same few microseconds whatever its size, so as many as have about
    16 million levels.
    """
    return 1 if video.device.type == "cpu" else max(1, 2**24 // video[0].numel())


def check_rgb(video: Tensor) -> None:
    """Raises ValueError for a video that has not three colours."""
    if video.shape[1] != 3:
        raise ValueError(f"video must have 3 colours, got {video.shape[1]}")


def check_batch_size(batch_size: int) -> int:
    """`batch_size`, or ValueError if it is not positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return batch_size


def resize_shorter(
    frames: Tensor,
    size: int,
    mode: Literal["bilinear", "bicubic"],
    *,
    antialias: bool = False,
    whole_levels: bool = False,
) -> Tensor:
    """The shorter side resized to `size`, as torchvision's `Resize(size)`.

    Args:
        frames: (N, C, H, W), any real dtype, levels 0 to 255.
        size: pixels.
        mode: of the interpolation.
        antialias: whether the filter grows as the frame shrinks.
        whole_levels: round and clamp to whole levels, as torchvision does for uint8 frames; float
            frames keep fractions and what bicubic overshoots.

    Returns:
        float32 (N, C, h, w), levels 0 to 255; the longer side is rounded down.
    """
    height, width = frames.shape[-2:]
    shorter = min(height, width)
    target = (size * height // shorter, size * width // shorter)
    frames = frames.float()
    if target == (height, width):
        return frames
    frames = F.interpolate(frames, target, mode=mode, align_corners=False, antialias=antialias)
    return frames.round().clamp(0, 255) if whole_levels else frames


def center_crop(frames: Tensor, size: int) -> Tensor:
    """The middle `size` x `size` pixels, as torchvision's `CenterCrop(size)`."""
    height, width = frames.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return frames[..., top : top + size, left : left + size]


def normalize(
    frames: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(levels / 255 - mean) / std for each colour; float32 (N, 3, H, W) to the same."""
    shape = (1, 3, 1, 1)
    center, deviation = (device_constant(values, frames.device) for values in (mean, std))
    return (frames / 255 - center.view(shape)) / deviation.view(shape)


@functools.lru_cache(maxsize=64)
def device_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as float32 on a device, copied once: a copy waits for all that the GPU has to do."""
    return torch.tensor(values, device=device)


def vbench_clip_frames(frames: Tensor, *, whole_levels: bool = False) -> Tensor:
    """VBench's `clip_transform(224)`: bicubic without antialiasing, cropped, normalised.

    Args:
        frames: uint8 (N, 3, H, W).
        whole_levels: as in `resize_shorter`. VBench holds the frames of its image metrics as
            floats (False) and those of ViCLIP as bytes (True).

    Returns:
        float32 (N, 3, 224, 224).
    """
    frames = resize_shorter(frames, 224, "bicubic", whole_levels=whole_levels)
    return normalize(center_crop(frames, 224), CLIP_MEAN, CLIP_STD)


def vbench_dino_frames(frames: Tensor) -> Tensor:
    """VBench's `dino_transform(224)`: bilinear without antialiasing, not cropped, normalised.

    Args:
        frames: uint8 (N, 3, H, W).

    Returns:
        float32 (N, 3, h, w), the shorter of h and w 224.
    """
    return normalize(resize_shorter(frames, 224, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)


def clip_frames(frames: Tensor) -> Tensor:
    """CLIP's own preprocessing: bicubic with antialiasing, cropped, normalised.

    Args:
        frames: uint8 (N, 3, H, W).

    Returns:
        float32 (N, 3, 224, 224).
    """
    frames = resize_shorter(frames, 224, "bicubic", antialias=True, whole_levels=True)
    return normalize(center_crop(frames, 224), CLIP_MEAN, CLIP_STD)


def middle_frames(count: int, number: int) -> list[int]:
    """The middle frame of each of `number` equal parts, as VBench's `get_frame_indices(middle)`.

    Args:
        count: frames of the video.
        number: of frames wanted; a shorter video's last frame is repeated.
    """
    parts = min(number, count)
    edges = np.linspace(0, count, parts + 1).astype(int).tolist()
    middles = [(a + b - 1) // 2 for a, b in pairwise(edges)]
    return middles + middles[-1:] * (number - parts)


def pad_to_multiple(frames: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Frames with their edges repeated until both sides are multiples.

    Args:
        frames: (N, C, H, W), float.
        multiple: pixels.

    Returns:
        The frames, and the (top, left) corner of the original in them.
    """
    height, width = frames.shape[-2:]
    extra_height, extra_width = -height % multiple, -width % multiple
    top, left = extra_height // 2, extra_width // 2
    padding = (left, extra_width - left, top, extra_height - top)
    return F.pad(frames, padding, mode="replicate"), (top, left)
