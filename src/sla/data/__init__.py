"""Video-caption data: decoding, the demo set, lists of clips, and the LightningDataModule.

Imported from here: names of `sla.data.video`, `sla.data.manifest`, `sla.data.demo`. The data module
and the latent cache are imported when they are asked for: the former needs lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sla.data.demo import DemoDataError, DemoSummary, build_demo_set, verify_demo_set
from sla.data.manifest import Clip, ClipSet, DataError, load_clips
from sla.data.video import (
    VideoError,
    VideoInfo,
    count_frames,
    gif_bytes,
    grid,
    picture_strip,
    probe,
    read_frames,
    resize_crop,
    side_by_side,
    to_frames,
    to_tensor,
    write_gif,
    write_picture,
    write_video,
)

if TYPE_CHECKING:
    from sla.data.latents import LatentCache, write_cache
    from sla.data.module import DataConfig, VideoBatch, VideoDataModule

_LAZY = {
    **dict.fromkeys(("DataConfig", "VideoBatch", "VideoDataModule"), "module"),
    **dict.fromkeys(("LatentCache", "write_cache"), "latents"),
}

__all__ = [
    "Clip",
    "ClipSet",
    "DataConfig",
    "DataError",
    "DemoDataError",
    "DemoSummary",
    "LatentCache",
    "VideoBatch",
    "VideoDataModule",
    "VideoError",
    "VideoInfo",
    "build_demo_set",
    "count_frames",
    "gif_bytes",
    "grid",
    "load_clips",
    "picture_strip",
    "probe",
    "read_frames",
    "resize_crop",
    "side_by_side",
    "to_frames",
    "to_tensor",
    "verify_demo_set",
    "write_cache",
    "write_gif",
    "write_picture",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"sla.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
