"""Roll-outs of a scene in MuJoCo: where every object is in each frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sla.data.study.scene import MOTIONS, ROLLERS, Scene, Thing, verb_of

Floats = NDArray[np.float64]

FRAMES = 32
FPS = 16
_STEPS = 30  # of the simulation per frame
_SEEN, _UNSEEN = 0, 1  # geom groups: what rays see; the floor is drawn without them


class StudyError(RuntimeError):
    """The study set cannot be made or read as asked; the message says what to do."""


def load_mujoco() -> Any:
    """The module.

    Raises:
        StudyError: it is not installed.
    """
    try:
        import mujoco
    except ImportError:
        raise StudyError(
            "the study set needs MuJoCo: pip install 'sla-reproduction[study]'"
        ) from None
    return mujoco


@dataclass(frozen=True)
class Rollout:
    """A simulated scene.

    Attributes:
        model, data: MuJoCo's, for casting rays.
        qpos: float64 (FRAMES, nq): the state of each frame.
        place: float64 (FRAMES, 3): centre of the main object, metres.
        turn: float64 (FRAMES, 3, 3): its orientation; columns are its axes.
        other_place: the same of the second object, or None.
        touch: first frame in which the two touch, or None.
        owner: int (ngeom,): whose geom it is, see `MAIN`.
    """

    model: Any
    data: Any
    qpos: Floats
    place: Floats
    turn: Floats
    other_place: Floats | None
    touch: int | None
    owner: NDArray[np.int64]


MAIN, OTHER, PROP = 0, 1, 2  # the object, the second one, and what belongs to the motion


@dataclass
class _Shape:
    """Geoms of an object whose centre is the origin, and how far below the centre it ends."""

    geoms: list[str] = field(default_factory=list)
    meshes: list[str] = field(default_factory=list)
    bottom: float = 0.0


def _text(values: Any) -> str:
    return " ".join(f"{float(value):.9g}" for value in np.ravel(values))


def _mesh(shape: _Shape, name: str, vertices: Any, faces: Any = None) -> None:
    """A geom of triangles; without faces, the convex hull of the vertices."""
    listed = "" if faces is None else f' face="{" ".join(map(str, np.ravel(faces)))}"'
    shape.meshes.append(
        f'<mesh name="{name}" inertia="convex" vertex="{_text(vertices)}"{listed}/>'
    )
    shape.geoms.append(f'type="mesh" mesh="{name}"')


def _circle(count: int, radius: float, z: float) -> list[tuple[float, float, float]]:
    angles = [2 * math.pi * k / count for k in range(count)]
    return [(radius * math.cos(a), radius * math.sin(a), z) for a in angles]


def _torus(large: float, small: float, around: int = 36, across: int = 12) -> tuple[Any, Any]:
    vertices = []
    for i in range(around):
        a = 2 * math.pi * i / around
        for j in range(across):
            b = 2 * math.pi * j / across
            reach = large + small * math.cos(b)
            vertices.append((reach * math.cos(a), reach * math.sin(a), small * math.sin(b)))
    faces = []
    for i in range(around):
        for j in range(across):
            k, m = (i + 1) % around, (j + 1) % across
            p, q = i * across + j, k * across + j
            r, s = k * across + m, i * across + m
            faces += [(p, q, r), (p, r, s)]
    return vertices, faces


def _star(outer: float, inner: float, half: float) -> tuple[Any, Any]:
    """A five-pointed star, upright in the xz plane, `2 * half` thick along y."""
    points = []
    for k in range(10):
        radius = outer if k % 2 == 0 else inner
        angle = math.pi / 2 + math.pi * k / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    vertices = [(x, -half, z) for x, z in points] + [(x, half, z) for x, z in points]
    vertices += [(0.0, -half, 0.0), (0.0, half, 0.0)]
    faces = []
    for k in range(10):
        n = (k + 1) % 10
        faces += [(20, k, n), (21, 10 + n, 10 + k), (k, 10 + k, 10 + n), (k, 10 + n, n)]
    return vertices, faces


def _shape(thing: Thing, name: str, tall: bool, lying: bool) -> _Shape:
    """The object standing upright; `tall` for one that can topple, `lying` on its side."""
    s, kind = thing.size, thing.kind
    shape = _Shape()
    geoms = shape.geoms
    if kind == "ball":
        geoms.append(f'type="sphere" size="{s:.9g}"')
        shape.bottom = s
    elif kind == "cube":
        half = 0.82 * s
        geoms.append(f'type="box" size="{_text([half] * 3)}"')
        shape.bottom = half
    elif kind == "brick":
        sides = [0.45 * s, 0.5 * s, 1.25 * s] if tall else [1.3 * s, 0.6 * s, 0.5 * s]
        sides[0] *= thing.stretch
        geoms.append(f'type="box" size="{_text(sides)}"')
        shape.bottom = sides[2]
    elif kind == "cylinder":
        half = (1.35 if tall else 0.95) * s * thing.stretch
        radius = (0.45 if tall else 0.68) * s
        geoms.append(f'type="cylinder" size="{_text([radius, half])}"')
        shape.bottom = radius if lying else half
    elif kind == "cone":
        radius, half = (0.5 * s, 1.3 * s) if tall else (0.8 * s, 0.95 * s * thing.stretch)
        # The centre is that of mass, a quarter of the height up.
        _mesh(shape, name, [*_circle(32, radius, -half / 2), (0.0, 0.0, 1.5 * half)])
        shape.bottom = half / 2
    elif kind == "pyramid":
        half = 0.95 * s * thing.stretch
        base = 0.92 * s
        corners = [(x * base, y * base, -half / 2) for x, y in _SQUARE]
        _mesh(shape, name, [*corners, (0.0, 0.0, 1.5 * half)])
        shape.bottom = half / 2
    elif kind == "ring":
        large, small = 0.8 * s, 0.28 * s
        _mesh(shape, name, *_torus(large, small))
        shape.bottom = large + small if lying else small
    elif kind == "star":
        outer = 1.2 * s
        _mesh(shape, name, *_star(outer, 0.5 * outer, 0.25 * s))
        shape.bottom = outer * math.cos(math.pi / 5)
    elif kind == "cross":
        arm, half = 1.05 * s, 0.34 * s
        geoms.append(f'type="box" size="{_text([half, half, arm])}"')
        geoms.append(f'type="box" size="{_text([arm, half, half])}"')
        shape.bottom = arm
    elif kind == "dumbbell":
        reach, radius = 0.75 * s * thing.stretch, 0.48 * s
        geoms += [f'type="sphere" size="{radius:.9g}" pos="0 0 {z:.9g}"' for z in (-reach, reach)]
        geoms.append(f'type="cylinder" size="{_text([0.2 * s, reach])}"')
        shape.bottom = radius if lying else reach + radius
    elif kind == "pill":
        radius, half = 0.5 * s, 0.65 * s * thing.stretch
        geoms.append(f'type="capsule" size="{_text([radius, half])}"')
        shape.bottom = radius if lying else half + radius
    elif kind == "mushroom":
        dome = [
            (x, y, z)
            for k in range(6)
            for x, y, z in _circle(
                24, s * math.cos(k * math.pi / 12), s * (0.1 + 0.75 * math.sin(k * math.pi / 12))
            )
        ]
        _mesh(shape, name, [*dome, (0.0, 0.0, 0.85 * s)])
        geoms.append(f'type="cylinder" size="{_text([0.3 * s, 0.5 * s])}" pos="0 0 {-0.3 * s:.9g}"')
        shape.bottom = 0.8 * s
    elif kind == "table":
        top, leg = 0.1 * s, 0.5 * s
        sides = [1.1 * s, 0.75 * s]
        geoms.append(f'type="box" size="{_text([*sides, top])}" pos="0 0 {0.5 * s:.9g}"')
        for x, y in _SQUARE:
            place = [x * (sides[0] - 0.12 * s), y * (sides[1] - 0.12 * s), -0.1 * s]
            geoms.append(f'type="box" size="{_text([top, top, leg])}" pos="{_text(place)}"')
        shape.bottom = 0.6 * s
    else:
        raise ValueError(f"no object {kind!r}")
    return shape


_SQUARE = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def _turned(axis: str, angle: float) -> Floats:
    """Quaternion (w, x, y, z) of a turn about an axis."""
    quat = np.zeros(4)
    quat[0] = math.cos(angle / 2)
    quat["xyz".index(axis) + 1] = math.sin(angle / 2)
    return quat


def _after(second: Floats, first: Floats) -> Floats:
    """Quaternion of one turn after another."""
    w1, x1, y1, z1 = second.tolist()
    w2, x2, y2, z2 = first.tolist()
    return np.array(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ]
    )


@dataclass
class _Start:
    """How a motion begins, and the contact that it needs.

    Attributes:
        place, turn: of the object's centre; a quaternion.
        velocity: metres a second. spin: radians a second about x, y, z of the object.
        gravity: metres a second squared, downwards.
        friction: sliding; solref: MuJoCo's stiffness and damping of contacts.
        joint: `free`, `spin` (about a fixed vertical axis) or `swing` (on a rod).
        rod: length.
        ramp: (height, run, direction) or None.
        other: place of the second object.
    """

    place: list[float]
    turn: Floats
    velocity: tuple[float, float, float] = (0.0, 0.0, 0.0)
    spin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gravity: float = 9.81
    friction: float = 0.8
    solref: str = "0.01 1"
    joint: str = "free"
    rod: float = 0.0
    ramp: tuple[float, float, int] | None = None
    other: tuple[float, float] = (0.0, 0.0)


def _between(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


def _lies(thing: Thing, motion: str) -> bool:
    """Whether the object is on its side: to roll, or because upright it would not stay."""
    rolls = verb_of(thing.kind) == "rolls"
    if motion.split("_")[0] in ("roll", "approach", "recede", "ramp", "hit") and rolls:
        return thing.kind != "ball"
    if thing.kind == "ring":
        return motion in ("spin", "swing", "arc_left", "arc_right", "float_up")
    return thing.kind in ("pill", "dumbbell") and motion in ("still", "drop", "bounce")


def _start(scene: Scene, bottom: float, lying: bool) -> _Start:
    name, u = scene.words.motion, scene.u
    kind = scene.thing.kind
    direction = MOTIONS[name].direction
    # Flat things are turned a little only: from their edge they would not be known.
    facing = 0.5 if kind in ("star", "cross", "ring") else math.pi
    yaw = _turned("z", _between(u[0], -facing, facing))
    side = 1.0 if u[1] < 0.5 else -1.0
    # Of its axis along z, an object on its side has it along x, or along y to roll along x.
    flat = _turned("y", math.pi / 2) if lying and kind != "ring" else _turned("x", 0.0)
    if lying and kind == "ring":
        flat = _turned("x", math.pi / 2)
    turn = _after(yaw, flat)
    at = [_between(u[2], -0.4, 0.4), _between(u[3], -0.4, 0.4), bottom + 0.001]
    start = _Start(at, turn)
    behind = side * _between(u[4], 0.75, 1.15), _between(u[5], 0.5, 1.2)
    start.other = (at[0] + behind[0], at[1] + behind[1])
    group = name.split("_")[0]
    rolls = kind in ROLLERS
    if group in ("roll", "slide", "hit", "approach", "recede"):
        slant = _between(u[6], -0.45, 0.45)
        way = _between(u[7], 1.3, 1.9)
        along = {"approach": -math.pi / 2, "recede": math.pi / 2}.get(group)
        if along is None:
            if group == "hit":
                slant *= 0.25
                way = _between(u[7], 2.2, 3.0)
            heading = slant if direction > 0 else math.pi - slant
        else:
            heading = along + 0.5 * slant
            way = _between(u[7], 2.0, 2.6)
        run = way / 2 if group != "hit" else 1.05
        x, y = math.cos(heading), math.sin(heading)
        middle = (0.3 * at[0], at[1] if along is None else 0.3)
        start.place = [middle[0] - run * x, middle[1] - run * y, at[2]]
        speed = way / ((FRAMES - 1) / FPS)
        start.velocity = (speed * x, speed * y, 0.0)
        start.friction = 0.9 if rolls else 1e-4
        if rolls:
            # The axis of rolling across the way; the pattern anywhere along it.
            own = _turned("z", 2 * math.pi * u[8])
            across = _after(_turned("z", heading), _turned("x", math.pi / 2))
            start.turn = _after(across, own)
        if along is not None or group == "slide":
            where = heading + math.pi / 2 if y * side > 0 else heading - math.pi / 2
            start.other = (1.1 * math.cos(where), abs(1.1 * math.sin(where)) + 0.3)
        if group == "hit":
            start.other = (0.1 * x, middle[1] + 0.1 * y)
            start.solref = "-4000 -40"
    elif name in ("bounce", "drop"):
        start.place[2] = bottom + _between(u[6], 1.0, 1.5)
        # A corner that comes down first throws the object about: next to none.
        tip = _turned("x", _between(u[7], -0.04, 0.04))
        start.turn = _after(tip, start.turn)
        if name == "bounce":
            start.solref = f"-9000 -{_between(u[8], 9.0, 16.0):.6g}"
            start.friction = 0.3
    elif name == "spin":
        start.joint = "spin"
        start.spin = (0.0, 0.0, side * _between(u[6], 2.8, 5.5))
    elif name == "swing":
        start.joint = "swing"
        start.rod = _between(u[6], 1.0, 1.25)
        # The pivot is the place; as much above the floor as the rod is long, and some.
        start.place = [0.6 * at[0], at[1], start.rod + bottom + _between(u[7], 0.1, 0.35)]
        start.turn = _turned("y", side * _between(u[8], 0.55, 0.85))
    elif name == "topple":
        start.turn = _after(_turned("y", side * _between(u[6], 0.03, 0.1)), turn)
        # About the edge that it stands on, not about its centre.
        start.spin = (0.0, side * _between(u[7], 2.4, 3.2), 0.0)
        start.velocity = (start.spin[1] * bottom, 0.0, 0.0)
        start.place[0] = -side * 0.45 + 0.3 * at[0]
    elif group == "arc":
        last = _between(u[6], 1.5, 1.9)
        start.gravity = _between(u[7], 2.8, 3.6)
        start.place = [-direction * _between(u[8], 0.85, 1.1), 0.6 * at[1], bottom + 0.05]
        start.velocity = (-2 * start.place[0] / last, 0.0, start.gravity * last / 2)
        start.spin = tuple((6 * (np.asarray(u[9:12]) - 0.5)).tolist())
        start.solref = "0.02 1"
    elif name == "float_up":
        start.gravity = 0.0
        start.place[2] = bottom + _between(u[6], 0.02, 0.15)
        start.velocity = (0.0, 0.0, _between(u[7], 0.5, 0.7))
        start.spin = tuple((1.6 * (np.asarray(u[9:12]) - 0.5)).tolist())
    elif group == "ramp":
        slope = _between(u[6], 0.36, 0.5)
        run = 1.9
        start.ramp = (run * math.tan(slope), run, direction)
        middle_x = -0.15 * direction
        top = middle_x - direction * run / 2
        along_x = _between(u[7], 0.32, 0.5)
        on = [top + direction * along_x, 0.2 * at[1], (run - along_x) * math.tan(slope)]
        lift = bottom + 0.002
        start.place = [
            on[0] + direction * lift * math.sin(slope),
            on[1],
            on[2] + lift * math.cos(slope),
        ]
        tilt = _turned("y", direction * slope)
        start.friction = 0.9 if rolls else 0.02
        start.gravity = _between(u[8], 3.5, 5.0)
        if rolls:
            across = _after(_turned("x", math.pi / 2), _turned("z", 2 * math.pi * u[9]))
            start.turn = across
        else:
            small = _turned("z", _between(u[0], -0.3, 0.3))
            start.turn = _after(tilt, _after(small, flat))
    return start


def simulate(scene: Scene) -> Rollout:
    """Runs a scene for `FRAMES` frames of 1 / `FPS` seconds; frame 0 is the start.

    Raises:
        StudyError: MuJoCo is missing.
    """
    mujoco = load_mujoco()
    motion = scene.words.motion
    lying = _lies(scene.thing, motion)
    shape = _shape(scene.thing, "main", tall=motion == "topple", lying=lying)
    start = _start(scene, shape.bottom, lying)
    meshes, bodies = list(shape.meshes), []
    contact = f'priority="2" friction="{start.friction:.6g}" solref="{start.solref}"'
    body = "".join(f'<geom group="{_SEEN}" {contact} {geom}/>' for geom in shape.geoms)
    if start.joint == "swing":
        rod = f'<geom name="rod" group="{_SEEN}" type="capsule" size="0.025" contype="0" '
        rod += f'conaffinity="0" fromto="0 0 0 0 0 {-start.rod:.9g}"/>'
        bodies.append(
            f'<body pos="{_text(start.place)}"><joint name="main" type="hinge" axis="0 1 0"/>{rod}'
            f'<body name="main" pos="0 0 {-start.rod:.9g}" quat="{_text(_yaw(scene, lying))}">'
            f"{body}</body></body>"
        )
    else:
        joint = {
            "free": '<freejoint name="main"/>',
            "spin": '<joint name="main" type="hinge" axis="0 0 1"/>',
        }[start.joint]
        turn = start.turn
        if start.joint == "spin":  # the axis is the body's: its geoms are turned in it
            bodies.append(
                f'<body pos="{_text(start.place)}">{joint}'
                f'<body name="main" quat="{_text(turn)}">{body}</body></body>'
            )
        else:
            bodies.append(
                f'<body name="main" pos="{_text(start.place)}" quat="{_text(turn)}">'
                f"{joint}{body}</body>"
            )
    if start.ramp is not None:
        height, run, direction = start.ramp
        middle, half = -0.15 * direction, 0.75
        high, low = middle - direction * run / 2, middle + direction * run / 2
        corners = [(x, y, 0.0) for x in (high, low) for y in (-half, half)]
        wedge = _Shape()
        _mesh(wedge, "ramp", [*corners, (high, -half, height), (high, half, height)])
        meshes += wedge.meshes
        bodies.append(f'<geom name="ramp" group="{_SEEN}" friction="0.001" {wedge.geoms[0]}/>')
    if scene.other is not None:
        lies = scene.other.kind in ("pill", "dumbbell")
        second = _shape(scene.other, "other", tall=False, lying=lies)
        meshes += second.meshes
        place = [*start.other, second.bottom + 0.001]
        yaw = _turned("z", _between(scene.u[12], -0.6, 0.6))
        turn = _after(yaw, _turned("y", math.pi / 2) if lies else _turned("x", 0.0))
        # One that is hit gives way; one that stands by stays.
        density, friction = (300, 0.2) if motion.startswith("hit") else (1000, 0.6)
        inner = "".join(
            f'<geom group="{_SEEN}" priority="1" density="{density}" condim="6" '
            f'friction="{friction} 0.02 0.005" {geom}/>'
            for geom in second.geoms
        )
        bodies.append(
            f'<body name="other" pos="{_text(place)}" quat="{_text(turn)}">'
            f"<freejoint/>{inner}</body>"
        )
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><option timestep="{1 / (FPS * _STEPS):.17g}" gravity="0 0 {-start.gravity:.9g}"'
        ' cone="elliptic" impratio="10"/>'
        f"<asset>{''.join(meshes)}</asset><worldbody>"
        f'<geom name="floor" group="{_UNSEEN}" type="plane" size="30 30 1" friction="0.001"/>'
        f"{''.join(bodies)}</worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    joint_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, "main")
    at = model.jnt_dofadr[joint_id]
    if start.joint == "swing":
        data.qpos[model.jnt_qposadr[joint_id]] = _hinge_angle(start.turn)
    elif start.joint == "spin":
        data.qvel[at] = start.spin[2]
    else:
        data.qvel[at : at + 3] = start.velocity
        data.qvel[at + 3 : at + 6] = _spin(scene, start, shape.bottom)
    return _run(mujoco, model, data)


def _yaw(scene: Scene, lying: bool) -> Floats:
    facing = 0.5 if scene.thing.kind in ("star", "cross", "ring") else math.pi
    stand = _turned("x", math.pi / 2) if lying else _turned("x", 0.0)
    return _after(_turned("z", _between(scene.u[0], -facing, facing)), stand)


def _hinge_angle(turn: Floats) -> float:
    return 2 * math.atan2(float(turn[2]), float(turn[0]))


def _spin(scene: Scene, start: _Start, radius: float) -> Floats:
    """Angular velocity in the object's own axes."""
    spin = np.asarray(start.spin, dtype=np.float64)
    group = scene.words.motion.split("_")[0]
    rolling = scene.thing.kind in ROLLERS and group in ("roll", "approach", "recede", "hit")
    if not rolling and group != "topple":
        return spin
    if rolling:  # as fast as the floor passes below
        vx, vy, _ = start.velocity
        spin = np.array([-vy / radius, vx / radius, 0.0])
    w, x, y, z = start.turn.tolist()
    matrix = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return np.einsum("ij,i->j", matrix, spin)


def _run(mujoco: Any, model: Any, data: Any) -> Rollout:
    names = mujoco.mjtObj.mjOBJ_BODY
    main = mujoco.mj_name2id(model, names, "main")
    other = mujoco.mj_name2id(model, names, "other")
    owner = np.full(model.ngeom, PROP)
    owner[model.geom_bodyid == main] = MAIN
    if other >= 0:
        owner[model.geom_bodyid == other] = OTHER
    qpos, place, turn, second = [], [], [], []
    touch = None
    mujoco.mj_forward(model, data)
    for frame in range(FRAMES):
        if frame:
            for _ in range(_STEPS):
                mujoco.mj_step(model, data)
                if touch is None and other >= 0 and data.ncon:
                    pairs = np.sort(owner[data.contact.geom], axis=1)
                    if ((pairs[:, 0] == MAIN) & (pairs[:, 1] == OTHER)).any():
                        touch = frame
            mujoco.mj_kinematics(model, data)
        qpos.append(data.qpos.copy())
        place.append(data.xpos[main].copy())
        turn.append(data.xmat[main].reshape(3, 3).copy())
        if other >= 0:
            second.append(data.xpos[other].copy())
    return Rollout(
        model=model,
        data=data,
        qpos=np.stack(qpos),
        place=np.stack(place),
        turn=np.stack(turn),
        other_place=np.stack(second) if second else None,
        touch=touch,
        owner=owner,
    )
