"""Pictures of a roll-out: rays cast by MuJoCo, shaded here.

MuJoCo's own renderer wants OpenGL; casting rays wants a processor alone, and gives the same pixels
on any machine. Four rays a pixel, one lamp with shadows, highlights, procedural textures. The
arithmetic keeps to operations that every processor rounds alike (no powers, exponentials or BLAS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sla.data.study.physics import MAIN, OTHER, Rollout, load_mujoco
from sla.data.study.scene import Scene, Thing, Vector

Floats = NDArray[np.float64]
Single = NDArray[np.float32]

SIZE = 64  # pixels, height and width
_FIELD = 0.80  # radians, vertical and horizontal
# Places of a pixel's rays: no two in one row or column, so that edges near to either are smooth.
_WITHIN = ((0.375, 0.125), (0.875, 0.375), (0.125, 0.625), (0.625, 0.875))
_TEXELS, _LEVELS = 256, 6
_EXTENT = 6.0  # metres after which the floor repeats
_SHADOW_REACH = 4.5  # metres from the middle beyond which shadows are not looked for


@dataclass(frozen=True)
class Rendering:
    """Pictures of a clip and what each pixel shows.

    Attributes:
        frames: uint8 (T, SIZE, SIZE, 3), RGB.
        share: uint8 (T, 2, SIZE, SIZE): how many of a pixel's 4 rays meet the main and the second
            object.
    """

    frames: NDArray[np.uint8]
    share: NDArray[np.uint8]


def camera_at(scene: Scene, u: float) -> tuple[Floats, Floats]:
    """The camera at a time in [0, 1].

    Returns:
        float64 (3,) its place; float64 (3, 3) rows: right, up, and where it looks.
    """
    move, _, side = scene.words.camera.partition("_")
    sign = {"left": -1.0, "right": 1.0}.get(side, 0.0)
    azimuth, distance, turn = scene.azimuth, scene.distance, 0.0
    if move == "circle":
        azimuth += sign * scene.sweep * (u - 0.5)
    elif move == "pan":
        turn = -sign * scene.sweep * (u - 0.5)  # anticlockwise as seen from above
    elif move in ("closer", "back"):
        near, far = 1.25 * distance * scene.sweep, 1.25 * distance
        distance = far + (near - far) * (u if move == "closer" else 1 - u)
    # At azimuth 0 the camera stands at -y; a larger one moves it to its right.
    flat = math.cos(scene.elevation)
    back = np.array(
        [
            math.sin(azimuth) * flat,
            -math.cos(azimuth) * flat,
            math.sin(scene.elevation),
        ]
    )
    place = np.asarray(scene.target) + distance * back
    place[2] = max(place[2], 0.25)
    x, y, z = (-back).tolist()
    c, s = math.cos(turn), math.sin(turn)
    look = np.array([c * x - s * y, s * x + c * y, z])
    length = math.sqrt(look[0] ** 2 + look[1] ** 2)
    right = np.array([look[1] / length, -look[0] / length, 0.0])
    up = np.array(
        [
            right[1] * look[2],
            -right[0] * look[2],
            right[0] * look[1] - right[1] * look[0],
        ]
    )
    return place, np.stack([right, up, look])


def project(place: Floats, axes: Floats, point: Floats) -> tuple[float, float]:
    """(column, row) in pixels of a point in front of the camera."""
    offset = point - place
    right, up, depth = (float((axis * offset).sum()) for axis in axes)
    scale = SIZE / 2 / math.tan(_FIELD / 2) / max(depth, 1e-6)
    return SIZE / 2 + right * scale, SIZE / 2 - up * scale


def render(scene: Scene, rollout: Rollout) -> Rendering:
    """Draws every frame of a roll-out."""
    return _Painter(scene, rollout).all()


class _Painter:
    def __init__(self, scene: Scene, rollout: Rollout) -> None:
        self.scene = scene
        self.rollout = rollout
        self.mujoco = load_mujoco()
        self.texture, self.first = _floor(scene)
        steps = np.arange(SIZE)
        tangent = math.tan(_FIELD / 2)
        across = [(steps + dx) * (2 / SIZE) - 1 for dx, _ in _WITHIN]
        down = [1 - (steps + dy) * (2 / SIZE) for _, dy in _WITHIN]
        # (SIZE, SIZE, 4): a pixel's rays lie side by side.
        self.x = tangent * np.stack([np.broadcast_to(a, (SIZE, SIZE)) for a in across], axis=-1)
        self.y = tangent * np.stack(
            [np.broadcast_to(d[:, None], (SIZE, SIZE)) for d in down], axis=-1
        )
        self.length = np.sqrt(1 + self.x * self.x + self.y * self.y)
        self.rays = SIZE * SIZE * len(_WITHIN)
        self.bodies = [self._body("main"), self._body("other")]
        self.seen = np.flatnonzero(rollout.model.geom_group == 0)

    def _body(self, name: str) -> int:
        kind = self.mujoco.mjtObj.mjOBJ_BODY
        return int(self.mujoco.mj_name2id(self.rollout.model, kind, name))

    def all(self) -> Rendering:
        count = len(self.rollout.qpos)
        frames = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
        share = np.empty((count, 2, SIZE, SIZE), dtype=np.uint8)
        for k in range(count):
            frames[k], share[k] = self.frame(k, k / max(1, count - 1))
        return Rendering(frames, share)

    def _cast(self, origin: Floats, rays: Floats) -> tuple[NDArray[np.int32], Floats, Floats]:
        """Geom (-1 for none), distance and normal of what unit rays float64 (n, 3) meet."""
        count = len(rays)
        geom = np.empty(count, dtype=np.int32)
        distance = np.empty(count)
        normal = np.empty(3 * count)
        groups = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)
        self.mujoco.mj_multiRay(
            *(self.rollout.model, self.rollout.data, origin, rays.ravel(), groups, 1, -1),
            *(geom, distance, normal, count, 1e6),
        )
        return geom, distance, normal.reshape(count, 3)

    def _pixels(self, place: Floats, axes: Floats) -> NDArray[np.int64]:
        """Rays that can meet anything: those through the boxes around the geoms."""
        tangent = math.tan(_FIELD / 2)
        near = np.zeros((SIZE, SIZE), dtype=bool)
        for geom in self.seen.tolist():
            offset = self.rollout.data.geom_xpos[geom] - place
            radius = float(self.rollout.model.geom_rbound[geom])
            x, y, z = (float((axis * offset).sum()) for axis in axes)
            if z + radius <= 0:
                continue
            if z - radius < 1e-3:
                near[:] = True
                break
            spans = []
            for middle in (x, -y):
                ends = [
                    (middle + way * radius) / (z + depth * radius)
                    for way in (-1, 1)
                    for depth in (-1, 1)
                ]
                low, high = (min(ends) / tangent + 1) / 2, (max(ends) / tangent + 1) / 2
                low, high = max(0.0, low * SIZE - 1), max(0.0, high * SIZE + 1)
                spans.append(slice(int(min(low, SIZE)), int(min(high, SIZE)) + 1))
            near[spans[1], spans[0]] = True
        return np.flatnonzero(np.repeat(near.ravel(), len(_WITHIN)))

    def _shaded(self, lamp: Floats, rays: Floats) -> NDArray[np.int64]:
        """Rays float64 (n, 3) from the lamp that can meet anything."""
        near = np.zeros(len(rays), dtype=bool)
        for geom in self.seen.tolist():
            offset = self.rollout.data.geom_xpos[geom] - lamp
            radius = float(self.rollout.model.geom_rbound[geom])
            x, y, z = offset.tolist()
            along = rays[:, 0] * x + rays[:, 1] * y + rays[:, 2] * z
            near |= float((offset * offset).sum()) - along * along < 1.01 * radius * radius
        return np.flatnonzero(near)

    def frame(self, k: int, u: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        scene, rollout = self.scene, self.rollout
        rollout.data.qpos[:] = rollout.qpos[k]
        self.mujoco.mj_kinematics(rollout.model, rollout.data)
        place, axes = camera_at(scene, u)
        right, up, look = axes
        rays = np.empty((self.rays, 3))
        for i in range(3):
            ray = (look[i] + self.x * right[i] + self.y * up[i]) / self.length
            rays[:, i] = ray.ravel()
        cast = self._pixels(place, axes)
        geom, distance, normal = self._cast(place, rays[cast])
        met = np.flatnonzero(geom >= 0)
        hit, geom, distance, normal = cast[met], geom[met], distance[met], normal[met]
        down = rays[:, 2]
        empty = down < -1e-3
        empty[hit] = False
        floor = np.flatnonzero(empty)
        linear = np.empty((self.rays, 3), dtype=np.float32)
        # Above the horizon, and what the floor fades into.
        blend = np.clip(down * 2.2, 0, 1).astype(np.float32)[:, None]
        horizon = np.asarray(scene.horizon, dtype=np.float32)
        linear[:] = horizon + blend * (np.asarray(scene.zenith, dtype=np.float32) - horizon)

        reach = -place[2] / down[floor]
        points = np.concatenate(
            [
                place + rays[floor] * reach[:, None],
                place + rays[hit] * distance[:, None],
            ]
        )
        normals = np.zeros((len(points), 3), dtype=np.float32)
        normals[: len(floor), 2] = 1
        normals[len(floor) :] = normal
        albedo = np.empty((len(points), 3), dtype=np.float32)
        albedo[: len(floor)] = self._floor_colour(points[: len(floor)], reach, down[floor])
        gloss = np.zeros(len(points), dtype=np.float32)
        owner = rollout.owner[geom]
        self._object_colours(albedo[len(floor) :], gloss[len(floor) :], points[len(floor) :], owner)
        views = np.concatenate([rays[floor], rays[hit]]).astype(np.float32)
        lit = self._light(points, normals, albedo, gloss, views)
        fade = (reach / 9.0).astype(np.float32)
        fade = (1 / (1 + fade * fade * fade))[:, None]
        linear[floor] = horizon + fade * (lit[: len(floor)] - horizon)
        linear[hit] = lit[len(floor) :]

        grid = np.clip(linear, 0, 1).reshape(SIZE, SIZE, len(_WITHIN), 3)
        mean = 0.25 * (grid[:, :, 0] + grid[:, :, 1] + grid[:, :, 2] + grid[:, :, 3])
        picture = np.rint(np.sqrt(mean) * np.float32(255)).astype(np.uint8)
        whose = np.full(self.rays, -1)
        whose[hit] = owner
        split = whose.reshape(SIZE, SIZE, len(_WITHIN))
        share = np.stack([(split == who).sum(-1) for who in (MAIN, OTHER)]).astype(np.uint8)
        return picture, share

    def _floor_colour(self, points: Floats, reach: Floats, down: Floats) -> Single:
        c, s = math.cos(self.scene.floor_angle), math.sin(self.scene.floor_angle)
        x = (c * points[:, 0] + s * points[:, 1]) * (_TEXELS / _EXTENT)
        y = (c * points[:, 1] - s * points[:, 0]) * (_TEXELS / _EXTENT)
        # How much floor a ray stands for, in texels; seen flatly it is more.
        ray = 2 * math.tan(_FIELD / 2) / SIZE / 2
        texels = reach * (ray * _TEXELS / _EXTENT) / np.sqrt(-down)
        level = np.searchsorted(1.5 * 2.0 ** np.arange(_LEVELS - 1), texels)
        side = _TEXELS >> level
        scaled = 2.0**-level
        column = np.floor(x * scaled).astype(np.int64) & (side - 1)
        row = np.floor(y * scaled).astype(np.int64) & (side - 1)
        return self.texture[self.first[level] + row * side + column]

    def _object_colours(
        self, albedo: Single, gloss: Single, points: Floats, owner: NDArray[np.int64]
    ) -> None:
        albedo[:] = (0.22, 0.2, 0.18)  # rods and ramps
        for who, thing in ((MAIN, self.scene.thing), (OTHER, self.scene.other)):
            mine = np.flatnonzero(owner == who)
            if thing is None or not len(mine):
                continue
            offset = points[mine] - self.rollout.data.xpos[self.bodies[who]]
            turn = self.rollout.data.xmat[self.bodies[who]].reshape(3, 3)
            local = [
                offset[:, 0] * turn[0, i] + offset[:, 1] * turn[1, i] + offset[:, 2] * turn[2, i]
                for i in range(3)
            ]
            albedo[mine] = _pattern(thing, local)
            gloss[mine] = thing.gloss

    def _light(
        self, points: Floats, normals: Single, albedo: Single, gloss: Single, views: Single
    ) -> Single:
        lamp = np.asarray(self.scene.light)
        towards = lamp - points
        far = np.sqrt(_dot(towards, towards))
        towards /= far[:, None]
        ray = towards.astype(np.float32)
        facing = np.maximum(_dot(normals, ray), 0)
        near = np.flatnonzero(
            (facing > 0) & (points[:, 0] ** 2 + points[:, 1] ** 2 < _SHADOW_REACH**2)
        )
        rays = -towards[near]
        some = self._shaded(lamp, rays)
        near, rays = near[some], rays[some]
        if len(near):
            geom, distance, _ = self._cast(lamp, rays)
            dark = (geom >= 0) & (distance < far[near] - 0.01)
            facing[near[dark]] = 0
        ambient = np.float32(self.scene.ambient)
        sky = ambient * (np.float32(0.75) + np.float32(0.25) * normals[:, 2])
        shade = sky + (np.float32(1.15) - ambient) * facing
        half = ray - views
        half /= np.sqrt(_dot(half, half))[:, None]
        shine = np.maximum(_dot(half, normals), 0) * (facing > 0)
        for _ in range(5):
            shine = shine * shine
        return albedo * shade[:, None] + (gloss * shine)[:, None]


def _dot(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def _pattern(thing: Thing, local: list[Floats]) -> Single:
    """Linear colours float32 (n, 3) of points in the object's own axes."""
    first = np.asarray(thing.rgb, dtype=np.float32)
    second = np.asarray(thing.second, dtype=np.float32)
    if thing.pattern == "plain":
        return np.broadcast_to(first, (len(local[0]), 3))
    period = thing.period * thing.size
    if thing.pattern == "striped":
        axis = thing.pattern_axis
        along = sum(local[i] * axis[i] for i in range(3)) / period + thing.phase
        other = np.floor(2 * along).astype(np.int64) & 1 == 1
    elif thing.pattern == "checkered":
        cells = sum(np.floor(1.5 * q / period + thing.phase).astype(np.int64) for q in local)
        other = cells & 1 == 1
    else:
        away = np.zeros(len(local[0]))
        for q in local:
            cell = q / (1.2 * period) + thing.phase
            cell = cell - np.floor(cell) - 0.5
            away += cell * cell
        other = away < 0.135
    return np.where(other[:, None], second, first)


# The floor


def _floor(scene: Scene) -> tuple[Single, NDArray[np.int64]]:
    """Texels of all levels, linear float32 (n, 3), each half as fine as the one before; and where
    each level begins."""
    rng = np.random.default_rng(scene.floor_seed)
    texture = _FLOORS[scene.words.floor](rng)
    levels = [texture]
    for _ in range(_LEVELS - 1):
        t = levels[-1]
        levels.append(0.25 * (t[::2, ::2] + t[1::2, ::2] + t[::2, 1::2] + t[1::2, 1::2]))
    sizes = [len(t) ** 2 for t in levels]
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    flat = np.concatenate([t.reshape(-1, 3) for t in levels]).astype(np.float32)
    return flat, first


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """Smooth repeating noise in [0, 1) of so many cells: float64 (_TEXELS, _TEXELS)."""
    values = rng.random((rows, columns))
    for axis, cells in ((0, rows), (1, columns)):
        at = (np.arange(_TEXELS) + 0.5) * (cells / _TEXELS)
        low = np.floor(at).astype(np.int64)
        part = at - low
        part = part * part * (3 - 2 * part)
        part = part[:, None] if axis == 0 else part[None, :]
        first = np.take(values, low % cells, axis=axis)
        values = first + part * (np.take(values, (low + 1) % cells, axis=axis) - first)
    return values


def _tone(rng: np.random.Generator, base: Vector, spread: float = 0.12) -> Floats:
    """A colour near `base` (sRGB), linear."""
    values = np.asarray(base) * (1 + rng.uniform(-spread, spread)) + rng.uniform(-0.03, 0.03, 3)
    return np.clip(values, 0.02, 1) ** 2


def _mix(first: Floats, second: Floats, share: Floats) -> Floats:
    return first + share[..., None] * (second - first)


def _wooden(rng: np.random.Generator) -> Floats:
    planks = int(rng.integers(9, 14))
    rows = np.arange(_TEXELS) * planks
    plank = rows // _TEXELS
    light = rng.uniform(0.65, 1.1, planks)[plank][:, None]
    grain = 0.8 + 0.4 * _noise(rng, 96, 6)
    gap = np.where(rows % _TEXELS < planks, 0.35, 1.0)[:, None]
    tone = _tone(rng, (0.66, 0.50, 0.36))
    return tone * (light * grain * gap)[..., None]


def _checkered(rng: np.random.Generator) -> Floats:
    cells = 2 * int(rng.integers(4, 7))
    index = np.arange(_TEXELS) * cells // _TEXELS
    odd = ((index[:, None] + index[None, :]) & 1).astype(np.float64)
    grey = 0.9 * (1 - 0.25 * rng.random(3))
    light, dark = _tone(rng, (0.8, 0.8, 0.8)) * grey, _tone(rng, (0.36, 0.36, 0.36)) * grey
    return _mix(light, dark, odd) * (0.92 + 0.16 * _noise(rng, 32, 32))[..., None]


def _tiled(rng: np.random.Generator) -> Floats:
    cells = int(rng.integers(6, 11))
    at = np.arange(_TEXELS) * cells
    line = at % _TEXELS < 3 * cells
    lines = (line[:, None] | line[None, :]).astype(np.float64)
    index = at // _TEXELS
    light = rng.uniform(0.88, 1.08, (cells, cells))[index][:, index]
    tone = _tone(rng, (0.70, 0.66, 0.62)) * (1 - 0.3 * rng.random(3))
    return _mix(tone * light[..., None], 0.25 * tone, lines)


def _grassy(rng: np.random.Generator) -> Floats:
    height = 0.45 * _noise(rng, 14, 14) + 0.3 * _noise(rng, 56, 56) + 0.25 * _noise(rng, 128, 128)
    return _mix(_tone(rng, (0.20, 0.30, 0.13)), _tone(rng, (0.48, 0.58, 0.28)), height)


def _sandy(rng: np.random.Generator) -> Floats:
    waves = int(rng.integers(10, 18))
    at = np.arange(_TEXELS)[:, None] * (waves / _TEXELS) + 1.2 * _noise(rng, 5, 5)
    ripple = 2 * np.abs(at - np.floor(at) - 0.5)
    height = 0.6 * ripple + 0.4 * _noise(rng, 90, 90)
    return _mix(_tone(rng, (0.72, 0.62, 0.44)), _tone(rng, (0.86, 0.78, 0.60)), height)


def _concrete(rng: np.random.Generator) -> Floats:
    height = 0.5 * _noise(rng, 6, 6) + 0.3 * _noise(rng, 20, 20) + 0.2 * _noise(rng, 100, 100)
    tone = _tone(rng, (0.55, 0.55, 0.56))
    return _mix(0.55 * tone, 1.25 * tone, height)


_FLOORS = {
    "wooden": _wooden,
    "checkered": _checkered,
    "tiled": _tiled,
    "grassy": _grassy,
    "sandy": _sandy,
    "concrete": _concrete,
}
