"""What a clip of the study set shows: words drawn first, then the numbers that a renderer needs.

A scene is drawn from generators seeded by (seed, split, index, attempt), so any clip can be made
without the others. The words (object, colour, motion, ...) are the caption's and the attributes
that an evaluator is trained on; the numbers (size, place, speed, light, ...) are nobody's to name.

The splits differ in their combinations of object, colour and motion: `split_of` gives each of them
to one split, by a hash of the three words. No seed enters, so that a clip of one set never shows a
training set made with another seed what it holds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sla.files import stable_number

Vector = tuple[float, float, float]

SPLITS = ("train", "val", "test")
HELD_OUT = 0.08  # share of the combinations that each of val and test has for itself

OBJECTS = (
    *("ball", "cube", "brick", "cylinder", "cone", "pyramid", "ring", "star", "cross"),
    *("dumbbell", "pill", "mushroom", "table"),
)
# sRGB in [0, 1]. White is told by its saturation, the others by their hue.
COLOURS: dict[str, Vector] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.97, 0.50, 0.05),
    "yellow": (0.94, 0.88, 0.12),
    "green": (0.14, 0.68, 0.18),
    "cyan": (0.12, 0.78, 0.82),
    "blue": (0.12, 0.24, 0.88),
    "purple": (0.58, 0.16, 0.80),
    "white": (0.93, 0.93, 0.93),
}
PATTERNS = ("plain", "striped", "checkered", "spotted")
FLOORS = ("wooden", "checkered", "tiled", "grassy", "sandy", "concrete")

ROLLERS = ("ball", "cylinder", "ring", "pill")
SLIDERS = ("cube", "brick", "cone", "pyramid", "star", "cross", "mushroom", "table")
_TALL = ("brick", "cylinder", "dumbbell", "pill")
_SPRINGY = ("ball", "cube", "cylinder", "ring", "pill", "dumbbell", "star", "cross")
# Turning about its own axis leaves the outline of these as it was: only a pattern shows it.
_ROUND = ("ball", "cylinder", "cone", "pill", "mushroom", "dumbbell", "ring")


@dataclass(frozen=True)
class Motion:
    """A motion class.

    Attributes:
        objects: that can move so.
        phrase: of the caption; `{verb}` is "rolls" or "slides", by the object.
        on_floor: the caption says "on" the floor, else "over" it.
        direction: -1 to the left as the camera sees it, 1 to the right, 0 neither.
    """

    objects: tuple[str, ...]
    phrase: str
    on_floor: bool = True
    direction: int = 0


_GOERS = (*ROLLERS, *SLIDERS)
MOTIONS: dict[str, Motion] = {
    "still": Motion(OBJECTS, "stands still"),
    "roll_left": Motion(ROLLERS, "rolls to the left", direction=-1),
    "roll_right": Motion(ROLLERS, "rolls to the right", direction=1),
    "slide_left": Motion(SLIDERS, "slides to the left", direction=-1),
    "slide_right": Motion(SLIDERS, "slides to the right", direction=1),
    "approach": Motion(_GOERS, "{verb} towards the camera"),
    "recede": Motion(_GOERS, "{verb} away from the camera"),
    "bounce": Motion(_SPRINGY, "falls and bounces"),
    "drop": Motion(OBJECTS, "falls and stays down"),
    "spin": Motion(OBJECTS, "spins in place"),
    "swing": Motion(OBJECTS, "swings on a rod", on_floor=False),
    "topple": Motion(_TALL, "topples over"),
    "arc_left": Motion(OBJECTS, "flies in an arc to the left", on_floor=False, direction=-1),
    "arc_right": Motion(OBJECTS, "flies in an arc to the right", on_floor=False, direction=1),
    "float_up": Motion(OBJECTS, "floats upwards", on_floor=False),
    "ramp_left": Motion(_GOERS, "{verb} down a ramp to the left", direction=-1),
    "ramp_right": Motion(_GOERS, "{verb} down a ramp to the right", direction=1),
    "hit_left": Motion(_GOERS, "{verb} to the left and hits {other}", direction=-1),
    "hit_right": Motion(_GOERS, "{verb} to the right and hits {other}", direction=1),
}
CAMERAS = {
    "still": "does not move",
    "pan_left": "pans to the left",
    "pan_right": "pans to the right",
    "closer": "moves closer",
    "back": "moves back",
    "circle_left": "circles to the left",
    "circle_right": "circles to the right",
}
# What an evaluator can be trained on: every attribute with its values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "motion": tuple(MOTIONS),
    "camera": tuple(CAMERAS),
    "floor": FLOORS,
}


@dataclass(frozen=True)
class Words:
    """What can be said about a clip: values of `ATTRIBUTES`, and a second object or None."""

    object: str
    colour: str
    pattern: str
    motion: str
    camera: str
    floor: str
    other: tuple[str, str] | None  # object, colour

    def check(self) -> None:
        """Raises ValueError if there is no such word, or the object cannot move so."""
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                allowed = ", ".join(values)
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        allowed = ", ".join(MOTIONS[self.motion].objects)
        if self.object not in MOTIONS[self.motion].objects:
            raise ValueError(f"{self.motion} is for {allowed}, not for {self.object}")
        if self.other is not None and not (self.other[0] in OBJECTS and self.other[1] in COLOURS):
            raise ValueError(f"other must be an object and a colour, got {self.other!r}")
        if self.motion.startswith("hit") and self.other is None:
            raise ValueError(f"{self.motion} needs a second object (other)")

    def attributes(self) -> dict[str, Any]:
        """As stored with a clip: JSON values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ATTRIBUTES}
        values["other_object"], values["other_colour"] = self.other or (None, None)
        return values


@dataclass(frozen=True)
class Thing:
    """How one object is made.

    Attributes:
        kind: of `OBJECTS`.
        size: half its extent, about, in metres.
        stretch: proportion of height to width, 1 on average.
        rgb, second: the two tones of its pattern, linear.
        pattern, pattern_axis, period, phase: of `PATTERNS`, and how it lies on the object.
        gloss: strength of the highlight.
    """

    kind: str
    size: float
    stretch: float
    rgb: Vector
    second: Vector
    pattern: str
    pattern_axis: Vector
    period: float
    phase: float
    gloss: float


@dataclass(frozen=True)
class Scene:
    """A clip's description: words and numbers. Metres, seconds, radians; z is up, the camera looks
    along +y, x is to its right.

    Attributes:
        words: see `Words`.
        thing, other: the objects.
        u: numbers in [0, 1) that the physics may use, in any order.
        azimuth, elevation, distance, target: of the camera around the point it looks at, in the
            middle of the clip.
        sweep: how far the camera moves: an angle, or the factor of its distance.
        floor_seed, floor_angle: of the floor's texture.
        horizon, zenith: background, linear.
        light: place of the lamp.
        ambient: share of light without direction.
    """

    words: Words
    thing: Thing
    other: Thing | None
    u: tuple[float, ...]
    azimuth: float
    elevation: float
    distance: float
    target: Vector
    sweep: float
    floor_seed: int
    floor_angle: float
    horizon: Vector
    zenith: Vector
    light: Vector
    ambient: float


def split_of(kind: str, colour: str, motion: str) -> str:
    """The one split whose clips may show this combination of object, colour and motion."""
    share = stable_number(f"study {kind} {colour} {motion}") / 2**64
    return "test" if share < HELD_OUT else "val" if share < 2 * HELD_OUT else "train"


@cache
def combinations(split: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """(object, colour) pairs that a split shows, by motion; motions without any are left out.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    found = {
        name: tuple(
            (kind, colour)
            for kind in motion.objects
            for colour in COLOURS
            if split_of(kind, colour, name) == split
        )
        for name, motion in MOTIONS.items()
    }
    return {name: pairs for name, pairs in found.items() if pairs}


def verb_of(kind: str) -> str:
    """How an object gets along on a floor."""
    return "rolls" if kind in ROLLERS else "slides"


def caption(words: Words, variant: int = 0) -> str:
    """The caption of a clip, one line of ASCII.

    Args:
        words: what is said.
        variant: 0 or 1: object first, or camera first.
    """
    motion = MOTIONS[words.motion]
    pattern = "" if words.pattern == "plain" else f"{words.pattern} "
    subject = _article(f"{words.colour} {pattern}{words.object}")
    other = _article(f"{words.other[1]} {words.other[0]}") if words.other else ""
    verb = verb_of(words.object)
    said = motion.phrase.format(verb=verb, other=other)
    floor = f"{'on' if motion.on_floor else 'over'} {_article(f'{words.floor} floor')}"
    near = f" near {other}" if other and "{other}" not in motion.phrase else ""
    camera = CAMERAS[words.camera]
    if variant == 0:
        return f"{_upper(subject)} {said} {floor}{near}. The camera {camera}."
    return f"The camera {camera}. {_upper(subject)}{near} {said} {floor}."


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def draw_words(
    rng: np.random.Generator, split: str, given: tuple[str, str, str] | None = None
) -> Words:
    """Draws what a clip says: motions evenly, then evenly among the split's pairs for it.

    Args:
        rng: of the clip.
        split: whose combinations are drawn from.
        given: object, colour and motion, if they are decided already.
    """
    pairs = combinations(split)
    if given is None:
        name = _pick(rng, tuple(pairs))
        kind, colour = _pick(rng, pairs[name])
    else:
        kind, colour, name = given
    turns = name == "spin" or verb_of(kind) == "rolls"
    needs_pattern = kind in _ROUND and turns and name not in ("still", "drop", "swing", "float_up")
    pattern = PATTERNS[int(rng.integers(1 if needs_pattern else 0, len(PATTERNS)))]
    # Both change how large the object is seen: one at a time.
    cameras = [
        camera
        for camera in CAMERAS
        if not (name in ("approach", "recede") and camera in ("closer", "back"))
    ]
    camera = "still" if rng.random() < 0.25 else _pick(rng, tuple(cameras[1:]))
    floor = _pick(rng, FLOORS)
    other = None
    hits = name.startswith("hit")
    near = rng.random() < 0.35
    kinds = tuple(k for k in OBJECTS if k != kind and not (hits and k in ("dumbbell", "pill")))
    others = (_pick(rng, kinds), _pick(rng, tuple(c for c in COLOURS if c != colour)))
    if hits or (near and name in _WITH_ROOM):
        other = others
    return Words(kind, colour, pattern, name, camera, floor, other)


# Motions beside which a second object finds room without being touched.
_WITH_ROOM = ("still", "bounce", "drop", "spin", "swing", "float_up", "slide_left", "slide_right")


def draw_scene(rng: np.random.Generator, words: Words) -> Scene:
    """Draws the numbers of a scene that says `words`."""
    thing = _draw_thing(rng, words.object, words.colour, words.pattern)
    other = _draw_thing(rng, *(words.other or ("cube", "red")), "plain")
    side = -1.0 if rng.random() < 0.5 else 1.0
    sweeps = {"pan": (0.22, 0.32), "circle": (0.6, 1.0), "closer": (0.52, 0.64)}
    sweeps["back"] = sweeps["closer"]
    low, high = sweeps.get(words.camera.split("_")[0], (0.0, 0.0))
    sky = [_muted(rng, 0.3, 0.55, 0.95) for _ in range(2)]
    return Scene(
        words=words,
        thing=thing,
        other=other if words.other else None,
        u=tuple(rng.random(16).tolist()),
        azimuth=float(rng.uniform(-0.22, 0.22)),
        elevation=float(rng.uniform(0.2, 0.48)),
        distance=float(rng.uniform(3.3, 4.1)),
        target=(
            float(rng.uniform(-0.15, 0.15)),
            float(rng.uniform(-0.2, 0.2)),
            float(rng.uniform(0.5, 0.75)),
        ),
        sweep=float(rng.uniform(low, high)),
        floor_seed=int(rng.integers(2**31)),
        floor_angle=float(rng.uniform(0, 2 * np.pi)),
        horizon=sky[0],
        zenith=sky[1],
        light=(
            side * float(rng.uniform(1.0, 3.5)),
            float(rng.uniform(-3.5, 0.5)),
            float(rng.uniform(4.0, 6.5)),
        ),
        ambient=float(rng.uniform(0.3, 0.5)),
    )


def _pick(rng: np.random.Generator, items: tuple[Any, ...]) -> Any:
    return items[int(rng.integers(len(items)))]


def _draw_thing(rng: np.random.Generator, kind: str, colour: str, pattern: str) -> Thing:
    shade = rng.uniform(-0.05, 0.05, 3) if colour != "white" else np.zeros(3)
    first = np.clip(np.asarray(COLOURS[colour]) + shade, 0.03, 1.0)
    dark = rng.random() < 0.5
    if colour == "white":
        second = np.full(3, rng.uniform(0.2, 0.35))
    elif dark:
        second = first * rng.uniform(0.25, 0.4)
    else:
        second = 0.25 * first + 0.75
    tilt = rng.uniform(-0.25, 0.25, 2)
    axis = np.array([1.0, tilt[0], tilt[1]])
    axis /= np.sqrt((axis * axis).sum())
    return Thing(
        kind=kind,
        size=float(rng.uniform(0.33, 0.46)),
        stretch=float(rng.uniform(0.88, 1.15)),
        rgb=_linear(first),
        second=_linear(second),
        pattern=pattern,
        pattern_axis=(float(axis[0]), float(axis[1]), float(axis[2])),
        period=float(rng.uniform(0.55, 0.85)),
        phase=float(rng.random()),
        gloss=float(rng.uniform(0.0, 0.35)),
    )


def _muted(rng: np.random.Generator, saturation: float, low: float, high: float) -> Vector:
    """A colour of little saturation, linear."""
    value = rng.uniform(low, high)
    return _linear(value * (1 - saturation * rng.random(3)))


def _linear(srgb: Any) -> Vector:
    # Squares stand for sRGB's curve: exact in every processor's arithmetic, as powers are not.
    red, green, blue = (float(value) ** 2 for value in srgb)
    return red, green, blue
