"""Whether a roll-out and its pictures show what the words say. Those that do not are drawn anew."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sla.data.study.physics import FRAMES, Rollout
from sla.data.study.render import SIZE, Rendering, camera_at, project
from sla.data.study.scene import COLOURS, MOTIONS, Scene, verb_of

Floats = NDArray[np.float64]

_LEAST_PIXELS = 45.0  # area of an object that counts as seen
_EDGE = 3  # pixels from the border where the centre of an object may not be


def turned(turn: Floats) -> float:
    """Radians that an object turns over a roll-out, whatever the axes: float64 (T, 3, 3)."""
    trace = np.einsum("tij,tij->t", turn[1:], turn[:-1])
    return float(np.arccos(np.clip((trace - 1) / 2, -1, 1)).sum())


def rebounds(height: Floats, least: float = 0.08) -> int:
    """How often a height goes up again by `least` after it went down."""
    count, low, top, falling = 0, float(height[0]), float(height[0]), True
    for value in height[1:].tolist():
        if falling:
            low = min(low, value)
            if value > low + least:
                count, falling, top = count + 1, False, value
        else:
            top = max(top, value)
            if value < top - least / 2:
                falling, low = True, value
    return count


def motion_fault(scene: Scene, rollout: Rollout) -> str:
    """Why the roll-out is not the motion of the words, or an empty string."""
    name = scene.words.motion
    group, direction = name.split("_")[0], MOTIONS[name].direction
    place = rollout.place
    if not np.isfinite(place).all():
        return "the simulation failed"
    moved = place[-1] - place[0]
    path = np.sqrt(((place - place[0]) ** 2).sum(-1))
    angle = math.degrees(turned(rollout.turn))
    rises = rebounds(place[:, 2])
    rolls = group == "roll" or (group != "slide" and verb_of(scene.words.object) == "rolls")
    ahead = moved[0] * direction
    steps = np.diff(place[:, 0]) * direction
    enough: dict[str, bool]
    if group == "still":
        enough = {"moves": path.max() < 0.03, "turns": angle < 5}
    elif group in ("roll", "slide", "hit"):
        enough = {
            "way": ahead > (0.5 if group == "hit" else 0.9),
            "turn": (angle > 110) if rolls else (group == "hit" or angle < 15),
            "leaves the floor": float(np.ptp(place[:, 2])) < (0.6 if group == "hit" else 0.12),
            "goes back": bool((steps > -0.01).all()) or group == "hit",
        }
    elif group in ("approach", "recede"):
        sign = -1 if group == "approach" else 1
        enough = {
            "way": sign * moved[1] > 1.2,
            "turn": angle > 110 if rolls else angle < 15,
            "leaves the floor": float(np.ptp(place[:, 2])) < 0.12,
        }
    elif group == "bounce":
        enough = {
            "fall": place[0, 2] - place[:, 2].min() > 0.6,
            "rebounds": rises >= 2,
            "goes away": path[:, None].max() < 2.2 and abs(moved[0]) < 0.8,
        }
    elif group == "drop":
        last = place[-6:]
        enough = {
            "fall": place[0, 2] - place[-1, 2] > 0.6,
            "rebounds": rises == 0,
            "comes to rest": float(np.ptp(last, axis=0).max()) < 0.06,
            "goes away": abs(moved[0]) < 0.5,
        }
    elif group == "spin":
        enough = {"moves": path.max() < 0.05, "turn": angle > 240}
    elif group == "swing":
        there = np.diff(place[:, 0])
        enough = {
            "width": float(np.ptp(place[:, 0])) > 0.7,
            "swings back": min(there[there > 0].sum(), -there[there < 0].sum()) > 0.35,
        }
    elif group == "topple":
        up = rollout.turn[:, 2, 2]
        enough = {
            "starts upright": up[0] > 0.96,
            "lies": up[-6:].max() < 0.6,
            "sinks": moved[2] < -0.05 and float(np.ptp(place[:, 2])) < 0.55,
            "goes away": abs(moved[0]) < 1.4 and abs(moved[1]) < 0.6,
        }
    elif group == "arc":
        top = int(place[:, 2].argmax())
        enough = {
            "way": ahead > 1.1,
            "rise": place[top, 2] - place[0, 2] > 0.5,
            "fall": place[top, 2] - place[-1, 2] > 0.35,
            "goes back": bool((steps > -0.02).all()),
        }
    elif group == "float":
        enough = {"rise": moved[2] > 0.7, "way": abs(moved[0]) < 0.2}
    else:
        enough = {
            "way": ahead > 0.8,
            "fall": moved[2] < -0.25,
            "rises": bool((np.diff(place[:, 2]) < 0.01).all()),
            "goes back": bool((steps > -0.02).all()),
            "turn": angle > 110 if rolls else angle < 75,
        }
    second = rollout.other_place
    enough["second"] = second is not None or group != "hit"
    if second is not None:
        pushed = np.sqrt(((second - second[0]) ** 2).sum(-1))
        if group == "hit":
            touch = rollout.touch
            enough["touch"] = touch is not None and 3 <= touch <= FRAMES - 6
            before = pushed[: touch or 1].max()
            enough["pushes"] = pushed[-1] > 0.12 and before < 0.03
        else:
            enough["second stays"] = pushed.max() < 0.03 and rollout.touch is None
    return next((why for why, good in enough.items() if not good), "")


def place_fault(scene: Scene, rollout: Rollout) -> str:
    """Why the objects are not in the picture, by their centres; or an empty string."""
    moments = np.linspace(0, 1, FRAMES)
    # What is hit may leave at the end.
    until = FRAMES - 8 if scene.words.motion.startswith("hit") else FRAMES
    seen = []
    for k, u in enumerate(moments.tolist()):
        place, axes = camera_at(scene, u)
        column, row = project(place, axes, rollout.place[k])
        seen.append(_EDGE <= column < SIZE - _EDGE and _EDGE <= row < SIZE - _EDGE)
        if rollout.other_place is not None and k < until:
            column, row = project(place, axes, rollout.other_place[k])
            if not (_EDGE <= column < SIZE - _EDGE and _EDGE <= row < SIZE - _EDGE):
                return "the second object leaves the picture"
    if not all(seen[:4]) or sum(seen) < 0.8 * FRAMES:
        return "the object leaves the picture"
    return ""


def name_colour(rgb: Floats) -> str:
    """The name in `COLOURS` that is nearest to an sRGB colour in [0, 1], float64 (3,): white by its
    saturation, the others by their hue."""
    top, low = float(rgb.max()), float(rgb.min())
    if top <= 0 or (top - low) / top < 0.2:
        return "white"
    named = {name: _hue(np.asarray(value)) for name, value in COLOURS.items() if name != "white"}
    hue = _hue(rgb)
    return min(named, key=lambda name: abs((named[name] - hue + 180) % 360 - 180))


def _hue(rgb: Floats) -> float:
    red, green, blue = rgb.tolist()
    across = math.sqrt(3) * (green - blue)
    return math.degrees(math.atan2(across, 2 * red - green - blue)) % 360


def picture_fault(scene: Scene, rendering: Rendering) -> str:
    """Why the pictures do not show the words, or an empty string."""
    name, words = scene.words.motion, scene.words
    area = rendering.share.sum((2, 3)) / 4  # (T, 2), pixels
    main = area[:, 0]
    if main[:3].min() < _LEAST_PIXELS or (main >= _LEAST_PIXELS / 2).sum() < 0.8 * FRAMES:
        return "the object is too little seen"
    if np.median(main) < _LEAST_PIXELS:
        return "the object is too small"
    if scene.other is not None and (area[:, 1] >= _LEAST_PIXELS / 2).sum() < 0.8 * FRAMES:
        return "the second object is too little seen"
    group, direction = name.split("_")[0], MOTIONS[name].direction
    first, last = centre(rendering, 0), centre(rendering, -1)
    if direction and direction * (last[0] - first[0]) < 6:
        return "the camera's motion hides the object's"
    if group in ("approach", "recede"):
        growth = float(main[-3:].mean() / main[:3].mean())
        if (growth if group == "approach" else 1 / growth) < 1.5:
            return "its size hardly changes"
    for which, colour in enumerate((words.colour, words.other[1] if words.other else None)):
        if colour is None:
            continue
        own, around = _colours(rendering, which)
        if name_colour(own) != colour:
            return f"its colour looks {name_colour(own)}"
        if np.abs(own - around).max() < 0.12:
            return "it has the colour of what is behind it"
    return ""


def centre(rendering: Rendering, frame: int, which: int = 0) -> tuple[float, float]:
    """(column, row) in pixels of an object's visible part; `frame` -1 is the last with any."""
    share = rendering.share[:, which].astype(np.float64)
    seen = np.flatnonzero(share.sum((1, 2)) > 0)
    if not len(seen):
        return -1.0, -1.0
    picture = share[seen[frame]] if frame < 0 else share[frame]
    total = max(1.0, float(picture.sum()))
    at = np.arange(picture.shape[0]) + 0.5
    return float((picture.sum(0) * at).sum() / total), float((picture.sum(1) * at).sum() / total)


def _colours(rendering: Rendering, which: int) -> tuple[Floats, Floats]:
    """Mean sRGB of an object's pixels over the clip, and of those up to 2 pixels beside it."""
    full = rendering.share[:, which] == 4
    some = rendering.share.sum(1) > 0
    wide = rendering.share[:, which] > 0
    for _ in range(2):
        grown = wide.copy()
        grown[:, 1:] |= wide[:, :-1]
        grown[:, :-1] |= wide[:, 1:]
        grown[:, :, 1:] |= wide[:, :, :-1]
        grown[:, :, :-1] |= wide[:, :, 1:]
        wide = grown
    frames = rendering.frames
    own = frames[full].mean(0) / 255 if full.any() else np.zeros(3)
    beside = wide & ~some
    around = frames[beside].mean(0) / 255 if beside.any() else np.zeros(3)
    return own, around
