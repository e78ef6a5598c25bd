"""The study set: captioned clips of simulated objects, whose captions are true by construction.

    scene    words and numbers of a clip; which split shows which combinations; captions
    physics  the objects' motion, in MuJoCo
    render   the pictures
    observe  whether both are what the words say
    clip     one clip from (seed, split, index)
    shards   the set on disk

Names here need no MuJoCo until a clip is made.
"""

from sla.data.study.clip import StudyClip, encode, make_clip
from sla.data.study.physics import FPS, FRAMES, StudyError
from sla.data.study.render import SIZE
from sla.data.study.scene import (
    ATTRIBUTES,
    SPLITS,
    Words,
    caption,
    combinations,
    split_of,
)
from sla.data.study.shards import (
    StudyConfig,
    StudySummary,
    study_records,
    verify_study,
    write_study,
)

__all__ = [
    "ATTRIBUTES",
    "FPS",
    "FRAMES",
    "SIZE",
    "SPLITS",
    "StudyClip",
    "StudyConfig",
    "StudyError",
    "StudySummary",
    "Words",
    "caption",
    "combinations",
    "encode",
    "make_clip",
    "split_of",
    "study_records",
    "verify_study",
    "write_study",
]
