"""Draws the scenes of `data/scenes/scenes.py` with numpy: shapes, textures, background, camera.

Every picture, instance mask, depth map and point correspondence comes from `render` and the two
maps `to_scene` and `to_object`, so they agree by construction. The design is ours.

Coordinates: a scene is the unit square, x to the right and y down. An object has its own frame
(u, v), where its outline is the level 1 of a gauge: a function that scales with (u, v), so that 0.7
of a point of the outline is inside. All objects are wider at -v; without that the corners of a
square could not be told apart.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TAPER = 0.25


class Body(NamedTuple):
    """One object: class, pose in the scene, distance, surface."""

    label: int  # row of KINDS
    x: float  # centre
    y: float
    radius: float  # of the circle around it
    angle: float  # radians
    depth: float  # metres
    frequency: float  # of the texture, radians per unit of (u, v)
    phase: tuple[float, float]
    palette: np.ndarray  # (3, 4), see _blend
    texture: int  # row of KINDS whose texture it wears; a distractor's is not its label's


class Background(NamedTuple):
    """Three fields (drift of the colours, patches, grain), each a sum of n plane waves."""

    waves: np.ndarray  # (2, 3, n, 1) radians per unit of the scene
    phase: np.ndarray  # (3, n, 1)
    palette: np.ndarray  # (3, 4), see _blend
    threshold: float  # the patches are where their field is above it
    grain: float  # contrast


class View(NamedTuple):
    """Camera, a similarity transform about the centre of the image, and light."""

    zoom: float = 1.0
    angle: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of red, green, blue
    slope: tuple[float, float] = (0.0, 0.0)  # change of the light across the image


class Rendering(NamedTuple):
    image: np.ndarray  # (3, H, W) uint8
    instance: np.ndarray  # (H, W) uint8, 0 = background, else 1 + number of the body
    depth: np.ndarray  # (H, W) float32, metres


class Kind(NamedTuple):
    """A class of objects."""

    name: str
    shape: Callable  # (u, v) -> gauge
    texture: Callable  # (u, v, gauge, frequency, phase) -> signal; its sign chooses the colour
    cycles: float  # mean frequency of the texture, periods per unit of (u, v)


def _length(u, v):
    return np.sqrt(u * u + v * v)


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v))


def _polygon(u, v, sides):
    turns = [2 * math.pi * k / sides - math.pi / 2 for k in range(sides)]
    planes = [u * math.cos(turn) + v * math.sin(turn) for turn in turns]
    return np.maximum.reduce(planes) / math.cos(math.pi / sides)


def _star(u, v):
    # cos(5 * angle) by Chebyshev's polynomial, as arctan2 is slow on most processors.
    c = u / (_length(u, v) + 1e-6)
    q = c * c
    cos5 = ((16 * q - 20) * q + 5) * c
    return _length(u, v) / (1 - 0.5 * np.sqrt(np.maximum(0.5 - 0.5 * cos5, 0)))


def _cos6(u, v):
    q = u * u / (u * u + v * v + 1e-9)
    return ((32 * q - 48) * q + 18) * q - 1


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u, v / 0.45), np.maximum(v, u / 0.45))


def _checks(u, v, g, w, p):
    return np.sin(w * u + p[0]) * np.sin(w * v + p[1])


def _dots(u, v, g, w, p):
    return np.cos(w * u + p[0]) + np.cos(w * v + p[1]) - 0.7


def _zigzag(u, v, g, w, p):
    return np.sin(w * u + 1.7 * np.sin(w * v + p[1]) + p[0])


def _lattice(u, v, g, w, p):
    return np.maximum(np.cos(w * u + p[0]), np.cos(w * v + p[1])) - 0.6


def _spiral(u, v, g, w, p):
    r = _length(u, v) + 1e-6
    turn = w * r + p[0]
    return (u * np.cos(turn) + v * np.sin(turn)) / r


KINDS = [
    Kind("striped disc", _length, lambda u, v, g, w, p: np.sin(w * u + p[0]), 1.9),
    Kind("checked square", _square, _checks, 1.4),
    Kind("dotted triangle", lambda u, v: _polygon(u, v, 3), _dots, 1.9),
    Kind("ringed star", _star, lambda u, v, g, w, p: np.sin(w * g + p[0]), 2.3),
    Kind("zigzag hexagon", lambda u, v: _polygon(u, v, 6), _zigzag, 1.5),
    Kind(
        "rayed flower",
        lambda u, v: _length(u, v) / (0.8 + 0.2 * _cos6(u, v)),
        lambda u, v, g, w, p: 0.25 * w * g * _cos6(u, v),
        1.5,
    ),
    Kind("latticed cross", _cross, _lattice, 1.7),
    Kind(
        "rimmed diamond",
        lambda u, v: np.abs(u) / 0.62 + np.abs(v),
        lambda u, v, g, w, p: w * (g - 0.62),
        1.5,
    ),
    Kind("spiral ellipse", lambda u, v: _length(u / 0.6, v), _spiral, 1.6),
    Kind(
        "halved arch",
        lambda u, v: np.maximum(_length(u, v), 2.5 * v),
        lambda u, v, g, w, p: w * u,
        1.5,
    ),
]


def outline(label: int, count: int) -> np.ndarray:
    """(count, 2) points (u, v) of the outline of a class, at even angles."""
    angles = np.arange(count) * (2 * math.pi / count) + 0.3
    u, v = np.cos(angles), np.sin(angles)
    return np.stack([u, v], axis=1) / KINDS[label].shape(u, v)[:, None]


def _reach(label):
    u, v = outline(label, 360).T
    return float(np.hypot(u / (1 + TAPER * v), v).max())


REACH = [_reach(label) for label in range(len(KINDS))]  # largest distance from the centre


def to_scene(body: Body, points: np.ndarray) -> np.ndarray:
    """Points (P, 2) of the object's frame as the scene has them."""
    u, v = points[:, 0] / (1 + TAPER * points[:, 1]), points[:, 1]
    unit = body.radius / REACH[body.label]
    c, s = unit * math.cos(body.angle), unit * math.sin(body.angle)
    return np.stack([body.x + c * u - s * v, body.y + s * u + c * v], axis=1)


def to_object(body: Body, points: np.ndarray) -> np.ndarray:
    """The inverse of `to_scene`."""
    return np.stack(_object_frame(body, points[:, 0], points[:, 1]), axis=1)


def _object_frame(body, x, y):
    per_unit = REACH[body.label] / body.radius
    c, s = per_unit * math.cos(body.angle), per_unit * math.sin(body.angle)
    x, y = x - body.x, y - body.y
    v = c * y - s * x
    return (c * x + s * y) * (1 + TAPER * v), v


def seen(body: Body, view: View) -> Body:
    """The body as that camera has it."""
    c, s = view.zoom * math.cos(view.angle), view.zoom * math.sin(view.angle)
    x, y = body.x - 0.5, body.y - 0.5
    return body._replace(
        x=0.5 + c * x - s * y + view.shift[0],
        y=0.5 + s * x + c * y + view.shift[1],
        radius=body.radius * view.zoom,
        angle=body.angle + view.angle,
    )


def render(bodies: list[Body], background: Background, view: View, resolution: int) -> Rendering:
    """Draw a scene at (resolution, resolution); the first body hides the others."""
    canvas, depth = _draw_background(background, view, resolution)
    instance = np.zeros((resolution, resolution), np.uint8)
    for number in reversed(range(len(bodies))):
        _draw_body(seen(bodies[number], view), number + 1, canvas, instance, depth)
    centred = _pixel_centres(0, resolution, resolution) - 0.5
    light = 1 + view.slope[0] * centred + view.slope[1] * centred[:, None]
    canvas *= light * (255 * np.array(view.gain, np.float32)[:, None, None])
    return Rendering(np.clip(canvas, 0, 255).astype(np.uint8), instance, depth)


def _pixel_centres(start, stop, resolution):
    return (np.arange(start, stop, dtype=np.float32) + 0.5) / resolution


def _draw_background(background, view, resolution):
    # A camera turns plane waves into plane waves, and cos(x + y) = cos x cos y - sin x sin y makes
    # their sum a matmul.
    kx, ky = background.waves
    c, s = math.cos(view.angle) / view.zoom, math.sin(view.angle) / view.zoom
    qx, qy = c * kx - s * ky, s * kx + c * ky
    origin = qx * (0.5 + view.shift[0]) + qy * (0.5 + view.shift[1])
    across = _pixel_centres(0, resolution, resolution)
    x = (qx * across + (background.phase + 0.5 * (kx + ky) - origin)).astype(np.float32)
    y = (qy * across).astype(np.float32)
    rows = np.concatenate([np.cos(y), -np.sin(y)], axis=1).transpose(0, 2, 1)
    columns = np.concatenate([np.cos(x), np.sin(x)], axis=1)
    drift, patches, grain = (rows @ columns) * math.sqrt(2 / kx.shape[1])
    tone = np.clip(0.5 + (patches - background.threshold) * (resolution / 20), 0, 1)
    canvas = _blend(background.palette, 0.5 + 0.4 * drift, tone, 1 + background.grain * grain)
    return canvas, 13 - 3 * across[:, None] - 0.6 * tone


def _blend(palette, drift, tone, shade):
    """(3, h, w) colours: at tone 0 and 1 one of two, each of which drifts to another.

    `palette` (3, 4) holds the factors of 1, drift, tone and drift * tone: one matmul for all.
    """
    basis = np.stack([shade, shade * drift, shade * tone, shade * drift * tone])
    return (palette @ basis.reshape(4, -1)).reshape(3, *tone.shape)


def _draw_body(body, number, canvas, instance, depth):
    resolution = len(instance)
    rows, columns = (_span(centre, 1.2 * body.radius, resolution) for centre in (body.y, body.x))
    x = _pixel_centres(columns.start, columns.stop, resolution)
    y = _pixel_centres(rows.start, rows.stop, resolution)[:, None]
    u, v = _object_frame(body, x, y)
    gauge = KINDS[body.label].shape(u, v)
    signal = KINDS[body.texture].texture(u, v, gauge, body.frequency, body.phase)
    pixels = resolution * body.radius / REACH[body.label]  # per unit of (u, v): soft edges
    tone = np.clip(0.5 + signal * (pixels / body.frequency), 0, 1)
    cover = np.clip(0.5 + (1 - gauge) * pixels, 0, 1)
    dome = 1 - gauge * gauge
    colour = _blend(body.palette, 0.5 + 0.5 * u, tone, 0.75 + 0.35 * dome)
    region = canvas[:, rows, columns]
    region *= np.clip(1.5 * gauge - 0.95, 0.55, 1)  # a soft shadow on what is behind
    region += cover * (colour - region)
    inside = cover > 0.5
    np.copyto(instance[rows, columns], number, where=inside)
    np.copyto(depth[rows, columns], body.depth - 0.35 * dome, where=inside)


def _span(centre, reach, resolution):
    start = min(max(int((centre - reach) * resolution), 0), resolution)
    return slice(start, min(max(int((centre + reach) * resolution) + 1, start), resolution))
